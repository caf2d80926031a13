//! Requests at a pace.

use std::fmt::{Display, Formatter};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::bench::client::{Ask, Failure, Prompt, Seen, Target};
use crate::bench::workload::{Draw, Length, Text};
use crate::error::CliError;
use crate::progress::Task;

/// When the next request is due.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pace {
    /// Requests per second, whether or not earlier ones are done.
    Open(f64),
    /// So many are in work at a time.
    Closed(u32),
}

impl Display for Pace {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Open(rate) => write!(f, "{rate} requests/s offered"),
            Self::Closed(concurrency) => write!(f, "{concurrency} at a time"),
        }
    }
}

/// Where prompts come from.
#[derive(Debug)]
pub(super) enum Prompts {
    /// Random ids below `vocab`.
    Tokens { length: Length, vocab: u32 },
    /// Pieces of texts, in turn.
    Texts { texts: Vec<Text>, characters: usize },
}

impl Display for Prompts {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tokens { length, vocab } => write!(f, "{length} token ids below {vocab}"),
            Self::Texts { characters, .. } => write!(f, "{characters} characters of text"),
        }
    }
}

impl Prompts {
    /// The prompt of request `at`.
    fn draw(&self, at: u32, draw: &mut Draw) -> Prompt {
        match self {
            Self::Tokens { length, vocab } => {
                let length = length.draw(draw);
                let id = |_| u32::try_from(draw.below(*vocab as usize)).unwrap_or(0);
                Prompt::Tokens((0..length).map(id).collect())
            }
            Self::Texts { texts, characters } => {
                let text = &texts[at as usize % texts.len()];
                Prompt::Text(text.cut(*characters, draw))
            }
        }
    }
}

/// A request's result, when it was due after the start of its pace, and how much later it was sent.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) due: Duration,
    pub(super) late: Duration,
    pub(super) result: Result<Seen, Failure>,
}

/// What all requests share.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) target: Target,
    pub(super) model: Arc<str>,
    pub(super) prompts: Prompts,
    pub(super) output: Length,
    pub(super) ignore_eos: bool,
    /// Of prompts and answers.
    pub(super) draw: Draw,
    /// Of arrivals: one of its own, so that they are the same for prompts of any length.
    pub(super) arrivals: Draw,
}

impl Load {
    fn ask(&mut self, at: u32) -> Ask {
        Ask {
            prompt: self.prompts.draw(at, &mut self.draw),
            max_tokens: self.output.draw(&mut self.draw),
            ignore_eos: self.ignore_eos,
        }
    }

    /// Requests one after the other. The first shows whether the server takes such requests at all.
    pub(super) async fn warm_up(&mut self, requests: u32) -> Result<(), CliError> {
        for at in 0..requests {
            let ask = self.ask(at);
            let seen = self
                .target
                .complete(&self.model, &ask, Instant::now())
                .await;
            seen.map_err(|failure| self.refused(&failure))?;
        }
        Ok(())
    }

    fn refused(&self, failure: &Failure) -> CliError {
        let remedy = match (failure.kind.as_str(), &self.prompts, self.ignore_eos) {
            ("HTTP 400" | "HTTP 422", Prompts::Tokens { .. }, _) => {
                "; if the server takes no such token ids, lower --vocab, or leave out --prompt-tokens and send text"
            }
            ("HTTP 400" | "HTTP 422", Prompts::Texts { .. }, true) => {
                "; if the server does not know ignore_eos, pass --allow-eos"
            }
            _ => "",
        };
        CliError::Runtime(format!("the first request failed, {failure}{remedy}"))
    }

    /// All requests of a pace; fewer if `drain` is cancelled.
    pub(super) async fn run(
        &mut self,
        pace: Pace,
        requests: u32,
        task: &Task,
        drain: &CancellationToken,
    ) -> Vec<Sent> {
        let permits = Arc::new(Semaphore::new(match pace {
            Pace::Open(_) => Semaphore::MAX_PERMITS,
            Pace::Closed(concurrency) => concurrency as usize,
        }));
        let mut work = JoinSet::new();
        let begin = Instant::now();
        let mut due = begin;
        for at in 0..requests {
            let ask = self.ask(at);
            if let Pace::Open(rate) = pace {
                due += self.arrivals.gap(rate);
                tokio::select! {
                    () = sleep_until(due) => {}
                    () = drain.cancelled() => break,
                }
            }
            let permit = tokio::select! {
                permit = Arc::clone(&permits).acquire_owned() => permit,
                () = drain.cancelled() => break,
            };
            if let Pace::Closed(_) = pace {
                due = Instant::now();
            }
            let (target, model, task) =
                (self.target.clone(), Arc::clone(&self.model), task.clone());
            work.spawn(async move {
                let late = due.elapsed();
                let result = target.complete(&model, &ask, due).await;
                drop(permit);
                task.add(1);
                let due = due.saturating_duration_since(begin);
                Sent { due, late, result }
            });
        }
        let mut sent = Vec::new();
        while let Some(done) = work.join_next().await {
            sent.push(done.unwrap_or_else(|error| lost(&error)));
        }
        sent
    }
}

fn lost(error: &JoinError) -> Sent {
    Sent {
        due: Duration::ZERO,
        late: Duration::ZERO,
        result: Err(Failure::new("client", error.to_string())),
    }
}
