//! One immutable snapshot of the cluster, replaced whole whenever the store says something new.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use foregate_api::ids::Rank;
use foregate_api::member::{Member, Phase};
use foregate_api::model::ModelSpec;
use foregate_store::coord::ClusterState;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::loads::Loads;
use crate::metrics::Metrics;

/// What the gateway knows of the cluster at a moment.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// The store's state as received.
    pub state: Arc<ClusterState>,
    /// Sequences that a worker reported beyond those this gateway had sent it at the time.
    pub foreign: BTreeMap<Rank, u32>,
}

impl View {
    /// Workers that take sequences now, ascending by rank.
    pub fn ready(&self) -> impl Iterator<Item = &Arc<Member>> {
        self.state
            .members
            .values()
            .filter(|member| member.phase == Phase::Ready && member.runs_attention())
    }

    /// The model, as its workers loaded it.
    #[must_use]
    pub fn model(&self) -> Option<&ModelSpec> {
        self.state
            .members
            .values()
            .next()
            .map(|member| &member.model)
    }

    /// Why nothing can be served; `None` if something can. A worker that is ready steps with a placement, even if the
    /// store has lost it and the operator makes another.
    #[must_use]
    pub fn not_ready(&self) -> Option<String> {
        if self.ready().next().is_some() {
            return None;
        }
        let members = self.state.members.len();
        Some(if self.state.active.is_some() {
            format!("no worker that takes requests is ready ({members} registered)")
        } else if !self.state.connected && members == 0 {
            "the store is not reachable yet".into()
        } else {
            format!("no placement is active yet ({members} workers registered)")
        })
    }
}

/// The newest [`View`].
#[derive(Debug, Default)]
pub struct Views {
    newest: ArcSwap<View>,
    seen: Mutex<BTreeMap<Rank, (u64, u64)>>,
}

impl Views {
    /// The newest view.
    #[must_use]
    pub fn load(&self) -> Arc<View> {
        self.newest.load_full()
    }

    /// Follows the store until `shutdown`.
    pub async fn follow(
        &self,
        mut states: watch::Receiver<Arc<ClusterState>>,
        loads: &Loads,
        metrics: &Metrics,
        shutdown: CancellationToken,
    ) {
        loop {
            let state = Arc::clone(&states.borrow_and_update());
            self.replace(state, loads, metrics);
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = states.changed() => if changed.is_err() {
                    return;
                },
            }
        }
    }

    /// Takes a new state.
    pub fn replace(&self, state: Arc<ClusterState>, loads: &Loads, metrics: &Metrics) {
        let old = self.load();
        let active =
            |state: &ClusterState| state.active.as_ref().map(|(plan, _)| Arc::clone(plan));
        if let Some(plan) = active(&state) {
            let parent = active(&old.state);
            if parent
                .as_ref()
                .is_none_or(|parent| parent.epoch != plan.epoch)
            {
                metrics.placement_changed(parent.as_deref(), &plan);
            }
        }
        let foreign = self.foreign(&old, &state, loads);
        loads.keep_only(|rank| state.members.contains_key(&rank));
        self.newest.store(Arc::new(View { state, foreign }));
    }

    /// A window says how many sequences a worker had when it closed; ours are known better than that, so
    /// only the surplus over ours counts, until the next window.
    fn foreign(&self, old: &View, state: &ClusterState, loads: &Loads) -> BTreeMap<Rank, u32> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|rank, _| state.loads.contains_key(rank));
        state
            .loads
            .iter()
            .map(|(rank, window)| {
                let incarnation = state
                    .members
                    .get(rank)
                    .map_or(0, |member| member.incarnation);
                let this = (incarnation, window.sequence);
                if seen.insert(*rank, this) == Some(this) {
                    return (*rank, old.foreign.get(rank).copied().unwrap_or(0));
                }
                let reported = window.engine.running.saturating_add(window.engine.waiting);
                (*rank, reported.saturating_sub(loads.running(*rank)))
            })
            .collect()
    }
}
