//! The store in the words of the cluster: register, publish, propose, acknowledge, activate, watch.

use std::collections::BTreeMap;
use std::sync::Arc;

use foregate_api::ids::{Epoch, Rank};
use foregate_api::load::LoadWindow;
use foregate_api::member::{Ack, Member};
use foregate_api::placement::Placement;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::keys::Keys;
use crate::kv::{Lease, Store, StoreError};

/// Everything the store knows of a cluster, as one immutable value.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClusterState {
    /// Whether the view is fresh; false while the store is away.
    pub connected: bool,
    /// Registered workers. One that vanished across a gap stays for a grace period.
    pub members: BTreeMap<Rank, Arc<Member>>,
    /// Last load window of each worker.
    pub loads: BTreeMap<Rank, Arc<LoadWindow>>,
    /// Progress of each worker.
    pub acks: BTreeMap<Rank, Ack>,
    /// The placement that is wanted, with its revision.
    pub target: Option<(Arc<Placement>, u64)>,
    /// The placement that new steps use, with its revision.
    pub active: Option<(Arc<Placement>, u64)>,
    /// Name of the leading operator.
    pub leader: Option<String>,
}

/// Typed access to one cluster's keys.
#[derive(Debug, Clone)]
pub struct Coord {
    store: Arc<dyn Store>,
    keys: Keys,
}

impl Coord {
    /// Access to the cluster of this name.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, cluster: &str) -> Self {
        Self {
            store,
            keys: Keys::new(cluster),
        }
    }

    /// The store underneath.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Writes or replaces a worker's registration.
    ///
    /// # Errors
    /// The store's.
    pub async fn register(&self, member: &Member, lease: &dyn Lease) -> Result<(), StoreError> {
        let _ = (member, lease);
        Err(StoreError::Refused("not built yet".into()))
    }

    /// Publishes a load window.
    ///
    /// # Errors
    /// The store's.
    pub async fn publish_load(
        &self,
        window: &LoadWindow,
        lease: &dyn Lease,
    ) -> Result<(), StoreError> {
        let _ = (window, lease);
        Err(StoreError::Refused("not built yet".into()))
    }

    /// Publishes a worker's progress.
    ///
    /// # Errors
    /// The store's.
    pub async fn acknowledge(
        &self,
        rank: Rank,
        ack: Ack,
        lease: &dyn Lease,
    ) -> Result<(), StoreError> {
        let _ = (rank, ack, lease);
        Err(StoreError::Refused("not built yet".into()))
    }

    /// Proposes a placement: succeeds only if the target is still the one read at `seen` (`None`: absent).
    ///
    /// # Errors
    /// The store's.
    pub async fn propose(
        &self,
        plan: &Placement,
        seen: Option<u64>,
    ) -> Result<bool, StoreError> {
        let _ = (plan, seen);
        Err(StoreError::Refused("not built yet".into()))
    }

    /// Makes a placement the active one: succeeds only if the active one is still that of `seen`.
    ///
    /// # Errors
    /// The store's.
    pub async fn activate(
        &self,
        plan: &Placement,
        seen: Option<u64>,
    ) -> Result<bool, StoreError> {
        let _ = (plan, seen);
        Err(StoreError::Refused("not built yet".into()))
    }

    /// Tries to become the leader; true if `name` leads now, under `lease`.
    ///
    /// # Errors
    /// The store's.
    pub async fn lead(&self, name: &str, lease: &dyn Lease) -> Result<bool, StoreError> {
        let _ = (name, lease, Epoch(0));
        Err(StoreError::Refused("not built yet".into()))
    }

    /// Follows the cluster until `shutdown`. The receiver holds the newest state.
    #[must_use]
    pub fn watch_cluster(
        &self,
        shutdown: CancellationToken,
    ) -> watch::Receiver<Arc<ClusterState>> {
        let (_send, receive) = watch::channel(Arc::new(ClusterState::default()));
        let _ = (&self.keys, shutdown);
        receive
    }
}
