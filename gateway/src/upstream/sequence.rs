//! One sequence: its stream of events, carried on by another worker when one is lost.
//!
//! What has come stays valid: a worker that takes over gets the prompt followed by the tokens already
//! received, the same seed and the same `prompt_len`, and goes on at the next index. Nothing comes twice.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::member::Member;
use foregate_wire::generation::generate_event::Event as WireEvent;
use foregate_wire::generation::generation_client::GenerationClient;
use foregate_wire::generation::{
    FinishReason, Finished, GenerateEvent, GenerateRequest, Prefilled, RoutedExperts, Token,
};
use foregate_wire::tonic::{Code, Request, Status, Streaming};
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout_at};
use tracing::{Instrument, Span};

use super::Upstream;
use super::foresight::{Foreseen, rest};
use super::window::{Grant, Place};
use crate::calibration::Predictor;
use crate::error::ApiError;
use crate::feed::Ended;
use crate::forecast::Work;
use crate::loads::LoadGuard;
use crate::route::{self, Choice};
use crate::signature::{Known, Signature};
use crate::trace::Identity;

/// Losses that one sequence survives: of workers that had it, not of those that could not be reached.
const MAX_LOSSES: u32 = 3;
/// Longest wait for the headers of an answer; a healthy worker answers at once.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a sequence that lost its worker waits for another one to be ready.
const PATIENCE: Duration = Duration::from_secs(30);
/// First and longest pause between two looks for a worker.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// What a sequence says.
#[derive(Debug)]
pub enum Event {
    /// The prompt is read. Comes once, first.
    Prefilled(Prefilled),
    /// The next token.
    Token(Token),
    /// The end; nothing follows.
    Finished(Finished),
}

/// What a failed call means.
enum Failure {
    /// The worker is full: ask another one.
    Busy,
    /// The worker is lost or leaves: ask another one.
    Lost(String),
    /// No other worker would say otherwise.
    Final(ApiError),
}

/// A running sequence. Dropping it cancels it at the worker.
#[derive(Debug)]
pub struct Sequence {
    upstream: Arc<Upstream>,
    request: GenerateRequest,
    identity: Identity,
    /// When its request came, and when its time is over.
    began: Instant,
    deadline: Instant,
    /// Ends at the deadline. One for all waits: a timer of its own for each token would be entered and taken out again.
    over: Pin<Box<Sleep>>,
    /// What predictors said of its prompt, and what of it is believed.
    foreseen: Foreseen,
    known: Known,
    losses: u32,
    /// Tokens received.
    received: u32,
    prefilled: bool,
    /// Positions whose experts were reported.
    routed: usize,
    /// Experts reported by the worker that took over, for the next token.
    late_routed: Option<RoutedExperts>,
    cached: u32,
    choice: Option<Choice>,
    running: Option<Running>,
    /// Its place in the window's count, for as long as it lives.
    place: Option<Place>,
    /// What its prompt used, as measured, with what was known of the part that a prefix cache had.
    prompt: Option<Arc<Signature>>,
    /// The measured part alone.
    read: Vec<u32>,
    /// What is left of it, for the forecast.
    work: Option<Work>,
}

#[derive(Debug)]
struct Running {
    stream: Streaming<GenerateEvent>,
    guard: LoadGuard,
    member: Arc<Member>,
    /// The call's, which ends with it.
    _span: Span,
}

impl Sequence {
    pub(super) async fn open(
        upstream: Arc<Upstream>,
        mut request: GenerateRequest,
        identity: Identity,
        began: Instant,
        deadline: Instant,
        in_turn: bool,
    ) -> Result<Self, ApiError> {
        let mut foreseen = upstream.foresight(&request.token_ids);
        let known = upstream.known(&foreseen);
        request.expert_hint = upstream.hint(&foreseen);
        let words = foreseen.words.take();
        let work = upstream
            .outlook
            .as_ref()
            .zip(words)
            .map(|(outlook, words)| {
                // Kinds of text are its own: it asks them itself.
                let known = upstream.by_prefix(&foreseen.prefix);
                let prompt = request.prompt_len as usize;
                outlook.enter_known(prompt, words, &known, request.max_tokens, 1)
            });
        let mut sequence = Self {
            upstream,
            request,
            identity,
            began,
            deadline,
            over: Box::pin(sleep_until(deadline)),
            foreseen,
            known,
            losses: 0,
            received: 0,
            prefilled: false,
            routed: 0,
            late_routed: None,
            cached: 0,
            choice: None,
            running: None,
            place: None,
            prompt: None,
            read: Vec::new(),
            work,
        };
        let upstream = Arc::clone(&sequence.upstream);
        let grant = match upstream.ahead.as_ref().filter(|_| in_turn) {
            None => None,
            Some(ahead) => {
                let place = upstream.place(ahead, &sequence.request, &sequence.known, deadline);
                Some(place.await?)
            }
        };
        sequence.connect(Instant::now(), grant).await?;
        Ok(sequence)
    }

    /// Where it was sent first, and why.
    #[must_use]
    pub const fn choice(&self) -> Option<&Choice> {
        self.choice.as_ref()
    }

    /// Prompt tokens that the worker found in its prefix cache.
    #[must_use]
    pub const fn cached_tokens(&self) -> u32 {
        self.cached
    }

    /// Waits for the next event. Not to be called after `Finished` or an error.
    ///
    /// # Errors
    /// 504 at the deadline; 502, 503 when the sequence cannot go on anywhere; 400 if a worker refuses it.
    pub async fn next(&mut self) -> Result<Event, ApiError> {
        loop {
            let Some(running) = &mut self.running else {
                return Err(ApiError::internal("the sequence has ended already"));
            };
            // A client that reads too slowly finds events ready at every call, so the clock is asked first.
            let message = if Instant::now() >= self.deadline {
                None
            } else {
                tokio::select! {
                    biased;
                    message = running.stream.message() => Some(message),
                    () = self.over.as_mut() => None,
                }
            };
            let failure = match message {
                None => Failure::Final(self.late()),
                Some(Ok(Some(GenerateEvent { event: Some(event) }))) => {
                    match self.take(event) {
                        Ok(Some(event)) => return Ok(event),
                        Ok(None) => continue,
                        Err(failure) => failure,
                    }
                }
                Some(Ok(Some(GenerateEvent { event: None }))) => continue,
                Some(Ok(None)) => Failure::Lost("the stream ended early".into()),
                Some(Err(status)) => self.meaning(&status),
            };
            match failure {
                Failure::Final(error) => {
                    self.running = None;
                    return Err(error);
                }
                Failure::Busy => self.lost("the worker gave it up")?,
                Failure::Lost(why) => self.lost(&why)?,
            }
            if self.received >= self.request.max_tokens {
                return Ok(Event::Finished(self.last_words()));
            }
            self.upstream.metrics.resumed();
            self.connect(Instant::now() + PATIENCE, None).await?;
        }
    }

    /// All tokens came, only the end was lost with the worker.
    fn last_words(&self) -> Finished {
        Finished {
            reason: FinishReason::Length.into(),
            stop_token: None,
            prompt_tokens: self.request.prompt_len,
            generated_tokens: self.received,
            signature: Vec::new(),
            preemptions: 0,
            steps: None,
        }
    }

    fn take(&mut self, event: WireEvent) -> Result<Option<Event>, Failure> {
        match event {
            WireEvent::Prefilled(prefilled) => Ok(self.take_prefilled(prefilled)),
            WireEvent::Token(token) => self.take_token(token).map(Some),
            WireEvent::Finished(finished) => match finished.reason() {
                FinishReason::Stop | FinishReason::Length => {
                    if let (Some(running), Some(steps)) = (&self.running, &finished.steps) {
                        self.upstream.timed(running.member.rank, steps);
                    }
                    self.remember_all(&finished);
                    self.tell(&finished);
                    self.look_back(&finished);
                    self.running = None;
                    if let Some(work) = self.work.take() {
                        work.answered(finished.generated_tokens);
                    }
                    self.leave(&finished);
                    Ok(Some(Event::Finished(finished)))
                }
                FinishReason::Deadline => Err(Failure::Final(self.late())),
                FinishReason::Cancelled | FinishReason::Unspecified => {
                    Err(Failure::Lost("the worker gave the sequence up".into()))
                }
            },
        }
    }

    fn take_prefilled(&mut self, mut prefilled: Prefilled) -> Option<Event> {
        let reported = prefilled
            .routed
            .take()
            .map(|routed| skip(routed, self.routed));
        self.routed += reported.as_ref().map_or(0, |routed| routed.tokens as usize);
        if self.prefilled {
            self.late_routed = reported;
            return None;
        }
        self.prefilled = true;
        self.cached = prefilled.cached_tokens;
        self.remember_prompt(&mut prefilled);
        let believed = self.upstream.believes(Predictor::Prefill);
        if let Some(work) = &self.work {
            work.read(self.cached, self.prompt.clone());
            if !believed {
                work.disregard();
            }
        }
        if let Some(running) = &self.running {
            self.upstream
                .has_read(self.prompt_ids(), running.member.rank);
        }
        if let Some(place) = &self.place {
            place.read(self.prompt.as_deref(), believed);
        }
        prefilled.routed = reported;
        Some(Event::Prefilled(prefilled))
    }

    fn prompt_ids(&self) -> &[u32] {
        let prompt = self.request.prompt_len as usize;
        self.request.token_ids.get(..prompt).unwrap_or_default()
    }

    fn take_token(&mut self, mut token: Token) -> Result<Event, Failure> {
        if token.index != self.received {
            return Err(Failure::Final(ApiError::upstream(format!(
                "the worker sent token {} where {} was due",
                token.index, self.received
            ))));
        }
        self.received += 1;
        if let Some(work) = &self.work {
            work.token();
        }
        self.request.token_ids.push(token.id);
        self.routed += token
            .routed
            .as_ref()
            .map_or(0, |routed| routed.tokens as usize);
        if let Some(mut late) = self.late_routed.take().filter(|late| late.tokens > 0) {
            if let Some(own) = token.routed.take() {
                late.tokens += own.tokens;
                late.experts.extend(own.experts);
            }
            token.routed = Some(late);
        }
        Ok(Event::Token(token))
    }

    /// Keeps the histogram of the prompt. What the prefix cache skipped is taken from what was known of it.
    fn remember_prompt(&mut self, prefilled: &mut Prefilled) {
        let Some(experts) = self
            .upstream
            .views
            .load()
            .model()
            .map(|model| model.experts)
        else {
            return;
        };
        self.read = std::mem::take(&mut prefilled.signature);
        let Some(mut signature) = Signature::new(experts, self.read.clone()) else {
            return;
        };
        if prefilled.cached_tokens > 0
            && let Some(known) = &self.foreseen.prefix.signature
            && known.counts.len() == signature.counts.len()
        {
            for (sum, count) in signature.counts.iter_mut().zip(&known.counts) {
                *sum = sum.saturating_add(*count);
            }
        }
        let signature = Arc::new(signature);
        let prompt = self.request.prompt_len as usize;
        let prompt = self.request.token_ids.get(..prompt).unwrap_or_default();
        self.upstream.signatures.remember(prompt, &signature);
        if let Some(running) = &mut self.running
            && self.upstream.believes(Predictor::Prefill)
        {
            running.guard.measured(Arc::clone(&signature));
        }
        self.prompt = Some(signature);
    }

    /// Keeps the histogram of prompt and answer: the next turn of a conversation begins with both.
    fn remember_all(&self, finished: &Finished) {
        if self.losses > 0 || self.cached > 0 {
            return;
        }
        let model = self.upstream.views.load();
        let signature = model
            .model()
            .and_then(|model| Signature::new(model.experts, finished.signature.clone()));
        if let Some(signature) = signature {
            let signature = Arc::new(signature);
            self.upstream
                .signatures
                .remember(&self.request.token_ids, &signature);
        }
    }

    /// Tells whoever records. A sequence that went on elsewhere, or took pages from the prefix cache, has no whole histogram
    /// and is not told.
    fn tell(&self, finished: &Finished) {
        if self.losses > 0 || self.cached > 0 {
            return;
        }
        self.upstream.feed.ended(|number| {
            let prompt = Arc::clone(self.prompt.as_ref()?);
            Some(Ended {
                number,
                prompt_tokens: u64::from(self.request.prompt_len),
                answer_tokens: u64::from(finished.generated_tokens),
                prompt,
                total: finished.signature.clone(),
            })
        });
    }

    /// Compares what was foreseen with what was used. A sequence that went on elsewhere has no whole histogram.
    fn look_back(&mut self, finished: &Finished) {
        if self.losses > 0 {
            return;
        }
        self.upstream.look_back(
            std::mem::take(&mut self.foreseen),
            self.prompt.clone(),
            &self.read,
            finished,
            self.identity.tenant.as_ref(),
        );
    }

    /// Gives the place back, with what the answer used: the whole without the prompt.
    fn leave(&mut self, finished: &Finished) {
        let Some(mut place) = self.place.take() else {
            return;
        };
        let model = self.upstream.views.load();
        let experts = model.model().map_or(0, |model| model.experts);
        let answer = rest(experts, &finished.signature, &self.read);
        let answer = answer.filter(|_| self.losses == 0);
        place.answered(finished.generated_tokens, answer.as_ref());
    }

    /// Drops the stream of a lost worker.
    fn lost(&mut self, why: &str) -> Result<(), ApiError> {
        if let Some(running) = self.running.take() {
            self.upstream.suspect(&running.member);
            tracing::warn!(
                parent: &self.identity.span,
                worker = running.member.rank.0,
                received = self.received,
                why,
                "a sequence lost its worker"
            );
        }
        self.losses += 1;
        if self.losses > MAX_LOSSES {
            return Err(ApiError::unavailable(
                "worker_lost",
                format!("the request lost {} workers: {why}", self.losses),
            ));
        }
        Ok(())
    }

    /// Opens a stream on some worker. Waits for one until `patience` if there is none.
    /// The first try goes to the worker that the window chose, if it did.
    async fn connect(
        &mut self,
        patience: Instant,
        mut grant: Option<Grant>,
    ) -> Result<(), ApiError> {
        let patience = patience.min(self.deadline);
        let mut avoid: BTreeSet<Rank> = BTreeSet::new();
        let mut busy = false;
        let mut pause = PAUSE.0;
        loop {
            let Some((choice, member, guard)) = self.worker(&avoid, grant.take()) else {
                if Instant::now() + pause >= patience {
                    return Err(self.nowhere(busy));
                }
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE.1);
                avoid.clear();
                continue;
            };
            let span = self.announce(&choice, &member);
            if self.choice.is_none() {
                self.choice = Some(choice);
            }
            let called = self.call(&member, &span).instrument(span.clone()).await;
            match called {
                Ok(stream) => {
                    self.running = Some(Running {
                        stream,
                        guard,
                        member,
                        _span: span,
                    });
                    return Ok(());
                }
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Busy) => busy = true,
                // No loss: the worker never had the sequence. Patience bounds how often that happens.
                Err(Failure::Lost(why)) => {
                    tracing::debug!(parent: &span, why, "worker_not_reached");
                    self.upstream.suspect(&member);
                }
            }
            // The first word belongs to the worker that took the sequence.
            if self.received == 0 && !self.prefilled {
                self.choice = None;
            }
            avoid.insert(member.rank);
        }
    }

    fn worker(
        &mut self,
        avoid: &BTreeSet<Rank>,
        grant: Option<Grant>,
    ) -> Option<(Choice, Arc<Member>, LoadGuard)> {
        if let Some(grant) = grant {
            let Grant {
                choice,
                member,
                guard,
                place,
            } = grant;
            self.place = Some(place);
            return Some((choice, member, guard));
        }
        if let Some(place) = &self.place {
            place.moved();
        }
        let members = self.upstream.candidates(avoid);
        self.upstream
            .choose(&members, &self.request.token_ids, &self.known)
    }

    /// Opens the spans of a decision and of the call that follows.
    fn announce(&self, choice: &Choice, member: &Member) -> Span {
        let route = tracing::info_span!(
            parent: &self.identity.span,
            "route",
            route.policy = route::word(choice.policy),
            route.outcome = choice.outcome.word(),
            route.worker = choice.rank.0,
            route.fit = choice.fit.unwrap_or(-1.0),
            route.known_tokens = choice.known,
        );
        tracing::info_span!(
            parent: &route,
            "upstream",
            otel.kind = "client",
            rpc.system = "grpc",
            rpc.method = "Generate",
            server.address = member.rpc,
            worker.rank = member.rank.0,
            sequence.losses = self.losses,
            sequence.received = self.received,
        )
    }

    async fn call(
        &self,
        member: &Member,
        span: &Span,
    ) -> Result<Streaming<GenerateEvent>, Failure> {
        let now = Instant::now();
        if now >= self.deadline {
            return Err(Failure::Final(self.late()));
        }
        let channel = self.upstream.channel(member).map_err(Failure::Final)?;
        let mut message = self.request.clone();
        let left = self.deadline - now;
        message.deadline_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1);
        let mut request = Request::new(message);
        self.identity.write_metadata(span, request.metadata_mut());
        let mut client = GenerationClient::new(channel).max_decoding_message_size(256 << 20);
        match timeout_at(self.deadline.min(now + ANSWER), client.generate(request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.meaning(&status)),
            Err(_) if Instant::now() >= self.deadline => Err(Failure::Final(self.late())),
            Err(_) => Err(Failure::Lost("the worker did not answer".into())),
        }
    }

    fn meaning(&self, status: &Status) -> Failure {
        match status.code() {
            Code::InvalidArgument | Code::OutOfRange => {
                Failure::Final(ApiError::refused_by_worker(status.message()))
            }
            Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => {
                Failure::Final(ApiError::upstream(format!(
                    "the worker cannot serve this: {}",
                    status.message()
                )))
            }
            Code::DeadlineExceeded => Failure::Final(self.late()),
            Code::ResourceExhausted => Failure::Busy,
            code => Failure::Lost(format!("{code:?}: {}", status.message())),
        }
    }

    fn late(&self) -> ApiError {
        let whole = self.deadline.saturating_duration_since(self.began);
        ApiError::deadline(u64::try_from(whole.as_millis()).unwrap_or(u64::MAX))
    }

    fn nowhere(&self, busy: bool) -> ApiError {
        if busy {
            return ApiError::overloaded(
                "workers_full",
                "every worker is full: try again later",
                1,
            );
        }
        let view = self.upstream.views.load();
        let reason = view
            .not_ready()
            .unwrap_or_else(|| "no ready worker can be reached".into());
        ApiError::unavailable("no_worker", reason)
    }
}

/// The report without its first `known` positions.
fn skip(mut routed: RoutedExperts, known: usize) -> RoutedExperts {
    let known = known.min(routed.tokens as usize);
    let per_token = routed.layers as usize * routed.top_k as usize;
    routed
        .experts
        .drain(..(known * per_token).min(routed.experts.len()));
    routed.tokens -= u32::try_from(known).unwrap_or(routed.tokens);
    routed
}
