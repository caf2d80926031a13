//! One lease: granted, kept alive in the background, known to be lost only when etcd says so.

use std::time::Duration;

use etcd_client::{LeaseClient, LeaseKeepAliveStream, LeaseKeeper};
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::etcd::bounded;
use crate::kv::{Lease, StoreError};

/// Beats per time to live, so that two may be lost.
const BEATS: u32 = 3;
/// Longest pause between two attempts while etcd is away.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// A lease in etcd.
#[derive(Debug)]
pub(super) struct EtcdLease {
    id: i64,
    client: Client,
    lost: CancellationToken,
    /// Cancelled before etcd is asked to end the lease: an end that the holder wanted is no loss.
    revoked: CancellationToken,
    /// Ends the keeping, by revocation or drop.
    released: CancellationToken,
}

struct Client(LeaseClient);

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LeaseClient")
    }
}

/// Grants a lease and starts keeping it. etcd rounds `ttl` up to seconds and to its own minimum (two).
pub(super) async fn grant(
    client: &LeaseClient,
    ttl: Duration,
    tasks: &TaskTracker,
) -> Result<EtcdLease, StoreError> {
    let seconds = i64::try_from(ttl.as_millis().div_ceil(1000))
        .unwrap_or(i64::MAX)
        .max(1);
    let mut granting = client.clone();
    let answer = bounded("lease grant", granting.grant(seconds, None)).await?;
    let lease = EtcdLease {
        id: answer.id(),
        client: Client(client.clone()),
        lost: CancellationToken::new(),
        revoked: CancellationToken::new(),
        released: CancellationToken::new(),
    };
    let granted = Duration::from_secs(u64::try_from(answer.ttl()).unwrap_or(1).max(1));
    let keeping = Keeping {
        id: lease.id,
        client: client.clone(),
        beat: granted / BEATS,
    };
    let (lost, revoked) = (lease.lost.clone(), lease.revoked.clone());
    let released = lease.released.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = released.cancelled() => {}
            () = keeping.run() => if !revoked.is_cancelled() {
                tracing::warn!(lease = keeping.id, "lease lost");
                lost.cancel();
            }
        }
    });
    Ok(lease)
}

struct Keeping {
    id: i64,
    client: LeaseClient,
    beat: Duration,
}

impl Keeping {
    /// Returns when the lease is gone.
    async fn run(&self) {
        loop {
            if let Err(error) = self.beat_on().await {
                tracing::debug!(lease = self.id, %error, "lease not renewed");
            }
            if self.is_gone().await {
                return;
            }
            tokio::time::sleep(RETRY_PAUSE.min(self.beat)).await;
        }
    }

    /// Renews until a renewal fails.
    async fn beat_on(&self) -> Result<(), StoreError> {
        let mut client = self.client.clone();
        let (mut keeper, mut answers) =
            bounded("lease keep-alive", client.keep_alive(self.id)).await?;
        loop {
            tokio::time::sleep(self.beat).await;
            if !bounded("lease keep-alive", renew(&mut keeper, &mut answers)).await? {
                return Ok(());
            }
        }
    }

    /// Whether etcd says that there is no such lease; an etcd that does not answer says nothing.
    async fn is_gone(&self) -> bool {
        let mut client = self.client.clone();
        let asked = bounded("lease time-to-live", client.time_to_live(self.id, None)).await;
        match asked {
            Ok(answer) => answer.ttl() < 0,
            Err(StoreError::LeaseEnded) => true,
            Err(_) => false,
        }
    }
}

/// One renewal; false if the lease is gone or the stream has ended.
async fn renew(
    keeper: &mut LeaseKeeper,
    answers: &mut LeaseKeepAliveStream,
) -> Result<bool, etcd_client::Error> {
    keeper.keep_alive().await?;
    Ok(answers
        .message()
        .await?
        .is_some_and(|answer| answer.ttl() > 0))
}

impl Lease for EtcdLease {
    fn id(&self) -> i64 {
        self.id
    }

    fn lost(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move { self.lost.cancelled().await })
    }

    fn revoke(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            self.revoked.cancel();
            let mut client = self.client.0.clone();
            let answer = bounded("lease revoke", client.revoke(self.id)).await;
            match answer {
                Ok(_) | Err(StoreError::LeaseEnded) => {
                    self.released.cancel();
                    Ok(())
                }
                Err(error) => Err(error),
            }
        })
    }
}

impl Drop for EtcdLease {
    fn drop(&mut self) {
        self.released.cancel();
    }
}
