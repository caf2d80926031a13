//! What peers last said about their queues: the base of the next split.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use foregate_api::ids::Rank;

/// How long a report counts. A decode step asks each peer in every layer, so a report of a busy cluster is
/// milliseconds old; an older one says nothing about now.
const FRESH: Duration = Duration::from_millis(50);

/// Rows queued at each peer, as its last answer said.
#[derive(Debug, Default)]
pub(super) struct PeerLoads {
    reports: BTreeMap<Rank, (u32, Instant)>,
}

impl PeerLoads {
    #[expect(
        clippy::disallowed_methods,
        reason = "reports age on the wall clock of the engine thread"
    )]
    pub(super) fn report(&mut self, rank: Rank, queued: u32) {
        self.reports.insert(rank, (queued, Instant::now()));
    }

    pub(super) fn of(&self, rank: Rank) -> f64 {
        self.reports
            .get(&rank)
            .filter(|(_, at)| at.elapsed() < FRESH)
            .map_or(0.0, |(queued, _)| f64::from(*queued))
    }
}
