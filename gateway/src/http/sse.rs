//! Server-sent events as OpenAI sends them: `data: {…}` lines, comments to keep proxies awake, an error as
//! an event of its own, `[DONE]` at a good end. Dropping the body drops the answer and so cancels it.

use std::time::Duration;

use axum::body::{Body, Bytes};
use futures::StreamExt;
use serde_json::Value;
use tokio::time::{Instant, timeout};

use super::shape::{Shape, Usage};
use crate::generate::Answer;
use crate::metrics::Call;
use crate::trace::Identity;

/// Silence after which a comment is sent.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

struct Events<S> {
    answer: Option<Answer>,
    shape: S,
    usage: Usage,
    reasons: Vec<&'static str>,
    identity: Identity,
    call: Call,
}

/// The body of a stream.
pub(super) fn body<S: Shape>(answer: Answer, shape: S, call: Call, identity: Identity) -> Body {
    let events = Events {
        usage: Usage {
            prompt: shape.prompt_tokens(),
            ..Usage::default()
        },
        answer: Some(answer),
        shape,
        reasons: Vec::new(),
        identity,
        call,
    };
    Body::from_stream(futures::stream::unfold(events, |mut events| async move {
        let bytes = events.next().await?;
        Some((Ok::<_, std::convert::Infallible>(bytes), events))
    }))
}

impl<S: Shape> Events<S> {
    /// The next bytes; `None` after the end.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let answer = self.answer.as_mut()?;
            match timeout(KEEP_ALIVE, answer.deltas.next()).await {
                Err(_) => return Some(Bytes::from_static(b": keep-alive\n\n")),
                Ok(None) => return Some(self.end()),
                Ok(Some(Err(error))) => {
                    self.call.metrics.rejected(error.reason);
                    self.call.failed(&error);
                    self.answer = None;
                    return Some(event(&error.to_json()));
                }
                Ok(Some(Ok(delta))) => {
                    let arrived = delta.arrived;
                    if !delta.tokens.is_empty() {
                        self.call.token();
                    }
                    self.usage.add(&delta, self.shape.n());
                    self.reasons
                        .extend(delta.finish.as_ref().map(|finish| finish.reason));
                    let Some(chunk) = self.shape.chunk(delta) else {
                        continue;
                    };
                    let bytes = event(&chunk);
                    if let Some(arrived) = arrived {
                        let added = Instant::now() - arrived;
                        let overhead = &self.call.metrics.token_overhead;
                        overhead.observe(added.as_secs_f64());
                    }
                    return Some(bytes);
                }
            }
        }
    }

    fn end(&mut self) -> Bytes {
        self.answer = None;
        record(&mut self.call, &self.identity, self.usage, &self.reasons);
        let mut bytes = Vec::new();
        if self.shape.include_usage() {
            bytes.extend_from_slice(&event(&self.shape.usage_chunk(self.usage)));
        }
        bytes.extend_from_slice(b"data: [DONE]\n\n");
        Bytes::from(bytes)
    }
}

/// Writes the figures of a finished request into its metrics and its span.
pub(super) fn record(call: &mut Call, identity: &Identity, usage: Usage, reasons: &[&str]) {
    call.done(usage.prompt, usage.completion, reasons.len());
    identity
        .span
        .record("gen_ai.usage.output_tokens", usage.completion);
    identity
        .span
        .record("gen_ai.response.finish_reasons", reasons.join(","));
}

fn event(document: &Value) -> Bytes {
    // JSON has no raw line breaks, so one line it is.
    Bytes::from(format!("data: {document}\n\n"))
}
