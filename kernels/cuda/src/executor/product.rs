//! Products with one weight.

use foregate_kernels::{Matrix, OpError};

use super::format::{Coding, Kind, Tile};
use super::{Cuda, Scratch};
use crate::kernel::{Address, CodedProduct, NULL, Product, Rounded, size};

/// Blocks of kernels whose grid may have any size, per unit of the device.
pub(super) const BLOCKS_PER_UNIT: u32 = 4;
/// Threads of elementwise kernels.
pub(super) const THREADS: u32 = 256;

/// Side of a block of `fg_gemm_f32` and `fg_gemm_f16`.
const PLAIN_SIDE: u32 = 32;

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
        let weight = self.weight(op, w)?;
        let kind = Kind::of(w.dtype(), w.k());
        if let Kind::Plain(symbol, _) = kind {
            let sizes = (rows, w.n(), w.k());
            return self.plain_product((op, symbol), (x, weight, bias, out), sizes);
        }
        let x = self.rounded(&mut scratch.rounded, op, x, rows * w.k())?;
        let tile = Tile::of(matches!(kind, Kind::Coded(_)), rows);
        let x_blocks = size(op, "blocks", w.n().div_ceil(tile.columns))?;
        let y_blocks = size(op, "blocks", rows.div_ceil(tile.rows))?;
        let (grid, symbol) = ([x_blocks, y_blocks, 1], (op, tile.product));
        let rows = size(op, "rows", rows)?;
        let (n, k) = (size(op, "outputs", w.n())?, size(op, "inputs", w.k())?);
        match kind {
            Kind::Coded(Coding {
                format,
                block_n,
                block_k,
            }) => CodedProduct {
                x,
                w: weight,
                format,
                block_n,
                block_k,
                bias,
                out,
                rows,
                n,
                k,
            }
            .run(self.driver(), symbol, grid, tile.threads),
            Kind::Bf16 | Kind::Plain(..) => Product {
                x,
                w: weight,
                bias,
                out,
                rows,
                n,
                k,
            }
            .run(self.driver(), symbol, grid, tile.threads),
        }
    }

    /// `out = x · wᵀ + bias` of weights that meet float32 inputs, by their address.
    pub(super) fn plain_product(
        &self,
        symbol: (&'static str, &'static str),
        (x, w, bias, out): (Address, Address, Address, Address),
        (rows, n, k): (usize, usize, usize),
    ) -> Result<(), OpError> {
        let op = symbol.0;
        let product = Product {
            x,
            w,
            bias,
            out,
            rows: size(op, "rows", rows)?,
            n: size(op, "outputs", n)?,
            k: size(op, "inputs", k)?,
        };
        let grid = [
            product.n.div_ceil(PLAIN_SIDE),
            product.rows.div_ceil(PLAIN_SIDE),
            1,
        ];
        product.run(self.driver(), symbol, grid, THREADS)
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

    /// Where a weight is, if this device has it.
    pub(super) fn weight(&self, op: &'static str, w: &Matrix) -> Result<Address, OpError> {
        let region = w
            .region()
            .filter(|region| region.device() == self.shared.driver.id());
        let region = region.ok_or(OpError::OnHost {
            op,
            what: "the weight",
        })?;
        Ok(region.address())
    }

    /// Blocks for `count` values, where any number is right: as many as there is work for, and as the device runs
    /// at a time.
    pub(super) fn blocks(&self, count: usize) -> u32 {
        let wanted = u32::try_from(count.div_ceil(THREADS as usize)).unwrap_or(u32::MAX);
        wanted.min(self.shared.driver.units() * BLOCKS_PER_UNIT)
    }
}

/// No bias.
pub(super) const NO_BIAS: Address = NULL;
