//! The bodies of `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use serde_json::{Map, Value};

use super::chat_request::{messages, template};
use super::fields::Fields;
use crate::error::ApiError;
use crate::prompt::Message;

/// What to encode.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizeInput {
    /// A text.
    Prompt(String),
    /// A conversation, through the chat template.
    Chat {
        /// The conversation.
        messages: Vec<Message>,
        /// Whether the template opens the assistant's turn.
        add_generation_prompt: bool,
        /// Further variables for the template.
        template_variables: Map<String, Value>,
    },
}

/// A tokenize request.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizeRequest {
    /// The model asked for.
    pub model: Option<String>,
    /// What to encode.
    pub input: TokenizeInput,
    /// Whether the tokenizer's special tokens are added.
    pub add_special_tokens: bool,
    /// Whether the tokens' strings are returned too.
    pub return_token_strs: bool,
}

/// A detokenize request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetokenizeRequest {
    /// The model asked for.
    pub model: Option<String>,
    /// The ids.
    pub tokens: Vec<u32>,
}

/// Reads the body of `POST /tokenize`.
///
/// # Errors
/// 400, naming the field.
pub fn parse_tokenize(body: &[u8]) -> Result<TokenizeRequest, ApiError> {
    let mut fields = Fields::body(body)?;
    let model = fields.string("model")?;
    let return_token_strs = fields.boolean("return_token_strs")?.unwrap_or(false);
    let (input, add_special_tokens) = match fields.string("prompt")? {
        Some(prompt) => (
            TokenizeInput::Prompt(prompt),
            fields.boolean("add_special_tokens")?.unwrap_or(true),
        ),
        None => {
            let messages =
                messages(&mut fields).map_err(|error| match error.param.as_deref() {
                    Some("messages") if error.message.ends_with("missing") => {
                        ApiError::invalid("prompt", "send `prompt` or `messages`")
                    }
                    _ => error,
                })?;
            let (add_generation_prompt, special, template_variables) = template(&mut fields)?;
            let chat = TokenizeInput::Chat {
                messages,
                add_generation_prompt,
                template_variables,
            };
            (chat, special)
        }
    };
    fields.finish()?;
    Ok(TokenizeRequest {
        model,
        input,
        add_special_tokens,
        return_token_strs,
    })
}

/// Reads the body of `POST /detokenize`.
///
/// # Errors
/// 400, naming the field.
pub fn parse_detokenize(body: &[u8]) -> Result<DetokenizeRequest, ApiError> {
    let mut fields = Fields::body(body)?;
    let model = fields.string("model")?;
    let tokens = fields
        .token_ids("tokens")?
        .ok_or_else(|| ApiError::invalid("tokens", "`tokens` is missing"))?;
    fields.finish()?;
    Ok(DetokenizeRequest { model, tokens })
}
