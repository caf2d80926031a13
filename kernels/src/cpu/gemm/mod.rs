//! Products with packed weights. Work is cut into blocks of rows × panels; how it is cut never shows in a
//! result, because every element is one chain of its own.

mod coded;
mod expert;
mod inputs;
mod multiplier;
mod tile;
mod tiles;

pub(super) use expert::expert_ffn;
pub(super) use inputs::round_kernel;

use super::detect::Isa;
use super::threads::{Parts, Threads};
use crate::matrix::{Matrix, PANEL};
use crate::ops::MatMul;
use inputs::Rows;
use multiplier::{Multiplier, Room};
use tile::{MAX_PANELS, MAX_ROWS, Panels};

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
    /// What the phase of experts that runs now is cut into.
    pieces: Vec<expert::Piece>,
    /// For each row of results of experts, its row of inputs.
    sources: Vec<u32>,
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

/// Computes one block.
///
/// # Safety
/// Nobody else uses this block's part of `out`.
unsafe fn block(isa: Isa, block: &Block<'_>) {
    let n = block.w.n();
    let mut multiplier = Multiplier::new(isa, block.rows.1 - block.rows.0, &[block.w]);
    let mut room = Room::new();
    let results = room.zeros(multiplier.rows());
    for panel in (block.panels.0..block.panels.1).step_by(MAX_PANELS) {
        let count = MAX_PANELS.min(block.panels.1 - panel);
        let w = panels(block.w, panel);
        let from = panel * PANEL;
        let columns = (count * PANEL).min(n - from);
        for (row, rows) in multiplier.blocks(block.rows) {
            // SAFETY: the rows are prepared for these weights; the panels are in range.
            unsafe { multiplier.product(&block.x, (row, rows), w, count, results) };
            for (r, result) in results.iter_mut().take(rows).enumerate() {
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
