//! The store of one process: what `foregate up` and the tests run on.
//!
//! One lock around plain maps, never held across an await. A watcher that does not keep up is marked *behind*:
//! events pass it by until its queue has room, then it gets a fresh snapshot. The two faults a real store has,
//! being away ([`MemoryStore::interrupt`]) and ending a lease ([`MemoryStore::expire`]), can be called for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::kv::{Entry, Expect, Lease, Store, StoreError, WATCH_QUEUE, WatchEvent};

/// A store in memory. Clones share their content.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    inner: Mutex<Inner>,
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct Inner {
    /// Number of the last write or deletion.
    revision: u64,
    data: BTreeMap<String, Held>,
    /// Leases that have not ended, with the token that says so to their holder.
    leases: BTreeMap<i64, CancellationToken>,
    next_lease: i64,
    watchers: BTreeMap<u64, Watcher>,
    next_watcher: u64,
    /// Calls fail and watchers are cut off.
    away: bool,
}

#[derive(Debug)]
struct Held {
    entry: Entry,
    lease: Option<i64>,
}

#[derive(Debug)]
struct Watcher {
    prefix: String,
    events: mpsc::Sender<WatchEvent>,
    /// Lost events; a snapshot is on its way.
    behind: bool,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Goes away, as a store that cannot be reached: calls fail, watchers hear `Disconnected`. Leases stay, as
    /// those of a restarted etcd do.
    pub fn interrupt(&self) {
        let mut inner = self.shared.lock();
        if std::mem::replace(&mut inner.away, true) {
            return;
        }
        let all: Vec<u64> = inner.watchers.keys().copied().collect();
        for id in all {
            self.shared
                .deliver(&mut inner, id, WatchEvent::Disconnected);
        }
    }

    /// Comes back after [`Self::interrupt`]: every watcher gets a snapshot.
    pub fn resume(&self) {
        let mut inner = self.shared.lock();
        if !std::mem::replace(&mut inner.away, false) {
            return;
        }
        let all: Vec<u64> = inner.watchers.keys().copied().collect();
        for id in all {
            let snapshot = inner.watchers.get(&id).map(|w| inner.snapshot(&w.prefix));
            if let Some(snapshot) = snapshot {
                self.shared
                    .deliver(&mut inner, id, WatchEvent::Snapshot(snapshot));
            }
        }
    }

    /// Ends a lease as if its holder had been silent for too long.
    pub fn expire(&self, lease: i64) {
        self.shared.end_lease(lease);
    }
}

// === impl Shared ===

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere leaves the maps whole: every change below is complete or not begun.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The maps, if the store is not away.
    fn open(&self) -> Result<MutexGuard<'_, Inner>, StoreError> {
        let inner = self.lock();
        if inner.away {
            return Err(StoreError::Unavailable(
                "the store in memory is interrupted".into(),
            ));
        }
        Ok(inner)
    }

    fn end_lease(self: &Arc<Self>, lease: i64) {
        let mut inner = self.lock();
        let Some(lost) = inner.leases.remove(&lease) else {
            return;
        };
        lost.cancel();
        let gone: Vec<String> = inner
            .data
            .iter()
            .filter(|(_, held)| held.lease == Some(lease))
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            inner.revision += 1;
            inner.data.remove(&key);
            self.announce(&mut inner, &key, &WatchEvent::Delete(key.clone()));
        }
    }

    fn write(
        self: &Arc<Self>,
        inner: &mut Inner,
        key: &str,
        value: Bytes,
        lease: Option<&dyn Lease>,
    ) -> Result<u64, StoreError> {
        let lease = lease.map(Lease::id);
        if lease.is_some_and(|id| !inner.leases.contains_key(&id)) {
            return Err(StoreError::LeaseEnded);
        }
        inner.revision += 1;
        let entry = Entry {
            value,
            revision: inner.revision,
        };
        let event = WatchEvent::Put(key.to_owned(), entry.clone());
        inner.data.insert(key.to_owned(), Held { entry, lease });
        self.announce(inner, key, &event);
        Ok(inner.revision)
    }

    fn announce(self: &Arc<Self>, inner: &mut Inner, key: &str, event: &WatchEvent) {
        if inner.away {
            return; // The snapshot on return says it.
        }
        let concerned: Vec<u64> = inner
            .watchers
            .iter()
            .filter(|(_, watcher)| key.starts_with(&watcher.prefix))
            .map(|(id, _)| *id)
            .collect();
        for id in concerned {
            self.deliver(inner, id, event.clone());
        }
    }

    /// Hands an event to one watcher; a full queue turns it into a snapshot later.
    fn deliver(self: &Arc<Self>, inner: &mut Inner, id: u64, event: WatchEvent) {
        let Some(watcher) = inner.watchers.get_mut(&id) else {
            return;
        };
        if watcher.behind {
            return;
        }
        match watcher.events.try_send(event) {
            Ok(()) => {}
            Err(TrySendError::Closed(_)) => {
                inner.watchers.remove(&id);
            }
            Err(TrySendError::Full(_)) => {
                watcher.behind = true;
                let events = watcher.events.clone();
                let shared = Arc::clone(self);
                self.tasks
                    .spawn(async move { shared.catch_up(id, events).await });
            }
        }
    }

    /// Waits until the reader has made room, then sends what is true by then.
    async fn catch_up(self: Arc<Self>, id: u64, events: mpsc::Sender<WatchEvent>) {
        let permit = events.reserve().await;
        let mut inner = self.lock();
        let Ok(permit) = permit else {
            inner.watchers.remove(&id);
            return;
        };
        let away = inner.away;
        let Some(watcher) = inner.watchers.get_mut(&id) else {
            return;
        };
        watcher.behind = false;
        let prefix = watcher.prefix.clone();
        permit.send(if away {
            WatchEvent::Disconnected
        } else {
            WatchEvent::Snapshot(inner.snapshot(&prefix))
        });
    }
}

// === impl Inner ===

impl Inner {
    fn snapshot(&self, prefix: &str) -> BTreeMap<String, Entry> {
        self.data
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, held)| (key.clone(), held.entry.clone()))
            .collect()
    }

    fn holds(&self, key: &str, expect: Expect) -> bool {
        let found = self.data.get(key).map(|held| held.entry.revision);
        match expect {
            Expect::Absent => found.is_none(),
            Expect::Revision(revision) => found == Some(revision),
        }
    }
}

// === impl Store ===

impl Store for MemoryStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        Box::pin(async move {
            let inner = self.shared.open()?;
            Ok(inner.data.get(key).map(|held| held.entry.clone()))
        })
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        lease: Option<&'a dyn Lease>,
    ) -> BoxFuture<'a, Result<u64, StoreError>> {
        Box::pin(async move {
            let mut inner = self.shared.open()?;
            self.shared.write(&mut inner, key, value, lease)
        })
    }

    fn put_if<'a>(
        &'a self,
        conditions: &'a [(&'a str, Expect)],
        key: &'a str,
        value: Bytes,
        lease: Option<&'a dyn Lease>,
    ) -> BoxFuture<'a, Result<Option<u64>, StoreError>> {
        Box::pin(async move {
            let mut inner = self.shared.open()?;
            if conditions
                .iter()
                .any(|(key, expect)| !inner.holds(key, *expect))
            {
                return Ok(None);
            }
            self.shared.write(&mut inner, key, value, lease).map(Some)
        })
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let mut inner = self.shared.open()?;
            if inner.data.remove(key).is_some() {
                inner.revision += 1;
                let event = WatchEvent::Delete(key.to_owned());
                self.shared.announce(&mut inner, key, &event);
            }
            Ok(())
        })
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
    ) -> BoxFuture<'a, Result<BTreeMap<String, Entry>, StoreError>> {
        Box::pin(async move { Ok(self.shared.open()?.snapshot(prefix)) })
    }

    fn watch(&self, prefix: &str) -> mpsc::Receiver<WatchEvent> {
        let (events, receiver) = mpsc::channel(WATCH_QUEUE);
        let mut inner = self.shared.lock();
        let id = inner.next_watcher;
        inner.next_watcher += 1;
        let first = if inner.away {
            WatchEvent::Disconnected
        } else {
            WatchEvent::Snapshot(inner.snapshot(prefix))
        };
        inner.watchers.insert(
            id,
            Watcher {
                prefix: prefix.to_owned(),
                events,
                behind: false,
            },
        );
        self.shared.deliver(&mut inner, id, first);
        receiver
    }

    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<Arc<dyn Lease>, StoreError>> {
        Box::pin(async move {
            let mut inner = self.shared.open()?;
            inner.next_lease += 1;
            let lease = MemoryLease {
                id: inner.next_lease,
                shared: Arc::clone(&self.shared),
                lost: CancellationToken::new(),
                revoked: CancellationToken::new(),
                dropped: CancellationToken::new(),
            };
            inner.leases.insert(lease.id, lease.lost.clone());
            self.shared.tasks.spawn(outlive(
                Arc::clone(&self.shared),
                lease.id,
                ttl,
                lease.dropped.clone(),
                lease.lost.clone(),
            ));
            Ok(Arc::new(lease) as Arc<dyn Lease>)
        })
    }
}

/// A holder that vanishes without revoking leaves its keys for one time to live.
async fn outlive(
    shared: Arc<Shared>,
    id: i64,
    ttl: Duration,
    dropped: CancellationToken,
    lost: CancellationToken,
) {
    tokio::select! {
        () = lost.cancelled() => return,
        () = dropped.cancelled() => {}
    }
    tokio::select! {
        () = lost.cancelled() => return,
        () = tokio::time::sleep(ttl) => {}
    }
    shared.end_lease(id);
}

#[derive(Debug)]
struct MemoryLease {
    id: i64,
    shared: Arc<Shared>,
    /// Cancelled once the lease has ended, for whatever reason.
    lost: CancellationToken,
    /// Cancelled before `lost` if it was ended here.
    revoked: CancellationToken,
    dropped: CancellationToken,
}

impl Lease for MemoryLease {
    fn id(&self) -> i64 {
        self.id
    }

    fn lost(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.lost.cancelled().await;
            if self.revoked.is_cancelled() {
                std::future::pending::<()>().await;
            }
        })
    }

    fn revoke(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            self.revoked.cancel();
            drop(self.shared.open()?);
            self.shared.end_lease(self.id);
            Ok(())
        })
    }
}

impl Drop for MemoryLease {
    fn drop(&mut self) {
        self.dropped.cancel();
    }
}
