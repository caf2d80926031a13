//! From deltas to an HTTP answer, whole or as events; what differs between routes is a [`Shape`].

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use futures::StreamExt;
use serde_json::{Value, json};

use super::sse;
use super::state::placed;
use crate::error::ApiError;
use crate::generate::{Answer, Delta};
use crate::metrics::Metrics;
use crate::trace::Identity;

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
    /// Whether a stream ends with usage.
    fn include_usage(&self) -> bool;
}

/// Collects an answer.
pub(super) async fn whole(
    mut answer: Answer,
    shape: &impl Shape,
    identity: &Identity,
) -> Result<Response<Body>, ApiError> {
    let mut choices: BTreeMap<usize, Delta> = BTreeMap::new();
    let mut usage = Usage {
        prompt: shape.prompt_tokens(),
        ..Usage::default()
    };
    while let Some(delta) = answer.deltas.next().await {
        let delta = delta?;
        usage.add(&delta, shape.n());
        choices
            .entry(delta.choice)
            .or_insert_with(|| Delta {
                choice: delta.choice,
                ..Delta::default()
            })
            .merge(delta);
    }
    record(
        identity,
        usage,
        choices
            .values()
            .filter_map(|choice| choice.finish.as_ref().map(|finish| finish.reason)),
    );
    let document = shape.whole(choices.into_values().collect(), usage);
    let mut response = json_response(StatusCode::OK, &document);
    placed(&answer, response.headers_mut());
    Ok(response)
}

/// Streams an answer.
pub(super) fn events(
    answer: Answer,
    shape: impl Shape,
    identity: &Identity,
    metrics: Arc<Metrics>,
) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    placed(&answer, response.headers_mut());
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies such as nginx keep events back without it.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    *response.body_mut() = sse::body(answer, shape, identity.clone(), metrics);
    response
}

/// Writes the figures of a finished request into its span.
pub(super) fn record(
    identity: &Identity,
    usage: Usage,
    reasons: impl Iterator<Item = &'static str>,
) {
    let reasons: Vec<&str> = reasons.collect();
    identity
        .span
        .record("gen_ai.usage.output_tokens", usage.completion);
    identity
        .span
        .record("gen_ai.response.finish_reasons", reasons.join(","));
}

/// A JSON answer.
pub(super) fn json_response(status: StatusCode, document: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(document.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}
