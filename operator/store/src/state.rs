//! What the store knows of a cluster, as readers see it.

use std::collections::BTreeMap;
use std::sync::Arc;

use foregate_api::forecast::Forecast;
use foregate_api::ids::Rank;
use foregate_api::load::LoadWindow;
use foregate_api::member::{Ack, Member, Phase};
use foregate_api::placement::Placement;

/// Gateways whose forecasts are kept; the others' are left out.
pub const GATEWAYS: usize = 256;

/// Everything the store knows of a cluster, as one immutable value.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClusterState {
    /// Whether the view is fresh; false while the store is away.
    pub connected: bool,
    /// Registered workers. One that vanished across a gap stays for a grace period.
    pub members: BTreeMap<Rank, Arc<Member>>,
    /// Last load window of each worker.
    pub loads: BTreeMap<Rank, Arc<LoadWindow>>,
    /// Last forecast of each gateway, by the number of its lease. [`GATEWAYS`] of them at most.
    pub forecasts: BTreeMap<i64, Arc<Forecast>>,
    /// Progress of each worker.
    pub acks: BTreeMap<Rank, Ack>,
    /// The placement that is wanted, with its revision.
    pub target: Option<(Arc<Placement>, u64)>,
    /// The placement that new steps use, with its revision.
    pub active: Option<(Arc<Placement>, u64)>,
    /// Revision of the value under the target's key if that cannot be read, and is not of a newer version: who replaces
    /// it compares with this. What was known before stays in `target`.
    pub target_unreadable: Option<u64>,
    /// The same of the active placement.
    pub active_unreadable: Option<u64>,
    /// Name of the leading operator.
    pub leader: Option<String>,
}

impl ClusterState {
    /// The member whose model and arithmetic are those of the cluster: of those that have served, else of all, the one
    /// with the lowest rank. A newcomer does not change what the cluster is.
    #[must_use]
    pub fn exemplar(&self) -> Option<&Arc<Member>> {
        let served = |member: &&Arc<Member>| member.phase != Phase::Joining;
        let found = self.members.values().find(served);
        found.or_else(|| self.members.values().next())
    }
}
