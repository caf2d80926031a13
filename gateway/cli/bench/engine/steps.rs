//! What each step of an engine took: its rows, its time, and in a pass of its own what it read and where
//! the time went.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foregate_api::ids::Epoch;
use foregate_models::experts::{ExpertBatch, Experts, ExpertsError, LateRows};
use foregate_wire::frame::TraceContext;
use foregate_worker::engine::StepExperts;
use tokio::time::Instant;

/// One step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Step {
    /// Rows of its batch.
    pub(super) rows: usize,
    /// From its begin until the engine wants to begin the next; the last step has none.
    pub(super) time: Option<Duration>,
    /// Of its time what came after the forward pass: results taken, tokens chosen and sent, the next step planned.
    pub(super) outside: Option<Duration>,
    /// Bytes of weights, keys and values that its ops had to read from memory; zero without an audit.
    pub(super) bytes: u64,
    /// Products of weights and activations; zero without an audit.
    pub(super) multiply_adds: u64,
    /// Where the time went; zero without an audit.
    pub(super) parts: Parts,
}

/// Time of a step by what it was spent on; the rest of a step's time is embedding, residuals, output
/// projection, sampling and scheduling.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Parts {
    /// Norm, router and choice of experts.
    pub(super) gate: Duration,
    /// Bringing rows to routed experts and their results back: grouping and the weighted sum.
    pub(super) exchange: Duration,
    /// Feed-forward of routed and shared experts, and of dense blocks.
    pub(super) experts: Duration,
    /// Norm, projections, rotation, cache and attention.
    pub(super) attention: Duration,
}

/// What steps do, whatever time it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Work {
    /// Bytes that have to be read from memory.
    pub(super) bytes: u64,
    /// Products of weights and activations.
    pub(super) multiply_adds: u64,
}

/// The steps of one engine.
#[derive(Debug, Clone, Default)]
pub(super) struct Ledger(Arc<Mutex<Vec<Step>>>);

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, Vec<Step>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the step now open, if there is one.
    pub(super) fn note(&self, change: impl FnOnce(&mut Step)) {
        if let Some(step) = self.lock().last_mut() {
            change(step);
        }
    }

    /// What all steps read and multiplied.
    pub(super) fn work(&self) -> Work {
        let steps = self.lock();
        Work {
            bytes: steps.iter().map(|step| step.bytes).sum(),
            multiply_adds: steps.iter().map(|step| step.multiply_adds).sum(),
        }
    }

    /// Time that the open step has spent in feed-forwards so far.
    fn experts_time(&self) -> Duration {
        let steps = self.lock();
        steps
            .last()
            .map_or(Duration::ZERO, |step| step.parts.experts)
    }

    /// The steps with `batch` rows among the last `count`: prompts are read before them, and a sequence
    /// that was submitted too late for the first step ends after the others.
    pub(super) fn decode(&self, batch: usize, count: usize) -> Vec<Step> {
        let steps = self.lock();
        let from = steps.len().saturating_sub(count);
        let full = steps[from..].iter().filter(|step| step.rows == batch);
        full.copied().collect()
    }
}

/// Experts that keep the ledger.
#[derive(Debug)]
pub(super) struct Kept<E> {
    inner: E,
    ledger: Ledger,
    begun: Option<Instant>,
    ended: Option<Instant>,
}

impl<E> Kept<E> {
    pub(super) fn new(inner: E, ledger: &Ledger) -> Self {
        Self {
            inner,
            ledger: ledger.clone(),
            begun: None,
            ended: None,
        }
    }
}

impl<E: Experts> Experts for Kept<E> {
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        let before = self.ledger.experts_time();
        let since = Instant::now();
        let late = self.inner.run(batch, out);
        let time = since.elapsed();
        let computed = self.ledger.experts_time().saturating_sub(before);
        self.ledger.note(|step| {
            step.rows = batch.dead.len();
            step.parts.exchange += time.saturating_sub(computed);
        });
        late
    }
}

impl<E: StepExperts> StepExperts for Kept<E> {
    /// What `inner` does before its step is no part of a step's time: it may wait there for its turn.
    fn begin_step(&mut self, trace: Option<TraceContext>) -> Epoch {
        let time = self.begun.take().map(|begun| begun.elapsed());
        let outside = self.ended.take().map(|ended| ended.elapsed());
        self.ledger.note(|step| {
            step.time = time;
            step.outside = outside;
        });
        let epoch = self.inner.begin_step(trace);
        self.ledger.lock().push(Step::default());
        self.begun = Some(Instant::now());
        epoch
    }

    fn end_step(&mut self) {
        self.inner.end_step();
        self.ended = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_full_steps_after_the_prompts_count() {
        let rows = [64, 70, 8, 7, 8, 8, 8, 1];
        let steps = rows.map(|rows| Step {
            rows,
            ..Step::default()
        });
        let ledger = Ledger(Arc::new(Mutex::new(steps.to_vec())));
        assert_eq!(ledger.decode(8, 5).len(), 3);
        assert_eq!(ledger.decode(8, 6).len(), 4);
        assert_eq!(ledger.decode(70, 3).len(), 0);
        assert_eq!(ledger.decode(64, 100).len(), 1);
    }
}
