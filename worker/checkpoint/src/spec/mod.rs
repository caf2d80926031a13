//! `config.json` and `generation_config.json` → [`Config`].
//!
//! The rule: a field is read, or it is on the list of fields that do not change what inference
//! computes, or it is refused by name. Nothing is ignored by accident, because a field ignored is
//! a model computed wrongly without anybody noticing. Absent fields take the defaults of the
//! family's configuration class in Hugging Face transformers.

mod families;
mod fields;
mod harmless;
pub(crate) mod quantization;
mod rope;
mod tokens;

use serde_json::Value;

use foregate_api::model::{Family, ModelSpec};
use foregate_api::weights::{WeightFormat, WeightFormats};

use fields::Fields;
pub use quantization::{Quantized, Scheme};

/// What is wrong with a configuration file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not a JSON object.
    #[error("not a JSON object ({what}); restore the file from the model's repository")]
    NotJson {
        /// The parser's words.
        what: String,
    },
    /// One field cannot be used.
    #[error("field `{field}`: {problem}; {remedy}")]
    Field {
        /// Its name, with a dotted path for nested ones.
        field: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
}

/// What a model directory's configuration says.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The model's shape. Its formats are those of matrices that are not quantised; which are, the
    /// tensors tell.
    pub spec: ModelSpec,
    /// How the others were quantised, if any were.
    pub quantized: Option<Quantized>,
}

/// Reads `config.json` and, if there is one, `generation_config.json`.
///
/// # Errors
/// Names the field that is missing, malformed or not supported, and the remedy.
pub fn parse(config: &[u8], generation: Option<&[u8]>) -> Result<Config, SpecError> {
    let config = object(config)?;
    let generation = generation.map(object).transpose()?;
    from_values(&config, generation.as_ref())
}

/// Whether the bytes are a JSON object at all.
pub(crate) fn check_object(bytes: &[u8]) -> Result<(), SpecError> {
    object(bytes).map(drop)
}

fn object(bytes: &[u8]) -> Result<Value, SpecError> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| SpecError::NotJson {
        what: error.to_string(),
    })?;
    if value.is_object() {
        Ok(value)
    } else {
        Err(SpecError::NotJson {
            what: "the top level is another kind of value".to_owned(),
        })
    }
}

fn from_values(config: &Value, generation: Option<&Value>) -> Result<Config, SpecError> {
    let mut fields = Fields::new(config);
    let family = family(&mut fields)?;
    harmless::refuse_active(&mut fields, family)?;
    let shape = families::Shape::read(&mut fields, family)?;
    let format = format(&mut fields)?;
    let quantized = quantization::read(&mut fields)?;
    let tokens = tokens::read(&mut fields, generation, shape.vocab)?;
    fields.finish(harmless::FIELDS)?;
    Ok(Config {
        spec: shape.into_spec(family, WeightFormats::all(format), tokens),
        quantized,
    })
}

fn family(fields: &mut Fields<'_>) -> Result<Family, SpecError> {
    match fields.required_text("model_type")? {
        "qwen3_moe" => Ok(Family::Qwen3Moe),
        "qwen2_moe" => Ok(Family::Qwen2Moe),
        "mixtral" => Ok(Family::Mixtral),
        "olmoe" => Ok(Family::Olmoe),
        other => Err(fields::refuse(
            "model_type",
            format!("family `{other}` is not supported"),
            "use a model of qwen3_moe, qwen2_moe, mixtral or olmoe",
        )),
    }
}

/// The old spelling is `torch_dtype`, the new one `dtype`; both may stand beside each other.
fn format(fields: &mut Fields<'_>) -> Result<WeightFormat, SpecError> {
    let new = fields.text("dtype")?;
    let old = fields.text("torch_dtype")?;
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        return Err(fields::refuse(
            "dtype",
            format!("`{new}`, but `torch_dtype` says `{old}`"),
            "keep the one that the weights have",
        ));
    }
    match new.or(old).unwrap_or("float32") {
        "float32" => Ok(WeightFormat::Float32),
        "bfloat16" => Ok(WeightFormat::Bfloat16),
        "float16" => Ok(WeightFormat::Float16),
        other => Err(fields::refuse(
            if new.is_some() {
                "dtype"
            } else {
                "torch_dtype"
            },
            format!("weights in `{other}` are not supported"),
            "convert the checkpoint to float32, bfloat16 or float16",
        )),
    }
}

#[cfg(test)]
mod tests;
