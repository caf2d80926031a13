//! The callee: runs resident experts for whoever asks.
//!
//! Calls wait in one bounded queue (`queue.rs`). Whoever runs them, this worker's engine between its own rows or
//! the compute thread here, takes everything that is pending, brings the rows of one (layer, expert) together
//! across calls, runs them in one grouped product (`workbench.rs`) and answers each call in the order of its
//! routes. Bringing rows together does not change their bits.
//!
//! When the queue is full a call is refused as busy, at once: its caller may have another copy.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use foregate_api::ids::{LayerId, Rank};
use foregate_api::model::ModelSpec;
use foregate_kernels::{OpError, Ops};
use foregate_wire::frame::{Call, RefuseReason, Route};
use tokio_util::sync::CancellationToken;

use super::queue::{Job, Queue};
use super::trace;
use super::workbench::{Own, Workbench};
use crate::fabric::{CallHandler, Inbox, Responder};
use crate::load::LoadCounters;
use crate::metrics::{Where, WorkerMetrics};
use crate::residency::{EpochGate, Residency, Resident};

/// What the callee works with.
pub struct ServerParts {
    /// The model's shape.
    pub spec: Arc<ModelSpec>,
    /// Numbers; used on the callee's own thread.
    pub ops: Arc<dyn Ops>,
    /// The experts.
    pub residency: Arc<Residency>,
    /// The epochs that are served.
    pub gate: Arc<EpochGate>,
    /// Counts served rows for load windows.
    pub load: Arc<LoadCounters>,
    /// Counts served rows and refusals.
    pub metrics: Arc<WorkerMetrics>,
    /// Limits of the queue.
    pub limits: ServerLimits,
}

impl fmt::Debug for ServerParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerParts")
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Limits of the queue of calls.
#[derive(Debug, Clone, Copy)]
pub struct ServerLimits {
    /// Most calls waiting.
    pub calls: usize,
    /// Bytes of rows and answers waiting at which further calls are refused. One call is always taken.
    pub bytes: usize,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            calls: 256,
            bytes: 256 << 20,
        }
    }
}

/// The callee. Dropping it ends its thread; waiting calls are refused.
pub struct Server {
    inner: Arc<Inner>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Inner {
    parts: ServerParts,
    queue: Queue,
    calls: AtomicU64,
    /// Cancelled when the compute thread has ended, however it ended.
    ended: CancellationToken,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    /// Starts the compute thread.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(parts: ServerParts) -> io::Result<Arc<Self>> {
        let inner = Arc::new(Inner {
            queue: Queue::new(parts.limits),
            parts,
            calls: AtomicU64::new(0),
            ended: CancellationToken::new(),
        });
        let for_thread = Arc::clone(&inner);
        let thread = thread::Builder::new()
            .name("experts".into())
            .spawn(move || {
                let _ended = for_thread.ended.clone().drop_guard();
                for_thread.run();
            })?;
        Ok(Arc::new(Self {
            inner,
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// Routes that wait to be run.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.inner.queue.routes()
    }

    /// Counts rows that this worker's experts ran for its own sequences, beside those run for peers.
    pub(super) fn ran_here(&self, layer: LayerId, rows: usize) {
        self.inner.parts.metrics.rows(Where::Local, rows);
        self.inner.parts.load.count_served(layer, rows as u64);
    }

    /// This worker's engine begins a step: calls are left to it for a while. It waits at `inbox`.
    pub(super) fn begin_step(&self, inbox: &Arc<Inbox>) {
        self.inner.queue.begin_step(inbox);
    }

    /// The engine's step is over.
    pub(super) fn end_step(&self) {
        self.inner.queue.end_step();
    }

    /// Whether each of these ranks has a call of this layer waiting here.
    pub(super) fn has_calls(&self, ranks: &[Rank], layer: LayerId) -> bool {
        self.inner.queue.has_calls(ranks, layer)
    }

    /// Runs what waits on the calling thread, `own` rows together with calls of their layer. Callers
    /// are added to the desk's. Gives the results of own rows: as many as own routes, at `place`.
    ///
    /// # Errors
    /// When own rows do not fit the experts.
    pub(super) fn serve(
        &self,
        ops: &dyn Ops,
        own: Option<Own<'_>>,
        desk: &mut Desk,
    ) -> Result<Vec<f32>, OpError> {
        self.inner.queue.take(&mut desk.jobs);
        self.inner.serve(ops, own, desk)
    }

    /// Runs what waits of other layers than this one on the calling thread: its callers are behind, or ahead.
    ///
    /// # Errors
    /// When an op refuses its sizes.
    pub(super) fn serve_but(
        &self,
        ops: &dyn Ops,
        layer: LayerId,
        desk: &mut Desk,
    ) -> Result<(), OpError> {
        self.inner.queue.take_but(layer, &mut desk.jobs);
        self.inner.serve(ops, None, desk).map(drop)
    }

    /// Counts rows of a step in lock-step as a call: somebody still needs this worker.
    pub(super) fn called(&self) {
        self.inner.calls.fetch_add(1, Ordering::Relaxed);
    }

    /// Calls that peers made since start, refused ones included; in lock-step, layers with rows for this worker.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.inner.calls.load(Ordering::Relaxed)
    }

    /// Whether the compute thread still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !self.inner.ended.is_cancelled()
    }

    /// Resolves when the compute thread has ended.
    pub async fn ended(&self) {
        self.inner.ended.cancelled().await;
    }

    /// Refuses what waits and ends the thread.
    pub fn close(&self) {
        self.inner.queue.close();
        if let Some(thread) = lock(&self.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("experts_thread_panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close();
    }
}

impl CallHandler for Server {
    fn call(&self, from: Rank, call: Call, responder: Responder) {
        let inner = &self.inner;
        inner.calls.fetch_add(1, Ordering::Relaxed);
        match inner.admit(&call) {
            Err(reason) => inner.refuse(responder, reason),
            Ok(()) => inner.push(from, call, responder),
        }
    }
}

impl Inner {
    /// Checks that need no queue.
    fn admit(&self, call: &Call) -> Result<(), RefuseReason> {
        let spec = &self.parts.spec;
        let fits = call.hidden as usize == spec.hidden
            && call.layer.index() < spec.moe_layers()
            && !call.routes.is_empty()
            && call
                .routes
                .iter()
                .all(|route| route.expert.index() < spec.experts);
        if !fits {
            return Err(RefuseReason::BadRequest);
        }
        if !self.parts.gate.accepts(call.epoch) {
            return Err(RefuseReason::WrongEpoch);
        }
        Ok(())
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "deadlines of calls run on the wall clock, without a tokio runtime"
    )]
    fn push(&self, from: Rank, call: Call, responder: Responder) {
        let arrived = Instant::now();
        let job = Job {
            from,
            arrived,
            deadline: arrived + Duration::from_micros(u64::from(call.deadline_us)),
            call,
            responder,
        };
        if let Some(job) = self.queue.push(job) {
            self.refuse(job.responder, RefuseReason::Busy);
        }
    }

    fn refuse(&self, responder: Responder, reason: RefuseReason) {
        self.parts.metrics.refused_here(reason);
        responder.refuse(self.parts.gate.view().serving, reason);
    }

    fn run(&self) {
        let _seated = self.parts.ops.enter();
        let mut desk = Desk::default();
        while self.queue.take_due(&mut desk.jobs) {
            if let Err(error) = self.serve(self.parts.ops.as_ref(), None, &mut desk) {
                tracing::error!(%error, "experts_run_failed");
            }
        }
    }

    /// Runs the desk's calls layer by layer, that of the own rows first, and answers them.
    fn serve(
        &self,
        ops: &dyn Ops,
        mut own: Option<Own<'_>>,
        desk: &mut Desk,
    ) -> Result<Vec<f32>, OpError> {
        let table = self.parts.residency.snapshot();
        self.refuse_some(&table, &mut desk.jobs);
        let first = own.map(|own| own.layer);
        desk.jobs.sort_unstable_by_key(|job| {
            let layer = job.call.layer;
            (first != Some(layer), layer, job.from, job.call.call)
        });
        let mut results = Vec::new();
        loop {
            let layer = match (own, desk.jobs.first()) {
                (Some(own), _) => own.layer,
                (None, Some(job)) => job.call.layer,
                (None, None) => return Ok(results),
            };
            let with = desk.jobs.iter();
            let with = with.take_while(|job| job.call.layer == layer).count();
            let mine = own.take();
            let ran = self.run_layer(ops, (layer, &table), with, mine, desk);
            if let Err(error) = ran {
                for job in desk.jobs.drain(..) {
                    self.refuse(job.responder, RefuseReason::BadRequest);
                }
                return Err(error);
            }
            if let Some(own) = mine {
                let routes = own.shipment.routes.len();
                results = desk.bench.take_results(routes, &mut desk.place);
            }
        }
    }

    /// Refuses calls that nobody waits for any more, or whose experts are not all here.
    #[expect(
        clippy::disallowed_methods,
        reason = "deadlines of calls run on the wall clock, without a tokio runtime"
    )]
    fn refuse_some(&self, table: &Resident, jobs: &mut Vec<Job>) {
        if jobs.is_empty() {
            return;
        }
        let now = Instant::now();
        let wrong = |job: &Job| {
            let layer = job.call.layer;
            let here = |route: &Route| table.get(layer, route.expert).is_some();
            if job.deadline <= now {
                Some(RefuseReason::Deadline)
            } else if job.call.routes.iter().all(here) {
                None
            } else {
                Some(RefuseReason::NotResident)
            }
        };
        let mut at = 0;
        while let Some(job) = jobs.get(at) {
            match wrong(job) {
                Some(reason) => self.refuse(jobs.swap_remove(at).responder, reason),
                None => at += 1,
            }
        }
    }

    /// Runs the first `with` calls of the desk, which are of this layer, and answers them.
    fn run_layer(
        &self,
        ops: &dyn Ops,
        of: (LayerId, &Resident),
        with: usize,
        own: Option<Own<'_>>,
        desk: &mut Desk,
    ) -> Result<(), OpError> {
        let jobs = &desk.jobs[..with];
        let spans: Vec<tracing::Span> = jobs.iter().filter_map(span_of).collect();
        let hidden = self.parts.spec.hidden;
        let result = desk.bench.run(ops, hidden, of, jobs, own);
        drop(spans);
        if desk.notes_callers {
            desk.callers.extend(jobs.iter().map(|job| (job.from, of.0)));
        }
        let mut first = own.map_or(0, |own| own.shipment.routes.len());
        let queued = u32::try_from(self.queue.routes()).unwrap_or(u32::MAX);
        for job in desk.jobs.drain(..with) {
            if result.is_err() {
                self.refuse(job.responder, RefuseReason::BadRequest);
                continue;
            }
            let routes = job.call.routes.len();
            let rows = desk.bench.rows_of(first..first + routes, hidden);
            first += routes;
            self.parts.metrics.rows(Where::Served, routes);
            self.parts.load.count_served(of.0, routes as u64);
            job.responder.reply(rows, queued);
        }
        result
    }
}

/// What a thread that runs experts keeps from one time to the next.
#[derive(Debug, Default)]
pub(super) struct Desk {
    jobs: Vec<Job>,
    pub(super) bench: Workbench,
    /// For each own route its row in the results.
    pub(super) place: Vec<u32>,
    /// Whether somebody reads `callers`: the engine does, the callee's thread does not.
    pub(super) notes_callers: bool,
    /// Who called, and for which layer.
    pub(super) callers: Vec<(Rank, LayerId)>,
}

impl Desk {
    /// One whose callers are noted.
    pub(super) fn of_engine() -> Self {
        Self {
            notes_callers: true,
            ..Self::default()
        }
    }
}

/// The span of one call, if its caller's trace is recorded. It lasts as long as the batch it is part of.
fn span_of(job: &Job) -> Option<tracing::Span> {
    let parent = job.call.trace.filter(|trace| trace.is_sampled())?;
    let span = tracing::info_span!(
        "experts.run",
        layer = job.call.layer.0,
        from = job.from.0,
        rows = job.call.rows.len() / (job.call.hidden.max(1) as usize),
        routes = job.call.routes.len(),
    );
    trace::adopt(&span, &parent);
    Some(span)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
