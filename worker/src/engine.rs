//! The engine: one thread that turns waiting sequences into tokens, step by step.
//!
//! In: validated requests through [`EngineHandle::submit`]. Out: one bounded stream of events per
//! request, and [`EngineLoad`](foregate_api::load::EngineLoad). A step is: take commands, drop who is
//! gone or late, [`schedule`](crate::scheduler), one forward pass, then per sequence commit, sample
//! and emit.
//!
//! - A slow client never blocks the engine: a stream's channel has room for every event its sequence
//!   can have (`max_tokens` and two more). How many streams are open is bounded by a permit that the
//!   stream holds until it is dropped, so memory is bounded as well.
//! - Rows that came late end with the step: their sequence's chunk counts as not computed, and is
//!   scheduled again after a pause (writing the same cache positions twice is harmless).
//! - With nothing to do the thread waits on its channel. With paused sequences only, it waits until
//!   the first of them may go on, or for a command.
//! - A panic in the thread is caught: the handle reports [`EngineState::Failed`], and every open
//!   stream ends with an error.

mod handle;
mod outlet;
mod pace;
mod settle;
mod step;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use foregate_api::ids::Epoch;
use foregate_api::load::EngineLoad;
use foregate_api::model::ModelSpec;
use foregate_api::node::WorkerConfig;
use foregate_kernels::{Anywhere, Executor, KvCache, KvShape, ViewMut};
use foregate_models::Model;
use foregate_models::experts::{ExpertBatch, Experts, ExpertsError, LateRows};
use foregate_wire::frame::TraceContext;
use tokio::sync::broadcast;

pub use handle::{
    EngineHandle, EngineState, EventStream, Follower, RequestLimits, StreamError, SubmitError,
};
pub use pace::Decoded;

use crate::kv_cache::{Changes, PagePool};
use crate::load::LoadCounters;
use crate::sampler::Sampler;
use crate::scheduler::{Limits, Overtake, Plan, Scheduler};
use crate::sequence::{Finish, Sequence, SequenceId};
use handle::{Command, Shared, Submission};
use outlet::{Outlet, Stage};

/// Experts that know where a step begins and ends.
pub trait StepExperts: Experts + Send {
    /// A step begins: it uses one placement from here to `end_step`, whose number is returned. `trace`
    /// is the context of one sampled sequence of the batch, if there is one.
    fn begin_step(&mut self, trace: Option<TraceContext>) -> Epoch;
    /// The step is over; its placement is not used any more.
    fn end_step(&mut self);
}

/// Experts without a cluster: all of a model in this process, no placement (epoch 0).
#[derive(Debug)]
pub struct Alone<E>(pub E);

impl<E: Experts> Experts for Alone<E> {
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        self.0.run(batch, out)
    }

    fn run_on(
        &mut self,
        executor: &dyn Executor,
        batch: &ExpertBatch<'_, Anywhere>,
        out: ViewMut<'_, f32>,
    ) -> Result<LateRows, ExpertsError> {
        self.0.run_on(executor, batch, out)
    }
}

impl<E: Experts + Send> StepExperts for Alone<E> {
    fn begin_step(&mut self, _trace: Option<TraceContext>) -> Epoch {
        Epoch(0)
    }

    fn end_step(&mut self) {}
}

/// What an engine is made of.
pub struct EngineParts {
    /// The dense part of the model.
    pub model: Model,
    /// The memory behind the pages, see [`kv_shape`].
    pub kv: KvCache,
    /// Where the experts are.
    pub experts: Box<dyn StepExperts>,
    /// Limits of batch, queue and sequence.
    pub config: WorkerConfig,
    /// Counters that the engine feeds with its gate's choices.
    pub load: Arc<LoadCounters>,
}

impl fmt::Debug for EngineParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineParts")
            .field("model", &self.model)
            .field("kv", &self.kv)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// A KV cache that could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "kv_bytes: {have} bytes hold no page of {page_tokens} tokens ({need} bytes each): raise kv_bytes (spec.workers.kvMemory) or lower page_tokens (spec.workers.pageTokens)"
)]
pub struct KvTooSmall {
    /// Bytes of one page.
    pub need: usize,
    /// Bytes configured.
    pub have: u64,
    /// Tokens of a page.
    pub page_tokens: u32,
}

/// Sizes of the KV cache that `kv_bytes` hold.
///
/// # Errors
/// When they hold no page.
pub fn kv_shape(spec: &ModelSpec, config: &WorkerConfig) -> Result<KvShape, KvTooSmall> {
    let shape = |pages| foregate_models::kv_shape(spec, pages, config.page_tokens as usize);
    let need = shape(1).page_bytes().unwrap_or(usize::MAX);
    let pages = usize::try_from(config.kv_bytes).unwrap_or(usize::MAX) / need.max(1);
    if pages == 0 || config.page_tokens == 0 {
        return Err(KvTooSmall {
            need,
            have: config.kv_bytes,
            page_tokens: config.page_tokens,
        });
    }
    Ok(shape(pages.min(u32::MAX as usize)))
}

/// Starts the engine's thread.
///
/// # Errors
/// When the system refuses a thread.
pub fn start(parts: EngineParts) -> std::io::Result<EngineHandle> {
    let (handle, inbox) = handle::open(request_limits(&parts), &parts.config);
    let shared = Arc::clone(handle.shared());
    let mut engine = Engine::new(parts, inbox, Arc::clone(&shared));
    let body = move || {
        let end = catch_unwind(AssertUnwindSafe(|| engine.run()));
        // The state first, then the streams: who sees a closed stream can say why.
        match end {
            Ok(()) => shared.end(EngineState::Stopped),
            Err(panic) => {
                let what = describe(&*panic);
                tracing::error!(what, "engine died");
                shared.end(EngineState::Failed(what));
            }
        }
        drop(engine);
    };
    std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(body)?;
    Ok(handle)
}

fn describe(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a message".to_owned())
}

fn request_limits(parts: &EngineParts) -> RequestLimits {
    let spec = parts.model.spec();
    let shape = parts.kv.shape();
    RequestLimits {
        vocab: spec.vocab,
        max_model_len: (parts.config.max_model_len as usize).min(spec.max_positions),
        kv_tokens: shape.pages * shape.page_tokens,
        moe_layers: spec.moe_layers(),
        experts: spec.experts,
        eos: spec.eos.clone(),
    }
}

/// Longest wait with sequences in hand: how late a cancellation or a deadline may be noticed while all
/// of them pause.
const LONGEST_WAIT: Duration = Duration::from_millis(20);

/// Bytes of logits that one step may have, unless decoding alone needs more.
pub(crate) const LOGIT_BYTES: usize = 64 << 20;

struct Engine {
    model: Model,
    kv: KvCache,
    experts: Box<dyn StepExperts>,
    load: Arc<LoadCounters>,
    scheduler: Scheduler,
    sampler: Sampler,
    outlets: BTreeMap<SequenceId, Outlet>,
    inbox: Receiver<Command>,
    shared: Arc<Shared>,
    /// Memory of a step, used again.
    buffers: step::Buffers,
    /// Zero of the engine's clock.
    started: Instant,
    next_id: u64,
    /// Steps in a row that failed as a whole.
    failures: u32,
    counts: EngineLoad,
    /// What decode steps take.
    pace: pace::Pace,
    /// To those who follow the prefixes; one that is slower than this many steps is told all anew.
    prefixes: broadcast::Sender<Arc<Changes>>,
}

/// Changes that wait for a slow follower.
const CHANGES: usize = 256;

impl Engine {
    fn new(parts: EngineParts, inbox: Receiver<Command>, shared: Arc<Shared>) -> Self {
        let shape = parts.kv.shape();
        let limits = Limits {
            max_num_seqs: parts.config.max_num_seqs as usize,
            max_batched_tokens: parts.config.max_num_batched_tokens as usize,
            max_logit_rows: LOGIT_BYTES / (4 * parts.model.spec().vocab.max(1)),
            overtake: Overtake {
                patience: parts.config.overtake_ms.saturating_mul(1000),
                top_k: parts.model.spec().top_k,
            },
        };
        Self {
            model: parts.model,
            kv: parts.kv,
            experts: parts.experts,
            load: parts.load,
            scheduler: Scheduler::new(limits, PagePool::new(shape.pages, shape.page_tokens)),
            sampler: Sampler::default(),
            outlets: BTreeMap::new(),
            inbox,
            shared,
            buffers: step::Buffers::default(),
            started: handle::now(),
            next_id: 0,
            failures: 0,
            counts: EngineLoad::default(),
            pace: pace::Pace::default(),
            prefixes: broadcast::Sender::new(CHANGES),
        }
    }

    fn run(&mut self) {
        let executor = Arc::clone(self.model.executor());
        let _seated = executor.enter();
        let mut wake_at = None;
        let mut plan = Plan::default();
        while self.take_commands(wake_at) {
            self.end_overdue();
            self.scheduler.schedule(self.clock(), &mut plan);
            self.note(&plan);
            wake_at = plan
                .chunks
                .is_empty()
                .then(|| plan.wake_at.unwrap_or(u64::MAX));
            if !plan.chunks.is_empty() {
                self.step(&plan);
            }
            self.publish();
        }
    }

    /// Microseconds since start.
    fn clock(&self) -> u64 {
        handle::now().duration_since(self.started).as_micros() as u64
    }

    /// Waits if there is nothing to compute, then takes all commands there are. False: the end.
    fn take_commands(&mut self, wake_at: Option<u64>) -> bool {
        self.take_waiting_commands();
        if self.scheduler.is_empty() {
            if self.shared.is_ending() {
                return false;
            }
            match self.inbox.recv() {
                Ok(command) => self.obey(command),
                Err(_) => return false,
            }
        } else if let Some(at) = wake_at {
            let pause = Duration::from_micros(at.saturating_sub(self.clock()));
            if let Ok(command) = self.inbox.recv_timeout(pause.min(LONGEST_WAIT)) {
                self.obey(command);
            }
        }
        self.take_waiting_commands();
        !self.shared.stopping.load(Ordering::Acquire)
    }

    fn take_waiting_commands(&mut self) {
        while let Ok(command) = self.inbox.try_recv() {
            self.obey(command);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.enter(*submission),
            Command::Prefixes(answer) => {
                // What others are still owed comes before what the new one is told.
                self.tell_changes();
                let names = self.scheduler.pool_mut().tell_names();
                // Whoever asked may be gone.
                answer.send((names, self.prefixes.subscribe())).ok();
            }
            Command::Wake => {}
        }
    }

    fn enter(&mut self, submission: Submission) {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let spec = self.model.spec();
        let signature = spec.moe_layers() * spec.experts;
        let (request, mut outlet) = Outlet::open(submission);
        let mut sequence = Sequence::new(id, request, signature);
        sequence.arrived = self.clock();
        match self.scheduler.submit(sequence) {
            Ok(()) => {
                self.outlets.insert(id, outlet);
            }
            Err(refused) => outlet.fail(StreamError::NeverFits(refused)),
        }
    }

    /// Ends sequences whose client left or whose time is over.
    fn end_overdue(&mut self) {
        let now = handle::now();
        let ends: Vec<(SequenceId, Finish)> = self
            .outlets
            .iter()
            .filter_map(|(id, outlet)| outlet.overdue(now).map(|why| (*id, why)))
            .collect();
        for (id, why) in ends {
            self.end(id, why);
        }
    }

    /// Takes a sequence out and says why.
    fn end(&mut self, id: SequenceId, why: Finish) {
        let sequence = self.scheduler.remove(id);
        if let (Some(sequence), Some(mut outlet)) = (sequence, self.outlets.remove(&id)) {
            outlet.finished(&sequence, why, self.pace.report());
        }
    }

    /// Takes a sequence out with an error.
    fn fail(&mut self, id: SequenceId, why: StreamError) {
        self.scheduler.remove(id);
        if let Some(mut outlet) = self.outlets.remove(&id) {
            outlet.fail(why);
        }
    }

    /// Opens and closes the spans of sequences that joined or left the batch.
    fn note(&mut self, plan: &Plan) {
        for id in &plan.preempted {
            if let Some(outlet) = self.outlets.get_mut(id) {
                outlet.enter(Stage::Queue);
            }
        }
        for id in &plan.admitted {
            let prefilled = self.scheduler.get(*id).is_some_and(|s| s.prefilled);
            if let Some(outlet) = self.outlets.get_mut(id) {
                outlet.enter(if prefilled {
                    Stage::Decode
                } else {
                    Stage::Prefill
                });
            }
        }
    }

    /// Tells which prefixes came and went.
    fn tell_changes(&mut self) {
        let wanted = self.prefixes.receiver_count() > 0;
        if let Some(changes) = self.scheduler.pool_mut().take_changes(wanted) {
            // Nobody left to hear it is no error.
            self.prefixes.send(Arc::new(changes)).ok();
        }
    }

    fn publish(&mut self) {
        self.tell_changes();
        let pool = self.scheduler.pool();
        let stats = pool.stats();
        self.counts = EngineLoad {
            running: self.scheduler.running() as u32,
            waiting: self.scheduler.waiting() as u32,
            kv_pages_used: pool.used() as u32,
            kv_pages: pool.pages() as u32,
            prefix_queries: stats.queries,
            prefix_hits: stats.hits,
            preemptions: self.scheduler.preemptions(),
            ..self.counts
        };
        self.shared.publish(self.counts, self.pace.totals());
    }
}
