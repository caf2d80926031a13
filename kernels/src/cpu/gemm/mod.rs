//! Products with packed weights. Work is cut into blocks of rows × panels; how it is cut never shows in a
//! result, because every element is one chain of its own.

mod coded;
mod expert;
mod inputs;
mod tile;

pub(super) use expert::expert_ffn;

use super::detect::Isa;
use super::lanes::WIDTH;
use super::threads::{Parts, Threads};
use crate::matrix::{Matrix, PANEL};
use crate::ops::MatMul;
use inputs::Rows;
use tile::{MAX_PANELS, MAX_ROWS, Panels, product};

/// Rows of a block: their inputs should stay in the second-level cache beside the block's panels.
const BLOCK_ROWS: usize = 16 * MAX_ROWS;
/// Multiply-adds below which a product is not worth a second thread.
const SMALL: usize = 1 << 16;

/// Memory kept from call to call.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Prepared inputs.
    inputs: Vec<u32>,
    /// Prepared inner activations of experts.
    inner: Vec<u32>,
}

/// Panels from `first` on.
fn panels(w: &Matrix, first: usize) -> Panels {
    let bytes = w.panel(first);
    Panels {
        dtype: w.dtype(),
        first: bytes.as_ptr(),
        bytes: bytes.len(),
        k: w.k(),
        packing: w.packing(),
    }
}

/// A block of rows × panels of one product.
#[derive(Clone, Copy)]
struct Block<'a> {
    x: Rows<'a>,
    rows: (usize, usize),
    w: &'a Matrix,
    panels: (usize, usize),
    bias: Option<&'a [f32]>,
    /// `rows × w.n()`, counted from row 0 of `x`.
    out: Parts<f32>,
}

/// Products of up to `N` rows × [`MAX_PANELS`] panels.
struct Tile<const N: usize> {
    results: [[f32; MAX_PANELS * WIDTH]; N],
    /// Of groups of inputs that are not over.
    chains: [[f32; MAX_PANELS * WIDTH]; N],
}

impl<const N: usize> Tile<N> {
    const fn new() -> Self {
        Self {
            results: [[0.0; MAX_PANELS * WIDTH]; N],
            chains: [[0.0; MAX_PANELS * WIDTH]; N],
        }
    }

    /// `rows` (at most `N`) rows from `row` on by `count` panels.
    ///
    /// # Safety
    /// The panels exist, and `x` is prepared for their format.
    unsafe fn fill(
        &mut self,
        isa: Isa,
        x: Rows<'_>,
        (row, rows): (usize, usize),
        w: Panels,
        count: usize,
    ) {
        if w.packing.is_some() {
            let x = x.pointers::<N>(row, rows);
            let (out, chains) = (&mut self.results, &mut self.chains);
            // SAFETY: the rows were checked by `pointers`; the panels are the caller's promise.
            return unsafe { coded::product(isa, &x[..rows], w, count, out, chains) };
        }
        for at in (0..rows).step_by(MAX_ROWS) {
            let now = MAX_ROWS.min(rows - at);
            let x = x.pointers::<MAX_ROWS>(row + at, now);
            // SAFETY: as above.
            unsafe { product(isa, &x[..now], w, count, &mut self.results[at..]) };
        }
    }
}

/// Computes one block.
///
/// # Safety
/// Nobody else uses this block's part of `out`.
unsafe fn block(isa: Isa, block: &Block<'_>) {
    let many = block.w.packing().is_some() && block.rows.1 - block.rows.0 > MAX_ROWS;
    // SAFETY: the caller's promise.
    unsafe {
        if many {
            block_by::<BLOCK_ROWS>(isa, block);
        } else {
            block_by::<MAX_ROWS>(isa, block);
        }
    }
}

/// Computes one block, `N` rows at a time.
///
/// # Safety
/// As for [`block`].
unsafe fn block_by<const N: usize>(isa: Isa, block: &Block<'_>) {
    let n = block.w.n();
    let mut tile = Tile::<N>::new();
    for panel in (block.panels.0..block.panels.1).step_by(MAX_PANELS) {
        let count = MAX_PANELS.min(block.panels.1 - panel);
        let w = panels(block.w, panel);
        let from = panel * PANEL;
        let columns = (count * PANEL).min(n - from);
        for row in (block.rows.0..block.rows.1).step_by(N) {
            let rows = N.min(block.rows.1 - row);
            // SAFETY: the panels are in range.
            unsafe { tile.fill(isa, block.x, (row, rows), w, count) };
            for (r, result) in tile.results.iter_mut().take(rows).enumerate() {
                if let Some(bias) = block.bias {
                    for (value, bias) in result.iter_mut().zip(&bias[from..from + columns]) {
                        *value += bias;
                    }
                }
                // SAFETY: this block's rows and columns only.
                let out = unsafe { block.out.slice((row + r) * n + from, columns) };
                out.copy_from_slice(&result[..columns]);
            }
        }
    }
}

/// Panels of a block, a multiple of [`MAX_PANELS`], so that there are several blocks per thread but each
/// has enough to do.
fn panels_per_block(panels: usize, row_blocks: usize, threads: usize) -> usize {
    let blocks = (threads * 6).div_ceil(row_blocks).max(1);
    panels.div_ceil(blocks).div_ceil(MAX_PANELS).clamp(1, 4) * MAX_PANELS
}

/// Runs a checked product.
pub(super) fn matmul(isa: Isa, threads: &Threads, op: MatMul<'_>, scratch: &mut Scratch) {
    let MatMul {
        x,
        rows,
        w,
        bias,
        out,
    } = op;
    let x = inputs::rows(isa, threads, w.dtype(), (x, w.k()), &mut scratch.inputs);
    let out = Parts::of(out);
    let whole = Block {
        x,
        rows: (0, rows),
        w,
        panels: (0, w.panels()),
        bias,
        out,
    };
    if threads.count() == 1 || rows * w.n() * w.k() < SMALL {
        // SAFETY: `out` is borrowed here and used by this call only.
        return unsafe { block(isa, &whole) };
    }
    let row_blocks = rows.div_ceil(BLOCK_ROWS);
    let per_block = panels_per_block(w.panels(), row_blocks, threads.count());
    // Blocks of the same panels follow each other, so that these stay in a cache.
    threads.run(w.panels().div_ceil(per_block) * row_blocks, &|item| {
        let (panel, row) = (
            item / row_blocks * per_block,
            item % row_blocks * BLOCK_ROWS,
        );
        let part = Block {
            rows: (row, rows.min(row + BLOCK_ROWS)),
            panels: (panel, w.panels().min(panel + per_block)),
            ..whole
        };
        // SAFETY: blocks do not overlap.
        unsafe { block(isa, &part) }
    });
}
