//! The outside of the engine: what others hold, and what both sides share.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use foregate_api::ids::Epoch;
use foregate_api::load::EngineLoad;
use foregate_api::node::WorkerConfig;
use foregate_wire::generation::generate_event::Event;
use futures::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, oneshot, watch};
use tracing::Span;

use super::pace::Decoded;
use crate::kv_cache::Changes;
use crate::sampler::SamplerError;
use crate::scheduler::NeverFits;
use crate::sequence::Request;

/// The engine thread's clock, the only place that reads it.
#[expect(
    clippy::disallowed_methods,
    reason = "deadlines are compared on the engine thread, outside any runtime"
)]
pub(super) fn now() -> Instant {
    Instant::now()
}

/// What requests must keep to on this engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestLimits {
    /// Token ids are below this.
    pub vocab: usize,
    /// Most tokens of prompt and answer.
    pub max_model_len: usize,
    /// Most positions of one sequence that the KV cache holds.
    pub kv_tokens: usize,
    /// MoE layers.
    pub moe_layers: usize,
    /// Experts of each.
    pub experts: usize,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
}

impl RequestLimits {
    /// What every step relies on. The service has named the field before it comes to this.
    fn check(&self, request: &Request) -> Result<(), &'static str> {
        let known = |token: &u32| (*token as usize) < self.vocab;
        if !(1..=request.tokens.len()).contains(&request.prompt_len) {
            return Err("the prompt is empty or longer than the tokens");
        }
        if !request.tokens.iter().all(known) {
            return Err("a token is not in the vocabulary");
        }
        if request.prompt_len.saturating_add(request.max_tokens) > self.max_model_len {
            return Err("prompt and answer are longer than the model takes");
        }
        if request.tokens.len() - request.prompt_len > request.max_tokens {
            return Err("the answer has more than max_tokens already");
        }
        Ok(())
    }
}

/// Whether the engine's thread lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineState {
    /// It takes steps, or waits for work.
    Running,
    /// It ended as it was told to.
    Stopped,
    /// It panicked; the message.
    Failed(String),
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many streams are open as batch and queue may have.
    #[error("the queue is full: {0} requests are running or waiting; try again later")]
    Full(usize),
    /// The worker finishes what it has and takes nothing new.
    #[error("the worker is draining")]
    Draining,
    /// The engine is gone.
    #[error("the engine does not run: {0}")]
    Dead(String),
    /// It would not fit into the KV cache alone.
    #[error(transparent)]
    NeverFits(NeverFits),
    /// It contradicts itself or the model; one such sequence would fail the steps of all.
    #[error("request: {0}")]
    Unsound(&'static str),
}

/// Why a stream ended without its last event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The engine was stopped; another worker can go on.
    #[error("the engine was stopped")]
    Stopped,
    /// The engine panicked.
    #[error("the engine died: {0}")]
    Died(String),
    /// Steps failed as a whole, several times in a row; another worker may have its experts.
    #[error("step failed: {0}")]
    Step(String),
    /// The model gave something that no token can be chosen from.
    #[error(transparent)]
    Logits(SamplerError),
    /// It would not fit into the KV cache alone.
    #[error(transparent)]
    NeverFits(NeverFits),
}

/// What an event channel carries.
pub(super) type Item = Result<Event, StreamError>;

/// A request on its way to the engine thread.
#[derive(Debug)]
pub(super) struct Submission {
    pub(super) request: Request,
    pub(super) deadline: Option<Instant>,
    pub(super) span: Span,
    pub(super) events: mpsc::Sender<Item>,
}

/// What the engine thread is told.
#[derive(Debug)]
pub(super) enum Command {
    Submit(Box<Submission>),
    /// Say what the KV cache holds, and from then on what changes.
    Prefixes(oneshot::Sender<Prefixes>),
    /// Look at the flags.
    Wake,
}

/// Short names of all prefixes, and every change after them.
pub(crate) type Prefixes = (Vec<u64>, broadcast::Receiver<Arc<Changes>>);

/// Streams of prefixes that may be open: one per gateway.
const FOLLOWERS: usize = 256;

/// The right to follow the prefixes.
#[derive(Debug)]
pub struct Follower {
    _permit: OwnedSemaphorePermit,
}

/// State that both sides see.
#[derive(Debug)]
pub(super) struct Shared {
    /// Nothing new is taken; the thread ends when it has nothing left.
    pub(super) draining: AtomicBool,
    /// The thread ends after this step.
    pub(super) stopping: AtomicBool,
    epoch: AtomicU64,
    load: Mutex<(EngineLoad, Decoded)>,
    state: watch::Sender<EngineState>,
}

impl Shared {
    pub(super) fn publish(&self, load: EngineLoad, decoded: Decoded) {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = (load, decoded);
    }

    fn published(&self) -> (EngineLoad, Decoded) {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_epoch(&self, epoch: Epoch) {
        self.epoch.store(epoch.0, Ordering::Release);
    }

    /// Whether the thread ends when it has nothing left.
    pub(super) fn is_ending(&self) -> bool {
        self.draining.load(Ordering::Acquire) || self.stopping.load(Ordering::Acquire)
    }

    /// The thread is over.
    pub(super) fn end(&self, state: EngineState) {
        self.state.send_replace(state);
    }
}

/// Gives requests to an engine and asks how it is. Clones mean the same engine; when the last one and
/// the last stream are gone, the engine ends.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: SyncSender<Command>,
    permits: Arc<Semaphore>,
    followers: Arc<Semaphore>,
    capacity: usize,
    page_tokens: usize,
    limits: Arc<RequestLimits>,
    shared: Arc<Shared>,
}

/// A handle and the engine's end of its channel. The channel has room for one command per permit and follower; a
/// full one refuses the request.
pub(super) fn open(
    limits: RequestLimits,
    config: &WorkerConfig,
) -> (EngineHandle, Receiver<Command>) {
    let capacity = config.max_num_seqs.max(1) as usize + config.max_waiting as usize;
    let capacity = capacity.min(Semaphore::MAX_PERMITS);
    let (commands, inbox) = sync_channel(capacity + 1 + FOLLOWERS);
    let shared = Shared {
        draining: AtomicBool::new(false),
        stopping: AtomicBool::new(false),
        epoch: AtomicU64::new(0),
        load: Mutex::default(),
        state: watch::channel(EngineState::Running).0,
    };
    let handle = EngineHandle {
        commands,
        permits: Arc::new(Semaphore::new(capacity)),
        followers: Arc::new(Semaphore::new(FOLLOWERS)),
        capacity,
        page_tokens: config.page_tokens.max(1) as usize,
        limits: Arc::new(limits),
        shared: Arc::new(shared),
    };
    (handle, inbox)
}

impl EngineHandle {
    /// Queues a request. Its stages become child spans of `span`. `time_left` counts from now.
    ///
    /// # Errors
    /// When the queue is full, the engine drains or is gone, or the request could never fit.
    pub fn submit(
        &self,
        request: Request,
        time_left: Option<Duration>,
        span: Span,
    ) -> Result<EventStream, SubmitError> {
        self.check(&request)?;
        let full = SubmitError::Full(self.capacity);
        let permit = Arc::clone(&self.permits).try_acquire_owned();
        let permit = permit.map_err(|_| full.clone())?;
        // Prefilled, one per token, Finished: sending never waits.
        let (events, receiver) = mpsc::channel(request.max_tokens.saturating_add(2));
        let submission = Submission {
            request,
            deadline: time_left.and_then(|left| now().checked_add(left)),
            span,
            events,
        };
        match self
            .commands
            .try_send(Command::Submit(Box::new(submission)))
        {
            Ok(()) => Ok(EventStream {
                receiver,
                shared: Arc::clone(&self.shared),
                over: false,
                _permit: permit,
            }),
            Err(TrySendError::Full(_)) => Err(full),
            Err(TrySendError::Disconnected(_)) => Err(SubmitError::Dead("it ended".into())),
        }
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        match &*self.shared.state.borrow() {
            EngineState::Failed(what) => return Err(SubmitError::Dead(what.clone())),
            EngineState::Stopped => return Err(SubmitError::Draining),
            EngineState::Running => {}
        }
        if self.shared.is_ending() {
            return Err(SubmitError::Draining);
        }
        self.limits.check(request).map_err(SubmitError::Unsound)?;
        let need = request.most_positions().div_ceil(self.page_tokens);
        let have = self.limits.kv_tokens / self.page_tokens;
        if need > have {
            return Err(SubmitError::NeverFits(NeverFits { need, have }));
        }
        Ok(())
    }

    /// The right to follow the prefixes of the KV cache.
    ///
    /// # Errors
    /// When too many do.
    pub fn follower(&self) -> Result<Follower, SubmitError> {
        let permit = Arc::clone(&self.followers).try_acquire_owned();
        let permit = permit.map_err(|_| SubmitError::Full(FOLLOWERS))?;
        Ok(Follower { _permit: permit })
    }

    /// What the KV cache holds, and its changes from then on. Comes between two steps; the caller sets the deadline.
    ///
    /// # Errors
    /// When the engine is gone or has too many commands to come to.
    pub(crate) async fn prefixes(&self) -> Result<Prefixes, SubmitError> {
        let (answer, answered) = oneshot::channel();
        match self.commands.try_send(Command::Prefixes(answer)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(SubmitError::Full(self.capacity)),
            Err(TrySendError::Disconnected(_)) => {
                return Err(SubmitError::Dead("it ended".into()));
            }
        }
        answered
            .await
            .map_err(|_| SubmitError::Dead("it ended".into()))
    }

    /// What requests must keep to.
    #[must_use]
    pub fn limits(&self) -> &RequestLimits {
        &self.limits
    }

    /// What the engine did up to its last step.
    #[must_use]
    pub fn load(&self) -> EngineLoad {
        self.shared.published().0
    }

    /// Decode steps up to its last step.
    #[must_use]
    pub fn decoded(&self) -> Decoded {
        self.shared.published().1
    }

    /// The placement of the last step.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.shared.epoch.load(Ordering::Acquire))
    }

    /// Whether the thread lives; health fails when it does not.
    #[must_use]
    pub fn state(&self) -> EngineState {
        self.shared.state.borrow().clone()
    }

    /// Follows [`EngineHandle::state`].
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<EngineState> {
        self.shared.state.subscribe()
    }

    /// Whether nothing new is taken.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::Acquire)
    }

    /// Takes nothing new, finishes what there is, ends the thread. Returns when it has ended; the
    /// caller sets the deadline, and calls [`EngineHandle::stop`] after it.
    pub async fn drain(&self) -> EngineState {
        self.shared.draining.store(true, Ordering::Release);
        self.wait_for_end().await
    }

    /// Ends the thread after the step it is in. Open streams end with [`StreamError::Stopped`].
    pub async fn stop(&self) -> EngineState {
        self.shared.stopping.store(true, Ordering::Release);
        self.wait_for_end().await
    }

    async fn wait_for_end(&self) -> EngineState {
        // A full channel wakes the thread as well as this would.
        self.commands.try_send(Command::Wake).ok();
        let mut state = self.shared.state.subscribe();
        let end = state.wait_for(|state| *state != EngineState::Running).await;
        end.map_or(EngineState::Stopped, |state| state.clone())
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

/// The events of one request, ending with `Finished` or with an error. Dropping it cancels the request.
///
/// It holds one of `max_num_seqs + max_waiting` permits until it is dropped, so a client that does not
/// read takes the place of a running one instead of memory without bound.
#[derive(Debug)]
pub struct EventStream {
    receiver: mpsc::Receiver<Item>,
    shared: Arc<Shared>,
    over: bool,
    _permit: OwnedSemaphorePermit,
}

impl EventStream {
    /// The next event; `None` after the last.
    pub async fn next(&mut self) -> Option<Result<Event, StreamError>> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    fn why_closed(&self) -> StreamError {
        match &*self.shared.state.borrow() {
            EngineState::Failed(what) => StreamError::Died(what.clone()),
            EngineState::Running | EngineState::Stopped => StreamError::Stopped,
        }
    }
}

impl Stream for EventStream {
    type Item = Result<Event, StreamError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        let item = std::task::ready!(this.receiver.poll_recv(cx));
        let item = item.unwrap_or_else(|| Err(this.why_closed()));
        this.over = matches!(item, Ok(Event::Finished(_)) | Err(_));
        Poll::Ready(Some(item))
    }
}
