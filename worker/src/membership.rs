//! What this worker says about itself in the store: registration, progress, load windows, all on one lease.
//!
//! The publisher owns the lease. Others tell it what shall be in the store ([`Wanted`]) and may wait until it
//! is ([`Publisher::published`]). When the lease is lost it takes a new one and writes everything again. While
//! the store is away it retries with backoff; nobody who serves waits for it.

use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::load::LoadWindow;
use foregate_api::member::{Ack, Member};
use foregate_store::coord::Coord;
use foregate_store::kv::{Lease, StoreError};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};
use tokio_util::sync::CancellationToken;

/// Time to live of a lease: a dead worker is gone from the store after it.
pub const LEASE_TTL: Duration = Duration::from_secs(5);
/// First wait after a failed write; doubles up to [`RETRY_MOST`].
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// Longest wait after a failed write.
const RETRY_MOST: Duration = Duration::from_secs(2);

/// What shall be in the store.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// The registration.
    pub member: Member,
    /// The progress.
    pub ack: Ack,
}

/// Closes load windows: called once per window with its number and length.
pub type CloseWindow = Box<dyn FnMut(u64, Duration) -> LoadWindow + Send>;

/// Writes one worker's keys.
pub struct Publisher {
    coord: Coord,
    rank: Rank,
    wanted: watch::Receiver<Wanted>,
    published: watch::Sender<Ack>,
    window: Duration,
    close_window: CloseWindow,
    lease: Option<Arc<dyn Lease>>,
    written: Option<Wanted>,
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher")
            .field("rank", &self.rank)
            .finish_non_exhaustive()
    }
}

/// The others' side of a publisher.
#[derive(Debug)]
pub struct PublisherHandle {
    /// What shall be in the store.
    pub wanted: watch::Sender<Wanted>,
    /// The progress that is in the store, zero before the first write.
    pub published: watch::Receiver<Ack>,
}

impl Publisher {
    /// A publisher that has written nothing yet.
    #[must_use]
    pub fn new(
        coord: Coord,
        first: Wanted,
        window: Duration,
        close_window: CloseWindow,
    ) -> (Self, PublisherHandle) {
        let rank = first.member.rank;
        let (wanted, wanted_here) = watch::channel(first);
        let (published_here, published) = watch::channel(Ack {
            prepared: foregate_api::ids::Epoch(0),
            serving: foregate_api::ids::Epoch(0),
            drained: foregate_api::ids::Epoch(0),
        });
        let publisher = Self {
            coord,
            rank,
            wanted: wanted_here,
            published: published_here,
            window,
            close_window,
            lease: None,
            written: None,
        };
        (publisher, PublisherHandle { wanted, published })
    }

    /// Writes until `shutdown`, then revokes the lease: the worker's keys vanish at once.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut ticks = interval_at(Instant::now() + self.window, self.window);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut sequence, mut closed) = (0, Instant::now());
        let mut retry = RETRY_FIRST;
        loop {
            let waits = match self.write().await {
                Ok(()) => {
                    retry = RETRY_FIRST;
                    None
                }
                Err(error) => {
                    let wait = retry;
                    retry = (retry * 2).min(RETRY_MOST);
                    self.failed(&error);
                    Some(wait)
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = wait_or_never(waits) => {}
                () = lost(self.lease.clone()), if waits.is_none() => {
                    self.failed(&StoreError::LeaseEnded);
                }
                changed = self.wanted.changed(), if waits.is_none() => {
                    if changed.is_err() {
                        break;
                    }
                }
                _ = ticks.tick() => {
                    sequence += 1;
                    let window = (self.close_window)(sequence, closed.elapsed());
                    closed = Instant::now();
                    self.publish_window(&window).await;
                }
            }
        }
        self.leave().await;
    }

    /// Brings the store up to what is wanted.
    async fn write(&mut self) -> Result<(), StoreError> {
        let wanted = self.wanted.borrow_and_update().clone();
        if self.written.as_ref() == Some(&wanted) {
            return Ok(());
        }
        let lease = match &self.lease {
            Some(lease) => Arc::clone(lease),
            None => {
                let lease = self.coord.store().lease(LEASE_TTL).await?;
                tracing::info!(rank = %self.rank, lease = lease.id(), "member_lease_granted");
                self.lease.insert(lease).clone()
            }
        };
        let before = self.written.take();
        if before.as_ref().map(|old| &old.member) != Some(&wanted.member) {
            self.coord.register(&wanted.member, lease.as_ref()).await?;
            tracing::info!(rank = %self.rank, phase = ?wanted.member.phase, "member_registered");
        }
        if before.as_ref().map(|old| old.ack) != Some(wanted.ack) {
            self.coord
                .acknowledge(self.rank, wanted.ack, lease.as_ref())
                .await?;
        }
        self.published.send_replace(wanted.ack);
        self.written = Some(wanted);
        Ok(())
    }

    /// Windows are best effort: one that cannot be written is dropped, the next follows soon.
    async fn publish_window(&mut self, window: &LoadWindow) {
        let Some(lease) = &self.lease else { return };
        if let Err(error) = self.coord.publish_load(window, lease.as_ref()).await {
            tracing::debug!(rank = %self.rank, %error, "load_window_dropped");
        }
    }

    fn failed(&mut self, error: &StoreError) {
        tracing::warn!(rank = %self.rank, %error, "member_write_failed");
        // Whatever is in the store now, the next write brings all of it.
        self.written = None;
        if matches!(error, StoreError::LeaseEnded) {
            self.lease = None;
        }
    }

    async fn leave(&mut self) {
        if let Some(lease) = self.lease.take()
            && let Err(error) = lease.revoke().await
        {
            tracing::warn!(rank = %self.rank, %error, "member_lease_not_revoked");
        }
    }
}

async fn wait_or_never(wait: Option<Duration>) {
    match wait {
        Some(wait) => sleep(wait).await,
        None => std::future::pending().await,
    }
}

async fn lost(lease: Option<Arc<dyn Lease>>) {
    match lease {
        Some(lease) => lease.lost().await,
        None => std::future::pending().await,
    }
}
