//! The calls in flight to one peer: their bound, and their end when the connection ends.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use foregate_api::ids::Rank;
use foregate_wire::frame::{Refuse, Reply};

use super::{Completion, Inbox, Outcome, SendError};

/// Calls in flight over one connection.
#[derive(Debug)]
pub(super) struct Pending {
    peer: Rank,
    bound: usize,
    inbox: Arc<Inbox>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Call number → when its caller stops waiting.
    calls: BTreeMap<u64, Instant>,
    closed: bool,
}

impl Pending {
    pub(super) fn new(peer: Rank, bound: usize, inbox: Arc<Inbox>) -> Self {
        Self {
            peer,
            bound,
            inbox,
            state: Mutex::default(),
        }
    }

    /// Takes a place for a call.
    pub(super) fn enter(&self, call: u64, deadline: Instant) -> Result<(), SendError> {
        let mut state = self.lock();
        if state.closed {
            return Err(SendError::Down(self.peer));
        }
        if state.calls.len() >= self.bound {
            return Err(SendError::Busy(self.peer));
        }
        state.calls.insert(call, deadline);
        Ok(())
    }

    /// Gives the place back without a completion: the call was not sent after all.
    pub(super) fn withdraw(&self, call: u64) {
        self.lock().calls.remove(&call);
    }

    /// Completes a call with its answer. An answer to a call that is not in flight is dropped.
    pub(super) fn complete(&self, answer: Result<Reply, Refuse>) {
        let (call, outcome) = match answer {
            Ok(reply) => (reply.call, Outcome::Reply(reply)),
            Err(refuse) => (refuse.call, Outcome::Refused(refuse.reason)),
        };
        if self.lock().calls.remove(&call).is_some() {
            self.push(call, outcome);
        }
    }

    /// Completes every call as lost and takes no more.
    pub(super) fn close(&self) {
        let calls = {
            let mut state = self.lock();
            state.closed = true;
            std::mem::take(&mut state.calls)
        };
        for call in calls.into_keys() {
            self.push(call, Outcome::Lost);
        }
    }

    /// Whether some call's caller gave up more than `grace` ago and no answer has come since: the
    /// connection may be a black hole.
    pub(super) fn is_overdue(&self, now: Instant, grace: Duration) -> bool {
        self.lock()
            .calls
            .values()
            .any(|deadline| now.saturating_duration_since(*deadline) > grace)
    }

    fn push(&self, call: u64, outcome: Outcome) {
        self.inbox.push(Completion {
            call,
            peer: self.peer,
            outcome,
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
