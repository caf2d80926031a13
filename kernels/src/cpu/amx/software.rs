//! The tile unit in plain Rust, by the definition in Intel's SDM, volume 2 (`TDPBF16PS` and the tile instructions).

use super::unit::{Config, ROW_BYTES, TILE_ROWS, TileUnit};

/// float32 elements, or bfloat16 pairs, of a full row.
const WORDS: usize = ROW_BYTES / 4;

type Tile = [[u32; WORDS]; TILE_ROWS];

/// Eight tiles in memory.
#[derive(Debug)]
pub(in crate::cpu) struct Software {
    rows: [usize; 8],
    tiles: [Tile; 8],
}

/// A number as the unit reads it: what is below 2⁻¹²⁶ is zero.
fn read(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE {
        0.0_f32.copysign(x)
    } else {
        x
    }
}

/// `a * b + c`, rounded once to nearest, ties to even; a result below 2⁻¹²⁶ becomes zero.
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    let (a, b, c) = (read(a), read(b), read(c));
    let sum = a.mul_add(b, c);
    if sum == 0.0 || sum.abs() > f32::MIN_POSITIVE || sum.is_nan() {
        return sum;
    }
    // Whether it is below is asked of the result rounded as if the exponent had no end. A sum so small has small terms,
    // so that 64 binary places up nothing overflows and nothing is subnormal.
    let up = 2.0_f32.powi(32);
    let far_up = (a * up).mul_add(b * up, c * up * up);
    if far_up.abs() < f32::MIN_POSITIVE * up * up {
        0.0_f32.copysign(sum)
    } else {
        sum
    }
}

/// The even and the odd half of a pair of bfloat16, widened.
fn halves(pair: u32) -> (f32, f32) {
    (
        f32::from_bits(pair << 16),
        f32::from_bits(pair & 0xffff_0000),
    )
}

impl Software {
    /// Rows of a tile that an instruction names.
    fn rows(&self, tile: u8) -> usize {
        let rows = self.rows[usize::from(tile)];
        // The instruction would fault.
        assert!(rows > 0, "tile {tile} is not configured");
        rows
    }
}

impl TileUnit for Software {
    unsafe fn new() -> Self {
        Self {
            rows: [0; 8],
            tiles: [[[0; WORDS]; TILE_ROWS]; 8],
        }
    }

    unsafe fn configure(&mut self, config: &Config) {
        self.rows = std::array::from_fn(|tile| config.rows(tile as u8));
        self.tiles = [[[0; WORDS]; TILE_ROWS]; 8];
    }

    unsafe fn release(&mut self) {
        self.rows = [0; 8];
    }

    unsafe fn zero<const T: u8>(&mut self) {
        self.rows(T);
        self.tiles[usize::from(T)] = [[0; WORDS]; TILE_ROWS];
    }

    unsafe fn load<const T: u8>(&mut self, from: *const u8, stride: usize) {
        let rows = self.rows(T);
        let mut tile = [[0; WORDS]; TILE_ROWS];
        for (r, row) in tile.iter_mut().take(rows).enumerate() {
            // SAFETY: the rows can be read, by the caller's promise.
            *row = unsafe { from.add(r * stride).cast::<[u32; WORDS]>().read_unaligned() };
        }
        self.tiles[usize::from(T)] = tile;
    }

    unsafe fn store<const T: u8>(&mut self, to: *mut u8, stride: usize) {
        let tile = &self.tiles[usize::from(T)];
        for (r, row) in tile.iter().take(self.rows(T)).enumerate() {
            // SAFETY: the rows can be written, by the caller's promise.
            unsafe {
                to.add(r * stride)
                    .cast::<[u32; WORDS]>()
                    .write_unaligned(*row);
            }
        }
    }

    unsafe fn multiply<const C: u8, const A: u8, const B: u8>(&mut self) {
        // The instruction would fault.
        assert!(C != A && C != B && A != B, "a tile is named twice");
        assert_eq!(
            self.rows(C),
            self.rows(A),
            "rows of the sums and of the inputs"
        );
        assert_eq!(
            self.rows(B),
            WORDS,
            "pairs of a row of inputs and rows of weights"
        );
        let (a, b) = (self.tiles[usize::from(A)], self.tiles[usize::from(B)]);
        let rows = self.rows(C);
        let sums = &mut self.tiles[usize::from(C)];
        for (sums, inputs) in sums.iter_mut().zip(&a).take(rows) {
            let mut apart = [(0.0, 0.0); WORDS];
            for (input, weights) in inputs.iter().zip(&b) {
                let (even, odd) = halves(*input);
                for (sum, weight) in apart.iter_mut().zip(weights) {
                    let weight = halves(*weight);
                    sum.0 = multiply_add(even, weight.0, sum.0);
                    sum.1 = multiply_add(odd, weight.1, sum.1);
                }
            }
            for (sum, (even, odd)) in sums.iter_mut().zip(apart) {
                let both = multiply_add(even, 1.0, odd);
                *sum = multiply_add(f32::from_bits(*sum), 1.0, both).to_bits();
            }
        }
    }

    unsafe fn prefetch(_: *const u8) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tininess is that of the rounded result, as SSE has it with flush-to-zero.
    #[test]
    fn small_results_and_inputs_are_zero() {
        let least = f32::MIN_POSITIVE;
        let below = f32::from_bits(least.to_bits() - 1);
        assert_eq!(multiply_add(below, 1.0, 0.0).to_bits(), 0);
        assert_eq!(
            multiply_add(-below, 1.0, -0.0).to_bits(),
            (-0.0_f32).to_bits()
        );
        assert_eq!(multiply_add(least, 1.0, 0.0), least);
        assert_eq!(multiply_add(least, 0.5, 0.0), 0.0);
        assert_eq!(
            multiply_add(least, -0.5, 0.0).to_bits(),
            (-0.0_f32).to_bits()
        );
        // 2⁻¹²⁶ (1 - 2⁻²⁴) rounds up to 2⁻¹²⁶ as a subnormal, but has 24 bits of its own: it is tiny.
        let x = 1.0 - 2.0_f32.powi(-24);
        assert_eq!(least.mul_add(x, 0.0), least);
        assert_eq!(multiply_add(least, x, 0.0), 0.0);
        // 2⁻¹²⁶ (1 - 2⁻²⁵) rounds up with any exponent.
        let half = (2.0_f32.powi(-75), -2.0_f32.powi(-76));
        assert_eq!(multiply_add(half.0, half.1, least), least);
        assert!(multiply_add(f32::NAN, 1.0, 0.0).is_nan());
        assert_eq!(multiply_add(f32::MAX, 2.0, 0.0), f32::INFINITY);
    }
}
