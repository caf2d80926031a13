//! The window at work: sequences that wait for a place, and who gets the next one.
//!
//! Admission lets in as many requests as there are places and [`WIDTH`] more: the head of the queue is the window. A
//! place is a permit of a semaphore that counts what runs on all workers, and a worker has room while it has less than
//! its share of them. Whenever a request comes or a place is free, the policy of `route/window.rs` picks. Requests of
//! several sequences take their places at once and in order ([`Upstream::places`]), because two that each held half of
//! theirs would wait for ever.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::manifest::RoutingPolicy;
use foregate_api::member::Member;
use foregate_wire::generation::{GenerateRequest, StepFit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::Upstream;
use crate::error::ApiError;
use crate::loads::{LoadGuard, Loads};
use crate::metrics::WindowState;
use crate::route::window::clusters::split_mix;
use crate::route::window::{
    Kinds, LEAST_PER_WORKER, Pick, Settings, StepModel, Waiting, Why, Window, Worker,
};
use crate::route::{Choice, Outcome};
use crate::signature::{Known, Profile, Signature};

/// Requests that the policy looks at.
const WIDTH: u32 = 64;
/// Profiles among which they are exchanged.
const EXCHANGED: usize = 64;
/// After this share of the longest wait a request is next, but after this time at the latest.
const PATIENCE: (f64, f64) = (0.25, 4000.0);
/// How long kinds stay, and how long after a try the next one may come.
const REFIT: (Duration, Duration) = (Duration::from_secs(120), Duration::from_secs(2));
/// Workers come and go without a word to those who wait, so they look again.
const LOOK: Duration = Duration::from_millis(100);
/// Tokens that an answer is expected to have before any has ended, and the weight of a new one.
const ANSWER: (f64, f64) = (120.0, 1.0 / 32.0);

/// How the window is tried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trial {
    /// Requests of the queue that are looked at, at least 1.
    pub width: u32,
    /// Each request is placed by what is known of another one: a placebo, that should gain nothing and do no harm.
    pub exchanged: bool,
}

impl Default for Trial {
    fn default() -> Self {
        Self {
            width: WIDTH,
            exchanged: false,
        }
    }
}

/// What the policy of the window needs.
#[derive(Debug)]
pub(super) struct Ahead {
    trial: Trial,
    total: u32,
    places: Arc<Semaphore>,
    longest_wait: Duration,
    began: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Made when the model is known.
    window: Option<Window>,
    waiting: BTreeMap<u64, Waiter>,
    next: u64,
    answer: f64,
    /// When kinds were last fitted, and whether somebody does now.
    fitted: Option<Instant>,
    fitting: bool,
    /// What is known of other requests, where profiles are exchanged.
    strangers: VecDeque<Option<Profile>>,
}

impl State {
    /// What was known of an earlier request, in place of what is known of this one; nothing at the beginning.
    fn exchange(&mut self, profile: Option<Profile>) -> Option<Profile> {
        self.strangers.push_back(profile);
        if self.strangers.len() <= EXCHANGED {
            return None;
        }
        // One of the older half, by its number: neighbours in time may well be alike.
        let drawn = split_mix(self.next) as usize % (EXCHANGED / 2);
        self.strangers.swap_remove_back(drawn).flatten()
    }
}

#[derive(Debug)]
struct Waiter {
    known: Known,
    grant: oneshot::Sender<Grant>,
}

/// A place on a worker.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) choice: Choice,
    pub(super) member: Arc<Member>,
    pub(super) guard: LoadGuard,
    pub(super) place: Place,
}

/// Gives the place to the next one when dropped.
#[derive(Debug)]
pub(super) struct Place {
    upstream: Arc<Upstream>,
    id: u64,
    permit: Option<OwnedSemaphorePermit>,
    used: Option<Profile>,
}

/// Places of a request of several sequences; the next one's when dropped.
#[derive(Debug)]
pub struct Places {
    upstream: Arc<Upstream>,
    permit: Option<OwnedSemaphorePermit>,
}

/// A sequence that waits; leaves the queue when dropped.
struct Leave<'a>(&'a Ahead, u64);

impl Ahead {
    pub(super) fn new(places: u32, longest_wait: Duration, trial: Trial) -> Self {
        Self {
            trial,
            total: places,
            places: Arc::new(Semaphore::new(places as usize)),
            longest_wait,
            began: Instant::now(),
            state: Mutex::new(State {
                window: None,
                waiting: BTreeMap::new(),
                next: 1,
                answer: ANSWER.0,
                fitted: None,
                fitting: false,
                strangers: VecDeque::new(),
            }),
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn now_ms(&self) -> f64 {
        self.began.elapsed().as_secs_f64() * 1000.0
    }

    fn patience_ms(&self, deadline: Instant) -> f64 {
        let left = deadline
            .saturating_duration_since(Instant::now())
            .min(self.longest_wait);
        (left.as_secs_f64() * 1000.0 * PATIENCE.0).min(PATIENCE.1)
    }

    /// A worker's newest fit.
    pub(super) fn timed(&self, worker: Rank, fit: &StepFit) {
        let found = StepModel {
            base: fit.base_ms,
            expert: fit.expert_ms,
            sequence: fit.row_ms,
        };
        self.with(|state| {
            if let Some(window) = &mut state.window {
                window.timed(worker, found, fit.explained);
            }
        });
    }

    /// For the metrics.
    pub(super) fn look(&self) -> Option<WindowState> {
        self.with(|state| {
            let window = state.window.as_ref()?;
            Some(WindowState {
                regime: window.regime(),
                grouping: window.is_grouping(),
                waiting: window.waiting(),
                switch_offs: window.guard().switch_offs(),
                gain: window.guard().gain(),
                separation: window.kinds().map(|kinds| kinds.separation),
                step: window.step(),
            })
        })
    }
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        let waiter = self.0.with(|state| {
            if let Some(window) = &mut state.window {
                window.remove(self.1);
            }
            state.waiting.remove(&self.1)
        });
        drop(waiter);
    }
}

impl Upstream {
    /// Whether sequences wait for their place in the window.
    #[must_use]
    pub const fn is_windowed(&self) -> bool {
        self.ahead.is_some()
    }

    /// Places for `sequences` sequences of one request, all at once; `None` without a window.
    ///
    /// # Errors
    /// 429 after the longest wait for a place, 504 at the deadline.
    pub async fn places(
        self: &Arc<Self>,
        sequences: u32,
        deadline: Instant,
    ) -> Result<Option<Places>, ApiError> {
        let Some(ahead) = &self.ahead else {
            return Ok(None);
        };
        let wanted = sequences.clamp(1, ahead.total);
        let over = Instant::now() + ahead.longest_wait;
        let acquired = tokio::select! {
            acquired = Arc::clone(&ahead.places).acquire_many_owned(wanted) => acquired,
            () = sleep_until(over.min(deadline)) => return Err(Self::too_long(ahead, over <= deadline)),
        };
        Ok(Some(Places {
            upstream: Arc::clone(self),
            permit: acquired.ok(),
        }))
    }

    /// Waits for a place of the window.
    pub(super) async fn place(
        self: &Arc<Self>,
        ahead: &Ahead,
        request: &GenerateRequest,
        known: &Known,
        deadline: Instant,
    ) -> Result<Grant, ApiError> {
        let (grant, mut granted) = oneshot::channel();
        let id = self.queue(ahead, request, known, deadline, grant)?;
        let _leave = Leave(ahead, id);
        let over = Instant::now() + ahead.longest_wait;
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                grant = &mut granted => {
                    return grant.map_err(|_| ApiError::internal("the window lost a request"));
                }
                () = sleep_until(over.min(deadline)) => {
                    return Err(Self::too_long(ahead, over <= deadline));
                }
                _ = looks.tick() => self.dispatch(ahead),
            }
        }
    }

    fn too_long(ahead: &Ahead, waited: bool) -> ApiError {
        if waited {
            let ms = ahead.longest_wait.as_millis();
            let what = format!("no free place within {ms} ms: try again later");
            ApiError::overloaded("queue_timeout", what, 1)
        } else {
            ApiError::deadline(
                u64::try_from(ahead.longest_wait.as_millis()).unwrap_or(u64::MAX),
            )
        }
    }

    fn queue(
        &self,
        ahead: &Ahead,
        request: &GenerateRequest,
        known: &Known,
        deadline: Instant,
        grant: oneshot::Sender<Grant>,
    ) -> Result<u64, ApiError> {
        let view = self.views.load();
        let Some(model) = view.model() else {
            let why = view
                .not_ready()
                .unwrap_or_else(|| "no worker is registered".into());
            return Err(ApiError::unavailable("no_worker", why));
        };
        let signature = known.signature.as_deref();
        let profile = signature.and_then(|signature| Profile::of(signature, model.top_k));
        let settings = Settings {
            width: ahead.trial.width.max(1) as usize,
            ..Settings::new(model.experts, model.top_k)
        };
        let cached = self.held(&request.token_ids).into_iter().collect();
        let (arrived_ms, patience_ms) = (ahead.now_ms(), ahead.patience_ms(deadline));
        Ok(ahead.with(|state| {
            let id = state.next;
            state.next += 1;
            let profile = match ahead.trial.exchanged {
                true => state.exchange(profile),
                false => profile,
            };
            let window = state.window.get_or_insert_with(|| Window::new(settings));
            window.push(Waiting {
                id,
                arrived_ms,
                patience_ms,
                profile,
                prompt: request.prompt_len,
                answer: state.answer.min(f64::from(request.max_tokens)),
                cached,
            });
            let known = known.clone();
            state.waiting.insert(id, Waiter { known, grant });
            id
        }))
    }

    /// Gives free places to those who wait.
    fn dispatch(self: &Arc<Self>, ahead: &Ahead) {
        while let Some((sender, grant)) = self.next_grant(ahead) {
            // Who has left meanwhile does not take it: dropping it frees the place for the next turn of the loop.
            drop(sender.send(grant));
        }
    }

    fn next_grant(self: &Arc<Self>, ahead: &Ahead) -> Option<(oneshot::Sender<Grant>, Grant)> {
        let permit = Arc::clone(&ahead.places).try_acquire_owned().ok()?;
        let members = self.candidates(&BTreeSet::new());
        let workers = self.rooms(&members, ahead.total);
        let (pick, waiter, guard) = ahead.with(|state| {
            let pick = state.window.as_mut()?.pick(ahead.now_ms(), &workers)?;
            let waiter = state.waiting.remove(&pick.request.id)?;
            // Counted in before anybody else may look.
            let signature = waiter.known.signature.clone();
            let guard = Loads::enter(&self.loads, pick.worker, signature);
            Some((pick, waiter, guard))
        })?;
        let member = members
            .into_iter()
            .find(|member| member.rank == pick.worker)?;
        let choice = choice(&pick, &waiter.known);
        self.metrics.routed(&choice);
        if let Some(added) = pick.added {
            self.metrics.added("predicted", added);
        }
        let place = Place {
            upstream: Arc::clone(self),
            id: pick.request.id,
            permit: Some(permit),
            used: None,
        };
        Some((
            waiter.grant,
            Grant {
                choice,
                member,
                guard,
                place,
            },
        ))
    }

    /// Workers with what they run. A place that is free is somewhere: if load that others brought fills every share,
    /// the least loaded have it.
    fn rooms(&self, members: &[Arc<Member>], places: u32) -> Vec<Worker> {
        let view = self.views.load();
        let share = places.div_ceil((members.len() as u32).max(1));
        let worker = |member: &Arc<Member>| {
            let foreign = view.foreign.get(&member.rank).copied().unwrap_or(0);
            let active = self.loads.running(member.rank).saturating_add(foreign);
            Worker {
                rank: member.rank,
                active,
                has_room: active < share,
            }
        };
        let mut workers: Vec<Worker> = members.iter().map(worker).collect();
        if !workers.iter().any(|worker| worker.has_room) {
            let least = workers.iter().map(|worker| worker.active).min();
            for worker in &mut workers {
                worker.has_room = Some(worker.active) == least;
            }
        }
        workers
    }

    /// Fits kinds beside serving, where that is due.
    fn refit(self: &Arc<Self>, ahead: &Ahead) {
        let members = self.candidates(&BTreeSet::new());
        let ranks: Vec<Rank> = members.iter().map(|member| member.rank).collect();
        let due = ahead.with(|state| {
            let window = state.window.as_mut()?;
            let fit = window.kinds().is_some_and(|kinds| kinds.are_for(&ranks));
            let pause = if fit { REFIT.0 } else { REFIT.1 };
            let rests = state.fitted.is_some_and(|last| last.elapsed() < pause);
            let enough = window.known() >= LEAST_PER_WORKER * ranks.len();
            if state.fitting || rests || !enough || ranks.len() < 2 {
                return None;
            }
            let alive = |rank: Rank| ranks.contains(&rank);
            window.keep_only(alive);
            state.fitting = true;
            Some((window.recent(), window.kinds().cloned()))
        });
        let Some((profiles, before)) = due else {
            return;
        };
        let upstream = Arc::clone(self);
        // Half a second at most; nobody waits for it, and it ends by itself.
        drop(tokio::task::spawn_blocking(move || {
            let kinds = Kinds::fit(&profiles, &ranks, before.as_deref());
            let Some(ahead) = &upstream.ahead else { return };
            ahead.with(|state| {
                state.fitting = false;
                state.fitted = Some(Instant::now());
                if let (Some(window), Some(kinds)) = (&mut state.window, kinds) {
                    window.adopt(Arc::new(kinds));
                }
            });
        }));
    }
}

fn choice(pick: &Pick, known: &Known) -> Choice {
    Choice {
        rank: pick.worker,
        policy: RoutingPolicy::Window,
        outcome: match pick.why {
            Why::Cost => Outcome::Fit,
            Why::Overdue => Outcome::Overdue,
            Why::Control => Outcome::Control,
            Why::Order => Outcome::Order,
        },
        fit: None,
        added: pick.added,
        known: known.tokens,
        cached: 0,
    }
}

impl Place {
    /// The worker read the prompt, which used experts like this; whether that is believed to say what the answer uses.
    pub(super) fn read(&self, signature: Option<&Signature>, believed: bool) {
        let Some(ahead) = &self.upstream.ahead else {
            return;
        };
        let top_k = self
            .upstream
            .views
            .load()
            .model()
            .map_or(1, |model| model.top_k);
        let Some(profile) = signature.and_then(|signature| Profile::of(signature, top_k))
        else {
            return;
        };
        ahead.with(|state| {
            if let Some(window) = &mut state.window {
                match believed {
                    true => window.measured(self.id, profile),
                    false => window.learn(profile),
                }
            }
        });
        self.upstream.refit(ahead);
    }

    /// The answer ended after so many tokens, and used experts like this if that is known.
    pub(super) fn answered(&mut self, tokens: u32, signature: Option<&Signature>) {
        let top_k = self
            .upstream
            .views
            .load()
            .model()
            .map_or(1, |model| model.top_k);
        self.used = signature.and_then(|signature| Profile::of(signature, top_k));
        if let Some(ahead) = &self.upstream.ahead {
            ahead.with(|state| state.answer += (f64::from(tokens) - state.answer) * ANSWER.1);
        }
    }

    /// The sequence goes on at a worker that the window did not choose.
    pub(super) fn moved(&self) {
        if let Some(ahead) = &self.upstream.ahead {
            ahead.with(|state| {
                state
                    .window
                    .as_mut()
                    .and_then(|window| window.ended(self.id, None))
            });
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(ahead) = &self.upstream.ahead else {
            return;
        };
        let used = self.used.take();
        let added = ahead.with(|state| {
            let window = state.window.as_mut();
            window.and_then(|window| window.ended(self.id, used.as_ref()))
        });
        if let Some(added) = added {
            self.upstream.metrics.added("measured", added);
        }
        drop(self.permit.take());
        self.upstream.dispatch(ahead);
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        drop(self.permit.take());
        if let Some(ahead) = &self.upstream.ahead {
            self.upstream.dispatch(ahead);
        }
    }
}
