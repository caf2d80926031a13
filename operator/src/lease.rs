//! Leader election on a store lease.

use std::sync::Arc;
use std::time::Duration;

use foregate_store::{Coord, Lease, StoreError};
use tokio_util::sync::CancellationToken;

/// How long a leader may be silent before another takes over.
pub(crate) const LEAD_TTL: Duration = Duration::from_secs(5);
/// Pause between two attempts.
const RETRY: Duration = Duration::from_secs(1);
/// How long the end of the lease may take at shutdown; after it the time to live does the same.
const RESIGN_DEADLINE: Duration = Duration::from_secs(1);

/// The lead, as long as the lease lives.
#[derive(Debug)]
pub(crate) struct Lead {
    /// Under which name.
    pub(crate) name: String,
    /// The lease it stands on.
    pub(crate) lease: Arc<dyn Lease>,
}

/// Stands until elected. `None` at shutdown.
pub(crate) async fn campaign(coord: &Coord, shutdown: &CancellationToken) -> Option<Lead> {
    tokio::select! {
        () = shutdown.cancelled() => None,
        lead = stand(coord) => Some(lead),
    }
}

async fn stand(coord: &Coord) -> Lead {
    let mut told = false;
    let mut lease: Option<Arc<dyn Lease>> = None;
    loop {
        match attempt(coord, &mut lease).await {
            Ok(Some(lead)) => return lead,
            Ok(None) => told = log_once(told, "another operator leads; standing by"),
            Err(StoreError::LeaseEnded) => lease = None,
            Err(error) => {
                tracing::debug!(%error, "election failed");
                told = log_once(told, "the store does not answer; election goes on");
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn attempt(
    coord: &Coord,
    lease: &mut Option<Arc<dyn Lease>>,
) -> Result<Option<Lead>, StoreError> {
    let held = match lease {
        Some(held) => Arc::clone(held),
        None => Arc::clone(lease.insert(coord.store().lease(LEAD_TTL).await?)),
    };
    // The lease is part of the name: it tells two processes on one host apart, and in the log a restart too.
    let name = format!("operator-{:x}", held.id());
    let leads = coord.lead(&name, held.as_ref()).await?;
    Ok(leads.then_some(Lead { name, lease: held }))
}

fn log_once(told: bool, what: &'static str) -> bool {
    if !told {
        tracing::info!("{what}");
    }
    true
}

/// Gives the lead back, so that a successor need not wait for the time to live.
pub(crate) async fn resign(lead: &Lead) {
    match tokio::time::timeout(RESIGN_DEADLINE, lead.lease.revoke()).await {
        Ok(Ok(())) => tracing::info!(name = %lead.name, "operator resigned"),
        Ok(Err(error)) => tracing::debug!(%error, "resignation failed; the lease will end"),
        Err(_) => tracing::debug!("resignation timed out; the lease will end"),
    }
}
