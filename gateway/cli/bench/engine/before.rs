//! Experts that wait for something before each step.

use foregate_api::ids::Epoch;
use foregate_models::experts::{ExpertBatch, Experts, ExpertsError, LateRows};
use foregate_wire::frame::TraceContext;
use foregate_worker::engine::StepExperts;

/// Experts, and what comes before a step of theirs.
pub(super) struct Before<E, F> {
    pub(super) inner: E,
    pub(super) wait: F,
}

impl<E: Experts, F> Experts for Before<E, F> {
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        self.inner.run(batch, out)
    }
}

impl<E: StepExperts, F: FnMut() + Send> StepExperts for Before<E, F> {
    fn begin_step(&mut self, trace: Option<TraceContext>) -> Epoch {
        (self.wait)();
        self.inner.begin_step(trace)
    }

    fn end_step(&mut self) {
        self.inner.end_step();
    }
}
