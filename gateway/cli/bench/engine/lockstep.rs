//! Two engines that step in turn, so that each step of one has a step of the other with the same work beside it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foregate_api::ids::Epoch;
use foregate_models::experts::{ExpertBatch, Experts, ExpertsError, LateRows};
use foregate_wire::frame::TraceContext;
use foregate_worker::engine::StepExperts;

/// Longest wait for the other engine's step.
const PATIENCE: Duration = Duration::from_secs(60);

/// Lets one of two sides through at a time.
#[derive(Debug, Default)]
pub(super) struct Turnstile {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Whose turn it is: side 0 or 1.
    turn: usize,
    open: bool,
}

impl Turnstile {
    /// The other side's turn; returns when it is this side's again.
    fn pass(&self, side: usize) {
        let mut state = self.lock();
        state.turn = 1 - side;
        self.moved.notify_all();
        let waits = |state: &mut State| !state.open && state.turn != side;
        let waited = self.moved.wait_timeout_while(state, PATIENCE, waits);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Nobody waits any more: one side has ended.
    pub(super) fn open(&self) {
        self.lock().open = true;
        self.moved.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Experts of one side.
pub(super) struct Lockstep<E> {
    pub(super) inner: E,
    pub(super) side: usize,
    pub(super) turnstile: Arc<Turnstile>,
}

impl<E: Experts> Experts for Lockstep<E> {
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        self.inner.run(batch, out)
    }
}

impl<E: StepExperts> StepExperts for Lockstep<E> {
    fn begin_step(&mut self, trace: Option<TraceContext>) -> Epoch {
        self.turnstile.pass(self.side);
        self.inner.begin_step(trace)
    }

    fn end_step(&mut self) {
        self.inner.end_step();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_take_turns() {
        let turnstile = Turnstile::default();
        let passed = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for side in 0..2 {
                let (turnstile, passed) = (&turnstile, &passed);
                scope.spawn(move || {
                    for _ in 0..50 {
                        turnstile.pass(side);
                        passed.lock().unwrap().push(side);
                    }
                    turnstile.open();
                });
            }
        });
        let passed = passed.into_inner().unwrap();
        // The last of all may go when the first side has ended.
        let alternates = passed[..99].windows(2).all(|two| two[0] != two[1]);
        assert!(alternates && passed.len() == 100, "{passed:?}");
    }
}
