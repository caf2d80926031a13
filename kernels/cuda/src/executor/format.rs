//! How kernels take the formats of weights. All take the canonical bytes as they are, so that what a device has can be sent to
//! another or moved into another slot without a conversion.

use foregate_kernels::{Dtype, OpError};

/// Multiples that groups of inputs have, which share a scale: a tensor core takes so many inputs at a time.
const STEP: usize = 16;
/// Inputs that share a scale of [`Dtype::Mxfp4`].
const MX_GROUP: u32 = 32;

/// Kernels of one kind. The bits of a result do not depend on which tile computes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Numbers that meet inputs of float32, without tensor cores: the symbols of product and embedding.
    Plain(&'static str, &'static str),
    /// Numbers that meet inputs rounded to bfloat16.
    Bf16,
    /// Codes with scales, which meet inputs rounded to bfloat16.
    Coded(Coding),
}

/// What kernels are told of codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Coding {
    /// The format's number.
    pub(super) format: u32,
    /// Outputs that share a scale.
    pub(super) block_n: u32,
    /// Inputs that share a scale; as many as there are, or more, is all of them.
    pub(super) block_k: u32,
}

impl Kind {
    /// Kernels for weights of `k` inputs.
    pub(super) fn of(dtype: Dtype, k: usize) -> Self {
        let most = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
        let coded = |format, block_n, block_k| {
            Self::Coded(Coding {
                format,
                block_n,
                block_k,
            })
        };
        match dtype {
            Dtype::F32 => Self::Plain("fg_gemm_f32", "fg_embed_f32"),
            Dtype::F16 => Self::Plain("fg_gemm_f16", "fg_embed_f16"),
            Dtype::Bf16 => Self::Bf16,
            Dtype::Int8 => coded(1, 1, most(k.max(1))),
            Dtype::Int4 { group } => coded(2, 1, most(group)),
            Dtype::Fp8 { block_n, block_k } => coded(3, most(block_n), most(block_k)),
            Dtype::Mxfp4 => coded(4, 1, MX_GROUP),
        }
    }
}

/// Rows of a tile, with the names of its kernels and the threads of a block: product, and the halves of a feed-forward.
pub(super) struct Tile {
    pub(super) rows: usize,
    /// Outputs of a product's tile.
    pub(super) columns: usize,
    pub(super) threads: u32,
    pub(super) product: &'static str,
    pub(super) gate_up: &'static str,
    pub(super) down: &'static str,
}

macro_rules! tile {
    ($rows:literal, $columns:literal, $threads:literal, $kind:literal) => {
        Tile {
            rows: $rows,
            columns: $columns,
            threads: $threads,
            product: concat!("fg_gemm_", $kind, "_m", $rows),
            gate_up: concat!("fg_moe_gate_up_", $kind, "_m", $rows),
            down: concat!("fg_moe_down_", $kind, "_m", $rows),
        }
    };
}

const BF16: [Tile; 5] = [
    tile!(8, 64, 128, "bf16"),
    tile!(16, 64, 128, "bf16"),
    tile!(32, 64, 128, "bf16"),
    tile!(64, 64, 128, "bf16"),
    tile!(128, 128, 256, "bf16"),
];

const CODED: [Tile; 4] = [
    tile!(8, 64, 128, "coded"),
    tile!(16, 64, 128, "coded"),
    tile!(32, 64, 128, "coded"),
    tile!(64, 64, 128, "coded"),
];

/// The place in a ladder of tiles of 8, 16, 32, 64, 128 rows for so many rows: the first that takes them all, and the
/// largest where there are two of the next to largest.
const fn rung(rows: usize) -> usize {
    match rows {
        0..=8 => 0,
        9..=16 => 1,
        17..=32 => 2,
        33..=128 => 3,
        _ => 4,
    }
}

impl Tile {
    /// The tile for so many rows, of bfloat16 weights or of codes.
    pub(super) fn of(coded: bool, rows: usize) -> &'static Self {
        let ladder: &[Self] = if coded { &CODED } else { &BF16 };
        &ladder[rung(rows).min(ladder.len() - 1)]
    }
}

/// Refuses what kernels do not take of a format that has it.
pub(super) fn supported(op: &'static str, dtype: Dtype, k: usize) -> Result<(), OpError> {
    let block = match dtype {
        Dtype::Int4 { group } => group,
        Dtype::Fp8 { block_k, .. } => block_k,
        Dtype::F32 | Dtype::Bf16 | Dtype::F16 | Dtype::Int8 | Dtype::Mxfp4 => return Ok(()),
    };
    if block >= k || block.is_multiple_of(STEP) {
        return Ok(());
    }
    Err(OpError::Unsupported {
        op,
        what: format!(
            "weights of {dtype} with {k} inputs: the device takes scales for a multiple of {STEP} inputs, or for all; serve a \
             checkpoint that has them, or spec.workers.device: cpu"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_takes_all_rows_or_is_the_largest_that_pays() {
        for coded in [false, true] {
            for rows in 1..400 {
                let tile = Tile::of(coded, rows);
                assert!(tile.rows >= rows || tile.rows >= 64, "{rows}");
                assert!(tile.rows == 8 || tile.rows / 2 < rows, "{rows}");
            }
        }
        assert_eq!(Tile::of(true, 999).gate_up, "fg_moe_gate_up_coded_m64");
        assert_eq!(Tile::of(false, 999).product, "fg_gemm_bf16_m128");
    }

    #[test]
    fn scales_for_a_few_inputs_are_refused() {
        let int4 = |group| Dtype::Int4 { group };
        let fp8 = |block_k| Dtype::Fp8 {
            block_n: 3,
            block_k,
        };
        for (dtype, taken) in [
            (Dtype::F16, true),
            (Dtype::Mxfp4, true),
            (int4(16), true),
            (int4(40), true),
            (int4(24), false),
            (fp8(usize::MAX), true),
            (fp8(8), false),
        ] {
            let judged = supported("weights", dtype, 40);
            assert_eq!(judged.is_ok(), taken, "{dtype}: {judged:?}");
        }
        assert_eq!(
            Kind::of(fp8(usize::MAX), 40),
            Kind::Coded(Coding {
                format: 3,
                block_n: 3,
                block_k: u32::MAX
            })
        );
    }
}
