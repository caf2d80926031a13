//! Gated feed-forward of many experts at once: two phases, each cut into blocks of one expert's rows and
//! some panels, so that a busy expert is shared by all threads.

use super::inputs::{self, Rows, prepare, width};
use super::multiplier::{Multiplier, Room};
use super::tile::Results;
use super::{BLOCK_ROWS, Block, MAX_PANELS, SMALL, Scratch, block, panels, panels_per_block};
use crate::cpu::detect::Isa;
use crate::cpu::exp::silu;
use crate::cpu::lanes::{Lanes, WIDTH, on_path};
use crate::cpu::threads::{Parts, Threads};
use crate::dtype::Dtype;
use crate::matrix::{Matrix, PANEL};
use crate::ops::{ExpertFfn, ExpertGroup};

/// One piece of a phase.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    group: usize,
    rows: (usize, usize),
    panels: (usize, usize),
    /// First word of the group's inner activations in the scratch memory.
    inner: usize,
}

/// The inputs of all experts, for weights of any format.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    floats: Rows<'a>,
    /// To bfloat16; empty when no expert has weights that ask for it.
    rounded: Rows<'a>,
    /// The rounded rows are not those of `x` but those of the groups, where their results go: tiles take rows in order.
    gathered: bool,
}

impl<'a> Inputs<'a> {
    /// The rows of a group, for the format of `w`.
    fn of(&self, w: &Matrix, group: &ExpertGroup<'a>) -> Rows<'a> {
        let rows = match (w.dtype().rounds_inputs(), self.gathered) {
            (false, _) => self.floats,
            (true, false) => self.rounded,
            (true, true) => {
                let words = &self.rounded.words[group.out_offset * self.rounded.width..];
                return Rows {
                    words,
                    ..self.rounded
                };
            }
        };
        Rows {
            chosen: Some(group.rows),
            ..rows
        }
    }
}

/// Some rows × panels of `silu(gate · x) * (up · x)`, prepared for the weights that come next.
struct Inner<'a> {
    x: Inputs<'a>,
    group: &'a ExpertGroup<'a>,
    piece: Piece,
    out: Parts<u32>,
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
    let (group, piece) = (op.group, op.piece);
    let (n, next) = (group.gate.n(), group.down.dtype());
    let (x_gate, x_up) = (op.x.of(group.gate, group), op.x.of(group.up, group));
    let mut multiplier =
        Multiplier::new(isa, piece.rows.1 - piece.rows.0, &[group.gate, group.up]);
    let (mut gates, mut ups) = (Room::new(), Room::new());
    let (gates, ups) = (gates.zeros(multiplier.rows()), ups.zeros(multiplier.rows()));
    for panel in (piece.panels.0..piece.panels.1).step_by(MAX_PANELS) {
        let count = MAX_PANELS.min(piece.panels.1 - panel);
        let (gate, up) = (panels(group.gate, panel), panels(group.up, panel));
        let columns = (count * PANEL).min(n - panel * PANEL);
        for (row, rows) in multiplier.blocks(piece.rows) {
            // SAFETY: the rows are prepared for these weights; the panels are in range.
            unsafe {
                multiplier.product(&x_gate, (row, rows), gate, count, gates);
                multiplier.product(&x_up, (row, rows), up, count, ups);
                gated(isa, &mut gates[..rows], &ups[..rows]);
            }
            for (r, values) in gates.iter().take(rows).enumerate() {
                let line = piece.inner + (row + r) * width(isa, next, n);
                let at = line + width(isa, next, panel * PANEL);
                // SAFETY: this piece's rows and columns only.
                let to = unsafe { op.out.slice(at, width(isa, next, columns)) };
                prepare(isa, next, &values[..columns], to);
            }
        }
    }
}

/// Cuts all groups' `panels(group)` × rows into `pieces`, in place of those that are there.
fn cut(
    isa: Isa,
    groups: &[ExpertGroup<'_>],
    panels: impl Fn(&ExpertGroup<'_>) -> usize,
    threads: usize,
    pieces: &mut Vec<Piece>,
) {
    pieces.clear();
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
        inner += inner_words(isa, expert);
    }
}

/// Words of a group's inner activations.
fn inner_words(isa: Isa, group: &ExpertGroup<'_>) -> usize {
    group.rows.len() * width(isa, group.down.dtype(), group.gate.n())
}

/// Writes for each row of results the row of inputs it is made of; the first one where there is no result.
fn sources(groups: &[ExpertGroup<'_>], from: &mut Vec<u32>) {
    from.clear();
    for group in groups.iter().filter(|group| !group.rows.is_empty()) {
        from.resize(group.out_offset, 0);
        from.extend_from_slice(group.rows);
    }
}

/// Runs checked groups; `scratch` grows to the inputs and the inner activations of all.
pub(in crate::cpu) fn expert_ffn(
    isa: Isa,
    threads: &Threads,
    op: ExpertFfn<'_>,
    scratch: &mut Scratch,
) {
    let ExpertFfn {
        x,
        hidden,
        groups,
        out,
    } = op;
    let Scratch {
        inputs: kept,
        inner: between,
        pieces,
        sources: from,
    } = scratch;
    let rounds = |g: &ExpertGroup<'_>| [g.gate, g.up].iter().any(|w| w.dtype().rounds_inputs());
    let to_round = if groups.iter().any(rounds) { x } else { &[] };
    let mut none = Vec::new();
    let gathered = isa.tiles().is_some() && groups.iter().any(rounds);
    let rounded = if gathered {
        sources(groups, from);
        let from = &*from;
        let order = |row: usize| from[row] as usize;
        let order = (from.len(), &order as &(dyn Fn(usize) -> usize + Sync));
        inputs::rows_in_order(isa, threads, Dtype::Bf16, (x, hidden), order, kept)
    } else {
        inputs::rows(isa, threads, Dtype::Bf16, (to_round, hidden), kept)
    };
    let x = Inputs {
        floats: inputs::rows(isa, threads, Dtype::F32, (x, hidden), &mut none),
        rounded,
        gathered,
    };
    let words: usize = groups.iter().map(|g| inner_words(isa, g)).sum();
    if between.len() < words {
        between.resize(words, 0);
    }
    let inners: usize = groups.iter().map(|g| g.rows.len() * g.gate.n()).sum();
    let alone = threads.count() == 1 || inners * hidden < SMALL;
    let each = |pieces: &[Piece], job: &(dyn Fn(&Piece) + Sync)| {
        if alone {
            pieces.iter().for_each(job);
        } else {
            threads.run(pieces.len(), &|item| job(&pieces[item]));
        }
    };
    let out = Parts::of(out);
    let between = Parts::of(between);
    cut(isa, groups, |g| g.gate.panels(), threads.count(), pieces);
    each(pieces, &|piece| {
        let op = Inner {
            x,
            group: &groups[piece.group],
            piece: *piece,
            out: between,
        };
        // SAFETY: pieces do not overlap.
        unsafe { inner(isa, &op) }
    });
    cut(isa, groups, |g| g.down.panels(), threads.count(), pieces);
    each(pieces, &|piece| {
        let group = &groups[piece.group];
        // SAFETY: the first phase is over: nobody writes the inner activations.
        let words = unsafe { between.part(piece.inner, inner_words(isa, group)).read() };
        let part = Block {
            x: Rows {
                words,
                width: width(isa, group.down.dtype(), group.down.k()),
                chosen: None,
            },
            rows: piece.rows,
            w: group.down,
            panels: piece.panels,
            bias: None,
            out: out.part(group.out_offset * hidden, group.rows.len() * hidden),
        };
        // SAFETY: pieces do not overlap.
        unsafe { block(isa, &part) }
    });
}
