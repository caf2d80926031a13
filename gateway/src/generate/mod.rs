//! A request's sequences, run and merged: prompts × `n` streams of deltas.

mod choice;
mod delta;
mod job;

use std::sync::Arc;

use foregate_api::ids::Rank;
use futures::future::try_join_all;
use futures::stream::{self, BoxStream, StreamExt};

pub use delta::{Delta, Finish, PromptReport, Stop, TokenReport};
pub use job::{Generation, Job};

use crate::admission::{Meter, Permit};
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::prompt::Prompter;
use crate::trace::Identity;
use crate::traffic::Standing;
use crate::upstream::{Places, Upstream};
use choice::ChoiceStream;

/// A running request. Dropping it cancels everything and gives the permit back.
pub struct Answer {
    /// Deltas of all choices, each choice in order.
    pub deltas: BoxStream<'static, Result<Delta, ApiError>>,
    /// Workers that took the first sequences, ascending.
    pub workers: Vec<Rank>,
    /// The first decision, as the header shows it.
    pub route: String,
    /// What was left of its tenant's minute when it came.
    pub standing: Standing,
    _places: Option<Places>,
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
        let total = job.choices();
        let width = (permit.sequences as usize).clamp(1, total.max(1));
        let alone = total == 1;
        let places = match &self.upstream {
            upstream if alone || !upstream.is_windowed() => None,
            upstream => upstream.places(permit.sequences, job.deadline).await?,
        };
        let (job, meter) = (Arc::new(job), permit.meter());
        let first = (0..width).map(|index| self.open(&job, index, &meter, identity));
        let started = try_join_all(first).await?;
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
        let standing = permit.standing;
        let answer = |deltas| Answer {
            deltas,
            workers,
            route,
            standing,
            _places: places,
            _permit: permit,
        };
        let mut first: Vec<_> = started
            .into_iter()
            .map(|choice| choice.deltas().boxed())
            .collect();
        // Nothing to merge: what merges has a waker and a queue of its own for each event.
        if alone && let Some(only) = first.pop() {
            return Ok(answer(only));
        }
        let (runner, identity) = (self.clone(), identity.clone());
        let later = stream::iter(width..total).map(move |index| {
            let (runner, identity) = (runner.clone(), identity.clone());
            let (job, meter) = (Arc::clone(&job), Arc::clone(&meter));
            stream::once(async move { runner.open(&job, index, &meter, &identity).await })
                .flat_map(|opened| match opened {
                    Ok(choice) => choice.deltas().boxed(),
                    Err(error) => stream::once(async { Err(error) }).boxed(),
                })
                .boxed()
        });
        let all = stream::iter(first).chain(later);
        Ok(answer(all.flatten_unordered(width).boxed()))
    }

    async fn open(
        &self,
        job: &Job,
        index: usize,
        meter: &Arc<Meter>,
        identity: &Identity,
    ) -> Result<ChoiceStream, ApiError> {
        let request = job.request(index, &identity.request_id);
        let (upstream, began, deadline) = (&self.upstream, job.began, job.deadline);
        // Several sequences have their places already.
        let sequence = if job.choices() == 1 {
            upstream
                .open_in_turn(request, identity, began, deadline)
                .await?
        } else {
            upstream.open(request, identity, began, deadline).await?
        };
        Ok(ChoiceStream::new(
            &self.prompter,
            &self.metrics,
            job,
            index,
            sequence,
            meter,
            identity,
        ))
    }
}
