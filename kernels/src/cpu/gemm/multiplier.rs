//! Products of blocks of rows, as many at once as the path takes: the vector paths a few, in their registers; a tile
//! unit up to 32, in its tiles.

use std::mem::MaybeUninit;

use super::inputs::{self, Rows};
use super::tile::{MAX_PANELS, MAX_ROWS, Panels, Results, product};
use super::tiles::Tiles;
use super::{BLOCK_ROWS, coded};
use crate::cpu::amx::{self, Inputs};
use crate::cpu::detect::{Isa, Unit};
use crate::cpu::lanes::WIDTH;
use crate::dtype::Dtype;
use crate::matrix::Matrix;

type Row = [f32; MAX_PANELS * WIDTH];

/// Memory for the results of a block, of which only what is used is made zero.
pub(super) struct Room([MaybeUninit<Row>; BLOCK_ROWS]);

impl Room {
    pub(super) const fn new() -> Self {
        Self([MaybeUninit::uninit(); BLOCK_ROWS])
    }

    /// Some rows of zeros.
    pub(super) fn zeros(&mut self, rows: usize) -> &mut Results {
        let room = &mut self.0[..rows];
        for row in &mut *room {
            row.write([0.0; MAX_PANELS * WIDTH]);
        }
        // SAFETY: all of them were written.
        unsafe { room.assume_init_mut() }
    }
}

/// Multiplies the rows of one piece of work by its weights, on one thread.
pub(super) struct Multiplier {
    isa: Isa,
    /// Rows at once.
    rows: usize,
    tiles: Option<Tiles>,
    /// Chains of groups of inputs that are not over, where weights are codes.
    chains: Room,
}

impl Multiplier {
    /// For a piece of `rows` rows that meet `weights`.
    pub(super) fn new(isa: Isa, rows: usize, weights: &[&Matrix]) -> Self {
        let tiled = |_: &Unit| rows > 0 && weights.iter().any(|w| w.dtype().rounds_inputs());
        let Some(unit) = isa.tiles().filter(tiled) else {
            // Codes are decoded once for all rows of a block, and bfloat16 is widened once, where it has to be.
            let shared = |w: &&Matrix| w.packing().is_some() || is_widened(isa, w.dtype());
            return Self {
                isa,
                rows: if weights.iter().any(shared) && rows > MAX_ROWS {
                    BLOCK_ROWS
                } else {
                    MAX_ROWS
                },
                tiles: None,
                chains: Room::new(),
            };
        };
        // Blocks of one size, so that the tiles keep their shapes through the piece.
        let rows = rows.div_ceil(rows.div_ceil(amx::ROWS));
        Self {
            isa,
            rows,
            tiles: Some(Tiles::begin(isa, unit, rows)),
            chains: Room::new(),
        }
    }

    /// Most rows of a block.
    pub(super) const fn rows(&self) -> usize {
        self.rows
    }

    /// The first row of each block of the piece, and its rows. With tiles the last block begins so early that it is as
    /// large as the others: some rows are computed twice, to the same bits.
    pub(super) fn blocks(
        &self,
        (from, to): (usize, usize),
    ) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (most, tiled) = (self.rows, self.tiles.is_some());
        (from..to).step_by(most).map(move |row| {
            if tiled {
                (row.min(to - most), most)
            } else {
                (row, most.min(to - row))
            }
        })
    }

    /// Multiplies a block by `count` panels.
    ///
    /// # Safety
    /// The block is one of [`Multiplier::blocks`], its rows are prepared for the format of `w`, `count` is at most
    /// [`MAX_PANELS`], and `out` has the block's rows.
    pub(super) unsafe fn product(
        &mut self,
        x: &Rows<'_>,
        (row, rows): (usize, usize),
        w: Panels,
        count: usize,
        out: &mut Results,
    ) {
        if let Some(tiles) = self.tiles.as_mut().filter(|_| w.dtype.rounds_inputs()) {
            // As many as the tiles have, which are those of the block.
            let (first, stride) = x.evenly_spaced(row, self.rows);
            // SAFETY: the rows were checked by `evenly_spaced`; the rest is the caller's promise.
            return unsafe { tiles.product(Inputs { first, stride }, w, count, out) };
        }
        if w.packing.is_some() {
            let x = x.pointers::<BLOCK_ROWS>(row, rows);
            let chains = self.chains.zeros(rows);
            // SAFETY: the rows were checked by `pointers`; the rest is the caller's promise.
            return unsafe { coded::product(self.isa, &x[..rows], w, count, out, chains) };
        }
        if rows > MAX_ROWS && is_widened(self.isa, w.dtype) {
            let x = x.pointers::<BLOCK_ROWS>(row, rows);
            // SAFETY: the rows were checked by `pointers`; the rest is the caller's promise.
            return unsafe { coded::widened(self.isa, &x[..rows], w, count, out) };
        }
        for at in (0..rows).step_by(MAX_ROWS) {
            let few = MAX_ROWS.min(rows - at);
            let x = x.pointers::<MAX_ROWS>(row + at, few);
            // SAFETY: the rows were checked by `pointers`; the rest is the caller's promise.
            unsafe { product(self.isa, &x[..few], w, count, &mut out[at..]) };
        }
    }
}

/// Whether pairs of a format are widened before they are multiplied.
fn is_widened(isa: Isa, dtype: Dtype) -> bool {
    // SAFETY: no pointers are passed.
    dtype == Dtype::Bf16 && unsafe { inputs::pair_words(isa) } == 2
}
