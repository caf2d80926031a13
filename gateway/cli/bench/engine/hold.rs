//! An engine that waits until all its sequences are there, so that they decode together on any machine.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use foregate_api::ids::Epoch;
use foregate_models::experts::{ExpertBatch, Experts, ExpertsError, LateRows};
use foregate_wire::frame::TraceContext;
use foregate_worker::engine::StepExperts;

/// Longest wait of a step.
const PATIENCE: Duration = Duration::from_secs(60);

/// Holds the steps of an engine back, or lets them go.
#[derive(Debug, Clone, Default)]
pub(super) struct Hold(Arc<(Mutex<bool>, Condvar)>);

impl Hold {
    /// Whether steps are held from now on. One that has begun goes on.
    pub(super) fn set(&self, held: bool) {
        let (state, changed) = &*self.0;
        *state.lock().unwrap_or_else(PoisonError::into_inner) = held;
        changed.notify_all();
    }

    fn wait(&self) {
        let (state, changed) = &*self.0;
        let held = state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = changed.wait_timeout_while(held, PATIENCE, |held| *held);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Experts whose steps can be held back.
pub(super) struct Held {
    pub(super) inner: Box<dyn StepExperts>,
    pub(super) hold: Hold,
}

impl Experts for Held {
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        self.inner.run(batch, out)
    }
}

impl StepExperts for Held {
    fn begin_step(&mut self, trace: Option<TraceContext>) -> Epoch {
        self.hold.wait();
        self.inner.begin_step(trace)
    }

    fn end_step(&mut self) {
        self.inner.end_step();
    }
}
