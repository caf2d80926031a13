//! What a worker computes with.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How products of bfloat16 weights are summed. The bits of two arithmetics differ, so all members of a cluster have one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// One chain of fused multiply-adds per element; every processor has it.
    Chain,
    /// Sums of steps of 32 inputs, as AMX has them.
    Tiles,
}

/// Which instructions the kernels use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum CpuPath {
    /// The fastest of the processor with [`Arithmetic::Chain`], so never `amx`.
    #[default]
    Auto,
    /// Plain Rust.
    Portable,
    /// NEON.
    Neon,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F.
    Avx512,
    /// AVX-512 F with its bfloat16 products.
    Avx512Bf16,
    /// AMX for products with bfloat16 weights; the only path with [`Arithmetic::Tiles`].
    Amx,
}

impl CpuPath {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Auto,
        Self::Portable,
        Self::Neon,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Amx,
    ];

    /// Its name in documents and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }

    /// How it sums.
    #[must_use]
    pub const fn arithmetic(self) -> Arithmetic {
        match self {
            Self::Auto
            | Self::Portable
            | Self::Neon
            | Self::Avx2
            | Self::Avx512
            | Self::Avx512Bf16 => Arithmetic::Chain,
            Self::Amx => Arithmetic::Tiles,
        }
    }
}

impl FromStr for CpuPath {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|path| path.name() == name);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("`{name}` is no instruction path; known: {names}")
        })
    }
}

#[cfg(test)]
mod tests {
    use serde::de::IntoDeserializer;
    use serde::de::value::Error;

    use super::*;

    #[test]
    fn documents_and_the_command_line_have_the_same_names() {
        for path in CpuPath::ALL {
            assert_eq!(path.name().parse(), Ok(path));
            let read: Result<_, Error> = CpuPath::deserialize(path.name().into_deserializer());
            assert_eq!(read, Ok(path));
        }
        assert!(
            "sse9"
                .parse::<CpuPath>()
                .unwrap_err()
                .contains("avx512bf16")
        );
    }
}
