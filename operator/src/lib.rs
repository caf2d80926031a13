//! `foregate-operator`: decides which worker holds which expert, and turns manifests into instances.
//!
//! In: a manifest (→ [`mod@validate`] → [`mod@launch`]), and through the store the workers' registrations, load windows
//! and acknowledgements. Out: launch plans, and placements under `placement/target` and `placement/active`.
//! Invariants: the operator talks to workers and gateways through the store only; it keeps nothing that it could
//! not read there again, so a killed operator resumes; while it or the store is away, serving goes on and only
//! re-balancing stops; every write is a compare-and-put, so two operators that both believe they lead do no harm.
//! On Kubernetes ([`controller`]) it also turns `MoeCluster` objects into pods, and decides which rank's pod is made or ended.
//! Start reading at [`run`], then `balance.rs`; for Kubernetes at `reconcile.rs`, then `fleet.rs`.
#![forbid(unsafe_code)]

mod apply;
mod authority;
mod balance;
mod build;
mod clusters;
pub mod controller;
mod dereference;
mod election;
mod error;
mod fleet;
mod forecast;
pub mod launch;
mod lease;
pub mod manifest;
mod memory;
mod metrics;
mod predict;
mod problem;
pub mod quantity;
mod reconcile;
mod record;
mod roster;
mod secrets;
mod source;
mod status;
mod tell;
#[cfg(test)]
mod testing;
pub mod validate;

use std::sync::Arc;

use foregate_api::node::OperatorConfig;
use foregate_store::{Archive, Coord, Store};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use crate::clusters::Canary;
pub use crate::error::OperatorError;
pub use crate::launch::launch;
pub use crate::manifest::parse_manifest;
pub use crate::validate::validate;

/// What the role is given.
#[derive(Debug, Clone)]
pub struct Deps {
    /// Name of the cluster.
    pub cluster: String,
    /// Its settings; a change is followed without a restart.
    pub config: watch::Receiver<OperatorConfig>,
    /// Where everybody meets.
    pub store: Arc<dyn Store>,
    /// Where it registers its metrics.
    pub registry: prometheus::Registry,
    /// Tells it to stop.
    pub shutdown: CancellationToken,
}

/// Runs the operator until it is told to stop: stands for election, and balances while it leads. A store that is
/// away is waited for.
///
/// # Errors
/// If its metrics are already registered.
pub async fn run(deps: Deps) -> Result<(), OperatorError> {
    let metrics = Arc::new(metrics::Metrics::register(&deps.registry)?);
    let coord = Coord::new(deps.store, &deps.cluster);
    let states = coord.watch_cluster(deps.shutdown.clone());
    while let Some(lead) = lease::campaign(&coord, &deps.shutdown).await {
        metrics.leader.set(1);
        tracing::info!(name = %lead.name, "operator leads");
        let archive = Archive::new(Arc::clone(coord.store()), &deps.cluster);
        let (recorder, keeper) = record::Recorder::new(archive, Arc::clone(&metrics));
        let balancer = balance::Balancer::new(
            coord.clone(),
            deps.config.clone(),
            states.clone(),
            Arc::clone(&metrics),
            recorder,
        );
        tokio::select! {
            () = deps.shutdown.cancelled() => {}
            () = lead.lease.lost() => tracing::warn!("operator lost its lead"),
            // Boxed: both hold whole placements across their waits.
            () = Box::pin(balancer.run()) => {}
            () = Box::pin(keeper.run()) => {}
        }
        metrics.leader.set(0);
        if deps.shutdown.is_cancelled() {
            lease::resign(&lead).await;
        }
    }
    Ok(())
}
