//! The body of `POST /v1/completions`.

use serde_json::Value;

use super::defaults::Defaults;
use super::fields::{Fields, token_ids, wrong};
use super::sampling::{self, MAX_LOGPROBS};
use crate::error::ApiError;
use crate::generate::Generation;

/// Most prompts in one request.
pub(super) const MAX_PROMPTS: usize = 1024;

/// A prompt as given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptInput {
    /// To be encoded.
    Text(String),
    /// Already encoded.
    Tokens(Vec<u32>),
}

/// A completions request.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionsRequest {
    /// The model asked for; absent: the main one.
    pub model: Option<String>,
    /// The prompts, not empty; choices come in their order, `n` for each.
    pub prompts: Vec<PromptInput>,
    /// Whether the prompt is part of the answer.
    pub echo: bool,
    /// Whether encoding adds the tokenizer's special tokens.
    pub add_special_tokens: bool,
    /// Everything else; `max_tokens` 0 is allowed with `echo`.
    pub generation: Generation,
}

/// Reads the body of `POST /v1/completions`; `defaults` are the model's, save for `max_tokens`, which is 16 as
/// everywhere.
///
/// # Errors
/// 400, naming the field.
pub fn parse_completions(
    body: &[u8],
    defaults: &Defaults,
) -> Result<CompletionsRequest, ApiError> {
    let mut fields = Fields::body(body)?;
    let model = fields.string("model")?;
    let prompts = prompts(&mut fields)?;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(true);
    let logprobs = fields.count("logprobs", 0, MAX_LOGPROBS)?;
    let max_tokens = fields.count("max_tokens", 0, u32::MAX)?.unwrap_or(16);
    let mut generation = sampling::parse(&mut fields, defaults)?;
    generation.logprobs = logprobs;
    generation.max_tokens = Some(max_tokens);
    fields.only(
        "suffix",
        |value| value.as_str() == Some(""),
        "there is no insertion",
    )?;
    fields.finish()?;
    if max_tokens == 0 && !echo {
        return Err(ApiError::invalid(
            "max_tokens",
            "`max_tokens` must be at least 1 without `echo`",
        ));
    }
    let choices = prompts.len() * generation.n as usize;
    if choices > MAX_PROMPTS {
        return Err(ApiError::invalid(
            "n",
            format!("prompts × `n` is {choices}, at most {MAX_PROMPTS} choices are served"),
        ));
    }
    Ok(CompletionsRequest {
        model,
        prompts,
        echo,
        add_special_tokens,
        generation,
    })
}

fn prompts(fields: &mut Fields) -> Result<Vec<PromptInput>, ApiError> {
    let list = match fields.take("prompt") {
        None => return Err(ApiError::invalid("prompt", "`prompt` is missing")),
        Some(Value::String(text)) => return Ok(vec![PromptInput::Text(text)]),
        Some(Value::Array(list)) => list,
        Some(other) => {
            return Err(wrong(
                "prompt",
                "a string, a list of strings, a list of token ids or a list of those",
                &other,
            ));
        }
    };
    if list.is_empty() {
        return Err(ApiError::invalid("prompt", "`prompt` must not be empty"));
    }
    if list[0].is_number() {
        return Ok(vec![PromptInput::Tokens(token_ids("prompt", &list)?)]);
    }
    if list.len() > MAX_PROMPTS {
        return Err(ApiError::invalid(
            "prompt",
            format!(
                "`prompt` has {} entries, at most {MAX_PROMPTS} are served",
                list.len()
            ),
        ));
    }
    list.into_iter()
        .enumerate()
        .map(|(at, value)| one(&format!("prompt[{at}]"), value))
        .collect()
}

fn one(name: &str, value: Value) -> Result<PromptInput, ApiError> {
    match value {
        Value::String(text) => Ok(PromptInput::Text(text)),
        Value::Array(list) if list.is_empty() => Err(ApiError::invalid(
            name,
            format!("`{name}` must have at least one token"),
        )),
        Value::Array(list) => Ok(PromptInput::Tokens(token_ids(name, &list)?)),
        other => Err(wrong(name, "a string or a list of token ids", &other)),
    }
}
