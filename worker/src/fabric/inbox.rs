//! Where answers to this worker's calls arrive, and where its engine waits.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
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

/// Looks at the event count before a waiting reader sleeps: some microseconds, less than a wake-up takes.
const SPINS: u32 = 256;

/// A bounded queue of completions with one reader. When full, the oldest is dropped: it can only be an
/// answer that came too late.
///
/// Its reader also waits here for what others leave elsewhere: every arrival and every [`Inbox::ring`] is an
/// event. Who reads the count, then finds nothing anywhere, waits for the count to move and misses nothing.
#[derive(Debug, Default)]
pub struct Inbox {
    queue: Mutex<VecDeque<Completion>>,
    /// Changed with the queue locked.
    events: AtomicU64,
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
        self.count(queue);
    }

    /// Wakes the reader: there is something for it elsewhere.
    pub fn ring(&self) {
        self.count(self.lock());
    }

    /// Events so far.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::Acquire)
    }

    /// The oldest completion, if there is one.
    #[must_use]
    pub fn take(&self) -> Option<Completion> {
        self.lock().pop_front()
    }

    /// Waits until there were more than `seen` events. False: not until `deadline`.
    #[expect(
        clippy::disallowed_methods,
        reason = "the engine thread waits on the wall clock, without a tokio runtime"
    )]
    pub fn wait_past(&self, seen: u64, deadline: Instant) -> bool {
        for _ in 0..SPINS {
            if self.events() != seen {
                return true;
            }
            std::hint::spin_loop();
        }
        let mut queue = self.lock();
        while self.events() == seen {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            queue = self
                .arrived
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// The oldest completion, waiting for one until `deadline`.
    pub fn take_until(&self, deadline: Instant) -> Option<Completion> {
        loop {
            let seen = self.events();
            let found = self.take();
            if found.is_some() || !self.wait_past(seen, deadline) {
                return found;
            }
        }
    }

    /// Forgets everything that has arrived: answers to calls of an earlier layer.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn count(&self, queue: MutexGuard<'_, VecDeque<Completion>>) {
        self.events.fetch_add(1, Ordering::Release);
        drop(queue);
        self.arrived.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Completion>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    #[expect(
        clippy::disallowed_methods,
        reason = "a thread waits on the wall clock"
    )]
    fn who_has_seen_an_event_waits_for_the_next() {
        let inbox = Inbox::default();
        let long = Instant::now() + Duration::from_secs(60);
        let seen = inbox.events();
        inbox.ring();
        assert!(inbox.wait_past(seen, long));
        assert!(inbox.take().is_none());
        let seen = inbox.events();
        assert!(!inbox.wait_past(seen, Instant::now()));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                inbox.push(Completion {
                    call: 7,
                    peer: Rank(1),
                    outcome: Outcome::Lost,
                });
            });
            assert!(inbox.wait_past(seen, long));
        });
        assert_eq!(inbox.take_until(Instant::now()).unwrap().call, 7);
    }
}
