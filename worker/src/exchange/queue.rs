//! Calls of peers that wait to be run, and who runs them: the engine between its own rows, or the callee's thread.
//!
//! An engine in a step comes to its experts again and again. A call that waits for it there is run together with
//! the engine's own rows of the same layer: weights are read once for both, and no second thread competes for the
//! engine's cores. So while an engine steps, the callee's thread leaves a call alone for as long as the engine
//! usually needs to come by; a call that has waited longer, because the engine is deep in something else, is run by
//! the thread after all.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use foregate_api::ids::{LayerId, Rank};
use foregate_wire::frame::Call;

use super::serve::ServerLimits;
use crate::fabric::{Inbox, Responder};

/// How long a call is left to a stepping engine at least, and how long an engine counts as stepping after a step.
const GRACE: Duration = Duration::from_millis(2);
/// How long a call is left to a stepping engine at most. One that came while a product began waits for its end,
/// and a thread that ran it meanwhile would slow down both.
const MOST_GRACE: Duration = Duration::from_millis(100);
/// How often the callee's thread looks for calls left too long, and whether the engine still steps.
const LOOK: Duration = Duration::from_millis(4);

/// One call.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) from: Rank,
    pub(super) call: Call,
    pub(super) arrived: Instant,
    /// When its caller stops waiting.
    pub(super) deadline: Instant,
    pub(super) responder: Responder,
}

/// The waiting calls.
#[derive(Debug)]
pub(super) struct Queue {
    limits: ServerLimits,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: Vec<Job>,
    routes: usize,
    bytes: usize,
    closed: bool,
    engine: Engine,
    /// The callee's thread looks by itself; it need not be woken.
    looking: bool,
}

/// What the queue knows about this worker's engine.
#[derive(Debug, Default)]
struct Engine {
    /// Where it waits; `None` before its first step.
    inbox: Option<Arc<Inbox>>,
    in_step: bool,
    last_step: Option<Instant>,
    last_visit: Option<Instant>,
    /// About the longest time from one visit of a step to the next.
    pace: Duration,
}

impl Engine {
    fn steps(&self, now: Instant) -> bool {
        let recent = |end: Instant| now.saturating_duration_since(end) < GRACE;
        self.in_step || self.last_step.is_some_and(recent)
    }

    /// It comes for calls.
    fn visits(&mut self, now: Instant) {
        if let Some(last) = self.last_visit.replace(now) {
            let since = now.saturating_duration_since(last);
            // Long visits are rare (the one after the last layer) but come again: they are forgotten slowly.
            self.pace = since.max(self.pace - self.pace / 32);
        }
    }

    /// How long a call is left to it, of which nobody wants to hear after a time.
    fn grace(&self, job: &Job) -> Duration {
        let patience = job.deadline.saturating_duration_since(job.arrived) / 4;
        let usual = (self.pace * 2).clamp(GRACE, MOST_GRACE);
        usual.min(patience.max(GRACE))
    }
}

impl Queue {
    pub(super) fn new(limits: ServerLimits) -> Self {
        Self {
            limits,
            state: Mutex::default(),
            arrived: Condvar::new(),
        }
    }

    /// Takes a call; gives it back when there is no room.
    pub(super) fn push(&self, job: Job) -> Option<Job> {
        let bytes = bytes_of(&job.call);
        let mut state = self.lock();
        let full = state.jobs.len() >= self.limits.calls
            || (!state.jobs.is_empty()
                && state.bytes.saturating_add(bytes) > self.limits.bytes);
        if state.closed || full {
            return Some(job);
        }
        state.routes += job.call.routes.len();
        state.bytes += bytes;
        let left_to_engine = state.engine.steps(job.arrived);
        state.jobs.push(job);
        let wake_thread = !left_to_engine || !state.looking;
        let inbox = state.engine.inbox.clone().filter(|_| left_to_engine);
        drop(state);
        if let Some(inbox) = inbox {
            inbox.ring();
        }
        if wake_thread {
            self.arrived.notify_one();
        }
        None
    }

    /// An engine begins a step; it waits at `inbox`.
    pub(super) fn begin_step(&self, inbox: &Arc<Inbox>) {
        let mut state = self.lock();
        state.engine.in_step = true;
        // A pause between steps is no measure of a step.
        state.engine.last_visit = None;
        if !state
            .engine
            .inbox
            .as_ref()
            .is_some_and(|known| Arc::ptr_eq(known, inbox))
        {
            state.engine.inbox = Some(Arc::clone(inbox));
        }
    }

    /// The engine's step is over.
    #[expect(
        clippy::disallowed_methods,
        reason = "threads outside any runtime, on the wall clock"
    )]
    pub(super) fn end_step(&self) {
        let mut state = self.lock();
        state.engine.in_step = false;
        state.engine.last_step = Some(Instant::now());
    }

    /// Moves all that waits to `jobs`, which is empty; for the engine.
    #[expect(
        clippy::disallowed_methods,
        reason = "threads outside any runtime, on the wall clock"
    )]
    pub(super) fn take(&self, jobs: &mut Vec<Job>) {
        let mut state = self.lock();
        state.engine.visits(Instant::now());
        state.take(jobs);
    }

    /// As [`Queue::take`], but calls of this layer stay.
    pub(super) fn take_but(&self, layer: LayerId, jobs: &mut Vec<Job>) {
        let mut state = self.lock();
        jobs.extend(state.jobs.extract_if(.., |job| job.call.layer != layer));
        for job in &*jobs {
            state.routes = state.routes.saturating_sub(job.call.routes.len());
            state.bytes = state.bytes.saturating_sub(bytes_of(&job.call));
        }
    }

    /// As [`Queue::take`], for the callee's thread: waits for calls that no engine comes for. False: closed.
    #[expect(
        clippy::disallowed_methods,
        reason = "a thread outside any runtime, on the wall clock"
    )]
    pub(super) fn take_due(&self, jobs: &mut Vec<Job>) -> bool {
        let mut state = self.lock();
        while !state.closed {
            let now = Instant::now();
            let steps = state.engine.steps(now);
            let age = |job: &Job| {
                let age = now.saturating_duration_since(job.arrived);
                (age, state.engine.grace(job))
            };
            let wait = match state.jobs.first().map(age) {
                Some((age, grace)) if !steps || age >= grace => {
                    state.take(jobs);
                    return true;
                }
                // Looks again soon in case that the engine stops stepping.
                Some((age, grace)) => Some((grace - age).min(LOOK)),
                None => steps.then_some(LOOK),
            };
            state.looking = wait.is_some();
            state = match wait {
                Some(wait) => {
                    let waited = self.arrived.wait_timeout(state, wait);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.arrived.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
        false
    }

    /// Whether each of these ranks has a call of this layer here.
    pub(super) fn has_calls(&self, ranks: &[Rank], layer: LayerId) -> bool {
        let state = self.lock();
        let called = |rank| {
            let of = |job: &Job| job.from == rank && job.call.layer == layer;
            state.jobs.iter().any(of)
        };
        ranks.iter().all(|rank| called(*rank))
    }

    /// Routes that wait.
    pub(super) fn routes(&self) -> usize {
        self.lock().routes
    }

    /// Takes no more; what waited is dropped, which refuses it.
    pub(super) fn close(&self) {
        let jobs = {
            let mut state = self.lock();
            state.closed = true;
            std::mem::take(&mut state.jobs)
        };
        self.arrived.notify_all();
        drop(jobs);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The vectors change places, so that the memory of both is used again.
    fn take(&mut self, jobs: &mut Vec<Job>) {
        debug_assert!(jobs.is_empty());
        std::mem::swap(&mut self.jobs, jobs);
        self.routes = 0;
        self.bytes = 0;
    }
}

/// Memory that a call and its answer take.
fn bytes_of(call: &Call) -> usize {
    let answer = call.routes.len() * call.hidden as usize * size_of::<f32>();
    size_of_val(call.rows.as_slice()) + answer
}
