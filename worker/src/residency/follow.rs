//! Follows the wanted and the active placement: asks `rollover::member` what to do, and does it.
//!
//! Order of effects, as the protocol wants it: fetch; serve newly accepted epochs; switch; publish progress;
//! release, once that progress is in the store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::{Epoch, Rank};
use foregate_api::member::{Ack, Member as Registration, Phase};
use foregate_api::placement::Placement;
use foregate_models::ExpertWeights;
use foregate_planner::rollover::member::{Member, MemberView, Orders};
use foregate_store::coord::ClusterState;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::migrate::{LoadError, Loader, rotate};
use super::table::Item;
use super::{EpochGate, Residency, Routing};
use crate::fabric::{Fabric, PeerAddress};
use crate::membership::PublisherHandle;
use crate::metrics::WorkerMetrics;

/// Wait before an expert that could not be loaded is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// This worker sums otherwise than the cluster it came to. Nothing of both may be mixed, so it leaves.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this worker computes with `{own}`, rank {rank} of the cluster with `{other}`, and their sums differ in the last \
     bits; give all workers one spec.workers.device and one spec.workers.cpuPath, or stop the others first to change it"
)]
pub struct Stranger {
    /// The path here.
    pub own: String,
    /// A member of the cluster.
    pub rank: Rank,
    /// Its path.
    pub other: String,
}

/// What the follower works with.
pub struct FollowerParts {
    /// This worker's number.
    pub rank: Rank,
    /// What the store says.
    pub cluster: watch::Receiver<Arc<ClusterState>>,
    /// The table it fills.
    pub residency: Arc<Residency>,
    /// The gate it switches.
    pub gate: Arc<EpochGate>,
    /// The fabric it tells about peers.
    pub fabric: Arc<dyn Fabric>,
    /// Where experts come from.
    pub loader: Arc<Loader>,
    /// Where progress goes.
    pub publisher: PublisherHandle,
    /// Counters.
    pub metrics: Arc<WorkerMetrics>,
    /// Told how many experts of how many are here, as long as the worker has not served yet.
    pub progress: Box<dyn FnMut(usize, usize) + Send>,
}

impl std::fmt::Debug for FollowerParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FollowerParts")
            .field("rank", &self.rank)
            .finish_non_exhaustive()
    }
}

/// The actor that keeps residency and gate where the placements want them.
#[derive(Debug)]
pub struct Follower {
    parts: FollowerParts,
    machine: Member,
    loads: JoinSet<(Item, Result<Arc<ExpertWeights>, LoadError>)>,
    loading: BTreeMap<Item, AbortHandle>,
    failed: BTreeMap<Item, Instant>,
    peers: BTreeMap<Rank, PeerAddress>,
    /// The routing of the placement that is wanted or active next, built once.
    routing: Option<Arc<Routing>>,
}

impl Follower {
    /// A follower that has done nothing yet.
    #[must_use]
    pub fn new(parts: FollowerParts) -> Self {
        Self {
            machine: Member::new(parts.rank),
            parts,
            loads: JoinSet::new(),
            loading: BTreeMap::new(),
            failed: BTreeMap::new(),
            peers: BTreeMap::new(),
            routing: None,
        }
    }

    /// Follows until `shutdown`. Loads in flight are dropped then; what is resident stays.
    ///
    /// # Errors
    /// When the cluster has another arithmetic.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), Stranger> {
        let gate = Arc::clone(&self.parts.gate);
        loop {
            self.step()?;
            let retry = self.failed.values().min().copied();
            tokio::select! {
                () = shutdown.cancelled() => break,
                changed = self.parts.cluster.changed() => {
                    if changed.is_err() {
                        break;
                    }
                }
                Some(done) = self.loads.join_next() => self.loaded(done),
                () = gate.older_step_ended() => {}
                changed = self.parts.publisher.published.changed() => {
                    if changed.is_err() {
                        break;
                    }
                }
                () = until(retry) => self.forget_failures(),
            }
        }
        self.loads.shutdown().await;
        Ok(())
    }

    fn step(&mut self) -> Result<(), Stranger> {
        let state = Arc::clone(&self.parts.cluster.borrow_and_update());
        self.compare(&state)?;
        self.meet(&state);
        // A switch changes what the machine sees, so it is asked again; it never switches twice in a row.
        while self.follow(&state) {}
        Ok(())
    }

    /// Whether this worker sums as the cluster does.
    fn compare(&self, state: &ClusterState) -> Result<(), Stranger> {
        let wanted = self.parts.publisher.wanted.borrow();
        let own = &wanted.member;
        // Under its own rank there may still be an earlier process, which is no member of anything any more.
        match state.exemplar().filter(|other| other.rank != own.rank) {
            Some(other) if other.arithmetic() != own.arithmetic() => Err(Stranger {
                own: own.cpu_path.clone(),
                rank: other.rank,
                other: other.cpu_path.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// One round of the machine. True if it switched.
    fn follow(&mut self, state: &ClusterState) -> bool {
        let resident = self.parts.residency.items();
        let orders = self.orders(state, &resident);
        self.abandon(&orders.abandon);
        self.fetch(state, &orders.fetch, &resident);
        self.parts.gate.set_accept(orders.accept.clone());
        if let Some(epoch) = orders.switch_to
            && self.switch(state, epoch)
        {
            return true;
        }
        self.acknowledge(orders.ack);
        if *self.parts.publisher.published.borrow() == orders.ack {
            self.release(&orders.release);
        }
        false
    }

    fn orders(&mut self, state: &ClusterState, resident: &BTreeSet<Item>) -> Orders {
        let view = self.parts.gate.view();
        let alive: BTreeSet<Rank> = state.members.keys().copied().collect();
        let fetching: BTreeSet<Item> = self.loading.keys().copied().collect();
        self.machine.step(&MemberView {
            target: state.target.as_ref().map(|(plan, _)| plan.as_ref()),
            active: state.active.as_ref().map(|(plan, _)| plan.as_ref()),
            alive: &alive,
            acks: &state.acks,
            resident,
            fetching: &fetching,
            serving: view.serving,
            in_use: &view.in_use,
        })
    }

    /// Tells the fabric about peers, if they changed.
    fn meet(&mut self, state: &ClusterState) {
        let own = self.parts.publisher.wanted.borrow().member.clone();
        let peers: BTreeMap<Rank, PeerAddress> = state
            .members
            .values()
            .filter(|peer| peer.rank != own.rank && is_kin(peer, &own))
            .map(|peer| {
                let address = PeerAddress {
                    exchange: peer.exchange.clone(),
                    incarnation: peer.incarnation,
                };
                (peer.rank, address)
            })
            .collect();
        if peers != self.peers {
            tracing::info!(rank = %own.rank, peers = peers.len(), "peers_changed");
            self.parts.fabric.set_peers(&peers);
            self.peers = peers;
        }
    }

    fn fetch(&mut self, state: &ClusterState, items: &[Item], resident: &BTreeSet<Item>) {
        let serving = self.parts.gate.view().serving > Epoch(0);
        let wanted = resident.len() + items.len() + self.loading.len();
        if !serving && wanted > 0 {
            (self.parts.progress)(resident.len(), wanted);
        }
        for item in items {
            if self.loading.len() >= self.parts.loader.at_once(serving) {
                return;
            }
            if self.failed.contains_key(item) {
                continue;
            }
            let holders = rotate(holders(state, self.parts.rank, *item), *item);
            let (loader, item) = (Arc::clone(&self.parts.loader), *item);
            let task = self
                .loads
                .spawn(async move { (item, loader.load(item, &holders, serving).await) });
            self.loading.insert(item, task);
        }
    }

    fn loaded(
        &mut self,
        done: Result<(Item, Result<Arc<ExpertWeights>, LoadError>), tokio::task::JoinError>,
    ) {
        match done {
            Ok((item, Ok(weights))) => {
                self.loading.remove(&item);
                self.parts.residency.insert([(item, weights)]);
                self.parts.metrics.resident(self.parts.residency.len());
            }
            Ok((item, Err(error))) => {
                self.loading.remove(&item);
                self.failed.insert(item, Instant::now() + RETRY);
                tracing::error!(layer = %item.0, expert = %item.1, %error, "expert_load_failed");
            }
            // Abandoned, or it panicked: either way the machine asks again if it is needed.
            Err(error) => {
                if error.is_panic() {
                    tracing::error!(%error, "expert_load_panicked");
                }
                self.loading.retain(|_, task| !task.is_finished());
            }
        }
    }

    fn forget_failures(&mut self) {
        let now = Instant::now();
        self.failed.retain(|_, again| *again > now);
    }

    fn abandon(&mut self, items: &[Item]) {
        for item in items {
            if let Some(task) = self.loading.remove(item) {
                task.abort();
            }
        }
    }

    fn switch(&mut self, state: &ClusterState, epoch: Epoch) -> bool {
        let Some((active, _)) = &state.active else {
            return false;
        };
        if active.epoch != epoch {
            return false;
        }
        match self.routing_of(active) {
            Ok(routing) => {
                self.parts.gate.switch(routing);
                tracing::info!(
                    rank = %self.parts.rank, %epoch, reason = ?active.reason, "epoch_switched"
                );
                true
            }
            Err(error) => {
                tracing::error!(rank = %self.parts.rank, %error, "placement_refused");
                false
            }
        }
    }

    fn routing_of(
        &mut self,
        placement: &Arc<Placement>,
    ) -> Result<Arc<Routing>, super::gate::BadPlacement> {
        if let Some(routing) = &self.routing
            && routing.epoch() == placement.epoch
        {
            return Ok(Arc::clone(routing));
        }
        let routing = Arc::new(Routing::new(Arc::clone(placement))?);
        self.routing = Some(Arc::clone(&routing));
        Ok(routing)
    }

    fn acknowledge(&self, ack: Ack) {
        self.parts.publisher.wanted.send_if_modified(|wanted| {
            let phase = match wanted.member.phase {
                Phase::Joining if ack.serving > Epoch(0) => Phase::Ready,
                phase @ (Phase::Joining | Phase::Ready | Phase::Draining) => phase,
            };
            let changed = wanted.ack != ack || wanted.member.phase != phase;
            wanted.ack = ack;
            wanted.member.phase = phase;
            changed
        });
    }

    fn release(&self, items: &[Item]) {
        if items.is_empty() {
            return;
        }
        self.parts.residency.remove(items);
        self.parts.metrics.resident(self.parts.residency.len());
        tracing::info!(rank = %self.parts.rank, experts = items.len(), "experts_released");
    }
}

/// Whether a member runs the same model and sums alike, so that its experts are this cluster's experts.
fn is_kin(peer: &Registration, own: &Registration) -> bool {
    let kin = peer.is_kin(own);
    if peer.model != own.model {
        tracing::error!(rank = %peer.rank, "peer_has_another_model");
    } else if !kin {
        tracing::error!(rank = %peer.rank, path = peer.cpu_path, "peer_sums_otherwise");
    }
    kin
}

/// gRPC addresses of live workers that the active placement gives an item, without this one.
fn holders(state: &ClusterState, own: Rank, (layer, expert): Item) -> Vec<String> {
    let Some((active, _)) = &state.active else {
        return Vec::new();
    };
    let copies = active
        .layers
        .get(layer.index())
        .and_then(|layer| layer.copies.get(expert.index()))
        .map_or(&[][..], Vec::as_slice);
    copies
        .iter()
        .filter(|copy| copy.rank != own)
        .filter_map(|copy| state.members.get(&copy.rank))
        .filter(|member| member.phase == Phase::Ready)
        .map(|member| member.rpc.clone())
        .collect()
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
