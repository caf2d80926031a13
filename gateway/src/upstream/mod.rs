//! Sequences on workers: choose, connect, guard, and go on elsewhere after a loss.

mod foresight;
mod prefixes;
mod sequence;
mod window;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::manifest::RoutingPolicy;
use foregate_api::member::Member;
use foregate_tls::Keys;
use foregate_wire::connect;
use foregate_wire::generation::{GenerateRequest, Steps};
use foregate_wire::tonic::transport::Channel;
use tokio::time::Instant;

pub use sequence::{Event, Sequence};
pub use window::{Places, Trial};

use crate::cached::Cached;
use crate::error::ApiError;
use crate::feed::Feed;
use crate::forecast::{Outlook, Work};
use crate::loads::{LoadGuard, Loads};
use crate::metrics::{Metrics, WindowState};
use crate::prefixes::Prefixes;
use crate::route::{Candidate, Choice, Router};
use crate::signature::{Known, Signatures};
use crate::trace::Identity;
use crate::view::Views;
use foresight::Hindsight;
use window::Ahead;

/// How long a worker that was lost is asked last.
const SUSPICION: Duration = Duration::from_secs(2);

/// The workers as a place to run sequences.
#[derive(Debug)]
pub struct Upstream {
    views: Arc<Views>,
    loads: Arc<Loads>,
    router: Router,
    signatures: Signatures,
    /// What workers say that they hold, and what those that do not say have read.
    prefixes: Prefixes,
    cached: Cached,
    feed: Feed,
    metrics: Arc<Metrics>,
    /// What gateway and workers prove themselves with.
    keys: Option<Keys>,
    channels: Mutex<BTreeMap<String, Channel>>,
    suspects: Mutex<BTreeMap<Rank, (u64, Instant)>>,
    /// What is admitted and not yet computed, if a forecast is made of it.
    outlook: Option<Arc<Outlook>>,
    /// Whether workers are told what is expected of a sequence's experts.
    hints: bool,
    /// How right that was, and who asked for what.
    hindsight: Hindsight,
    /// Where sequences wait for their place, if the policy is that of the window.
    ahead: Option<Ahead>,
}

impl Upstream {
    /// Over the workers of `views`; with `keys` over connections on which both sides prove themselves.
    #[must_use]
    pub fn new(
        views: Arc<Views>,
        loads: Arc<Loads>,
        router: Router,
        metrics: Arc<Metrics>,
        keys: Option<Keys>,
    ) -> Self {
        Self {
            views,
            loads,
            router,
            signatures: Signatures::default(),
            prefixes: Prefixes::default(),
            cached: Cached::default(),
            feed: Feed::default(),
            metrics,
            keys,
            channels: Mutex::default(),
            suspects: Mutex::default(),
            outlook: None,
            hints: false,
            hindsight: Hindsight::default(),
            ahead: None,
        }
    }

    /// With a count of what is admitted and not yet computed.
    #[must_use]
    pub fn with_outlook(mut self, outlook: Arc<Outlook>) -> Self {
        self.outlook = Some(outlook);
        self
    }

    /// Tells workers what is expected of a sequence's experts, or not.
    #[must_use]
    pub const fn with_hints(mut self, hints: bool) -> Self {
        self.hints = hints;
        self
    }

    /// Counts `sequences` sequences of a prompt as work to come until the guard is dropped; `None` if nobody counts.
    #[must_use]
    pub fn foresee(&self, prompt: &[u32], max_tokens: u32, sequences: u32) -> Option<Work> {
        let outlook = self.outlook.as_ref()?;
        let known = self.by_prefix(&self.signatures.known(prompt));
        Some(outlook.enter(prompt, &known, max_tokens, sequences))
    }

    /// With `places` for sequences on all workers, for which they wait in a window for `longest` at most.
    #[must_use]
    pub fn with_window(mut self, places: u32, longest: Duration, trial: Trial) -> Self {
        self.ahead = Some(Ahead::new(places, longest, trial));
        self
    }

    /// Tells of requests that end.
    pub(crate) const fn feed(&self) -> &Feed {
        &self.feed
    }

    /// The window at the moment.
    pub(crate) fn window(&self) -> Option<WindowState> {
        self.ahead.as_ref()?.look()
    }

    /// Starts a sequence in the place that it gets from the window; without one it is [`Upstream::open`].
    ///
    /// # Errors
    /// As [`Upstream::open`]; 429 also after the longest wait for a place.
    pub async fn open_in_turn(
        self: &Arc<Self>,
        request: GenerateRequest,
        identity: &Identity,
        began: Instant,
        deadline: Instant,
    ) -> Result<Sequence, ApiError> {
        let (upstream, identity) = (Arc::clone(self), identity.clone());
        Sequence::open(upstream, request, identity, began, deadline, true).await
    }

    /// Starts a sequence on the worker that the policy chooses. Its request came at `began`.
    ///
    /// # Errors
    /// 400 if the worker refuses the request as wrong, 429 if every worker is full, 503 if none can be
    /// reached, 504 at the deadline.
    pub async fn open(
        self: &Arc<Self>,
        request: GenerateRequest,
        identity: &Identity,
        began: Instant,
        deadline: Instant,
    ) -> Result<Sequence, ApiError> {
        let upstream = Arc::clone(self);
        Sequence::open(upstream, request, identity.clone(), began, deadline, false).await
    }

    /// Prompt prefixes whose signature is known.
    #[must_use]
    pub fn known_prefixes(&self) -> usize {
        self.signatures.len()
    }

    /// Why nothing can be served; `None` if something can. A worker that is registered and was lost a
    /// moment ago does not count.
    #[must_use]
    pub fn not_ready(&self) -> Option<String> {
        let view = self.views.load();
        if let Some(reason) = view.not_ready() {
            return Some(reason);
        }
        view.ready()
            .all(|member| self.is_suspect(member))
            .then(|| "no ready worker can be reached".to_owned())
    }

    /// A worker has said what its decode steps take.
    fn timed(&self, worker: Rank, steps: &Steps) {
        self.metrics.decoded(worker, steps);
        if let (Some(ahead), Some(fit)) = (&self.ahead, &steps.fit) {
            ahead.timed(worker, fit);
        }
    }

    /// Tokens of a prompt that workers hold: as they say, or, where one says nothing, as it has read.
    fn held(&self, prompt: &[u32]) -> BTreeMap<Rank, u32> {
        let mut held = self.prefixes.of(prompt);
        for (rank, tokens) in self.cached.of(prompt) {
            held.entry(rank).or_insert(tokens);
        }
        held
    }

    /// Whether anybody asks what workers hold.
    #[must_use]
    pub const fn wants_prefixes(&self) -> bool {
        matches!(
            self.router.policy(),
            RoutingPolicy::PrefixAware | RoutingPolicy::Window
        )
    }

    /// A worker has read a prompt. One that says what it holds is believed instead.
    fn has_read(&self, prompt: &[u32], worker: Rank) {
        if self.wants_prefixes() && !self.prefixes.tells(worker) {
            self.cached.read(prompt, worker);
        }
    }

    /// Ready workers without those in `avoid`; suspects only if nobody else is left.
    fn candidates(&self, avoid: &BTreeSet<Rank>) -> Vec<Arc<Member>> {
        let view = self.views.load();
        let (mut good, mut suspect) = (Vec::new(), Vec::new());
        for member in view.ready().filter(|member| !avoid.contains(&member.rank)) {
            if self.is_suspect(member) {
                suspect.push(Arc::clone(member));
            } else {
                good.push(Arc::clone(member));
            }
        }
        if good.is_empty() { suspect } else { good }
    }

    /// Chooses a worker and counts the sequence in there.
    fn choose(
        &self,
        members: &[Arc<Member>],
        prompt: &[u32],
        known: &Known,
    ) -> Option<(Choice, Arc<Member>, LoadGuard)> {
        let view = self.views.load();
        let held = match self.router.policy() {
            RoutingPolicy::PrefixAware => self.held(prompt),
            _ => BTreeMap::new(),
        };
        let candidates: Vec<Candidate> = members
            .iter()
            .map(|member| {
                let (running, signature) = self.loads.of(member.rank);
                let foreign = view.foreign.get(&member.rank).copied().unwrap_or(0);
                Candidate {
                    rank: member.rank,
                    load: running.saturating_add(foreign),
                    signature,
                    cached: held.get(&member.rank).copied().unwrap_or(0),
                }
            })
            .collect();
        let choice = self.router.choose(&candidates, known)?;
        let member = members.iter().find(|member| member.rank == choice.rank)?;
        self.metrics.routed(&choice);
        let guard = Loads::enter(&self.loads, choice.rank, known.signature.clone());
        Some((choice, Arc::clone(member), guard))
    }

    fn channel(&self, member: &Member) -> Result<Channel, ApiError> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(&member.rpc) {
            return Ok(channel.clone());
        }
        // Addresses of workers that are gone go with them, so that restarts do not pile up.
        let view = self.views.load();
        channels.retain(|rpc, _| view.state.members.values().any(|member| &member.rpc == rpc));
        let channel = connect::channel(&member.rpc, self.keys.as_ref())
            .map_err(|error| ApiError::upstream(format!("worker {}: {error}", member.rank)))?;
        channels.insert(member.rpc.clone(), channel.clone());
        Ok(channel)
    }

    fn suspect(&self, member: &Member) {
        let mut suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        let until = Instant::now() + SUSPICION;
        suspects.insert(member.rank, (member.incarnation, until));
    }

    fn is_suspect(&self, member: &Member) -> bool {
        let suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        suspects
            .get(&member.rank)
            .is_some_and(|(incarnation, until)| {
                *incarnation == member.incarnation && Instant::now() < *until
            })
    }
}
