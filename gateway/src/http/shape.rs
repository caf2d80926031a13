//! What differs between the routes that generate: how they write a delta. Streams and whole answers know
//! a route by its [`Shape`] only.

use serde::Serialize;
use serde_json::{Value, json};

use crate::generate::{Delta, Finish, Stop};

/// An answer, or a chunk of one, with choices of type `C`. It is written as it stands: a tree of values for each token
/// would cost more than what is in it.
#[derive(Debug, Serialize)]
pub(super) struct Frame<'a, C> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Value>,
}

/// Tokens read and made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) prompt: usize,
    pub(super) completion: usize,
    pub(super) cached: usize,
}

impl Usage {
    /// Counts a delta. `n`: choices per prompt, whose first one speaks for the prompt.
    pub(super) fn add(&mut self, delta: &Delta, n: usize) {
        self.completion += delta.tokens.len();
        if let Some(prompt) = &delta.prompt
            && delta.choice.is_multiple_of(n)
        {
            self.cached += prompt.cached as usize;
        }
    }

    pub(super) fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": { "cached_tokens": self.cached },
        })
    }
}

/// How a route writes its answers.
pub(super) trait Shape: Send + 'static {
    /// The model's served name.
    fn model(&self) -> &str;
    /// One chunk, or none if the delta has nothing to tell.
    fn chunk<'a>(&'a mut self, delta: &'a Delta) -> Option<impl Serialize + 'a>;
    /// The chunk that carries usage.
    fn usage_chunk(&self, usage: Usage) -> impl Serialize;
    /// The whole answer, choices in order.
    fn whole<'a>(&'a self, choices: &'a [Delta], usage: Usage) -> impl Serialize + 'a;
    /// Choices per prompt.
    fn n(&self) -> usize;
    /// Prompt tokens of the request.
    fn prompt_tokens(&self) -> usize;
    /// Whether the answer is a stream.
    fn stream(&self) -> bool;
    /// Whether a stream ends with usage.
    fn include_usage(&self) -> bool;
}

/// `finish_reason` and vLLM's `stop_reason`.
pub(super) fn finish_fields(finish: Option<&Finish>) -> (Option<&'static str>, Value) {
    let stop = match finish.and_then(|finish| finish.stop.as_ref()) {
        None => Value::Null,
        Some(Stop::Text(text)) => text.as_str().into(),
        Some(Stop::Token(id)) => (*id).into(),
    };
    (finish.map(|finish| finish.reason), stop)
}

/// Adds a document's JSON, which has no raw line breaks, to `bytes`.
pub(super) fn write(document: &impl Serialize, mut bytes: Vec<u8>) -> Vec<u8> {
    // Only a map with keys that are no strings could not be written, and ours has none.
    if let Err(error) = serde_json::to_writer(&mut bytes, document) {
        tracing::error!(%error, "an answer could not be written");
    }
    bytes
}
