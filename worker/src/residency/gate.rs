//! The epoch gate: a step uses one placement from its begin to its end; a switch happens between steps.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use foregate_api::ids::{Epoch, LayerId};
use foregate_api::placement::Placement;
use foregate_planner::split::SplitTable;
use tokio::sync::Notify;

/// A placement made ready for routing.
#[derive(Debug)]
pub struct Routing {
    placement: Arc<Placement>,
    layers: Vec<SplitTable>,
}

/// A placement that cannot be routed with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "placement {epoch} cannot be used for routing: layer {layer} names ranks it does not have"
)]
pub struct BadPlacement {
    /// Its number.
    pub epoch: Epoch,
    /// The first bad layer.
    pub layer: LayerId,
}

impl Routing {
    /// Builds the tables.
    ///
    /// # Errors
    /// When a copy lies on a rank outside the placement.
    pub fn new(placement: Arc<Placement>) -> Result<Self, BadPlacement> {
        let layers = (0_u32..)
            .zip(&placement.layers)
            .map(|(layer, _)| {
                let layer = LayerId(layer);
                SplitTable::new(&placement, layer).ok_or(BadPlacement {
                    epoch: placement.epoch,
                    layer,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { placement, layers })
    }

    /// The placement's number.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.placement.epoch
    }

    /// The placement.
    #[must_use]
    pub const fn placement(&self) -> &Arc<Placement> {
        &self.placement
    }

    /// One layer's copies.
    #[must_use]
    pub fn layer(&self, layer: LayerId) -> Option<&SplitTable> {
        self.layers.get(layer.index())
    }
}

/// What the gate knows at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GateView {
    /// Epoch of new steps; 0 before the first switch.
    pub serving: Epoch,
    /// Epochs that running steps use.
    pub in_use: BTreeSet<Epoch>,
}

/// Holds the routing of new steps and knows which epoch the running step uses.
#[derive(Debug)]
pub struct EpochGate {
    state: Mutex<State>,
    /// Epochs whose calls are served.
    accept: ArcSwap<BTreeSet<Epoch>>,
    step_ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    routing: Option<Arc<Routing>>,
    running: Option<Epoch>,
    /// The epoch of the last step that began, to notice the first step of a new one.
    last: Epoch,
}

/// A step's hold on its routing.
#[derive(Debug, Clone)]
pub struct Begun {
    /// The routing; `None` before the first placement.
    pub routing: Option<Arc<Routing>>,
    /// How long this step waited for a switch, if it is the first of its epoch.
    pub stall: Option<Duration>,
}

impl EpochGate {
    /// A gate without a placement.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: Mutex::default(),
            accept: ArcSwap::default(),
            step_ended: Notify::new(),
        }
    }

    /// Begins a step: it uses the returned routing until [`Self::end`].
    #[expect(
        clippy::disallowed_methods,
        reason = "measures the engine thread on the wall clock"
    )]
    pub fn begin(&self) -> Begun {
        let before = Instant::now();
        let mut state = self.lock();
        let routing = state.routing.clone();
        let epoch = routing.as_ref().map_or(Epoch(0), |routing| routing.epoch());
        state.running = Some(epoch);
        let first = state.last != epoch;
        state.last = epoch;
        drop(state);
        Begun {
            routing,
            stall: first.then(|| before.elapsed()),
        }
    }

    /// Ends the running step.
    pub fn end(&self) {
        let mut state = self.lock();
        let ended = state.running.take();
        let serving = state.serving();
        drop(state);
        // Only a step of an older epoch is waited for.
        if ended.is_some_and(|epoch| epoch != serving) {
            self.step_ended.notify_one();
        }
    }

    /// New steps use this placement; a running one keeps its own. An older placement than the present one
    /// is ignored.
    pub fn switch(&self, routing: Arc<Routing>) {
        let mut state = self.lock();
        if routing.epoch() > state.serving() {
            state.routing = Some(routing);
        }
    }

    /// The epoch of new steps and of the running one.
    #[must_use]
    pub fn view(&self) -> GateView {
        let state = self.lock();
        GateView {
            serving: state.serving(),
            in_use: state.running.into_iter().collect(),
        }
    }

    /// Replaces the set of epochs whose calls are served.
    pub fn set_accept(&self, epochs: BTreeSet<Epoch>) {
        self.accept.store(Arc::new(epochs));
    }

    /// Whether calls of an epoch are served.
    #[must_use]
    pub fn accepts(&self, epoch: Epoch) -> bool {
        self.accept.load().contains(&epoch)
    }

    /// Resolves after the end of a step that used an older epoch than new steps do. Remembers one such
    /// end that nobody waited for.
    pub async fn older_step_ended(&self) {
        self.step_ended.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for EpochGate {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    fn serving(&self) -> Epoch {
        self.routing
            .as_ref()
            .map_or(Epoch(0), |routing| routing.epoch())
    }
}
