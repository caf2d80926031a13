//! The callee: runs resident experts for whoever asks.
//!
//! Calls wait in one bounded queue. The compute thread takes everything that is pending, brings the rows of
//! one (layer, expert) together across calls, runs them in one grouped product and answers each call in the
//! order of its routes. Bringing rows together does not change their bits.
//!
//! When the queue is full a call is refused as busy, at once: its caller may have another copy.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use foregate_api::ids::{ExpertId, LayerId, Rank};
use foregate_api::model::ModelSpec;
use foregate_kernels::Ops;
use foregate_models::{ExpertRows, ExpertWeights, run_expert_rows};
use foregate_wire::frame::{Call, RefuseReason};
use tokio_util::sync::CancellationToken;

use super::trace;
use crate::fabric::{CallHandler, Responder};
use crate::load::LoadCounters;
use crate::metrics::{Where, WorkerMetrics};
use crate::residency::{EpochGate, Residency};

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
    queue: Mutex<Queue>,
    arrived: Condvar,
    calls: AtomicU64,
    /// Cancelled when the compute thread has ended, however it ended.
    ended: CancellationToken,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    routes: usize,
    bytes: usize,
    closed: bool,
}

#[derive(Debug)]
struct Job {
    from: Rank,
    call: Call,
    deadline: Instant,
    responder: Responder,
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
            parts,
            queue: Mutex::default(),
            arrived: Condvar::new(),
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
        self.inner.lock().routes
    }

    /// Counts rows that this worker's experts ran for its own sequences, beside those run for peers.
    pub(super) fn ran_here(&self, layer: LayerId, rows: usize) {
        self.inner.parts.metrics.rows(Where::Local, rows);
        self.inner.parts.load.count_served(layer, rows as u64);
    }

    /// Calls that peers made since start, refused ones included.
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
        let jobs = {
            let mut queue = self.inner.lock();
            queue.closed = true;
            std::mem::take(&mut queue.jobs)
        };
        self.inner.arrived.notify_all();
        drop(jobs);
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
        let bytes = bytes_of(&call);
        let limits = self.parts.limits;
        let mut queue = self.lock();
        let full = queue.jobs.len() >= limits.calls
            || (!queue.jobs.is_empty() && queue.bytes.saturating_add(bytes) > limits.bytes);
        if queue.closed || full {
            drop(queue);
            return self.refuse(responder, RefuseReason::Busy);
        }
        queue.routes += call.routes.len();
        queue.bytes += bytes;
        let deadline = Instant::now() + Duration::from_micros(u64::from(call.deadline_us));
        queue.jobs.push_back(Job {
            from,
            call,
            deadline,
            responder,
        });
        drop(queue);
        self.arrived.notify_one();
    }

    fn refuse(&self, responder: Responder, reason: RefuseReason) {
        self.parts.metrics.refused_here(reason);
        responder.refuse(self.parts.gate.view().serving, reason);
    }

    fn run(&self) {
        let mut scratch = Scratch::default();
        while let Some(jobs) = self.take() {
            for (layer, jobs) in by_layer(self.in_time(jobs)) {
                self.run_layer(layer, jobs, &mut scratch);
            }
        }
    }

    /// Everything that is pending; waits for the first. `None` after `close`.
    fn take(&self) -> Option<VecDeque<Job>> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            if !queue.jobs.is_empty() {
                queue.routes = 0;
                queue.bytes = 0;
                return Some(std::mem::take(&mut queue.jobs));
            }
            queue = self
                .arrived
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "deadlines of calls run on the wall clock, without a tokio runtime"
    )]
    fn in_time(&self, jobs: VecDeque<Job>) -> Vec<Job> {
        let now = Instant::now();
        let (kept, late): (Vec<Job>, Vec<Job>) =
            jobs.into_iter().partition(|job| job.deadline > now);
        for job in late {
            self.refuse(job.responder, RefuseReason::Deadline);
        }
        kept
    }

    fn run_layer(&self, layer: LayerId, jobs: Vec<Job>, scratch: &mut Scratch) {
        let (jobs, weights) = self.resident(layer, jobs);
        if jobs.is_empty() {
            return;
        }
        let spans: Vec<tracing::Span> = jobs.iter().filter_map(span_of).collect();
        let hidden = self.parts.spec.hidden;
        let result = scratch.compute(self.parts.ops.as_ref(), hidden, &jobs, &weights);
        drop(spans);
        match result {
            Ok(()) => self.answer(layer, jobs, scratch),
            Err(error) => {
                tracing::error!(%layer, %error, "experts_run_failed");
                for job in jobs {
                    self.refuse(job.responder, RefuseReason::BadRequest);
                }
            }
        }
    }

    /// The calls whose experts are all here, and those experts.
    fn resident(
        &self,
        layer: LayerId,
        jobs: Vec<Job>,
    ) -> (Vec<Job>, BTreeMap<ExpertId, Arc<ExpertWeights>>) {
        let table = self.parts.residency.snapshot();
        let mut weights = BTreeMap::new();
        let mut kept = Vec::with_capacity(jobs.len());
        for job in jobs {
            let mut complete = true;
            for route in &job.call.routes {
                if weights.contains_key(&route.expert) {
                    continue;
                }
                match table.get(layer, route.expert) {
                    Some(found) => drop(weights.insert(route.expert, Arc::clone(found))),
                    None => complete = false,
                }
            }
            if complete {
                kept.push(job);
            } else {
                self.refuse(job.responder, RefuseReason::NotResident);
            }
        }
        (kept, weights)
    }

    fn answer(&self, layer: LayerId, jobs: Vec<Job>, scratch: &Scratch) {
        let hidden = self.parts.spec.hidden;
        let queued = u32::try_from(self.lock().routes).unwrap_or(u32::MAX);
        let mut first = 0;
        for job in jobs {
            let routes = job.call.routes.len();
            let rows = scratch.rows_of(first..first + routes, hidden);
            first += routes;
            self.parts.metrics.rows(Where::Served, routes);
            self.parts.load.count_served(layer, routes as u64);
            job.responder.reply(rows, queued);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }
}

/// Buffers of the compute thread.
#[derive(Debug, Default)]
struct Scratch {
    /// Rows of all calls, one call after the other; unused for a single call.
    input: Vec<f32>,
    /// `(expert, row of the input, number of the route over all calls)`, by expert.
    order: Vec<(ExpertId, u32, u32)>,
    rows: Vec<u32>,
    results: Vec<f32>,
    /// For each route over all calls, the row of `results` that is its.
    place: Vec<u32>,
}

impl Scratch {
    fn compute(
        &mut self,
        ops: &dyn Ops,
        hidden: usize,
        jobs: &[Job],
        weights: &BTreeMap<ExpertId, Arc<ExpertWeights>>,
    ) -> Result<(), foregate_kernels::ShapeError> {
        self.gather(hidden, jobs);
        let input = match jobs {
            [one] => &one.call.rows,
            _ => &self.input,
        };
        self.rows.clear();
        self.rows.extend(self.order.iter().map(|(_, row, _)| *row));
        let mut calls = Vec::with_capacity(weights.len());
        let mut start = 0;
        for group in self.order.chunk_by(|a, b| a.0 == b.0) {
            let rows = &self.rows[start..start + group.len()];
            start += group.len();
            if let Some(expert) = weights.get(&group[0].0) {
                calls.push(ExpertRows {
                    expert: Arc::clone(expert),
                    rows,
                });
            }
        }
        self.results.resize(self.order.len() * hidden, 0.0);
        run_expert_rows(ops, input, hidden, &calls, &mut self.results)
    }

    /// Brings the rows of all calls together and sorts their routes by expert.
    fn gather(&mut self, hidden: usize, jobs: &[Job]) {
        self.input.clear();
        self.order.clear();
        let (mut first_row, mut route) = (0_u32, 0_u32);
        for job in jobs {
            for wanted in &job.call.routes {
                self.order
                    .push((wanted.expert, first_row + wanted.row, route));
                route += 1;
            }
            if jobs.len() > 1 {
                self.input.extend_from_slice(&job.call.rows);
                first_row += count(job.call.rows.len() / hidden.max(1));
            }
        }
        self.order.sort_unstable();
        self.place.clear();
        self.place.resize(self.order.len(), 0);
        for ((_, _, route), place) in self.order.iter().zip(0_u32..) {
            self.place[*route as usize] = place;
        }
    }

    /// The results of some routes, in their order.
    fn rows_of(&self, routes: std::ops::Range<usize>, hidden: usize) -> Vec<f32> {
        let mut rows = Vec::with_capacity(routes.len() * hidden);
        for place in &self.place[routes] {
            let at = *place as usize * hidden;
            rows.extend_from_slice(&self.results[at..at + hidden]);
        }
        rows
    }
}

fn by_layer(jobs: Vec<Job>) -> BTreeMap<LayerId, Vec<Job>> {
    let mut layers: BTreeMap<LayerId, Vec<Job>> = BTreeMap::new();
    for job in jobs {
        layers.entry(job.call.layer).or_default().push(job);
    }
    layers
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

/// Memory that a call and its answer take.
fn bytes_of(call: &Call) -> usize {
    let answer = call.routes.len() * call.hidden as usize * size_of::<f32>();
    size_of_val(call.rows.as_slice()) + answer
}

/// Rows of a queue fit 32 bits: [`ServerLimits::bytes`] bounds them.
const fn count(number: usize) -> u32 {
    number as u32
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
