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
    /// As the kernels of cards sum.
    Card,
}

impl Arithmetic {
    /// What [`Member::cpu_path`](crate::member::Member::cpu_path) says of who computes on a card.
    pub const CARD: &str = "cuda";

    /// Of who computes with `path`: the name of an instruction path, or [`Self::CARD`]. A path of an unknown name is one of
    /// the chain.
    #[must_use]
    pub fn of(path: &str) -> Self {
        if path == Self::CARD {
            return Self::Card;
        }
        path.parse::<CpuPath>().unwrap_or_default().arithmetic()
    }
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

/// Which processors a worker's compute threads keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Pinning {
    /// To none: the system places them.
    None,
    /// To one memory (NUMA) node, where their weights then lie. Nothing on a machine with one node.
    #[default]
    Node,
    /// To one processor each, cores before second hardware threads.
    Core,
}

impl Pinning {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::None, Self::Node, Self::Core];

    /// Its name in documents and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Node => "node",
            Self::Core => "core",
        }
    }
}

impl FromStr for Pinning {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|pinning| pinning.name() == name);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("`{name}` is no way to pin threads; known: {names}")
        })
    }
}

/// Which of the workers on its machine a worker is, so that each takes processors of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seat {
    /// Its number, below `of`.
    pub index: u32,
    /// Workers that share the machine's processors; 1 where each has processors of its own.
    pub of: u32,
}

impl Seat {
    /// For a worker that shares its processors with no other.
    pub const ALONE: Self = Self { index: 0, of: 1 };
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
        for pinning in Pinning::ALL {
            assert_eq!(pinning.name().parse(), Ok(pinning));
            let read: Result<_, Error> =
                Pinning::deserialize(pinning.name().into_deserializer());
            assert_eq!(read, Ok(pinning));
        }
        assert!("numa".parse::<Pinning>().unwrap_err().contains("node"));
        assert!(
            "sse9"
                .parse::<CpuPath>()
                .unwrap_err()
                .contains("avx512bf16")
        );
    }
}
