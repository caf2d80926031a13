//! The queue seen ahead: of the requests that wait and the workers with room, the pair that costs least goes next.
//!
//! Why: a decode step in the memory-bound regime takes as long as its distinct experts take to read. A router that
//! takes one request at a time has no choice when all slots are full, one request against one free slot. A window
//! over the queue restores it. Costs are milliseconds, so that unlike things can be added:
//!
//! ```text
//!  cost   = step + once / n̂ − A·wait / patience
//!  step   = (b̂ + 1)·c1·ĝ + 2·c2·n_w        what the request and its companions lose in every step
//!  ĝ      = Σ p·(1 − c)^b̂ / layers         experts that it would add to a usual batch of the worker's kind
//!  once   = τ·(prompt − cached) + wait at w  what is paid once; n̂: tokens that the answer is expected to have
//! ```
//!
//! ĝ is against the *kind* of the worker (`kinds.rs`), not against what runs there at the moment: with a few
//! sequences nothing overlaps yet, and a router that looks at those only never builds a mixture that pays.
//!
//! Guards. A request older than its patience is next, whatever it costs others. A slice is placed at random and
//! compared (`guard.rs`). Where kinds do not differ, or all experts are read anyway (`regime.rs`), ĝ is left out and
//! the order of arrival stays: what remains is exactly prefix and load.
//!
//! Pure: no clock, no lock, no task. The caller says what time it is and which workers have room.

pub mod band;
pub(crate) mod clusters;
mod cost;
mod fitted;
mod guard;
mod kinds;
mod matching;
mod regime;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use foregate_api::ids::Rank;

pub use cost::StepModel;
pub use guard::{CONTROL, Guard};
pub use kinds::{Kinds, LEAST_PER_WORKER};
pub use regime::Regime;

use crate::signature::Profile;
use clusters::split_mix;
use cost::{Running, Unused};
use fitted::Fitted;

/// Profiles of the newest requests that kinds are made from.
const RECENT: usize = 2000;
/// Share of variance between kinds below which there are none.
const LEAST_SEPARATION: f64 = 0.05;
/// The table of usual batches is made anew when the batch is off by this factor.
const STALE: f64 = 1.2;

/// What the policy is told once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Requests of the queue that are looked at.
    pub width: usize,
    /// What a wait as long as the patience is worth, in ms: about half a step.
    pub age_ms: f64,
    /// Cost of a step.
    pub step: StepModel,
    /// Milliseconds per prompt token that is not cached.
    pub prefill_ms: f64,
    /// Share of requests placed at random until the gain is proven; then a fifth of it.
    pub control: f64,
    /// Experts per layer, and how many of them a token uses.
    pub experts: (usize, usize),
}

impl Settings {
    /// The settings of the design for a model of `experts` experts of which a token uses `top_k`.
    #[must_use]
    pub fn new(experts: usize, top_k: usize) -> Self {
        Self {
            width: 64,
            age_ms: 8.0,
            step: StepModel::default(),
            prefill_ms: 0.05,
            control: CONTROL,
            experts: (experts, top_k),
        }
    }
}

/// A request that waits.
#[derive(Debug, Clone, PartialEq)]
pub struct Waiting {
    /// The caller's number for it.
    pub id: u64,
    /// When it came, ms.
    pub arrived_ms: f64,
    /// After such a wait it is next.
    pub patience_ms: f64,
    /// What is known of its experts.
    pub profile: Option<Profile>,
    /// Prompt tokens.
    pub prompt: u32,
    /// Tokens that its answer is expected to have.
    pub answer: f64,
    /// Prompt tokens that a worker's cache holds; workers not named hold none.
    pub cached: Vec<(Rank, u32)>,
}

/// A worker at the moment of a decision.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Worker {
    /// Which.
    pub rank: Rank,
    /// Sequences it runs or keeps waiting.
    pub active: u32,
    /// Whether it takes one more.
    pub has_room: bool,
}

/// What decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// The least cost of the window.
    Cost,
    /// The oldest request had waited for as long as it may.
    Overdue,
    /// Placed at random, to compare with.
    Control,
    /// In order of arrival, by prefix and load.
    Order,
}

/// A decision.
#[derive(Debug, Clone, PartialEq)]
pub struct Pick {
    /// The request, taken out of the queue.
    pub request: Waiting,
    /// Its worker.
    pub worker: Rank,
    /// What decided.
    pub why: Why,
    /// Experts per layer that it is expected to add to a usual batch there; `None` without kinds.
    pub added: Option<f64>,
}

#[derive(Debug)]
struct Queued {
    request: Waiting,
    likely: Option<Vec<f32>>,
    /// Experts added by kind, and the version of the table that said so.
    added: (u64, Vec<f32>),
}

#[derive(Debug)]
struct Placed {
    worker: Rank,
    profile: Option<Profile>,
    control: bool,
}

/// The policy with its state.
#[derive(Debug)]
pub struct Window {
    settings: Settings,
    queue: VecDeque<Queued>,
    recent: VecDeque<Profile>,
    kinds: Option<Arc<Kinds>>,
    unused: Option<Unused>,
    regime: Regime,
    fitted: Fitted,
    guard: Guard,
    placed: BTreeMap<u64, Placed>,
    running: BTreeMap<Rank, Running>,
    decisions: u64,
    controls: u64,
}

impl Window {
    /// Nothing waits, nothing is known.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            queue: VecDeque::new(),
            recent: VecDeque::new(),
            kinds: None,
            unused: None,
            regime: Regime::Group,
            fitted: Fitted::default(),
            guard: Guard::default(),
            placed: BTreeMap::new(),
            running: BTreeMap::new(),
            decisions: 0,
            controls: 0,
        }
    }

    /// A request joins the end of the queue.
    pub fn push(&mut self, request: Waiting) {
        let likely = request
            .profile
            .as_ref()
            .map(|profile| profile.probabilities().collect());
        let mut queued = Queued {
            request,
            likely,
            added: (0, Vec::new()),
        };
        // Now, so that the pick finds it done.
        queued.refresh(self.kinds.as_deref(), self.unused.as_ref());
        self.queue.push_back(queued);
    }

    /// Takes a request that gave up out of the queue.
    pub fn remove(&mut self, id: u64) -> bool {
        let at = self.queue.iter().position(|queued| queued.request.id == id);
        at.and_then(|at| self.queue.remove(at)).is_some()
    }

    /// Requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Number of profiles to fit kinds on.
    #[must_use]
    pub fn known(&self) -> usize {
        self.recent.len()
    }

    /// Profiles to fit kinds on.
    #[must_use]
    pub fn recent(&self) -> Vec<Profile> {
        self.recent.iter().cloned().collect()
    }

    /// The kinds in use.
    #[must_use]
    pub const fn kinds(&self) -> Option<&Arc<Kinds>> {
        self.kinds.as_ref()
    }

    /// Takes new kinds, which [`Kinds::fit`] made elsewhere.
    pub fn adopt(&mut self, kinds: Arc<Kinds>) {
        let (batch, version) = self
            .unused
            .as_ref()
            .map_or((1.0, 0), |u| (u.batch, u.version));
        self.unused = Some(Unused::new(&kinds, batch, version + 1));
        self.kinds = Some(kinds);
        self.look_at_prize(batch);
    }

    /// A worker's newest fit of its decode steps, and the part of their variance that it explains.
    pub fn timed(&mut self, worker: Rank, found: StepModel, explained: f64) {
        if let Some(model) = self.fitted.note(worker, found, explained) {
            self.adopt_cost(model);
        }
    }

    /// The cost of a step in use, and whether workers have measured it.
    #[must_use]
    pub const fn step(&self) -> (StepModel, bool) {
        (self.settings.step, self.fitted.in_use().is_some())
    }

    /// What is worth as much as a step keeps its proportion to it: the credit of a wait, and a token of a prompt.
    fn adopt_cost(&mut self, model: Option<StepModel>) {
        let (experts, top_k) = self.settings.experts;
        let assumed = Settings::new(experts, top_k);
        let batch = self.unused.as_ref().map_or(1.0, |unused| unused.batch);
        let step = model.unwrap_or(assumed.step);
        let distinct = self
            .kinds
            .as_ref()
            .map_or(top_k as f64, |kinds| kinds.distinct(batch).0);
        let scale = step.step(distinct, batch) / assumed.step.step(distinct, batch);
        self.settings.step = step;
        self.settings.age_ms = assumed.age_ms * scale;
        self.settings.prefill_ms = assumed.prefill_ms * scale;
        self.look_at_prize(batch);
    }

    /// What the gateway aims at now.
    #[must_use]
    pub const fn regime(&self) -> Regime {
        self.regime
    }

    /// The judge of the gain.
    #[must_use]
    pub const fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Requests placed, and how many of them at random.
    #[must_use]
    pub const fn counts(&self) -> (u64, u64) {
        (self.decisions, self.controls)
    }

    /// Whether requests join their like at the moment.
    #[must_use]
    pub fn is_grouping(&self) -> bool {
        let separate = |kinds: &Arc<Kinds>| kinds.separation >= LEAST_SEPARATION;
        self.regime == Regime::Group
            && self.guard.is_on()
            && self.kinds.as_ref().is_some_and(separate)
    }

    /// The next request and its worker; `None` if nobody waits or no worker has room. To be called again until
    /// then, whenever a request came or a slot was freed.
    pub fn pick(&mut self, now_ms: f64, workers: &[Worker]) -> Option<Pick> {
        let open: Vec<Worker> = workers.iter().copied().filter(|w| w.has_room).collect();
        let oldest = &self.queue.front()?.request;
        if open.is_empty() {
            return None;
        }
        let overdue = now_ms - oldest.arrived_ms > oldest.patience_ms;
        let batch = workers
            .iter()
            .map(|worker| f64::from(worker.active))
            .sum::<f64>()
            / workers.len() as f64;
        self.follow(batch.max(1.0));
        let grouping = self.is_grouping();
        self.decisions += 1;
        self.guard.placed();
        let (at, worker, why) = if grouping && self.is_control() {
            self.controls += 1;
            let drawn = split_mix(self.decisions.wrapping_mul(0xD134_2543_DE82_EF95));
            (0, open[(drawn % open.len() as u64) as usize], Why::Control)
        } else {
            let width = if overdue || !grouping {
                1
            } else {
                self.settings.width
            };
            let why = match (overdue, grouping) {
                (true, _) => Why::Overdue,
                (false, true) => Why::Cost,
                (false, false) => Why::Order,
            };
            let (at, worker) = self.cheapest(now_ms, width, &open, grouping, batch.max(1.0))?;
            (at, worker, why)
        };
        self.place(at, worker.rank, why)
    }

    /// Drawn, so that it is not in step with anything that comes in turns.
    fn is_control(&self) -> bool {
        let drawn = split_mix(self.decisions.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let slice = self.settings.control * self.guard.slice();
        (drawn as f64) < slice * 2f64.powi(64)
    }

    fn cheapest(
        &mut self,
        now_ms: f64,
        width: usize,
        open: &[Worker],
        grouping: bool,
        batch: f64,
    ) -> Option<(usize, Worker)> {
        let kinds: Vec<usize> = open.iter().map(|worker| self.kind(worker.rank)).collect();
        let step = self.settings.step;
        let per_expert = if grouping {
            (batch + 1.0) * step.expert
        } else {
            0.0
        };
        let width = width.min(self.queue.len());
        let mut best: Option<(f64, usize, Worker)> = None;
        for at in 0..width {
            let queued = &mut self.queue[at];
            if grouping {
                queued.refresh(self.kinds.as_deref(), self.unused.as_ref());
            }
            let queued = &self.queue[at];
            let request = &queued.request;
            let waited = (now_ms - request.arrived_ms) / request.patience_ms.max(1.0);
            let credit = self.settings.age_ms * waited;
            for (worker, kind) in open.iter().zip(&kinds) {
                let added = queued.added.1.get(*kind).copied().map_or(0.0, f64::from);
                let cost = per_expert * added
                    + 2.0 * step.sequence * f64::from(worker.active)
                    + self.once(request, worker.rank)
                    - credit;
                if best.is_none_or(|(least, ..)| cost < least) {
                    best = Some((cost, at, *worker));
                }
            }
        }
        best.map(|(_, at, worker)| (at, worker))
    }

    /// What is paid once, per token of the answer.
    fn once(&self, request: &Waiting, worker: Rank) -> f64 {
        let cached = request.cached.iter().find(|(rank, _)| *rank == worker);
        let missing = request
            .prompt
            .saturating_sub(cached.map_or(0, |(_, tokens)| *tokens));
        self.settings.prefill_ms * f64::from(missing) / request.answer.clamp(16.0, 1024.0)
    }

    /// Index into what was added by kind.
    fn kind(&self, worker: Rank) -> usize {
        let kinds = self.kinds.as_deref();
        kinds.map_or(0, |kinds| kinds.of(worker).unwrap_or(kinds.len()))
    }

    fn place(&mut self, at: usize, worker: Rank, why: Why) -> Option<Pick> {
        let kind = self.kind(worker);
        let Queued { request, added, .. } = self.queue.remove(at)?;
        if let Some(profile) = &request.profile {
            self.running.entry(worker).or_default().add(profile, 1.0);
        }
        let placed = Placed {
            worker,
            profile: request.profile.clone(),
            control: why == Why::Control,
        };
        self.placed.insert(request.id, placed);
        Some(Pick {
            request,
            worker,
            why,
            added: added.1.get(kind).copied().map(f64::from),
        })
    }

    /// The prompt of a placed request was read: what it used is known now, and is remembered for the next fit.
    pub fn measured(&mut self, id: u64, profile: Profile) {
        if let Some(placed) = self.placed.get_mut(&id) {
            let running = self.running.entry(placed.worker).or_default();
            if let Some(guessed) = placed.profile.replace(profile.clone()) {
                running.add(&guessed, -1.0);
            }
            running.add(&profile, 1.0);
        }
        self.learn(profile);
    }

    /// Remembers for the next fit what a prompt has used.
    pub fn learn(&mut self, profile: Profile) {
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(profile);
    }

    /// Forgets workers that are gone and run nothing of ours.
    pub fn keep_only(&mut self, alive: impl Fn(Rank) -> bool) {
        let placed = &self.placed;
        let used = |rank: Rank| placed.values().any(|placed| placed.worker == rank);
        self.running.retain(|rank, _| alive(*rank) || used(*rank));
        if let Some(model) = self.fitted.keep_only(alive) {
            self.adopt_cost(model);
        }
    }

    /// A placed request ended; `used` is what its answer really used, if that is known. Returns the experts per layer
    /// that its tokens added to those of its worker's other sequences.
    pub fn ended(&mut self, id: u64, used: Option<&Profile>) -> Option<f64> {
        let placed = self.placed.remove(&id)?;
        if let (Some(profile), Some(running)) =
            (&placed.profile, self.running.get_mut(&placed.worker))
        {
            running.add(profile, -1.0);
        }
        let (saved, own) = self.saved(placed.worker, used?)?;
        if let (Some(kinds), Some(unused)) = (&self.kinds, &self.unused) {
            let (batch, step) = (unused.batch, self.settings.step);
            let (mixed, _) = kinds.distinct(batch);
            // The last that joins its like saves all of it and the first nothing: half on average.
            let value =
                |saved: f64| step.expert * saved * batch / 2.0 / step.step(mixed, batch);
            self.guard.ended(placed.control, saved, value);
        }
        Some(own)
    }

    /// Experts that the tokens of a request would have added on the average worker, less what they added on its own;
    /// and the latter.
    fn saved(&self, worker: Rank, used: &Profile) -> Option<(f64, f64)> {
        let likely: Vec<f32> = used.probabilities().collect();
        let layers = used.layers() as f64;
        let own = self.running.get(&worker)?.added(&likely, layers)?;
        let all: Vec<f64> = self
            .running
            .values()
            .filter_map(|running| running.added(&likely, layers))
            .collect();
        Some((all.iter().sum::<f64>() / all.len() as f64 - own, own))
    }

    /// Follows the usual batch.
    fn follow(&mut self, batch: f64) {
        let (Some(kinds), Some(unused)) = (&self.kinds, &self.unused) else {
            let (experts, top_k) = self.settings.experts;
            self.regime = self.regime.by_shape(batch, experts, top_k);
            return;
        };
        if batch > unused.batch * STALE || batch < unused.batch / STALE {
            self.unused = Some(Unused::new(kinds, batch, unused.version + 1));
            self.look_at_prize(batch);
        }
    }

    fn look_at_prize(&mut self, batch: f64) {
        if let Some(kinds) = &self.kinds {
            let (mixed, apart) = kinds.distinct(batch);
            let saved = 1.0 - apart / mixed.max(f64::MIN_POSITIVE);
            let prize = self.settings.step.expert_share(mixed, batch) * saved;
            self.regime = self.regime.next(prize);
        }
    }
}

impl Queued {
    /// Brings what the request adds up to date.
    fn refresh(&mut self, kinds: Option<&Kinds>, unused: Option<&Unused>) {
        let (Some(kinds), Some(unused)) = (kinds, unused) else {
            return;
        };
        if self.added.0 != unused.version {
            let fits = self.request.profile.as_ref().is_some_and(|p| kinds.fits(p));
            let likely = self.likely.as_ref().filter(|_| fits);
            self.added = (unused.version, unused.added(likely.map(Vec::as_slice)));
        }
    }
}

#[cfg(test)]
mod tests;
