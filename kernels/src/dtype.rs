//! Number formats of weights.

use std::fmt;

use crate::error::ShapeError;

/// How a weight of `n` outputs × `k` inputs is stored, and with it what a product rounds.
///
/// Sums are always float32. Inputs that meet float32 or float16 weights stay float32; those that meet any other
/// format are rounded to bfloat16. [`Dtype::bytes`] says how long the *canonical* bytes are, which go to peers
/// and are hashed: rows of outputs, little-endian, then what is written below. A format of *codes* stands for
/// `code * scale`, where every code is a bfloat16 without loss; see [`MatMul`](crate::MatMul) for its products.
///
/// The error that each format names is what [`quantize`](crate::quantize) keeps, for weights of which none is
/// so small that a scale falls below 2⁻¹²⁶ (such a group of weights becomes zero).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32, 4 bytes.
    F32,
    /// bfloat16: the upper half of a binary32, 2 bytes. Error at most 2⁻⁸ of a weight.
    Bf16,
    /// IEEE 754 binary16, 2 bytes. Error at most 2⁻¹¹ of a weight, or 2⁻²⁵ where that is more.
    F16,
    /// Signed bytes, then one float32 scale per output. Error at most 1/254 of the greatest weight of an output.
    Int8,
    /// Codes of 4 bits, then scales and zero points: `w = (code - zero) * scale`.
    ///
    /// `n` rows of `ceil(k / 2)` bytes, the even input in the low half, and nothing (0) beside a last odd one;
    /// then per output and group of inputs one float32 scale; then as many zero points of one byte, `0..=16`.
    /// Root of the mean square error of a group: at most 1/30 of the span of its weights and zero.
    Int4 {
        /// Inputs that share a scale: even. The last group may be short.
        group: usize,
    },
    /// OCP float8 `e4m3fn` (no infinities, `0x7f` and `0xff` are not numbers), then one float32 scale per block,
    /// blocks in rows of blocks. A block of at least `n` × `k` is one scale for all, of 1 × at least `k` one per
    /// output. Error at most 2⁻⁴ of a weight, or 2⁻¹⁸ of the greatest weight of its block where that is more.
    Fp8 {
        /// Outputs that share a scale: at least 1.
        block_n: usize,
        /// Inputs that share a scale: even, or at least `k`.
        block_k: usize,
    },
    /// OCP MXFP4: `e2m1` codes of 4 bits (rows as those of [`Dtype::Int4`], `k` even), then per output and group
    /// of 32 inputs one `e8m0` byte, a power of two (`0xff` is not a number). Error at most a quarter of a weight,
    /// or 1/16 of the greatest weight of its group where that is more.
    Mxfp4,
}

/// Inputs that share a scale of [`Dtype::Mxfp4`].
pub(crate) const MX_GROUP: usize = 32;
/// The greatest zero point of [`Dtype::Int4`]: 16, because GPTQ's files store one less.
pub(crate) const MAX_ZERO: u8 = 16;

/// Lengths of the three parts of canonical bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sections {
    /// Of a row of weights or codes.
    pub(crate) row: usize,
    pub(crate) codes: usize,
    pub(crate) scales: usize,
    pub(crate) zeros: usize,
}

impl Dtype {
    /// Length of the canonical bytes of `n` outputs × `k` inputs.
    ///
    /// `None` when a matrix of that shape does not exist in this format (an odd `k` in MXFP4, a group of odd
    /// size) or would be larger than the address space.
    #[must_use]
    pub fn bytes(self, n: usize, k: usize) -> Option<usize> {
        self.check("bytes", k).ok()?;
        let parts = self.sections(n, k)?;
        parts
            .codes
            .checked_add(parts.scales)?
            .checked_add(parts.zeros)
    }

    /// Whether a row of `k` inputs may have this format.
    pub(crate) fn check(self, op: &'static str, k: usize) -> Result<(), ShapeError> {
        let even = |what, got: usize| {
            let odd = !got.is_multiple_of(2) || got == 0;
            odd.then(|| ShapeError::new(op, what, (got + 1).next_multiple_of(2), got))
                .map_or(Ok(()), Err)
        };
        match self {
            Self::F32 | Self::Bf16 | Self::F16 | Self::Int8 => Ok(()),
            Self::Int4 { group } => even("group of int4, even", group),
            Self::Fp8 { block_n: 0, .. } => {
                Err(ShapeError::new(op, "block_n of float8, at least", 1, 0))
            }
            Self::Fp8 { block_k, .. } if block_k >= k.max(1) => Ok(()),
            Self::Fp8 { block_k, .. } => even("block_k of float8, even", block_k),
            Self::Mxfp4 if k == 0 => Ok(()),
            Self::Mxfp4 => even("inputs of mxfp4, even", k),
        }
    }

    /// Bits of a code, for formats that have scales.
    pub(crate) const fn code_bits(self) -> Option<usize> {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 => None,
            Self::Int8 | Self::Fp8 { .. } => Some(8),
            Self::Int4 { .. } | Self::Mxfp4 => Some(4),
        }
    }

    /// Whether inputs are rounded to bfloat16 before they meet such weights.
    pub(crate) const fn rounds_inputs(self) -> bool {
        !matches!(self, Self::F32 | Self::F16)
    }

    /// Outputs and inputs that share a scale, in a row of `k`.
    pub(crate) fn block(self, k: usize) -> (usize, usize) {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 | Self::Int8 => (1, k.max(1)),
            Self::Int4 { group } => (1, group.min(k.max(1))),
            Self::Fp8 { block_n, block_k } => (block_n, block_k.min(k.max(1))),
            Self::Mxfp4 => (1, MX_GROUP),
        }
    }

    /// Scales of a row of `k`.
    pub(crate) fn groups(self, k: usize) -> usize {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 => 0,
            // Also one that has no inputs.
            Self::Int8 => 1,
            Self::Int4 { .. } | Self::Fp8 { .. } | Self::Mxfp4 => k.div_ceil(self.block(k).1),
        }
    }

    /// `None` when there is no such size. The format fits `k`.
    pub(crate) fn sections(self, n: usize, k: usize) -> Option<Sections> {
        let row = match self {
            Self::F32 => k.checked_mul(4)?,
            Self::Bf16 | Self::F16 => k.checked_mul(2)?,
            Self::Int8 | Self::Fp8 { .. } => k,
            Self::Int4 { .. } | Self::Mxfp4 => k.div_ceil(2),
        };
        let codes = n.checked_mul(row)?;
        let scales = n.div_ceil(self.block(k).0).checked_mul(self.groups(k))?;
        let (scale_bytes, zero_bytes) = match self {
            Self::Int4 { .. } => (4, 1),
            Self::Mxfp4 => (1, 0),
            Self::F32 | Self::Bf16 | Self::F16 | Self::Int8 | Self::Fp8 { .. } => (4, 0),
        };
        Some(Sections {
            row,
            codes,
            scales: scales.checked_mul(scale_bytes)?,
            zeros: scales * zero_bytes,
        })
    }

    /// Element `index` of little-endian `bytes`, widened to float32.
    ///
    /// `None` when `bytes` does not hold that element, or for a format of codes, whose numbers depend on a shape:
    /// see [`Matrix::row`](crate::Matrix::row).
    #[must_use]
    pub fn get(self, bytes: &[u8], index: usize) -> Option<f32> {
        let half = || bytes.as_chunks::<2>().0.get(index).copied();
        match self {
            Self::F32 => bytes
                .as_chunks::<4>()
                .0
                .get(index)
                .map(|b| f32::from_le_bytes(*b)),
            Self::Bf16 => half().map(|b| half::bf16::from_le_bytes(b).to_f32()),
            Self::F16 => half().map(|b| half::f16::from_le_bytes(b).to_f32()),
            Self::Int8 | Self::Int4 { .. } | Self::Fp8 { .. } | Self::Mxfp4 => None,
        }
    }

    /// All elements of little-endian `bytes`, widened to float32 (a vector such as a norm or a bias).
    /// A last incomplete element is left out.
    ///
    /// `None` for a format of codes, whose numbers depend on a shape.
    #[must_use]
    pub fn widen(self, bytes: &[u8]) -> Option<Vec<f32>> {
        let halves = bytes.as_chunks::<2>().0.iter();
        match self {
            Self::F32 => {
                let words = bytes.as_chunks::<4>().0.iter();
                Some(words.map(|b| f32::from_le_bytes(*b)).collect())
            }
            Self::Bf16 => Some(
                halves
                    .map(|b| half::bf16::from_le_bytes(*b).to_f32())
                    .collect(),
            ),
            Self::F16 => Some(
                halves
                    .map(|b| half::f16::from_le_bytes(*b).to_f32())
                    .collect(),
            ),
            Self::Int8 | Self::Int4 { .. } | Self::Fp8 { .. } | Self::Mxfp4 => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("float32"),
            Self::Bf16 => f.write_str("bfloat16"),
            Self::F16 => f.write_str("float16"),
            Self::Int8 => f.write_str("int8"),
            Self::Int4 { group } => write!(f, "int4-{group}"),
            Self::Fp8 { block_n, block_k } => {
                let size = |n: &usize| match *n {
                    usize::MAX => "all".to_owned(),
                    n => n.to_string(),
                };
                write!(f, "float8-{}x{}", size(block_n), size(block_k))
            }
            Self::Mxfp4 => f.write_str("mxfp4"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact() {
        let bytes: Vec<u8> = [0x3f80_u16, 0xc000, 0x7f7f]
            .iter()
            .flat_map(|b| b.to_le_bytes())
            .collect();
        assert_eq!(
            Dtype::Bf16.widen(&bytes),
            Some(vec![1.0, -2.0, f32::from_bits(0x7f7f_0000)])
        );
        assert_eq!(Dtype::Bf16.get(&bytes, 1), Some(-2.0));
        assert_eq!(Dtype::Bf16.get(&bytes, 3), None);
        assert_eq!(Dtype::F16.get(&[0x01, 0x3c], 0), Some(1.0 + 1.0 / 1024.0));
        assert_eq!(Dtype::F32.widen(&1.5_f32.to_le_bytes()), Some(vec![1.5]));
        assert_eq!(Dtype::Int8.widen(&bytes), None);
    }

    #[test]
    fn canonical_sizes() {
        let fp8 = |block_n, block_k| Dtype::Fp8 { block_n, block_k };
        let int4 = |group| Dtype::Int4 { group };
        for (dtype, n, k, want) in [
            (Dtype::F32, 3, 5, Some(60)),
            (Dtype::F16, 3, 5, Some(30)),
            (Dtype::Int8, 3, 5, Some(15 + 12)),
            (Dtype::Int8, 3, 0, Some(12)),
            (int4(32), 3, 33, Some(3 * 17 + 6 * 4 + 6)),
            (int4(33), 3, 33, None),
            (int4(0), 3, 33, None),
            (fp8(128, 128), 129, 256, Some(129 * 256 + 4 * 4)),
            (fp8(usize::MAX, usize::MAX), 5, 7, Some(35 + 4)),
            (fp8(1, usize::MAX), 5, 7, Some(35 + 20)),
            (fp8(1, 3), 5, 7, None),
            (fp8(0, 4), 5, 7, None),
            (Dtype::Mxfp4, 5, 34, Some(5 * 17 + 10)),
            (Dtype::Mxfp4, 5, 33, None),
            (Dtype::F32, usize::MAX, 2, None),
            (int4(2), usize::MAX / 2, 4, None),
        ] {
            assert_eq!(dtype.bytes(n, k), want, "{dtype} {n}x{k}");
        }
    }
}
