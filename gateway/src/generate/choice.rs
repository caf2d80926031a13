//! One choice: a sequence's events in, deltas out.

use std::sync::Arc;
use std::time::Duration;

use foregate_wire::generation::{FinishReason, Finished, Prefilled, Token};
use futures::stream::{self, Stream};
use tokio::time::Instant;

use super::delta::{Delta, Finish, PromptReport, Stop, TokenReport};
use super::job::Job;
use crate::admission::Meter;
use crate::error::ApiError;
use crate::metrics::{Measured, Metrics};
use crate::output::{TextOptions, TextStream};
use crate::prompt::Prompter;
use crate::trace::Identity;
use crate::upstream::{Event, Sequence};

/// When things happened in one choice; counts the choice when dropped.
struct Times {
    metrics: Arc<Metrics>,
    began: Instant,
    first: Option<Duration>,
    last: Option<Instant>,
    generated: u64,
    reason: Option<&'static str>,
}

impl Times {
    fn token(&mut self, now: Instant) {
        self.generated += 1;
        if self.first.is_none() {
            let after = now - self.began;
            self.first = Some(after);
            self.metrics.first_token(after);
        }
        self.metrics.token(self.last.map(|last| now - last));
        self.last = Some(now);
    }
}

impl Drop for Times {
    fn drop(&mut self) {
        self.metrics.finished(Measured {
            reason: self.reason.unwrap_or("abort"),
            whole: self.began.elapsed(),
            first: self.first,
            generated: self.generated,
        });
    }
}

/// One choice.
pub(super) struct ChoiceStream {
    pub(super) sequence: Sequence,
    text: TextStream,
    index: usize,
    /// Only the prompt was asked for.
    silent: bool,
    client_stops: Vec<u32>,
    prompt_tokens: usize,
    identity: Identity,
    meter: Arc<Meter>,
    /// Whether it speaks for its prompt, which counts once whatever the number of its answers.
    first_of_prompt: bool,
    times: Times,
    done: bool,
}

impl ChoiceStream {
    /// Choice `index` of `job`, whose `sequence` was just accepted.
    pub(super) fn new(
        prompter: &Prompter,
        metrics: &Arc<Metrics>,
        job: &Job,
        index: usize,
        sequence: Sequence,
        meter: &Arc<Meter>,
        identity: &Identity,
    ) -> Self {
        let asked = &job.generation;
        let options = TextOptions {
            stop: asked.stop.clone(),
            include_stop: asked.include_stop,
            skip_special_tokens: asked.skip_special_tokens,
            min_tokens: asked.min_tokens,
        };
        let prompt = job.prompt_of(index);
        Self {
            sequence,
            text: TextStream::new(prompter, prompt, &options),
            index,
            silent: job.max_tokens == 0,
            client_stops: asked.stop_token_ids.clone(),
            prompt_tokens: prompt.len(),
            identity: identity.clone(),
            meter: Arc::clone(meter),
            first_of_prompt: index.is_multiple_of(asked.n.max(1) as usize),
            times: Times {
                metrics: Arc::clone(metrics),
                began: job.began,
                first: None,
                last: None,
                generated: 0,
                reason: None,
            },
            done: false,
        }
    }

    pub(super) fn deltas(self) -> impl Stream<Item = Result<Delta, ApiError>> + Send + 'static {
        stream::unfold(self, |mut choice| async move {
            if choice.done {
                return None;
            }
            let delta = choice.next().await;
            if delta.is_err() {
                choice.done = true;
                choice.times.reason = Some("error");
            }
            Some((delta, choice))
        })
    }

    async fn next(&mut self) -> Result<Delta, ApiError> {
        let event = self.sequence.next().await?;
        let now = Instant::now();
        let mut delta = match event {
            Event::Prefilled(prefilled) => self.prefilled(prefilled),
            Event::Token(_) if self.silent => self.end(Finish {
                reason: "length",
                stop: None,
            }),
            Event::Token(token) => self.token(token, now),
            Event::Finished(finished) => self.finished(&finished),
        };
        delta.choice = self.index;
        delta.arrived = Some(now);
        Ok(delta)
    }

    fn prefilled(&mut self, prefilled: Prefilled) -> Delta {
        self.times.metrics.prompt(self.prompt_tokens);
        if self.first_of_prompt {
            self.meter.read(self.prompt_tokens);
        }
        Delta {
            prompt: Some(PromptReport {
                logprobs: prefilled.prompt_logprobs,
                routed: prefilled.routed,
                cached: self.sequence.cached_tokens(),
            }),
            ..Delta::default()
        }
    }

    fn token(&mut self, token: Token, now: Instant) -> Delta {
        self.times.token(now);
        self.meter.made(now);
        if self.times.generated == 1
            && let Some(first) = self.times.first
        {
            self.identity
                .span
                .record("gen_ai.latency.time_to_first_token", first.as_secs_f64());
        }
        let piece = self.text.push(token.id);
        let mut delta = match piece.stopped_by {
            // The sequence is not asked again; dropping it tells the worker.
            Some(stop) => self.end(Finish {
                reason: "stop",
                stop: Some(Stop::Text(stop)),
            }),
            None => Delta::default(),
        };
        delta.text = piece.text;
        delta.routed.extend(token.routed);
        delta.tokens.push(TokenReport {
            id: token.id,
            offset: piece.offset,
            info: token.info,
        });
        delta
    }

    fn finished(&mut self, finished: &Finished) -> Delta {
        let tail = self.text.finish();
        let mut finish = match finished.reason() {
            FinishReason::Length => Finish {
                reason: "length",
                stop: None,
            },
            _ => Finish {
                reason: "stop",
                stop: finished
                    .stop_token
                    .filter(|id| self.client_stops.contains(id))
                    .map(Stop::Token),
            },
        };
        if let Some(stop) = tail.stopped_by {
            finish = Finish {
                reason: "stop",
                stop: Some(Stop::Text(stop)),
            };
        }
        if self.silent {
            finish.reason = "length";
        }
        let mut delta = self.end(finish);
        delta.text = tail.text;
        delta
    }

    fn end(&mut self, finish: Finish) -> Delta {
        self.done = true;
        self.times.reason = Some(finish.reason);
        Delta {
            finish: Some(finish),
            ..Delta::default()
        }
    }
}
