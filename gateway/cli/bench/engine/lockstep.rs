//! Two engines that step in turn, so that each step of one has a step of the other with the same work beside it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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
    pub(super) fn pass(&self, side: usize) {
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
