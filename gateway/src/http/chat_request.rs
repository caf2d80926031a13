//! The body of `POST /v1/chat/completions`.

use serde_json::{Map, Value};

use super::defaults::Defaults;
use super::fields::{Fields, wrong};
use super::sampling::{self, MAX_LOGPROBS};
use crate::error::{ApiError, clip};
use crate::generate::Generation;
use crate::prompt::Message;

/// Most messages in a conversation.
pub(super) const MAX_MESSAGES: usize = 4096;

/// A chat request.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// The model asked for; absent: the main one.
    pub model: Option<String>,
    /// The conversation, not empty.
    pub messages: Vec<Message>,
    /// Whether the template opens the assistant's turn.
    pub add_generation_prompt: bool,
    /// Whether encoding adds the tokenizer's special tokens (templates write their own).
    pub add_special_tokens: bool,
    /// Further variables for the template.
    pub template_variables: Map<String, Value>,
    /// Everything else.
    pub generation: Generation,
}

/// Reads the body of `POST /v1/chat/completions`; `defaults` are the model's.
///
/// # Errors
/// 400, naming the field.
pub fn parse_chat(body: &[u8], defaults: &Defaults) -> Result<ChatRequest, ApiError> {
    let mut fields = Fields::body(body)?;
    let model = fields.string("model")?;
    let messages = messages(&mut fields)?;
    let logprobs = logprobs(&mut fields)?;
    let max_tokens = max_tokens(&mut fields)?;
    let mut generation = sampling::parse(&mut fields, defaults)?;
    generation.logprobs = logprobs;
    generation.max_tokens = max_tokens;
    let (add_generation_prompt, add_special_tokens, template_variables) =
        template(&mut fields)?;
    fields.only(
        "modalities",
        |value| value == &Value::from(vec!["text"]),
        "only [\"text\"] is served",
    )?;
    fields.only(
        "echo",
        |value| value == &Value::Bool(false),
        "only /v1/completions echoes the prompt",
    )?;
    fields.finish()?;
    Ok(ChatRequest {
        model,
        messages,
        add_generation_prompt,
        add_special_tokens,
        template_variables,
        generation,
    })
}

/// Reads what steers the template. Shared with `/tokenize`.
pub(super) fn template(
    fields: &mut Fields,
) -> Result<(bool, bool, Map<String, Value>), ApiError> {
    let prompt = fields.boolean("add_generation_prompt")?.unwrap_or(true);
    let special = fields.boolean("add_special_tokens")?.unwrap_or(false);
    fields.only(
        "continue_final_message",
        |value| value == &Value::Bool(false),
        "use /v1/completions to continue a text",
    )?;
    let variables = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong("chat_template_kwargs", "an object", &other)),
    };
    if let Some(taken) = ["messages", "add_generation_prompt", "tools"]
        .into_iter()
        .find(|name| variables.contains_key(*name))
    {
        return Err(ApiError::invalid(
            "chat_template_kwargs",
            format!("`chat_template_kwargs` must not set `{taken}`"),
        ));
    }
    Ok((prompt, special, variables))
}

/// Reads `messages`. Shared with `/tokenize`.
pub(super) fn messages(fields: &mut Fields) -> Result<Vec<Message>, ApiError> {
    let list = match fields.take("messages") {
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong("messages", "a list", &other)),
        None => return Err(ApiError::invalid("messages", "`messages` is missing")),
    };
    if list.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "`messages` must not be empty",
        ));
    }
    if list.len() > MAX_MESSAGES {
        return Err(ApiError::invalid(
            "messages",
            format!(
                "`messages` has {} entries, at most {MAX_MESSAGES} are served",
                list.len()
            ),
        ));
    }
    list.into_iter()
        .enumerate()
        .map(|(at, value)| message(format!("messages[{at}]"), value))
        .collect()
}

fn message(path: String, value: Value) -> Result<Message, ApiError> {
    let mut fields = Fields::nested(path, value)?;
    let role = role(&mut fields)?;
    let content = content(&mut fields)?;
    let name = fields.string("name")?;
    fields.only(
        "tool_calls",
        |value| value.as_array().is_some_and(Vec::is_empty),
        "tools are not served",
    )?;
    fields.finish()?;
    Ok(Message {
        role,
        content,
        name,
    })
}

fn role(fields: &mut Fields) -> Result<&'static str, ApiError> {
    let name = fields.name("role");
    match fields.string("role")?.as_deref() {
        Some("system" | "developer") => Ok("system"),
        Some("user") => Ok("user"),
        Some("assistant") => Ok("assistant"),
        Some(tool @ ("tool" | "function")) => Err(ApiError::unsupported(
            name,
            format!("role `{tool}` is not supported: tools are not served"),
        )),
        Some(other) => Err(ApiError::invalid(
            name.clone(),
            format!(
                "`{name}` must be system, developer, user or assistant, not `{}`",
                clip(other, 80)
            ),
        )),
        None => Err(ApiError::invalid(
            name.clone(),
            format!("`{name}` is missing"),
        )),
    }
}

fn content(fields: &mut Fields) -> Result<String, ApiError> {
    let name = fields.name("content");
    match fields.take("content") {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => {
            let texts = parts
                .into_iter()
                .enumerate()
                .map(|(at, part)| text_part(format!("{name}[{at}]"), part))
                .collect::<Result<Vec<_>, _>>()?;
            Ok(texts.join("\n"))
        }
        Some(other) => Err(wrong(&name, "a string or a list of text parts", &other)),
        None => Err(ApiError::invalid(
            name.clone(),
            format!("`{name}` is missing"),
        )),
    }
}

fn text_part(path: String, value: Value) -> Result<String, ApiError> {
    if let Value::String(text) = value {
        return Ok(text);
    }
    let mut fields = Fields::nested(path, value)?;
    let kind = fields.name("type");
    match fields.string("type")?.as_deref() {
        Some("text") => {}
        Some(other) => {
            return Err(ApiError::unsupported(
                kind,
                format!(
                    "content of type `{}` is not supported: only text is",
                    clip(other, 80)
                ),
            ));
        }
        None => {
            return Err(ApiError::invalid(
                kind.clone(),
                format!("`{kind}` is missing"),
            ));
        }
    }
    let name = fields.name("text");
    let text = fields
        .string("text")?
        .ok_or_else(|| ApiError::invalid(name.clone(), format!("`{name}` is missing")))?;
    fields.finish()?;
    Ok(text)
}

fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0, MAX_LOGPROBS)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid(
            "top_logprobs",
            "`top_logprobs` needs `logprobs`: true",
        )),
    }
}

fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let old = fields.count("max_tokens", 1, u32::MAX)?;
    let new = fields.count("max_completion_tokens", 1, u32::MAX)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(ApiError::invalid(
            "max_completion_tokens",
            format!(
                "`max_tokens` ({old}) and `max_completion_tokens` ({new}) differ: send one"
            ),
        )),
        (old, new) => Ok(new.or(old)),
    }
}
