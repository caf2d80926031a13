//! Gated feed-forward of many experts at once: two phases, each cut into blocks of one expert's rows and
//! some panels, so that a busy expert is shared by all threads.

use super::tile::{Results, product};
use super::{
    BLOCK_ROWS, Block, MAX_PANELS, MAX_ROWS, Rows, SMALL, block, panels, panels_per_block,
};
use crate::cpu::detect::Isa;
use crate::cpu::exp::silu;
use crate::cpu::lanes::{Lanes, WIDTH, on_path};
use crate::cpu::threads::{Parts, Threads};
use crate::matrix::PANEL;
use crate::ops::{ExpertFfn, ExpertGroup};

/// One piece of a phase.
#[derive(Clone, Copy)]
struct Piece {
    group: usize,
    rows: (usize, usize),
    panels: (usize, usize),
    /// Start of the group's inner activations in the scratch memory.
    inner: usize,
}

/// Some rows × panels of `silu(gate · x) * (up · x)`.
struct Inner<'a> {
    x: Rows<'a>,
    group: &'a ExpertGroup<'a>,
    piece: Piece,
    out: Parts,
}

/// `gates = silu(gates) * ups` over whole tiles.
///
/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
unsafe fn gated_kernel<L: Lanes>(gates: &mut Results, ups: &Results) {
    for (gates, ups) in gates.iter_mut().zip(ups) {
        for p in 0..MAX_PANELS {
            // SAFETY: a row has `MAX_PANELS` vectors; the instructions are the caller's promise.
            unsafe {
                let gate = gates.as_mut_ptr().add(p * WIDTH);
                let up = L::load(ups.as_ptr().add(p * WIDTH));
                silu(L::load(gate)).mul(up).store(gate);
            }
        }
    }
}

on_path! {
    /// The gated activation of a tile.
    fn gated(gates: &mut Results, ups: &Results) = gated_kernel
}

/// Computes one piece of the first phase.
///
/// # Safety
/// Nobody else uses this piece's part of `out`.
unsafe fn inner(isa: Isa, op: &Inner<'_>) {
    let n = op.group.gate.n();
    let mut gates = [[0.0; MAX_PANELS * WIDTH]; MAX_ROWS];
    let mut ups = gates;
    for panel in (op.piece.panels.0..op.piece.panels.1).step_by(MAX_PANELS) {
        let count = MAX_PANELS.min(op.piece.panels.1 - panel);
        let (gate, up) = (panels(op.group.gate, panel), panels(op.group.up, panel));
        let columns = (count * PANEL).min(n - panel * PANEL);
        for row in (op.piece.rows.0..op.piece.rows.1).step_by(MAX_ROWS) {
            let rows = MAX_ROWS.min(op.piece.rows.1 - row);
            let x = op.x.pointers(row, rows);
            // SAFETY: the rows were checked by `pointers`; the panels are in range.
            unsafe {
                product(isa, &x[..rows], gate, count, &mut gates);
                product(isa, &x[..rows], up, count, &mut ups);
                gated(isa, &mut gates[..rows], &ups[..rows]);
            }
            for (r, values) in gates.iter().take(rows).enumerate() {
                let at = op.piece.inner + (row + r) * n + panel * PANEL;
                // SAFETY: this piece's rows and columns only.
                unsafe { op.out.slice(at, columns) }.copy_from_slice(&values[..columns]);
            }
        }
    }
}

/// Cuts all groups' `panels(group)` × rows into pieces.
fn cut(
    groups: &[ExpertGroup<'_>],
    panels: impl Fn(&ExpertGroup<'_>) -> usize,
    threads: usize,
) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut inner = 0;
    for (group, expert) in groups.iter().enumerate() {
        let (rows, all) = (expert.rows.len(), panels(expert));
        let row_blocks = rows.div_ceil(BLOCK_ROWS).max(1) * groups.len();
        let step = panels_per_block(all, row_blocks, threads);
        for panel in (0..all).step_by(step) {
            for row in (0..rows).step_by(BLOCK_ROWS) {
                pieces.push(Piece {
                    group,
                    rows: (row, rows.min(row + BLOCK_ROWS)),
                    panels: (panel, all.min(panel + step)),
                    inner,
                });
            }
        }
        inner += rows * expert.gate.n();
    }
    pieces
}

/// Runs checked groups; `scratch` grows to the inner activations of all.
pub(in crate::cpu) fn expert_ffn(
    isa: Isa,
    threads: &Threads,
    op: ExpertFfn<'_>,
    scratch: &mut Vec<f32>,
) {
    let ExpertFfn {
        x,
        hidden,
        groups,
        out,
    } = op;
    let inners: usize = groups.iter().map(|g| g.rows.len() * g.gate.n()).sum();
    if scratch.len() < inners {
        scratch.resize(inners, 0.0);
    }
    let alone = threads.count() == 1 || inners * hidden < SMALL;
    let each = |pieces: &[Piece], job: &(dyn Fn(&Piece) + Sync)| {
        if alone {
            pieces.iter().for_each(job);
        } else {
            threads.run(pieces.len(), &|item| job(&pieces[item]));
        }
    };
    let out = Parts::of(out);
    let between = Parts::of(scratch);
    each(
        &cut(groups, |g| g.gate.panels(), threads.count()),
        &|piece| {
            let group = &groups[piece.group];
            let x = Rows {
                x,
                width: hidden,
                chosen: Some(group.rows),
            };
            // SAFETY: pieces do not overlap.
            unsafe {
                inner(
                    isa,
                    &Inner {
                        x,
                        group,
                        piece: *piece,
                        out: between,
                    },
                )
            }
        },
    );
    each(
        &cut(groups, |g| g.down.panels(), threads.count()),
        &|piece| {
            let group = &groups[piece.group];
            let (n, rows) = (group.down.k(), group.rows.len());
            // SAFETY: the first phase is over: nobody writes the inner activations.
            let x = unsafe { between.part(piece.inner, rows * n).read() };
            let part = Block {
                x: Rows {
                    x,
                    width: n,
                    chosen: None,
                },
                rows: piece.rows,
                w: group.down,
                panels: piece.panels,
                bias: None,
                out: out.part(group.out_offset * hidden, rows * hidden),
            };
            // SAFETY: pieces do not overlap.
            unsafe { block(isa, &part) }
        },
    );
}
