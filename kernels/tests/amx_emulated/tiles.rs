//! Tiles in memory, and what the instructions do with them (Intel SDM, volume 2). Whatever the processor would refuse
//! is refused. Sums are made by the processor's own fused multiply-add, with small numbers flushed to zero.

use std::arch::asm;

use crate::instruction::Instruction;

const ROWS: usize = 16;
const ROW_BYTES: usize = 64;

/// The tiles of a thread with their configuration.
pub(crate) struct TileFile {
    /// Whether there is a configuration.
    configured: bool,
    /// Rows of each tile and bytes of a row.
    shapes: [(usize, usize); 8],
    tiles: [[[u8; ROW_BYTES]; ROWS]; 8],
}

/// `a * b + c` rounded once, as tiles do it whatever the thread's own mode is: to nearest, ties to even, numbers below
/// 2⁻¹²⁶ zero in inputs and results, no exceptions.
fn multiply_add(a: f32, b: f32, mut c: f32) -> f32 {
    const MODE: u32 = 0x9fc0;
    let (mode, mut own) = (MODE, 0_u32);
    // SAFETY: the mode is put back; FMA is part of every processor that the vector paths choose it for.
    unsafe {
        asm!(
            "stmxcsr [{own}]",
            "ldmxcsr [{mode}]",
            "vfmadd231ss {c}, {a}, {b}",
            "ldmxcsr [{own}]",
            own = in(reg) &raw mut own, mode = in(reg) &raw const mode,
            a = in(xmm_reg) a, b = in(xmm_reg) b, c = inout(xmm_reg) c,
            options(nostack, preserves_flags),
        );
    }
    c
}

impl TileFile {
    pub(crate) const EMPTY: Self = Self {
        configured: false,
        shapes: [(0, 0); 8],
        tiles: [[[0; ROW_BYTES]; ROWS]; 8],
    };

    pub(crate) const fn is_released(&self) -> bool {
        !self.configured
    }

    /// Executes an instruction; false when the processor would refuse it.
    ///
    /// # Safety
    /// What it reads and writes may be.
    pub(crate) unsafe fn execute(&mut self, instruction: Instruction) -> bool {
        if let Instruction::LoadConfig { from } = instruction {
            // SAFETY: the caller's promise.
            return self.configure(unsafe { &*(from as *const [u8; 64]) });
        }
        if let Instruction::Release = instruction {
            *self = Self::EMPTY;
            return true;
        }
        // SAFETY: the caller's promise.
        self.configured && unsafe { self.compute(instruction) }.is_some()
    }

    fn configure(&mut self, config: &[u8; 64]) -> bool {
        let zero = |bytes: &[u8]| bytes.iter().all(|b| *b == 0);
        let reserved = [&config[1..16], &config[32..48], &config[56..64]];
        if config[0] != 1 || !reserved.into_iter().all(zero) {
            return false;
        }
        *self = Self::EMPTY;
        for tile in 0..8 {
            let rows = usize::from(config[48 + tile]);
            let bytes =
                usize::from(config[16 + 2 * tile]) | usize::from(config[17 + 2 * tile]) << 8;
            if rows > ROWS || bytes > ROW_BYTES || (rows == 0) != (bytes == 0) {
                return false;
            }
            self.shapes[tile] = (rows, bytes);
        }
        self.configured = true;
        true
    }

    /// Rows of a tile and bytes of a row; `None` where there is no such tile.
    fn shape(&self, tile: u8) -> Option<(usize, usize)> {
        let shape = *self.shapes.get(usize::from(tile))?;
        (shape.0 > 0).then_some(shape)
    }

    unsafe fn compute(&mut self, instruction: Instruction) -> Option<()> {
        match instruction {
            Instruction::LoadConfig { .. } | Instruction::Release => return None,
            Instruction::Zero { tile } => {
                self.shape(tile)?;
                self.tiles[usize::from(tile)] = [[0; ROW_BYTES]; ROWS];
            }
            Instruction::Load { tile, from, stride } => {
                let (rows, bytes) = self.shape(tile)?;
                let to = &mut self.tiles[usize::from(tile)];
                *to = [[0; ROW_BYTES]; ROWS];
                for (row, to) in to.iter_mut().take(rows).enumerate() {
                    let from = from.wrapping_add(row.wrapping_mul(stride)) as *const u8;
                    // SAFETY: the caller's promise.
                    unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr(), bytes) };
                }
            }
            Instruction::Store { tile, to, stride } => {
                let (rows, bytes) = self.shape(tile)?;
                for (row, from) in self.tiles[usize::from(tile)].iter().take(rows).enumerate() {
                    let to = to.wrapping_add(row.wrapping_mul(stride)) as *mut u8;
                    // SAFETY: the caller's promise.
                    unsafe { from.as_ptr().copy_to_nonoverlapping(to, bytes) };
                }
            }
            Instruction::MultiplyBf16 { sums, a, b } => return self.multiply(sums, a, b),
        }
        Some(())
    }

    fn multiply(&mut self, sums: u8, a: u8, b: u8) -> Option<()> {
        let (c_shape, a_shape, b_shape) = (self.shape(sums)?, self.shape(a)?, self.shape(b)?);
        let fit = c_shape.0 == a_shape.0
            && c_shape.1 == b_shape.1
            && a_shape.1 == 4 * b_shape.0
            && c_shape.1.is_multiple_of(4);
        if !fit || sums == a || sums == b || a == b {
            return None;
        }
        let (pairs, columns) = (b_shape.0, c_shape.1 / 4);
        for m in 0..c_shape.0 {
            // Two sums for each column, of the even and of the odd inputs.
            let mut apart = [0.0; 2 * ROW_BYTES / 4];
            for k in 0..pairs {
                for (n, sum) in apart.iter_mut().enumerate().take(2 * columns) {
                    let x = self.bf16(a, m, 2 * k + n % 2);
                    *sum = multiply_add(x, self.bf16(b, k, n), *sum);
                }
            }
            for n in 0..columns {
                let to = &mut self.tiles[usize::from(sums)][m][4 * n..4 * n + 4];
                let before = f32::from_bits(u32::from_le_bytes(to.try_into().ok()?));
                let both = multiply_add(apart[2 * n], 1.0, apart[2 * n + 1]);
                to.copy_from_slice(&multiply_add(before, 1.0, both).to_le_bytes());
            }
        }
        Some(())
    }

    /// A bfloat16 of a tile, widened.
    fn bf16(&self, tile: u8, row: usize, column: usize) -> f32 {
        let row = &self.tiles[usize::from(tile)][row];
        f32::from_bits(u32::from_le_bytes([
            0,
            0,
            row[2 * column],
            row[2 * column + 1],
        ]))
    }
}
