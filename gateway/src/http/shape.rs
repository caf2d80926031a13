//! What differs between the routes that generate: how they write a delta. Streams and whole answers know
//! a route by its [`Shape`] only.

use serde_json::{Value, json};

use crate::generate::{Delta, Finish, Stop};

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
    fn chunk(&mut self, delta: Delta) -> Option<Value>;
    /// The chunk that carries usage.
    fn usage_chunk(&self, usage: Usage) -> Value;
    /// The whole answer, choices in order.
    fn whole(&self, choices: Vec<Delta>, usage: Usage) -> Value;
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
pub(super) fn finish_fields(finish: Option<&Finish>) -> (Value, Value) {
    match finish {
        None => (Value::Null, Value::Null),
        Some(finish) => {
            let stop = match &finish.stop {
                None => Value::Null,
                Some(Stop::Text(text)) => text.as_str().into(),
                Some(Stop::Token(id)) => (*id).into(),
            };
            (finish.reason.into(), stop)
        }
    }
}
