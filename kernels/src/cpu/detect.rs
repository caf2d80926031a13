//! The instruction paths this processor has.

use std::fmt;
use std::str::FromStr;

#[cfg(target_arch = "x86_64")]
use super::amx;

/// How the products of bfloat16 weights are summed. Results of one arithmetic have the same bits everywhere; those of two
/// are equal within rounding only, so whoever computes together must agree on one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arithmetic {
    /// One chain of fused multiply-adds per element, in pairs of inputs, of a pair the odd one first.
    Chain,
    /// Steps of 32 inputs from the first on. Of a step the even and the odd inputs are a chain each from zero; both are
    /// added, then their sum is added to the element. Numbers below 2⁻¹²⁶ are zero.
    Tiles,
}

/// A set of instructions. All paths of one [`Arithmetic`] give the same bits; they differ in speed only. One exception: in
/// products with bfloat16 weights [`Path::Avx512Bf16`] takes numbers below 2⁻¹²⁶ for zero.
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
    /// AMX for products with bfloat16 weights, the best vector instructions for everything else (x86-64, Linux). Never
    /// chosen unasked: it has another [`Arithmetic`].
    Amx,
}

/// The processor does not have the path that was asked for, or the system keeps it from this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this machine has no {path} instructions for this process; choose one of: {}", names(&Path::present()))]
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
    /// All paths: those of the chain, slowest first, then those of another arithmetic.
    pub const ALL: [Self; 6] = [
        Self::Portable,
        Self::Neon,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Amx,
    ];

    /// The paths of this processor, in the order of [`Path::ALL`].
    #[must_use]
    pub fn present() -> Vec<Self> {
        Self::ALL.into_iter().filter(|p| p.is_present()).collect()
    }

    /// The fastest path of this processor with the arithmetic that every processor has, [`Arithmetic::Chain`].
    #[must_use]
    pub fn best() -> Self {
        Self::ALL
            .into_iter()
            .rev()
            .find(|p| p.arithmetic() == Arithmetic::Chain && p.is_present())
            .unwrap_or(Self::Portable)
    }

    /// How it sums.
    #[must_use]
    pub const fn arithmetic(self) -> Arithmetic {
        match self {
            Self::Portable | Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 | Self::Neon => {
                Arithmetic::Chain
            }
            Self::Amx => Arithmetic::Tiles,
        }
    }

    /// Whether this processor has it, and the system lets this process use it.
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
            #[cfg(target_arch = "x86_64")]
            Self::Amx => amx::usable(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 | Self::Amx => false,
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
            Self::Amx => "amx",
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

/// What computes tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// The processor.
    #[cfg(target_arch = "x86_64")]
    Hardware,
    /// Plain Rust.
    Software,
}

/// A path that this processor was found to have, or that somebody vouched for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Isa {
    path: Path,
    lanes: Path,
    tiles: Option<Unit>,
}

impl Isa {
    /// `None` when the processor does not have the path.
    pub(crate) fn of(path: Path) -> Option<Self> {
        // SAFETY: the processor has the path.
        path.is_present().then(|| unsafe { Self::trusted(path) })
    }

    /// A path that is not looked for.
    ///
    /// # Safety
    /// Its instructions can be executed.
    pub(crate) unsafe fn trusted(path: Path) -> Self {
        #[cfg(target_arch = "x86_64")]
        if path == Path::Amx {
            return Self::with_tiles(Unit::Hardware);
        }
        Self {
            path,
            lanes: path,
            tiles: None,
        }
    }

    /// AMX's arithmetic by a unit, everything else by the best vector instructions.
    fn with_tiles(unit: Unit) -> Self {
        Self {
            path: Path::Amx,
            lanes: Path::best(),
            tiles: Some(unit),
        }
    }

    /// AMX's arithmetic, without the instructions.
    pub(crate) fn software_tiles() -> Self {
        Self::with_tiles(Unit::Software)
    }

    /// The fastest path of this processor.
    pub(crate) fn best() -> Self {
        let path = Path::best();
        Self {
            path,
            lanes: path,
            tiles: None,
        }
    }

    /// The path by name.
    pub(crate) const fn path(self) -> Path {
        self.path
    }

    /// The path of vector instructions.
    pub(crate) const fn lanes(self) -> Path {
        self.lanes
    }

    /// What multiplies bfloat16 weights, when it is not the vector instructions.
    pub(crate) const fn tiles(self) -> Option<Unit> {
        self.tiles
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_path_is_present_and_names_round_trip() {
        assert!(Path::best().is_present());
        assert_eq!(Path::present()[0], Path::Portable);
        assert_eq!(Path::best().arithmetic(), Arithmetic::Chain);
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
