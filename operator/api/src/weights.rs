//! Formats of weights: which part of a model has which, what a user may choose, and how many bytes it takes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How many inputs of an output share a scale when weights are quantised to int4 at load.
const INT4_GROUP: u32 = 64;
/// Sides of the squares that share a scale when weights are quantised to FP8 at load.
const FP8_BLOCK: u32 = 128;
/// Inputs that share a scale in MXFP4, as the format's specification has it.
const MXFP4_GROUP: usize = 32;
/// Bytes of a scale of int8, int4 and FP8: a float32.
const SCALE: usize = 4;

/// The format of a matrix in memory. A matrix of `n` outputs and `k` inputs has *canonical bytes*, which
/// are what workers send each other: the weights row by row, then what scales them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// IEEE single precision, 4 bytes.
    Float32,
    /// bfloat16, 2 bytes.
    Bfloat16,
    /// IEEE half precision, 2 bytes.
    Float16,
    /// One byte per weight, one scale per output.
    Int8,
    /// Half a byte per weight; a scale and a zero point for every `group` inputs of an output.
    Int4 {
        /// Inputs of a group; at least the row's length for one group per row.
        group: u32,
    },
    /// One byte per weight (e4m3); one scale for every block of weights.
    Fp8 {
        /// Outputs of a block.
        rows: u32,
        /// Inputs of a block.
        columns: u32,
    },
    /// Half a byte per weight (e2m1), one power of two for every 32 inputs of an output.
    Mxfp4,
}

impl WeightFormat {
    /// A group of int4 that is as long as the row.
    pub const WHOLE_ROW: u32 = u32::MAX;

    /// Whether a weight is one number, with no scale beside it.
    #[must_use]
    pub const fn is_plain(self) -> bool {
        matches!(self, Self::Float32 | Self::Bfloat16 | Self::Float16)
    }

    /// Bytes of the sections of a matrix's canonical bytes: weights, scales, zero points. Sections that
    /// a format does not have are 0. A size beyond memory is `usize::MAX`.
    #[must_use]
    pub fn sections(self, n: usize, k: usize) -> [usize; 3] {
        let times = usize::saturating_mul;
        match self {
            Self::Float32 => [times(times(n, k), 4), 0, 0],
            Self::Bfloat16 | Self::Float16 => [times(times(n, k), 2), 0, 0],
            Self::Int8 => [times(n, k), times(n, SCALE), 0],
            Self::Int4 { group } => {
                let groups = times(n, k.div_ceil(group.max(1) as usize));
                [times(n, k.div_ceil(2)), times(groups, SCALE), groups]
            }
            Self::Fp8 { rows, columns } => {
                let down = n.div_ceil(rows.max(1) as usize);
                let across = k.div_ceil(columns.max(1) as usize);
                [times(n, k), times(times(down, across), SCALE), 0]
            }
            Self::Mxfp4 => [
                times(n, k.div_ceil(2)),
                times(n, k.div_ceil(MXFP4_GROUP)),
                0,
            ],
        }
    }

    /// Canonical bytes of a matrix of `n` outputs and `k` inputs.
    #[must_use]
    pub fn matrix_bytes(self, n: usize, k: usize) -> usize {
        self.sections(n, k)
            .into_iter()
            .fold(0, usize::saturating_add)
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float32 => f.write_str("float32"),
            Self::Bfloat16 => f.write_str("bfloat16"),
            Self::Float16 => f.write_str("float16"),
            Self::Int8 => f.write_str("int8"),
            Self::Int4 {
                group: Self::WHOLE_ROW,
            } => f.write_str("int4 (one group per row)"),
            Self::Int4 { group } => write!(f, "int4 (groups of {group})"),
            Self::Fp8 { rows, columns } => write!(f, "fp8 (blocks of {rows}x{columns})"),
            Self::Mxfp4 => f.write_str("mxfp4"),
        }
    }
}

/// What a matrix is for. All matrices of a part have one format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The token embedding.
    Embedding,
    /// Projections of the attention.
    Attention,
    /// Routers, and the gates of shared experts.
    Router,
    /// Routed experts.
    Expert,
    /// Dense feed-forward blocks and shared experts.
    Dense,
    /// The output projection.
    Output,
}

impl Part {
    /// All parts, in the order of a forward pass.
    pub const ALL: [Self; 6] = [
        Self::Embedding,
        Self::Attention,
        Self::Router,
        Self::Expert,
        Self::Dense,
        Self::Output,
    ];
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Embedding => "token embedding",
            Self::Attention => "attention",
            Self::Router => "routers",
            Self::Expert => "routed experts",
            Self::Dense => "dense and shared feed-forward",
            Self::Output => "output projection",
        })
    }
}

/// The format of every part of a model. A part that a model does not have has a format that says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightFormats {
    /// The token embedding; that of the output projection too, where they are one matrix.
    pub embedding: WeightFormat,
    /// Projections of the attention.
    pub attention: WeightFormat,
    /// Routers, and the gates of shared experts.
    pub router: WeightFormat,
    /// Routed experts.
    pub expert: WeightFormat,
    /// Dense feed-forward blocks and shared experts.
    pub dense: WeightFormat,
    /// The output projection.
    pub output: WeightFormat,
}

impl WeightFormats {
    /// The same format for all parts.
    #[must_use]
    pub const fn all(format: WeightFormat) -> Self {
        Self {
            embedding: format,
            attention: format,
            router: format,
            expert: format,
            dense: format,
            output: format,
        }
    }

    /// The format of a part.
    #[must_use]
    pub const fn of(&self, part: Part) -> WeightFormat {
        match part {
            Part::Embedding => self.embedding,
            Part::Attention => self.attention,
            Part::Router => self.router,
            Part::Expert => self.expert,
            Part::Dense => self.dense,
            Part::Output => self.output,
        }
    }

    /// The format of a part, to be changed.
    pub const fn of_mut(&mut self, part: Part) -> &mut WeightFormat {
        match part {
            Part::Embedding => &mut self.embedding,
            Part::Attention => &mut self.attention,
            Part::Router => &mut self.router,
            Part::Expert => &mut self.expert,
            Part::Dense => &mut self.dense,
            Part::Output => &mut self.output,
        }
    }
}

/// To which format the plain matrices of a checkpoint are converted at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum PlainFormat {
    /// As the files have them.
    #[default]
    Auto,
    /// float32: a wider copy of what the files have.
    Float32,
    /// bfloat16, rounded to the nearest.
    Bfloat16,
    /// float16, rounded to the nearest.
    Float16,
}

/// To which format linear layers are quantised at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Quantization {
    /// Not at all.
    #[default]
    None,
    /// int8, one scale per output.
    Int8,
    /// int4, groups of 64.
    Int4,
    /// FP8 (e4m3), blocks of 128 × 128.
    Fp8,
    /// MXFP4.
    Mxfp4,
}

impl Quantization {
    /// What `--quantization` takes, in the order of the variants.
    pub const NAMES: [&str; 5] = ["none", "int8", "int4", "fp8", "mxfp4"];

    /// The format of the layers that are quantised.
    #[must_use]
    pub const fn format(self) -> Option<WeightFormat> {
        match self {
            Self::None => None,
            Self::Int8 => Some(WeightFormat::Int8),
            Self::Int4 => Some(WeightFormat::Int4 { group: INT4_GROUP }),
            Self::Fp8 => Some(WeightFormat::Fp8 {
                rows: FP8_BLOCK,
                columns: FP8_BLOCK,
            }),
            Self::Mxfp4 => Some(WeightFormat::Mxfp4),
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::NAMES[*self as usize])
    }
}

impl fmt::Display for PlainFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::NAMES[*self as usize])
    }
}

impl PlainFormat {
    /// What `--dtype` takes, in the order of the variants.
    pub const NAMES: [&str; 4] = ["auto", "float32", "bfloat16", "float16"];

    /// The format to convert to, if any.
    #[must_use]
    pub const fn format(self) -> Option<WeightFormat> {
        match self {
            Self::Auto => None,
            Self::Float32 => Some(WeightFormat::Float32),
            Self::Bfloat16 => Some(WeightFormat::Bfloat16),
            Self::Float16 => Some(WeightFormat::Float16),
        }
    }
}

/// A word that is no format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownFormat {
    found: String,
    wanted: &'static [&'static str],
}

impl fmt::Display for UnknownFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: give {}", self.found, self.wanted.join(", "))
    }
}

impl std::error::Error for UnknownFormat {}

impl FromStr for PlainFormat {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        match text {
            "auto" => Ok(Self::Auto),
            "float32" => Ok(Self::Float32),
            "bfloat16" => Ok(Self::Bfloat16),
            "float16" => Ok(Self::Float16),
            other => Err(UnknownFormat {
                found: other.to_owned(),
                wanted: &Self::NAMES,
            }),
        }
    }
}

impl FromStr for Quantization {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        match text {
            "none" => Ok(Self::None),
            "int8" => Ok(Self::Int8),
            "int4" => Ok(Self::Int4),
            "fp8" => Ok(Self::Fp8),
            "mxfp4" => Ok(Self::Mxfp4),
            other => Err(UnknownFormat {
                found: other.to_owned(),
                wanted: &Self::NAMES,
            }),
        }
    }
}

/// What is done with a checkpoint's weights at load: one value for a whole cluster, since experts move
/// between its workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightSettings {
    /// Conversion of the plain matrices.
    pub dtype: PlainFormat,
    /// Quantisation of the linear layers.
    pub quantization: Quantization,
}

impl WeightSettings {
    /// Formats in memory of a checkpoint that has the formats `stored`. What is quantised: projections of
    /// the attention, experts, dense and shared feed-forward, the output projection. Routers keep a plain
    /// format, since a slightly other logit can choose another expert. An embedding is quantised only if it is the output
    /// projection as well (`tied`): otherwise a token reads one row of it.
    #[must_use]
    pub fn in_memory(&self, stored: &WeightFormats, tied: bool) -> WeightFormats {
        let mut formats = *stored;
        for part in Part::ALL {
            let format = formats.of_mut(part);
            if let Some(plain) = self.dtype.format()
                && format.is_plain()
            {
                *format = plain;
            }
            let quantised = match part {
                Part::Router => false,
                Part::Embedding => tied,
                Part::Attention | Part::Expert | Part::Dense | Part::Output => true,
            };
            if let Some(target) = self.quantization.format()
                && quantised
            {
                *format = target;
            }
        }
        formats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_every_format() {
        // 3 outputs of 70 inputs.
        let bytes = |format: WeightFormat| format.matrix_bytes(3, 70);
        assert_eq!(bytes(WeightFormat::Float32), 840);
        assert_eq!(bytes(WeightFormat::Bfloat16), 420);
        assert_eq!(bytes(WeightFormat::Float16), 420);
        assert_eq!(bytes(WeightFormat::Int8), 210 + 12);
        assert_eq!(bytes(WeightFormat::Int4 { group: 32 }), 105 + 9 * 4 + 9);
        let whole = WeightFormat::Int4 {
            group: WeightFormat::WHOLE_ROW,
        };
        assert_eq!(bytes(whole), 105 + 12 + 3);
        let (rows, columns) = (2, 64);
        assert_eq!(bytes(WeightFormat::Fp8 { rows, columns }), 210 + 16);
        assert_eq!(bytes(WeightFormat::Mxfp4), 105 + 9);
        assert_eq!(
            WeightFormat::Int8.matrix_bytes(usize::MAX, 3),
            usize::MAX,
            "saturates"
        );
    }

    #[test]
    fn names_are_what_is_parsed() {
        for name in PlainFormat::NAMES {
            assert_eq!(name.parse::<PlainFormat>().unwrap().to_string(), name);
        }
        for name in Quantization::NAMES {
            assert_eq!(name.parse::<Quantization>().unwrap().to_string(), name);
        }
        let error = "int3".parse::<Quantization>().unwrap_err().to_string();
        assert_eq!(error, "`int3`: give none, int8, int4, fp8, mxfp4");
        assert!("half".parse::<PlainFormat>().is_err());
    }

    #[test]
    fn routers_and_an_embedding_of_its_own_stay_plain() {
        let stored = WeightFormats::all(WeightFormat::Bfloat16);
        let settings = WeightSettings {
            dtype: PlainFormat::Float32,
            quantization: Quantization::Int8,
        };
        let untied = settings.in_memory(&stored, false);
        assert_eq!(untied.router, WeightFormat::Float32);
        assert_eq!(untied.embedding, WeightFormat::Float32);
        for part in [Part::Attention, Part::Expert, Part::Dense, Part::Output] {
            assert_eq!(untied.of(part), WeightFormat::Int8, "{part}");
        }
        assert_eq!(
            settings.in_memory(&stored, true).embedding,
            WeightFormat::Int8
        );
        let same = WeightSettings::default().in_memory(&stored, true);
        assert_eq!(same, stored);
    }

    #[test]
    fn a_conversion_leaves_quantised_parts_alone() {
        let mut stored = WeightFormats::all(WeightFormat::Float16);
        stored.expert = WeightFormat::Mxfp4;
        let settings = WeightSettings {
            dtype: PlainFormat::Bfloat16,
            quantization: Quantization::None,
        };
        let found = settings.in_memory(&stored, false);
        assert_eq!(found.expert, WeightFormat::Mxfp4);
        assert_eq!(found.attention, WeightFormat::Bfloat16);
    }
}
