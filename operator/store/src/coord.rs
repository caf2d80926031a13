//! The store in the words of the cluster: register, publish, propose, acknowledge, activate, watch.

use std::sync::Arc;

use bytes::Bytes;
use foregate_api::forecast::Forecast;
use foregate_api::ids::Rank;
use foregate_api::load::LoadWindow;
use foregate_api::member::{Ack, Member};
use foregate_api::placement::Placement;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::codec;
use crate::keys::Keys;
use crate::kv::{Expect, Lease, Store, StoreError, WatchEvent};
pub use crate::state::{ClusterState, GATEWAYS};
use crate::view::{Leader, View};

/// Typed access to one cluster's keys.
#[derive(Debug, Clone)]
pub struct Coord {
    store: Arc<dyn Store>,
    keys: Keys,
    tasks: TaskTracker,
}

impl Coord {
    /// Access to the cluster of this name.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, cluster: &str) -> Self {
        Self {
            store,
            keys: Keys::new(cluster),
            tasks: TaskTracker::new(),
        }
    }

    /// The keys of the cluster.
    #[must_use]
    pub const fn keys(&self) -> &Keys {
        &self.keys
    }

    /// The store underneath.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Writes or replaces a worker's registration. What an earlier process of the same rank left behind (its
    /// acknowledgement and load) is removed first: it speaks of experts that died with it.
    ///
    /// # Errors
    /// The store's.
    pub async fn register(&self, member: &Member, lease: &dyn Lease) -> Result<(), StoreError> {
        let key = self.keys.member(member.rank);
        if let Some(found) = self.store.get(&key).await? {
            let before = codec::decode::<Member>(&key, &found.value).ok();
            if before.is_none_or(|before| before.incarnation != member.incarnation) {
                self.store.delete(&self.keys.ack(member.rank)).await?;
                self.store.delete(&self.keys.load(member.rank)).await?;
            }
        }
        self.write(&key, codec::encode(member)?, lease).await
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
        let key = self.keys.load(window.rank);
        self.write(&key, codec::encode(window)?, lease).await
    }

    /// Publishes a gateway's forecast, under the number of its lease.
    ///
    /// # Errors
    /// The store's.
    pub async fn publish_forecast(
        &self,
        forecast: &Forecast,
        lease: &dyn Lease,
    ) -> Result<(), StoreError> {
        let key = self.keys.forecast(lease.id());
        self.write(&key, codec::encode(forecast)?, lease).await
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
        self.write(&self.keys.ack(rank), codec::encode(&ack)?, lease)
            .await
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
        let value = codec::encode_placement(plan)?;
        let key = self.keys.target();
        let written = self
            .store
            .compare_and_put(&key, expect(seen), value, None)
            .await?;
        Ok(written.is_some())
    }

    /// Makes the target active: succeeds only if the target is still `plan` and the active placement is still
    /// the one read at `seen`, both compared in the transaction that writes. False otherwise.
    ///
    /// # Errors
    /// The store's.
    pub async fn activate(
        &self,
        plan: &Placement,
        seen: Option<u64>,
    ) -> Result<bool, StoreError> {
        let (target, active) = (self.keys.target(), self.keys.active());
        let Some(wanted) = self.store.get(&target).await? else {
            return Ok(false);
        };
        if codec::decode_placement(&target, &wanted.value)? != *plan {
            return Ok(false);
        }
        let conditions = [
            (target.as_str(), Expect::Revision(wanted.revision)),
            (active.as_str(), expect(seen)),
        ];
        let written = self
            .store
            .put_if(&conditions, &active, wanted.value, None)
            .await?;
        Ok(written.is_some())
    }

    /// Writes the active placement again over a value that cannot be read: succeeds only if that is still the one of
    /// revision `unreadable` ([`ClusterState::active_unreadable`]).
    ///
    /// # Errors
    /// The store's.
    pub async fn reinstate(
        &self,
        plan: &Placement,
        unreadable: u64,
    ) -> Result<bool, StoreError> {
        let (key, value) = (self.keys.active(), codec::encode_placement(plan)?);
        let written = self
            .store
            .compare_and_put(&key, Expect::Revision(unreadable), value, None)
            .await?;
        Ok(written.is_some())
    }

    /// Tries to become the leader; true if `name` leads now, under `lease`. Another process of the same name
    /// leads until its own lease has ended; a value that cannot be read leads nothing and is replaced, unless it is
    /// of a newer version.
    ///
    /// # Errors
    /// The store's.
    pub async fn lead(&self, name: &str, lease: &dyn Lease) -> Result<bool, StoreError> {
        let key = self.keys.leader();
        let own = Leader {
            name: name.to_owned(),
            lease: lease.id(),
        };
        let value = codec::encode(&own)?;
        let written = self
            .store
            .compare_and_put(&key, Expect::Absent, value.clone(), Some(lease))
            .await?;
        if written.is_some() {
            return Ok(true);
        }
        let Some(found) = self.store.get(&key).await? else {
            return Ok(false); // It ended between the two calls; the next attempt finds it absent.
        };
        match codec::decode::<Leader>(&key, &found.value) {
            Ok(leader) => Ok(leader == own),
            Err(_) if codec::is_of_another_format(&found.value) => Ok(false),
            Err(error) => {
                tracing::warn!(%error, "it leads nothing and is replaced");
                let expect = Expect::Revision(found.revision);
                let written = self
                    .store
                    .compare_and_put(&key, expect, value, Some(lease))
                    .await?;
                Ok(written.is_some())
            }
        }
    }

    /// Follows the cluster until `shutdown` or until every receiver is gone. The receiver holds the newest
    /// state; it changes only when the state does. While the store is away the state stays as it was, with
    /// `connected == false`. A member that is missing when the store comes back is kept for five seconds more.
    #[must_use]
    pub fn watch_cluster(
        &self,
        shutdown: CancellationToken,
    ) -> watch::Receiver<Arc<ClusterState>> {
        let (publish, receive) = watch::channel(Arc::new(ClusterState::default()));
        let events = self.store.watch(self.keys.root());
        let view = View::new(self.keys.clone());
        self.tasks.spawn(follow(events, view, publish, shutdown));
        receive
    }

    async fn write(
        &self,
        key: &str,
        value: Bytes,
        lease: &dyn Lease,
    ) -> Result<(), StoreError> {
        self.store.put(key, value, Some(lease)).await?;
        Ok(())
    }
}

const fn expect(seen: Option<u64>) -> Expect {
    match seen {
        Some(revision) => Expect::Revision(revision),
        None => Expect::Absent,
    }
}

/// Folds events into states; several that are waiting become one state.
async fn follow(
    mut events: mpsc::Receiver<WatchEvent>,
    mut view: View,
    publish: watch::Sender<Arc<ClusterState>>,
    shutdown: CancellationToken,
) {
    loop {
        let deadline = view.next_deadline();
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = publish.closed() => return,
            event = events.recv() => {
                let Some(event) = event else { return };
                view.apply(event, Instant::now());
                while let Ok(event) = events.try_recv() {
                    view.apply(event, Instant::now());
                }
            }
            () = sleep_until(deadline) => {
                view.give_up(Instant::now());
            }
        }
        publish.send_if_modified(|current| {
            let changed = **current != *view.state();
            if changed {
                *current = Arc::new(view.state().clone());
            }
            changed
        });
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
