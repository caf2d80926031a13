//! The fields that chat and completions share: lengths, sampling, stops, reports.

use std::collections::BTreeMap;

use foregate_api::limits::PRIORITY;
use serde_json::Value;

use super::defaults::Defaults;
use super::fields::{Fields, number, wrong};
use crate::error::{ApiError, clip};
use crate::generate::Generation;

/// Most choices per prompt.
pub(super) const MAX_N: u32 = 128;
/// Most alternatives reported per token.
pub(super) const MAX_LOGPROBS: u32 = 20;
/// Most stop strings, and most bytes in one.
pub(super) const MAX_STOPS: usize = 32;
/// Most bytes in a stop string.
pub(super) const MAX_STOP_BYTES: usize = 1024;

/// Reads the shared fields; `logprobs` and the limits that differ are read by the caller first. What the
/// request does not say comes from `defaults`.
pub(super) fn parse(fields: &mut Fields, defaults: &Defaults) -> Result<Generation, ApiError> {
    let chosen = Defaults::take(fields)?.or(defaults);
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let n = fields.count("n", 1, MAX_N)?.unwrap_or(1);
    let generation = Generation {
        max_tokens: None,
        min_tokens: fields.count("min_tokens", 0, u32::MAX)?.unwrap_or(0),
        temperature: chosen.temperature.unwrap_or(1.0),
        top_p: chosen.top_p.unwrap_or(1.0),
        top_k: chosen.top_k.unwrap_or(0),
        min_p: chosen.min_p.unwrap_or(0.0),
        repetition_penalty: chosen.repetition_penalty.unwrap_or(1.0),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0, 2.0)?
            .unwrap_or(0.0),
        logit_bias: logit_bias(fields)?,
        seed: seed(fields)?,
        n,
        priority: fields.integer("priority", PRIORITY.0, PRIORITY.1)?,
        stop: stop(fields)?,
        stop_token_ids: fields.token_ids("stop_token_ids")?.unwrap_or_default(),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        include_stop: fields
            .boolean("include_stop_str_in_output")?
            .unwrap_or(false),
        skip_special_tokens: fields.boolean("skip_special_tokens")?.unwrap_or(true),
        logprobs: None,
        prompt_logprobs: fields.count("prompt_logprobs", 0, MAX_LOGPROBS)?,
        return_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
        return_routed_experts: fields.boolean("return_routed_experts")?.unwrap_or(false),
        tokens_as_ids: fields
            .boolean("return_tokens_as_token_ids")?
            .unwrap_or(false),
        stream,
        include_usage: stream_options(fields, stream)?,
    };
    if stream && generation.prompt_logprobs.is_some() {
        return Err(ApiError::unsupported(
            "prompt_logprobs",
            "`prompt_logprobs` is not supported with `stream`: ask without streaming",
        ));
    }
    harmless(fields, n)?;
    Ok(generation)
}

/// Fields that are accepted with the values that ask for nothing, and refused with others.
fn harmless(fields: &mut Fields, n: u32) -> Result<(), ApiError> {
    let text = |value: &Value| value.is_string();
    let no = |value: &Value| value == &Value::Bool(false);
    let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    fields.only("user", text, "it must be a string")?;
    fields.only("safety_identifier", text, "it must be a string")?;
    fields.only("prompt_cache_key", text, "it must be a string")?;
    fields.only("metadata", Value::is_object, "it must be an object")?;
    fields.only("store", no, "answers are not stored, send false or nothing")?;
    fields.only(
        "service_tier",
        |value| matches!(value.as_str(), Some("auto" | "default")),
        "there is one tier, send \"auto\" or nothing",
    )?;
    fields.only(
        "best_of",
        |value| value.as_u64() == Some(u64::from(n)),
        "it must equal `n`, answers are not ranked",
    )?;
    fields.only(
        "response_format",
        |value| {
            value.as_object().is_some_and(|format| {
                format.len() == 1 && format.get("type").and_then(Value::as_str) == Some("text")
            })
        },
        "only {\"type\": \"text\"} is served",
    )?;
    fields.only("use_beam_search", no, "there is no beam search")?;
    fields.only(
        "length_penalty",
        |value| value.as_f64() == Some(1.0),
        "there is no beam search, send 1 or nothing",
    )?;
    fields.only(
        "spaces_between_special_tokens",
        |value| value == &Value::Bool(true),
        "send true or nothing",
    )?;
    fields.only("tools", empty, "tools are not served")?;
    fields.only("functions", empty, "tools are not served")?;
    fields.only(
        "tool_choice",
        |value| matches!(value.as_str(), Some("none" | "auto")),
        "tools are not served, send \"none\" or nothing",
    )?;
    fields.only(
        "parallel_tool_calls",
        Value::is_boolean,
        "tools are not served",
    )
}

/// Any 64-bit integer; a negative one is taken by its bits.
fn seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.take("seed") else {
        return Ok(None);
    };
    if let Some(seed) = value.as_u64() {
        return Ok(Some(seed));
    }
    match value.as_i64() {
        Some(seed) => Ok(Some(seed.cast_unsigned())),
        None if value.is_number() => Err(ApiError::invalid(
            "seed",
            format!("`seed` must be a 64-bit integer, not {value}"),
        )),
        None => Err(wrong("seed", "an integer", &value)),
    }
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(list)) => list
            .into_iter()
            .enumerate()
            .map(|(at, value)| match value {
                Value::String(text) => Ok(text),
                other => Err(wrong(&format!("stop[{at}]"), "a string", &other)),
            })
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(wrong("stop", "a string or a list of strings", &other)),
    };
    if stops.len() > MAX_STOPS {
        return Err(ApiError::invalid(
            "stop",
            format!(
                "`stop` has {} strings, at most {MAX_STOPS} are served",
                stops.len()
            ),
        ));
    }
    if stops.iter().any(String::is_empty) {
        return Err(ApiError::invalid(
            "stop",
            "`stop` must not have an empty string",
        ));
    }
    if stops.iter().any(|text| text.len() > MAX_STOP_BYTES) {
        return Err(ApiError::invalid(
            "stop",
            format!("a string of `stop` must have at most {MAX_STOP_BYTES} bytes"),
        ));
    }
    Ok(stops)
}

fn logit_bias(fields: &mut Fields) -> Result<BTreeMap<u32, f32>, ApiError> {
    let map = match fields.take("logit_bias") {
        None => return Ok(BTreeMap::new()),
        Some(Value::Object(map)) => map,
        Some(other) => {
            return Err(wrong(
                "logit_bias",
                "an object of token id to number",
                &other,
            ));
        }
    };
    if map.len() > 1024 {
        return Err(ApiError::invalid(
            "logit_bias",
            format!(
                "`logit_bias` has {} tokens, at most 1024 are served",
                map.len()
            ),
        ));
    }
    map.iter()
        .map(|(token, bias)| {
            let id = token.parse::<u32>().map_err(|_| {
                ApiError::invalid(
                    "logit_bias",
                    format!(
                        "`logit_bias` has the key `{}`, which is no token id",
                        clip(token, 80)
                    ),
                )
            })?;
            Ok((
                id,
                number(&format!("logit_bias.{id}"), bias, -100.0, 100.0)?,
            ))
        })
        .collect()
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(value) = fields.take("stream_options") else {
        return Ok(false);
    };
    if !stream {
        return Err(ApiError::invalid(
            "stream_options",
            "`stream_options` is only allowed with `stream`: true",
        ));
    }
    let mut options = Fields::nested("stream_options", value)?;
    let usage = options.boolean("include_usage")?.unwrap_or(false);
    options.only(
        "include_obfuscation",
        |value| value == &Value::Bool(false),
        "send false or nothing",
    )?;
    options.only(
        "continuous_usage_stats",
        |value| value == &Value::Bool(false),
        "usage comes in the last chunk only",
    )?;
    options.finish()?;
    Ok(usage)
}
