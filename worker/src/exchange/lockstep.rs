//! The exchange in lock-step: [`StepExperts`] over a [`Collective`](crate::fabric::lockstep::Collective).
//!
//! ```text
//!  engine thread: begin_step ─► first run: agree ─► layer 0 … layer n ─► end_step
//!  idle thread:   while no step runs here: agree ─► the same layers, without rows of its own
//!                 both hold the one `Walk`: the group, and everything that is used again
//! ```
//!
//! Invariants:
//! - A rank takes part in every step of its group, from the agreement to the last layer, with or without rows.
//! - The step is agreed with the first layer's rows: only then is it known how many there are. Ranks that have not all
//!   come to one placement take no step, and their engines try again.
//! - A lost collective loses the step for all: the group is aborted, every live row is late, and the engine does the tokens
//!   again when a new group stands, in the next epoch or, where all ranks live, in the same.
//! - Rows are combined in ascending order of expert, as everywhere, so the bits are those of one process.
//! - Every wait ends by the exchange's deadline. It must cover what the slowest rank does between two layers.

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use foregate_api::ids::{Epoch, LayerId, Rank};
use foregate_api::model::ModelSpec;
use foregate_kernels::Ops;
use foregate_models::combine;
use foregate_models::experts::{ExpertBatch, Experts, ExpertsError, LateRows};
use foregate_wire::frame::TraceContext;

use super::live_rows;
use super::serve::Server;
use crate::engine::StepExperts;
use crate::fabric::Inbox;
use crate::fabric::lockstep::{Form, Groups};
use crate::metrics::WorkerMetrics;
use crate::residency::{EpochGate, Residency, Routing};

use walk::{Round, Walk};

mod walk;

/// How long a rank without a step lets pass until it asks the others again. A step of another rank waits this long for it.
const IDLE_PAUSE: Duration = Duration::from_millis(1);
/// The same where no step can be: placements differ, or there is no group.
const APART_PAUSE: Duration = Duration::from_millis(5);

/// What a lock-step exchange is made of.
pub struct LockStepParts {
    /// This worker.
    pub rank: Rank,
    /// The model's shape.
    pub spec: Arc<ModelSpec>,
    /// Numbers; used on the engine's thread.
    pub ops: Arc<dyn Ops>,
    /// Numbers for steps of others; used on a thread of this exchange, never at the same time.
    pub idle_ops: Arc<dyn Ops>,
    /// Experts of this worker.
    pub residency: Arc<Residency>,
    /// The placement of new steps.
    pub gate: Arc<EpochGate>,
    /// Runs the experts, and counts.
    pub server: Arc<Server>,
    /// How groups come into being.
    pub groups: Arc<dyn Groups>,
    /// Counters.
    pub metrics: Arc<WorkerMetrics>,
    /// Longest wait for the other ranks.
    pub deadline: Duration,
}

impl fmt::Debug for LockStepParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockStepParts")
            .field("rank", &self.rank)
            .field("groups", &self.groups)
            .finish_non_exhaustive()
    }
}

/// The experts of a cluster that steps as one, for the engine's thread. When it and every [`StandIn`] are dropped the
/// group is aborted: the other ranks lose their step.
#[derive(Debug)]
pub struct LockStep {
    shared: Arc<Shared>,
    step: Option<Step>,
    inbox: Arc<Inbox>,
    idler: Arc<Idler>,
}

/// Keeps this rank in the steps of the others, also where it has no engine, or no longer: its experts are still wanted.
#[derive(Debug, Clone)]
pub struct StandIn {
    idler: Arc<Idler>,
}

impl StandIn {
    /// Ends what waits for a group. Dropping it then waits at most for the call that it is in.
    pub fn close(&self) {
        self.idler.shared.parts.groups.close();
    }
}

/// The thread that steps with the others; the last to drop it ends it.
#[derive(Debug)]
struct Idler {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Idler {
    fn drop(&mut self) {
        self.shared.parts.groups.close();
        self.shared.close();
        if let Some(thread) = self.thread.take() {
            // It ends by the deadline of what it is in. A panic there has been reported by its thread.
            drop(thread.join());
        }
    }
}

/// The running step of this rank's engine.
#[derive(Debug)]
struct Step {
    walk: Box<Walk>,
    routing: Option<Arc<Routing>>,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing was agreed yet.
    Begun,
    /// The layers up to this one are done.
    Walking(Form, LayerId),
    /// Nothing comes of this step.
    Lost,
}

#[derive(Debug)]
struct Shared {
    parts: LockStepParts,
    turn: Mutex<Turn>,
    turned: Condvar,
}

/// Whose turn it is to walk.
#[derive(Debug)]
struct Turn {
    /// `None` while somebody has it.
    walk: Option<Box<Walk>>,
    engine_waits: bool,
    closed: bool,
}

impl LockStep {
    /// Starts the thread that takes part in the steps of others.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(parts: LockStepParts) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            parts,
            turn: Mutex::new(Turn {
                walk: Some(Box::default()),
                engine_waits: false,
                closed: false,
            }),
            turned: Condvar::new(),
        });
        let idle = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("lockstep".into())
            .spawn(move || idle.idle())?;
        Ok(Self {
            idler: Arc::new(Idler {
                shared: Arc::clone(&shared),
                thread: Some(thread),
            }),
            shared,
            step: None,
            inbox: Arc::default(),
        })
    }

    /// What keeps this rank in the steps of the others after the engine has dropped `self`.
    #[must_use]
    pub fn stand_in(&self) -> StandIn {
        StandIn {
            idler: Arc::clone(&self.idler),
        }
    }

    /// Runs one layer, and the agreement before the first.
    fn layer(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        let failed = |what: String| ExpertsError {
            layer: batch.layer,
            what,
        };
        let step = self
            .step
            .as_mut()
            .ok_or_else(|| failed("no step has begun".to_owned()))?;
        let parts = &self.shared.parts;
        let Some(routing) = step.routing.clone() else {
            // Before the first placement nobody has experts: the engine tries again later.
            return Ok(live_rows(batch));
        };
        if step.stage == Stage::Begun {
            let rows = u32::try_from(batch.dead.len()).unwrap_or(u32::MAX);
            step.stage = match step.walk.begin(parts, &routing, rows) {
                Round::Step(form) => Stage::Walking(form, LayerId(0)),
                Round::Idle | Round::Apart => Stage::Lost,
            };
        }
        let Stage::Walking(form, next) = step.stage else {
            return Ok(live_rows(batch));
        };
        if batch.layer != next {
            let what = format!("layer {next} comes first: a step walks every layer once");
            return Err(failed(what));
        }
        let ops = parts.ops.as_ref();
        let layer = step
            .walk
            .layer(parts, ops, &routing, (form, next), Some(batch));
        match layer.map_err(failed)? {
            None => {
                step.stage = Stage::Lost;
                let late = live_rows(batch);
                parts.metrics.late(late.len());
                Ok(late)
            }
            Some(results) => {
                step.stage = Stage::Walking(form, LayerId(next.0 + 1));
                let late = results.late_rows(batch);
                combine(
                    ops,
                    &results.of_pairs(),
                    batch.weights,
                    batch.top_k,
                    batch.hidden,
                    out,
                )
                .map_err(|error| failed(error.to_string()))?;
                parts.metrics.late(late.len());
                Ok(late)
            }
        }
    }
}

impl Experts for LockStep {
    #[expect(
        clippy::disallowed_methods,
        reason = "measures the engine thread on the wall clock"
    )]
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        let begun = Instant::now();
        let late = self.layer(batch, out)?;
        let metrics = &self.shared.parts.metrics;
        metrics.exchange(begun.elapsed().as_secs_f64());
        Ok(late)
    }
}

impl StepExperts for LockStep {
    fn begin_step(&mut self, _trace: Option<TraceContext>) -> Epoch {
        // A step that never ended is one whose engine gave up: it ends here.
        self.end_step();
        let Some(walk) = self.shared.take_for_engine() else {
            return Epoch(0);
        };
        let parts = &self.shared.parts;
        parts.server.begin_step(&self.inbox);
        let begun = parts.gate.begin();
        let epoch = begun
            .routing
            .as_ref()
            .map_or(Epoch(0), |routing| routing.epoch());
        if let Some(stall) = begun.stall {
            parts.metrics.switched(stall);
            parts.metrics.serving(epoch.0);
        }
        self.step = Some(Step {
            walk,
            routing: begun.routing,
            stage: Stage::Begun,
        });
        epoch
    }

    /// Walks the layers that the engine did not come to: the other ranks are in them.
    fn end_step(&mut self) {
        let Some(mut step) = self.step.take() else {
            return;
        };
        let parts = &self.shared.parts;
        if let (Stage::Walking(form, next), Some(routing)) = (step.stage, &step.routing) {
            step.walk
                .walk_idle(parts, parts.ops.as_ref(), routing, form, next);
        }
        parts.gate.end();
        parts.server.end_step();
        self.shared.give(step.walk);
    }
}

impl Drop for LockStep {
    fn drop(&mut self) {
        self.end_step();
    }
}

impl Shared {
    /// The life of the thread that steps with the others while the engine has nothing.
    fn idle(&self) {
        while let Some(mut walk) = self.take_for_idle() {
            let begun = self.parts.gate.begin();
            let round = match &begun.routing {
                Some(routing) => walk.begin(&self.parts, routing, 0),
                None => Round::Apart,
            };
            if let (Round::Step(form), Some(routing)) = (round, &begun.routing) {
                let ops = self.parts.idle_ops.as_ref();
                walk.walk_idle(&self.parts, ops, routing, form, LayerId(0));
            }
            self.parts.gate.end();
            self.give(walk);
            match round {
                Round::Step(_) => {}
                Round::Idle => self.pause(IDLE_PAUSE),
                Round::Apart => self.pause(APART_PAUSE),
            }
        }
    }

    /// Waits for the walk; the idle thread takes it no more until it is given back.
    fn take_for_engine(&self) -> Option<Box<Walk>> {
        let mut turn = self.lock();
        turn.engine_waits = true;
        // A pause of the idle thread is over.
        self.turned.notify_all();
        loop {
            if let Some(walk) = turn.walk.take() {
                turn.engine_waits = false;
                return Some(walk);
            }
            if turn.closed {
                turn.engine_waits = false;
                return None;
            }
            // Who has it gives it back by a deadline of its own.
            turn = self
                .turned
                .wait(turn)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn take_for_idle(&self) -> Option<Box<Walk>> {
        let mut turn = self.lock();
        loop {
            if turn.closed {
                return None;
            }
            if !turn.engine_waits
                && let Some(walk) = turn.walk.take()
            {
                return Some(walk);
            }
            turn = self
                .turned
                .wait(turn)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn give(&self, walk: Box<Walk>) {
        self.lock().walk = Some(walk);
        self.turned.notify_all();
    }

    /// Lets time pass, or until the engine wants to step.
    fn pause(&self, time: Duration) {
        let turn = self.lock();
        if turn.closed || turn.engine_waits {
            return;
        }
        drop(self.turned.wait_timeout(turn, time));
    }

    /// Ends the idle thread, and the group as soon as nobody walks.
    fn close(&self) {
        self.lock().closed = true;
        self.turned.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
