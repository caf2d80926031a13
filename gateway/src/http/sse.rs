//! Server-sent events as OpenAI sends them: `data: {…}` lines, comments to keep proxies awake, an error as
//! an event of its own, `[DONE]` at a good end. Dropping the body drops the answer and so cancels it.

use std::pin::Pin;
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures::StreamExt;
use serde::Serialize;
use tokio::time::{Instant, Sleep, sleep};

use super::shape::{Shape, Usage, write};
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
    /// Ends when a comment is due. One for all waits, as it is cheaper to put off than to make.
    silence: Pin<Box<Sleep>>,
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
        silence: Box::pin(sleep(KEEP_ALIVE)),
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
            let delta = tokio::select! {
                biased;
                delta = answer.deltas.next() => delta,
                () = self.silence.as_mut() => {
                    self.speak();
                    return Some(Bytes::from_static(b": keep-alive\n\n"));
                }
            };
            self.speak();
            match delta {
                None => return Some(self.end()),
                Some(Err(error)) => {
                    self.call.metrics.rejected(error.reason);
                    self.call.failed(&error);
                    self.answer = None;
                    return Some(event(&error.to_json()).into());
                }
                Some(Ok(delta)) => {
                    if !delta.tokens.is_empty() {
                        self.call.token();
                    }
                    self.usage.add(&delta, self.shape.n());
                    self.reasons
                        .extend(delta.finish.as_ref().map(|finish| finish.reason));
                    let Some(bytes) = self.shape.chunk(&delta).map(|chunk| event(&chunk))
                    else {
                        continue;
                    };
                    if let Some(arrived) = delta.arrived {
                        let added = Instant::now() - arrived;
                        let overhead = &self.call.metrics.token_overhead;
                        overhead.observe(added.as_secs_f64());
                    }
                    return Some(bytes.into());
                }
            }
        }
    }

    /// Something is said: silence begins anew.
    fn speak(&mut self) {
        self.silence.as_mut().reset(Instant::now() + KEEP_ALIVE);
    }

    fn end(&mut self) -> Bytes {
        self.answer = None;
        record(&mut self.call, &self.identity, self.usage, &self.reasons);
        let mut bytes = match self.shape.include_usage() {
            true => event(&self.shape.usage_chunk(self.usage)),
            false => Vec::new(),
        };
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

fn event(document: &impl Serialize) -> Vec<u8> {
    // What one token takes without logprobs.
    let mut bytes = Vec::with_capacity(256);
    bytes.extend_from_slice(b"data: ");
    let mut bytes = write(document, bytes);
    bytes.extend_from_slice(b"\n\n");
    bytes
}
