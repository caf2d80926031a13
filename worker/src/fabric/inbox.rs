//! Where answers to this worker's calls arrive.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use foregate_api::ids::Rank;
use foregate_wire::frame::{RefuseReason, Reply};

/// How a call ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The rows.
    Reply(Reply),
    /// The peer did not run it.
    Refused(RefuseReason),
    /// The connection ended before an answer.
    Lost,
}

/// The end of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Number of the call.
    pub call: u64,
    /// Who was called.
    pub peer: Rank,
    /// How it ended.
    pub outcome: Outcome,
}

/// Most completions kept. A reader drains it in every layer, so only answers that nobody waits for pile up.
const BOUND: usize = 4096;

/// A bounded queue of completions with one reader. When full, the oldest is dropped: it can only be an
/// answer that came too late.
#[derive(Debug, Default)]
pub struct Inbox {
    queue: Mutex<VecDeque<Completion>>,
    arrived: Condvar,
}

impl Inbox {
    /// Adds a completion and wakes the reader.
    pub fn push(&self, completion: Completion) {
        let mut queue = self.lock();
        if queue.len() >= BOUND {
            queue.pop_front();
        }
        queue.push_back(completion);
        drop(queue);
        self.arrived.notify_one();
    }

    /// The oldest completion, waiting for one until `deadline`.
    #[expect(
        clippy::disallowed_methods,
        reason = "the engine thread waits on the wall clock, without a tokio runtime"
    )]
    pub fn take_until(&self, deadline: Instant) -> Option<Completion> {
        let mut queue = self.lock();
        loop {
            if let Some(completion) = queue.pop_front() {
                return Some(completion);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            if left.is_zero() {
                return None;
            }
            queue = self
                .arrived
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Forgets everything that has arrived: answers to calls of an earlier layer.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Completion>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
