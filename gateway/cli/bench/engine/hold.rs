//! An engine that waits until all its sequences are there, so that they decode together on any machine.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

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

    /// Returns when steps are not held.
    pub(super) fn wait(&self) {
        let (state, changed) = &*self.0;
        let held = state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = changed.wait_timeout_while(held, PATIENCE, |held| *held);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}
