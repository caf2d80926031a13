//! The sampling that a model asks for, `generation_config.json`: what a request does not say itself. The
//! fields are those that vLLM takes over; a value is judged like the same one in a request.

use std::path::Path;

use serde_json::Value;

use super::fields::Fields;
use crate::error::ApiError;
use crate::model_files::{self, ModelFileError};

/// How tokens are chosen and how many; `None`: not said.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Defaults {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// 1 is off.
    pub top_p: Option<f32>,
    /// 0 is off.
    pub top_k: Option<u32>,
    /// 0 is off.
    pub min_p: Option<f32>,
    /// 1 is off.
    pub repetition_penalty: Option<f32>,
    /// Tokens of an answer, if they fit. From `max_new_tokens`; a request has a field of its own for each
    /// route.
    pub max_tokens: Option<u32>,
}

impl Defaults {
    /// Reads `generation_config.json` of a model directory; without the file nothing is said.
    ///
    /// # Errors
    /// A file that cannot be read, or a value that could not stand in a request.
    pub fn load(dir: &Path) -> Result<Self, ModelFileError> {
        let path = dir.join("generation_config.json");
        let Some(document) = model_files::json(&path)? else {
            return Ok(Self::default());
        };
        Self::of_document(document).map_err(|error| ModelFileError::parse(&path, error.message))
    }

    /// Other fields of the file speak of training or of things that are not served; the end tokens among
    /// them are read by the workers.
    fn of_document(document: Value) -> Result<Self, ApiError> {
        let mut fields = Fields::document(document)?;
        let mut defaults = Self::take(&mut fields)?;
        defaults.max_tokens = fields.count("max_new_tokens", 1, u32::MAX)?;
        Ok(defaults)
    }

    /// Takes the fields that a request and the file have in common.
    pub(super) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(Self {
            temperature: fields.number("temperature", 0.0, 2.0)?,
            top_p: top_p(fields)?,
            top_k: top_k(fields)?,
            min_p: fields.number("min_p", 0.0, 1.0)?,
            repetition_penalty: repetition_penalty(fields)?,
            max_tokens: None,
        })
    }

    /// These, and where they say nothing, `others`.
    pub(super) fn or(self, others: &Self) -> Self {
        Self {
            temperature: self.temperature.or(others.temperature),
            top_p: self.top_p.or(others.top_p),
            top_k: self.top_k.or(others.top_k),
            min_p: self.min_p.or(others.min_p),
            repetition_penalty: self.repetition_penalty.or(others.repetition_penalty),
            max_tokens: self.max_tokens.or(others.max_tokens),
        }
    }
}

fn top_p(fields: &mut Fields) -> Result<Option<f32>, ApiError> {
    let top_p = fields.number("top_p", 0.0, 1.0)?;
    if top_p.is_none_or(|top_p| top_p > 0.0) {
        return Ok(top_p);
    }
    Err(ApiError::invalid(
        "top_p",
        "`top_p` must be greater than 0 and at most 1; for greedy answers send `temperature`: 0",
    ))
}

/// -1 and 0 both mean "off", as in vLLM.
fn top_k(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let top_k = fields.integer("top_k", -1, i64::from(u32::MAX))?;
    Ok(top_k.map(|top_k| u32::try_from(top_k).unwrap_or(0)))
}

fn repetition_penalty(fields: &mut Fields) -> Result<Option<f32>, ApiError> {
    let penalty = fields.number("repetition_penalty", 0.0, 100.0)?;
    if penalty.is_none_or(|penalty| penalty > 0.0) {
        return Ok(penalty);
    }
    Err(ApiError::invalid(
        "repetition_penalty",
        "`repetition_penalty` must be greater than 0; 1 switches it off",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Defaults, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        Defaults::load(dir.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_the_file_says_is_taken() {
        let text = r#"{"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": null, "max_new_tokens": 2048,
            "do_sample": true, "eos_token_id": [1, 2], "transformers_version": "4.51.0"}"#;
        let expected = Defaults {
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(20),
            max_tokens: Some(2048),
            ..Defaults::default()
        };
        assert_eq!(load(text).unwrap(), expected);
        let nowhere = tempfile::tempdir().unwrap();
        assert_eq!(Defaults::load(nowhere.path()).unwrap(), Defaults::default());
    }

    #[test]
    fn what_no_request_could_say_names_file_and_field() {
        for (text, part) in [
            (
                r#"{"temperature": -1}"#,
                "`temperature` must be from 0 to 2, not -1",
            ),
            (r#"{"top_p": 0}"#, "`top_p` must be greater than 0"),
            (r#"{"top_k": "x"}"#, "`top_k` must be an integer"),
            (
                r#"{"repetition_penalty": 0}"#,
                "`repetition_penalty` must be",
            ),
            (
                r#"{"max_new_tokens": 0}"#,
                "`max_new_tokens` must be an integer from 1",
            ),
            ("[]", "the file must be a JSON object, not a list"),
            ("{", "EOF"),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.contains("generation_config.json: "), "{error}");
            assert!(error.contains(part), "{part} is not in {error}");
        }
    }

    #[test]
    fn the_request_wins() {
        let file = Defaults {
            temperature: Some(0.6),
            top_k: Some(20),
            ..Defaults::default()
        };
        let request = Defaults {
            temperature: Some(0.0),
            ..Defaults::default()
        };
        let both = request.or(&file);
        assert_eq!((both.temperature, both.top_k), (Some(0.0), Some(20)));
    }
}
