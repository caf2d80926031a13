//! The flags that say what is done with weights at load.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use foregate_api::weights::{PlainFormat, Quantization, WeightSettings};

/// Flags of every command that loads a model.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct WeightArgs {
    /// Format of the weights that are not quantised; auto: as the files have them.
    #[arg(long, value_name = "FORMAT", value_parser = PossibleValuesParser::new(PlainFormat::NAMES).try_map(|name| name.parse::<PlainFormat>()))]
    pub(crate) dtype: Option<PlainFormat>,
    /// Quantise linear layers at load.
    #[arg(long, value_name = "FORMAT", value_parser = PossibleValuesParser::new(Quantization::NAMES).try_map(|name| name.parse::<Quantization>()))]
    pub(crate) quantization: Option<Quantization>,
}

impl WeightArgs {
    /// With the defaults for what is not given.
    pub(crate) fn settings(self) -> WeightSettings {
        WeightSettings {
            dtype: self.dtype.unwrap_or_default(),
            quantization: self.quantization.unwrap_or_default(),
        }
    }
}
