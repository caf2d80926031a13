//! A request's sequences, run and merged: prompts × `n` streams of deltas.

use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_wire::generation::{
    FinishReason, Finished, GenerateRequest, Prefilled, RoutedExperts, Sampling, Token,
    TokenInfo,
};
use futures::future::try_join_all;
use futures::stream::{self, BoxStream, StreamExt};
use tokio::time::Instant;

use crate::admission::Permit;
use crate::error::ApiError;
use crate::http::Generation;
use crate::metrics::{Measured, Metrics};
use crate::output::{TextOptions, TextStream};
use crate::prompt::Prompter;
use crate::trace::Identity;
use crate::upstream::{Event, Sequence, Upstream};

/// A prompt ready to run.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Token ids, not empty.
    pub ids: Arc<[u32]>,
    /// The text as the client wrote it, if it did.
    pub text: Option<String>,
}

/// A request ready to run.
#[derive(Debug)]
pub struct Job {
    /// Prompts; choice `p * n + i` is the i-th answer to prompt `p`.
    pub prompts: Vec<Prompt>,
    /// Tokens per answer, resolved; 0: only the prompt is read.
    pub max_tokens: u32,
    /// Alternatives to report per prompt token.
    pub prompt_logprobs: Option<u32>,
    /// What the client asked.
    pub generation: Generation,
    /// Seed of the first choice of every prompt; the i-th has `seed + i`.
    pub seed: u64,
    /// Arrival of the request.
    pub began: Instant,
    /// End of its time.
    pub deadline: Instant,
}

/// What is new in one choice.
#[derive(Debug, Clone, Default)]
pub struct Delta {
    /// Which choice.
    pub choice: usize,
    /// Once, first: the prompt is read.
    pub prompt: Option<PromptReport>,
    /// Text that is certain.
    pub text: String,
    /// Tokens.
    pub tokens: Vec<TokenReport>,
    /// Experts of positions after the prompt.
    pub routed: Vec<RoutedExperts>,
    /// The end.
    pub finish: Option<Finish>,
    /// When the event arrived.
    pub arrived: Option<Instant>,
}

/// What prefill reported.
#[derive(Debug, Clone, Default)]
pub struct PromptReport {
    /// Entry `i` belongs to prompt token `i + 1`.
    pub logprobs: Vec<TokenInfo>,
    /// Experts of the prompt's positions.
    pub routed: Option<RoutedExperts>,
    /// Tokens found in the prefix cache.
    pub cached: u32,
}

/// A generated token.
#[derive(Debug, Clone, Default)]
pub struct TokenReport {
    /// Its id.
    pub id: u32,
    /// Characters of the answer before it.
    pub offset: usize,
    /// Its probability, if asked.
    pub info: Option<TokenInfo>,
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finish {
    /// `stop` or `length`.
    pub reason: &'static str,
    /// The stop string or the stop token, if the client's own ended it.
    pub stop: Option<Stop>,
}

/// What stopped a choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// A stop string.
    Text(String),
    /// A stop token.
    Token(u32),
}

impl Delta {
    /// Adds a later delta of the same choice.
    pub fn merge(&mut self, later: Self) {
        if later.prompt.is_some() {
            self.prompt = later.prompt;
        }
        self.text.push_str(&later.text);
        self.tokens.extend(later.tokens);
        self.routed.extend(later.routed);
        if later.finish.is_some() {
            self.finish = later.finish;
        }
    }
}

/// A running request. Dropping it cancels everything and gives the permit back.
pub struct Answer {
    /// Deltas of all choices, each choice in order.
    pub deltas: BoxStream<'static, Result<Delta, ApiError>>,
    /// Workers that took the first sequences, ascending.
    pub workers: Vec<Rank>,
    /// The first decision, as the header shows it.
    pub route: String,
    _permit: Permit,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer")
            .field("workers", &self.workers)
            .finish_non_exhaustive()
    }
}

/// What running a request needs.
#[derive(Debug, Clone)]
pub struct Runner {
    /// Text of tokens.
    pub prompter: Prompter,
    /// The workers.
    pub upstream: Arc<Upstream>,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

impl Runner {
    /// Starts a request. As many sequences as the permit allows start at once and are accepted by workers
    /// before this returns, so a refusal still has a status of its own; the others follow as these end.
    ///
    /// # Errors
    /// The first refusal.
    pub async fn start(
        &self,
        job: Job,
        permit: Permit,
        identity: &Identity,
    ) -> Result<Answer, ApiError> {
        let n = job.generation.n as usize;
        let total = job.prompts.len() * n;
        let width = (permit.sequences as usize).clamp(1, total.max(1));
        let job = Arc::new(job);
        let started =
            try_join_all((0..width).map(|index| self.open(&job, index, identity))).await?;
        let mut workers: Vec<Rank> = started
            .iter()
            .filter_map(|choice| choice.sequence.choice().map(|choice| choice.rank))
            .collect();
        workers.sort_unstable();
        workers.dedup();
        let route = started
            .first()
            .and_then(|choice| choice.sequence.choice())
            .map(ToString::to_string)
            .unwrap_or_default();
        let first = stream::iter(started).map(|choice| choice.deltas().boxed());
        let (runner, identity) = (self.clone(), identity.clone());
        let later = stream::iter(width..total).map(move |index| {
            let (runner, identity, job) = (runner.clone(), identity.clone(), Arc::clone(&job));
            stream::once(async move { runner.open(&job, index, &identity).await })
                .flat_map(|opened| match opened {
                    Ok(choice) => choice.deltas().boxed(),
                    Err(error) => stream::once(async { Err(error) }).boxed(),
                })
                .boxed()
        });
        Ok(Answer {
            deltas: first.chain(later).flatten_unordered(width).boxed(),
            workers,
            route,
            _permit: permit,
        })
    }

    async fn open(
        &self,
        job: &Job,
        index: usize,
        identity: &Identity,
    ) -> Result<ChoiceStream, ApiError> {
        let n = job.generation.n as usize;
        let prompt = &job.prompts[index / n];
        let request = upstream_request(job, prompt, index % n, index, identity);
        let sequence = self.upstream.open(request, identity, job.deadline).await?;
        let options = TextOptions {
            stop: job.generation.stop.clone(),
            include_stop: job.generation.include_stop,
            skip_special_tokens: job.generation.skip_special_tokens,
            min_tokens: job.generation.min_tokens,
        };
        Ok(ChoiceStream {
            sequence,
            text: TextStream::new(&self.prompter, &prompt.ids, &options),
            index,
            silent: job.max_tokens == 0,
            client_stops: job.generation.stop_token_ids.clone(),
            prompt_tokens: prompt.ids.len(),
            identity: identity.clone(),
            times: Times {
                metrics: Arc::clone(&self.metrics),
                began: job.began,
                first: None,
                last: None,
                generated: 0,
                reason: None,
            },
            done: false,
        })
    }
}

fn upstream_request(
    job: &Job,
    prompt: &Prompt,
    repeat: usize,
    index: usize,
    identity: &Identity,
) -> GenerateRequest {
    let asked = &job.generation;
    GenerateRequest {
        request_id: format!("{}-{index}", identity.request_id),
        token_ids: prompt.ids.to_vec(),
        prompt_len: u32::try_from(prompt.ids.len()).unwrap_or(u32::MAX),
        // A worker always makes a token; one that was not asked for is dropped here.
        max_tokens: job.max_tokens.max(1),
        min_tokens: asked.min_tokens,
        ignore_eos: asked.ignore_eos,
        stop_token_ids: asked.stop_token_ids.clone(),
        sampling: Some(Sampling {
            temperature: asked.temperature,
            top_k: asked.top_k,
            top_p: asked.top_p,
            min_p: asked.min_p,
            repetition_penalty: asked.repetition_penalty,
            presence_penalty: asked.presence_penalty,
            frequency_penalty: asked.frequency_penalty,
            logit_bias: asked
                .logit_bias
                .iter()
                .map(|(id, bias)| (*id, *bias))
                .collect(),
            seed: job.seed.wrapping_add(repeat as u64),
        }),
        logprobs: asked.logprobs,
        prompt_logprobs: job.prompt_logprobs,
        return_routed_experts: asked.return_routed_experts,
        deadline_ms: 0,
    }
}

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

/// One choice: events in, deltas out.
struct ChoiceStream {
    sequence: Sequence,
    text: TextStream,
    index: usize,
    /// Only the prompt was asked for.
    silent: bool,
    client_stops: Vec<u32>,
    prompt_tokens: usize,
    identity: Identity,
    times: Times,
    done: bool,
}

impl ChoiceStream {
    fn deltas(self) -> impl futures::Stream<Item = Result<Delta, ApiError>> + Send + 'static {
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
