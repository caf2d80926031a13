//! The instruction paths this processor has.

use std::fmt;
use std::str::FromStr;

/// A set of vector instructions. All paths give the same bits; they differ in speed only. One exception: in products
/// with bfloat16 weights [`Path::Avx512Bf16`] takes numbers below 2⁻¹²⁶ for zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Path {
    /// Plain Rust, everywhere.
    Portable,
    /// AVX2 with FMA and F16C (x86-64).
    Avx2,
    /// AVX-512 F and BW (x86-64).
    Avx512,
    /// AVX-512 F, BW and VBMI with the bfloat16 products (x86-64).
    Avx512Bf16,
    /// NEON (aarch64).
    Neon,
}

/// The processor does not have the path that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this processor has no {path} instructions; choose one of: {}", names(&Path::present()))]
pub struct PathError {
    /// The path.
    pub path: Path,
}

/// No path has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown instruction path {name:?}; known: {}", names(&Path::ALL))]
pub struct UnknownPath {
    /// The name that was asked for.
    pub name: String,
}

fn names(paths: &[Path]) -> String {
    paths
        .iter()
        .map(|p| p.name())
        .collect::<Vec<_>>()
        .join(", ")
}

impl Path {
    /// All paths, slowest first.
    pub const ALL: [Self; 5] = [
        Self::Portable,
        Self::Neon,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
    ];

    /// The paths of this processor, slowest first.
    #[must_use]
    pub fn present() -> Vec<Self> {
        Self::ALL.into_iter().filter(|p| p.is_present()).collect()
    }

    /// The fastest path of this processor.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL
            .into_iter()
            .rev()
            .find(|p| p.is_present())
            .unwrap_or(Self::Portable)
    }

    /// Whether this processor has it.
    #[must_use]
    pub fn is_present(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.is_present()
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 => false,
            #[cfg(not(target_arch = "aarch64"))]
            Self::Neon => false,
        }
    }

    /// Its name in configuration and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Neon => "neon",
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Path {
    type Err = UnknownPath;

    fn from_str(name: &str) -> Result<Self, UnknownPath> {
        Self::ALL
            .into_iter()
            .find(|p| p.name() == name)
            .ok_or_else(|| UnknownPath {
                name: name.to_owned(),
            })
    }
}

/// A path that this processor was found to have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Isa(Path);

impl Isa {
    /// `None` when the processor does not have the path.
    pub(crate) fn of(path: Path) -> Option<Self> {
        path.is_present().then_some(Self(path))
    }

    /// The fastest path of this processor.
    pub(crate) fn best() -> Self {
        Self(Path::best())
    }

    pub(crate) const fn path(self) -> Path {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_path_is_present_and_names_round_trip() {
        assert!(Path::best().is_present());
        assert_eq!(Path::present()[0], Path::Portable);
        for path in Path::ALL {
            assert_eq!(path.name().parse(), Ok(path));
        }
        let error = "sse9".parse::<Path>().unwrap_err();
        assert!(error.to_string().contains("avx512"), "{error}");
    }

    #[test]
    fn a_missing_path_is_refused_by_name() {
        let missing = if cfg!(target_arch = "x86_64") {
            Path::Neon
        } else {
            Path::Avx512
        };
        let error = crate::Cpu::with_path(missing, 1).unwrap_err();
        assert!(error.to_string().contains(missing.name()), "{error}");
        assert!(error.to_string().contains("portable"), "{error}");
    }
}
