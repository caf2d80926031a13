//! Who counts as alive. Pure: the time is an argument.
//!
//! A rank that vanishes may be back in a moment, and a rank that is there may never get ready. Both need a clock,
//! which the planner's coordinator has not: the roster gives it a set of ranks that already accounts for it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use foregate_api::ids::{Epoch, Rank};
use foregate_api::member::Phase;
use foregate_store::ClusterState;
use tokio::time::Instant;

/// How long a rank that vanished is waited for before its experts are placed anew. Its lease has ended by then,
/// so it has been silent for a time to live already.
pub(crate) const GRACE: Duration = Duration::from_secs(2);
/// How long a rank of the placement in force that this operator has never seen is waited for: after a start of
/// the whole cluster over an old store the workers come one by one.
pub(crate) const FIRST_GRACE: Duration = Duration::from_secs(10);
/// How long a registered rank may take to prepare a placement without any progress of anybody. Experts come from
/// peers or a local disk; five minutes load hundreds of gigabytes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// The memory of who was seen and missed when.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    seen: BTreeSet<Rank>,
    /// Ranks that said that they leave: no grace when they go.
    leaving: BTreeSet<Rank>,
    missing: BTreeMap<Rank, Instant>,
    /// Ranks that were waited for in vain, with the incarnation that was given up.
    silent: BTreeMap<Rank, u64>,
    waiting: Option<Waiting>,
}

#[derive(Debug, PartialEq)]
struct Waiting {
    epoch: Epoch,
    on: BTreeSet<Rank>,
    since: Instant,
}

impl Roster {
    /// Takes in a fresh view; answers who counts as alive: registered and not given up, or missing for less than
    /// the grace period. `wanted` are the ranks of target and active placement.
    pub(crate) fn alive(
        &mut self,
        state: &ClusterState,
        wanted: &BTreeSet<Rank>,
        now: Instant,
    ) -> BTreeSet<Rank> {
        self.missing
            .retain(|rank, _| wanted.contains(rank) && !state.members.contains_key(rank));
        self.silent.retain(|rank, incarnation| {
            let member = state.members.get(rank);
            member.is_some_and(|member| member.incarnation == *incarnation)
        });
        // Only ranks that are there or wanted are ever asked about.
        let asked = |rank: &Rank| wanted.contains(rank) || state.members.contains_key(rank);
        self.seen.retain(asked);
        self.leaving.retain(asked);
        let mut alive = BTreeSet::new();
        for (rank, member) in &state.members {
            self.seen.insert(*rank);
            if member.phase == Phase::Draining {
                self.leaving.insert(*rank);
            } else {
                self.leaving.remove(rank);
            }
            if !self.silent.contains_key(rank) {
                alive.insert(*rank);
            }
        }
        for rank in wanted {
            if state.members.contains_key(rank) {
                continue;
            }
            let since = *self.missing.entry(*rank).or_insert(now);
            let grace = match (self.leaving.contains(rank), self.seen.contains(rank)) {
                (true, _) => Duration::ZERO,
                (false, true) => GRACE,
                (false, false) => FIRST_GRACE,
            };
            if now < since + grace {
                alive.insert(*rank);
            }
        }
        alive
    }

    /// Notes whom a placement waits for. True once nothing has moved for [`PATIENCE`]: these ranks are then given
    /// up until they start anew.
    pub(crate) fn lose_patience(
        &mut self,
        state: &ClusterState,
        epoch: Epoch,
        on: &BTreeSet<Rank>,
        now: Instant,
    ) -> bool {
        let same = |waiting: &&Waiting| waiting.epoch == epoch && waiting.on == *on;
        let since = match self.waiting.as_ref().filter(same) {
            Some(waiting) => waiting.since,
            None => {
                self.waiting = Some(Waiting {
                    epoch,
                    on: on.clone(),
                    since: now,
                });
                now
            }
        };
        if now < since + PATIENCE {
            return false;
        }
        for rank in on {
            if let Some(member) = state.members.get(rank) {
                self.silent.insert(*rank, member.incarnation);
            }
        }
        self.waiting = None;
        true
    }
}
