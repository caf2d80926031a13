//! The loops over tiles. A bfloat16 panel is a column of weight tiles as it is (16 lines of 64 bytes are 32 inputs of 16
//! outputs), and prepared rows of inputs are rows of input tiles, so nothing is packed again.
//!
//! An element is the sum, over the inputs in steps of 32 from the first on, of what one instruction makes of a step; a
//! last step of fewer inputs is filled up with zeros. Rows of a tile do not meet, so neither the number of rows nor the
//! place of a row in a tile shows in a result.

use std::marker::PhantomData;

use super::unit::{Config, ROW_BYTES, TILE_ROWS, TileUnit};

/// Most rows of a block of tiles.
pub(in crate::cpu) const ROWS: usize = 2 * TILE_ROWS;
/// Most panels of a product.
const PANELS: usize = 4;
/// Outputs of a panel.
const PANEL: usize = ROW_BYTES / 4;
/// Bytes of a weight tile: the weights of one step and panel.
const STEP_BYTES: usize = TILE_ROWS * ROW_BYTES;
/// Inputs of a step.
const STEP: usize = 2 * TILE_ROWS;
/// Bytes ahead of the running position of each panel that are asked for: two steps.
const AHEAD: usize = 2 * STEP_BYTES;

// The tiles: four of sums, then inputs, then weights.
const SUMS: [u8; 4] = [0, 1, 2, 3];
const INPUTS: [u8; 2] = [4, 5];
const WEIGHTS: [u8; 2] = [6, 7];

/// Rows of bfloat16 inputs in pairs: the first one, and how many bytes the next ones are apart.
#[derive(Debug, Clone, Copy)]
pub(in crate::cpu) struct Inputs {
    pub(in crate::cpu) first: *const u8,
    pub(in crate::cpu) stride: usize,
}

/// bfloat16 panels: the first one, and the bytes and the inputs of each.
#[derive(Debug, Clone, Copy)]
pub(in crate::cpu) struct Weights {
    pub(in crate::cpu) first: *const u8,
    pub(in crate::cpu) bytes: usize,
    pub(in crate::cpu) k: usize,
}

/// Results, `PANELS` panels a row.
type Results = [[f32; PANELS * PANEL]];

/// A tile unit with tiles for blocks of a number of rows. The end of it releases the unit.
#[derive(Debug)]
pub(in crate::cpu) struct Session<U: TileUnit> {
    unit: U,
    rows: usize,
    /// The unit's tiles are those of this thread.
    _here: PhantomData<*mut ()>,
}

impl<U: TileUnit> Drop for Session<U> {
    fn drop(&mut self) {
        // SAFETY: the processor has the unit by the promise of `begin`.
        unsafe { self.unit.release() }
    }
}

impl<U: TileUnit> Session<U> {
    /// Tiles for blocks of `rows` rows, 1 to [`ROWS`].
    ///
    /// # Safety
    /// The processor has the unit.
    pub(in crate::cpu) unsafe fn begin(rows: usize) -> Self {
        let first = rows.min(TILE_ROWS);
        let config = match rows - first {
            0 => Config::of([first, first, first, first, first, 0, 16, 16]),
            rest => Config::of([first, first, rest, rest, first, rest, 16, 16]),
        };
        // SAFETY: the caller's promise.
        let mut unit = unsafe { U::new() };
        // SAFETY: as above.
        unsafe { unit.configure(&config) };
        Self {
            unit,
            rows,
            _here: PhantomData,
        }
    }

    /// Multiplies this session's number of rows by `count` panels.
    ///
    /// # Safety
    /// All rows and panels are there, `count` is 1 to 4, and `out` has the rows.
    pub(in crate::cpu) unsafe fn product(
        &mut self,
        x: Inputs,
        w: Weights,
        count: usize,
        out: &mut Results,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.rows <= TILE_ROWS {
                return match count {
                    4 => self.multiply::<1, 4>(x, w, 0, out),
                    3 => self.multiply::<1, 3>(x, w, 0, out),
                    2 => self.multiply::<1, 2>(x, w, 0, out),
                    _ => self.multiply::<1, 1>(x, w, 0, out),
                };
            }
            for at in (0..count).step_by(2) {
                let w = Weights {
                    first: w.first.add(at * w.bytes),
                    ..w
                };
                match count - at {
                    1 => self.multiply::<2, 1>(x, w, at, out),
                    _ => self.multiply::<2, 2>(x, w, at, out),
                }
            }
        }
    }

    /// `R` tiles of rows by `P` panels, the results from panel `at` of `out` on.
    ///
    /// # Safety
    /// As for [`Session::product`].
    unsafe fn multiply<const R: usize, const P: usize>(
        &mut self,
        x: Inputs,
        w: Weights,
        at: usize,
        out: &mut Results,
    ) {
        let whole = w.k / STEP;
        // SAFETY: the caller's promise; a step reads 32 inputs of each row and 16 lines of each panel.
        unsafe {
            self.zero();
            for step in 0..whole {
                let inputs = x.first.add(step * ROW_BYTES);
                let weights = w.first.add(step * STEP_BYTES);
                self.step::<R, P>(Inputs { first: inputs, ..x }, weights, w.bytes);
            }
            if !w.k.is_multiple_of(STEP) {
                let last = Last::of(x, w, whole, self.rows, P);
                self.step::<R, P>(last.inputs(), last.weights.as_ptr().cast(), STEP_BYTES);
            }
            self.store::<R, P>(out.as_mut_ptr().cast::<f32>().add(at * PANEL));
        }
    }

    #[inline(always)]
    unsafe fn zero(&mut self) {
        // SAFETY: the tiles of sums are configured.
        unsafe {
            self.unit.zero::<{ SUMS[0] }>();
            self.unit.zero::<{ SUMS[1] }>();
            self.unit.zero::<{ SUMS[2] }>();
            self.unit.zero::<{ SUMS[3] }>();
        }
    }

    /// One step: two tiles of rows by up to two panels, or one by up to four.
    ///
    /// # Safety
    /// `x` and the `P` weight tiles, `apart` bytes from each other, can be read.
    #[inline(always)]
    unsafe fn step<const R: usize, const P: usize>(
        &mut self,
        x: Inputs,
        w: *const u8,
        apart: usize,
    ) {
        let unit = &mut self.unit;
        // SAFETY: the caller's promise; tiles of inputs and sums have the same rows by `begin`. What is asked for ahead
        // need not be there.
        unsafe {
            for line in 0..P * TILE_ROWS {
                let line = line / TILE_ROWS * apart + line % TILE_ROWS * ROW_BYTES;
                U::prefetch(w.wrapping_add(line + AHEAD));
            }
            unit.load::<{ INPUTS[0] }>(x.first, x.stride);
            if R == 2 {
                unit.load::<{ INPUTS[1] }>(x.first.add(TILE_ROWS * x.stride), x.stride);
            }
            unit.load::<{ WEIGHTS[0] }>(w, ROW_BYTES);
            unit.multiply::<{ SUMS[0] }, { INPUTS[0] }, { WEIGHTS[0] }>();
            if R == 2 {
                unit.multiply::<{ SUMS[2] }, { INPUTS[1] }, { WEIGHTS[0] }>();
            }
            if P > 1 {
                unit.load::<{ WEIGHTS[1] }>(w.add(apart), ROW_BYTES);
                unit.multiply::<{ SUMS[1] }, { INPUTS[0] }, { WEIGHTS[1] }>();
                if R == 2 {
                    unit.multiply::<{ SUMS[3] }, { INPUTS[1] }, { WEIGHTS[1] }>();
                }
            }
            if R == 1 && P > 2 {
                unit.load::<{ WEIGHTS[0] }>(w.add(2 * apart), ROW_BYTES);
                unit.multiply::<{ SUMS[2] }, { INPUTS[0] }, { WEIGHTS[0] }>();
            }
            if R == 1 && P > 3 {
                unit.load::<{ WEIGHTS[1] }>(w.add(3 * apart), ROW_BYTES);
                unit.multiply::<{ SUMS[3] }, { INPUTS[0] }, { WEIGHTS[1] }>();
            }
        }
    }

    /// Writes the sums where [`Session::step`] has them.
    ///
    /// # Safety
    /// `to` is a row of results, with this session's number of rows and room for `P` panels.
    #[inline(always)]
    unsafe fn store<const R: usize, const P: usize>(&mut self, to: *mut f32) {
        const STRIDE: usize = PANELS * ROW_BYTES;
        let unit = &mut self.unit;
        // SAFETY: the caller's promise.
        unsafe {
            let at = |row: usize, panel: usize| {
                to.cast::<u8>().add(row * STRIDE + panel * ROW_BYTES)
            };
            unit.store::<{ SUMS[0] }>(at(0, 0), STRIDE);
            if P > 1 {
                unit.store::<{ SUMS[1] }>(at(0, 1), STRIDE);
            }
            if R == 2 {
                unit.store::<{ SUMS[2] }>(at(TILE_ROWS, 0), STRIDE);
                if P > 1 {
                    unit.store::<{ SUMS[3] }>(at(TILE_ROWS, 1), STRIDE);
                }
            }
            if R == 1 && P > 2 {
                unit.store::<{ SUMS[2] }>(at(0, 2), STRIDE);
            }
            if R == 1 && P > 3 {
                unit.store::<{ SUMS[3] }>(at(0, 3), STRIDE);
            }
        }
    }
}

/// The last step, of fewer than 32 inputs, filled up with zeros: what follows a row or a panel in memory is something
/// else, and zero times that may be no number.
#[repr(C, align(64))]
struct Last {
    inputs: [[u8; ROW_BYTES]; ROWS],
    weights: [[u8; STEP_BYTES]; PANELS],
}

impl Last {
    /// What is left of `rows` rows and `panels` panels after `whole` steps.
    ///
    /// # Safety
    /// They are there.
    unsafe fn of(x: Inputs, w: Weights, whole: usize, rows: usize, panels: usize) -> Self {
        let mut last = Self {
            inputs: [[0; ROW_BYTES]; ROWS],
            weights: [[0; STEP_BYTES]; PANELS],
        };
        let pairs = (w.k % STEP).div_ceil(2);
        for (row, to) in last.inputs.iter_mut().take(rows).enumerate() {
            // SAFETY: the pairs follow the whole steps of the row.
            unsafe {
                let from = x.first.add(row * x.stride + whole * ROW_BYTES);
                from.copy_to_nonoverlapping(to.as_mut_ptr(), pairs * 4);
            }
        }
        for (panel, to) in last.weights.iter_mut().take(panels).enumerate() {
            // SAFETY: the lines follow the whole steps of the panel.
            unsafe {
                let from = w.first.add(panel * w.bytes + whole * STEP_BYTES);
                from.copy_to_nonoverlapping(to.as_mut_ptr(), pairs * ROW_BYTES);
            }
        }
        last
    }

    const fn inputs(&self) -> Inputs {
        Inputs {
            first: self.inputs.as_ptr().cast(),
            stride: ROW_BYTES,
        }
    }
}
