//! Number formats of weights.

use std::fmt;

/// How a weight is stored. Sums are always float32; inputs that meet bfloat16 weights are rounded to bfloat16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32, 4 bytes.
    F32,
    /// bfloat16: the upper half of a binary32, 2 bytes.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Element `index` of little-endian `bytes`, widened to float32.
    ///
    /// `None` when `bytes` does not hold that element.
    #[must_use]
    pub fn get(self, bytes: &[u8], index: usize) -> Option<f32> {
        match self {
            Self::F32 => bytes
                .as_chunks::<4>()
                .0
                .get(index)
                .map(|b| f32::from_le_bytes(*b)),
            Self::Bf16 => bytes
                .as_chunks::<2>()
                .0
                .get(index)
                .map(|b| half::bf16::from_le_bytes(*b).to_f32()),
        }
    }

    /// All elements of little-endian `bytes`, widened to float32 (a vector such as a norm or a bias).
    /// A last incomplete element is left out.
    #[must_use]
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
            Self::Bf16 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| half::bf16::from_le_bytes(*b).to_f32())
                .collect(),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        })
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
            [1.0, -2.0, f32::from_bits(0x7f7f_0000)]
        );
        assert_eq!(Dtype::Bf16.get(&bytes, 1), Some(-2.0));
        assert_eq!(Dtype::Bf16.get(&bytes, 3), None);
        assert_eq!(Dtype::F32.widen(&1.5_f32.to_le_bytes()), [1.5]);
    }
}
