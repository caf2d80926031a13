//! Products with one weight.

use foregate_kernels::{Dtype, Matrix, OpError};

use super::{Cuda, Scratch};
use crate::kernel::{Address, NULL, Product, Rounded, size};

/// Blocks of kernels whose grid may have any size, per unit of the device.
pub(super) const BLOCKS_PER_UNIT: u32 = 4;
/// Threads of elementwise kernels.
pub(super) const THREADS: u32 = 256;

/// A product of rows: the bits do not depend on which tile computes them.
struct Tile {
    symbol: &'static str,
    rows: usize,
    columns: usize,
    threads: u32,
}

const TILES: [Tile; 5] = [
    Tile {
        symbol: "fg_gemm_bf16_m8",
        rows: 8,
        columns: 64,
        threads: 128,
    },
    Tile {
        symbol: "fg_gemm_bf16_m16",
        rows: 16,
        columns: 64,
        threads: 128,
    },
    Tile {
        symbol: "fg_gemm_bf16_m32",
        rows: 32,
        columns: 64,
        threads: 128,
    },
    Tile {
        symbol: "fg_gemm_bf16_m64",
        rows: 64,
        columns: 64,
        threads: 128,
    },
    Tile {
        symbol: "fg_gemm_bf16_m128",
        rows: 128,
        columns: 128,
        threads: 256,
    },
];

/// Side of a block of `fg_gemm_f32`.
const F32_SIDE: u32 = 32;

/// The place in a ladder of tiles of 8, 16, 32, 64, 128 rows for so many rows: the first that takes them all, and the
/// largest where there are two of the next to largest.
pub(super) const fn rung(rows: usize) -> usize {
    match rows {
        0..=8 => 0,
        9..=16 => 1,
        17..=32 => 2,
        33..=128 => 3,
        _ => 4,
    }
}

impl Cuda {
    /// `out = x · wᵀ + bias` for rows that stand one after the other.
    pub(super) fn product(
        &self,
        scratch: &mut Scratch,
        op: &'static str,
        w: &Matrix,
        rows: usize,
        (x, bias, out): (Address, Address, Address),
    ) -> Result<(), OpError> {
        let (n, k) = (size(op, "outputs", w.n())?, size(op, "inputs", w.k())?);
        let weight = self.weight(op, w)?;
        if w.dtype() == Dtype::F32 {
            let rows = size(op, "rows", rows)?;
            return self.f32_product(
                op,
                Product {
                    x,
                    w: weight,
                    bias,
                    out,
                    rows,
                    n,
                    k,
                },
            );
        }
        let x = self.rounded(&mut scratch.rounded, op, x, rows * w.k())?;
        let tile = &TILES[rung(rows)];
        let x_blocks = size(op, "blocks", w.n().div_ceil(tile.columns))?;
        let y_blocks = size(op, "blocks", rows.div_ceil(tile.rows))?;
        let rows = size(op, "rows", rows)?;
        let product = Product {
            x,
            w: weight,
            bias,
            out,
            rows,
            n,
            k,
        };
        product.run(
            self.driver(),
            (op, tile.symbol),
            [x_blocks, y_blocks, 1],
            tile.threads,
        )
    }

    fn f32_product(&self, op: &'static str, product: Product) -> Result<(), OpError> {
        let grid = [
            product.n.div_ceil(F32_SIDE),
            product.rows.div_ceil(F32_SIDE),
            1,
        ];
        product.run(self.driver(), (op, "fg_gemm_f32"), grid, THREADS)
    }

    /// `out = x · wᵀ` of float32 weights by their address.
    pub(super) fn plain_product(
        &self,
        op: &'static str,
        (x, w, out): (Address, Address, Address),
        (rows, n, k): (usize, usize, usize),
    ) -> Result<(), OpError> {
        let rows = size(op, "rows", rows)?;
        let (n, k) = (size(op, "outputs", n)?, size(op, "inputs", k)?);
        self.f32_product(
            op,
            Product {
                x,
                w,
                bias: NO_BIAS,
                out,
                rows,
                n,
                k,
            },
        )
    }

    /// A copy of `count` float32 values, rounded to bfloat16.
    pub(super) fn rounded(
        &self,
        to: &mut super::scratch::Grown,
        op: &'static str,
        x: Address,
        count: usize,
    ) -> Result<Address, OpError> {
        let out = to.bytes(&self.shared.driver, "rounded inputs", count * 2)?;
        let rounded = Rounded {
            x,
            out,
            count: count as u64,
        };
        let grid = [self.blocks(count), 1, 1];
        rounded.run(self.driver(), (op, "fg_round_bf16"), grid, THREADS)?;
        Ok(out)
    }

    /// Where a weight is, if this device has it in a format that kernels take.
    pub(super) fn weight(&self, op: &'static str, w: &Matrix) -> Result<Address, OpError> {
        let region = w
            .region()
            .filter(|region| region.device() == self.shared.driver.id());
        let region = region.ok_or(OpError::OnHost {
            op,
            what: "the weight",
        })?;
        supported(op, w.dtype())?;
        Ok(region.address())
    }

    /// Blocks for `count` values, where any number is right: as many as there is work for, and as the device runs
    /// at a time.
    pub(super) fn blocks(&self, count: usize) -> u32 {
        let wanted = u32::try_from(count.div_ceil(THREADS as usize)).unwrap_or(u32::MAX);
        wanted.min(self.shared.driver.units() * BLOCKS_PER_UNIT)
    }
}

/// Formats that kernels take.
pub(super) fn supported(op: &'static str, dtype: Dtype) -> Result<(), OpError> {
    if matches!(dtype, Dtype::F32 | Dtype::Bf16) {
        return Ok(());
    }
    Err(OpError::Unsupported {
        op,
        what: format!(
            "weights of {dtype}: the device computes with bfloat16 and float32 weights; serve a checkpoint that has \
             them, without spec.model.quantization, or spec.workers.device: cpu"
        ),
    })
}

/// No bias.
pub(super) const NO_BIAS: Address = NULL;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_takes_all_rows_or_is_the_largest_that_pays() {
        for rows in 1..400 {
            let tile = &TILES[rung(rows)];
            assert!(tile.rows >= rows || tile.rows >= 64, "{rows}");
            assert!(
                rung(rows) == 0 || TILES[rung(rows) - 1].rows < rows,
                "{rows}"
            );
        }
    }
}
