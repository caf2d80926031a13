//! Which rank's pod is made or ended next. Pure: a look at pods and store in, orders out.
//!
//! It remembers nothing, so an operator that was killed goes on where it was. Invariants:
//! - A rank that is to go, or to be started anew, is emptied first: the plan moves its experts, and its pod ends once nobody
//!   can call it any more. Only where the others cannot hold all experts does a restart go without.
//! - At most one rank is started anew at a time, and only while all others serve.
//! - Ranks are added before any is started anew, and started anew before any leaves: what stays has the slots for what goes.
//! - A rank that is gone comes back alone.

use std::collections::{BTreeMap, BTreeSet};

use foregate_api::ids::Rank;
use foregate_api::member::Phase;
use foregate_store::ClusterState;

/// A rank's pod as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Hash of what it was made from.
    pub(crate) config: String,
    /// Slots per layer that it was started with.
    pub(crate) slots: u32,
    /// Whether it serves.
    pub(crate) ready: bool,
    /// Where it is in its life.
    pub(crate) life: Life,
}

/// Where a pod is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// It runs, or will.
    Lives,
    /// It ended for good (evicted, or its node gave up): only its object is left.
    Ended,
    /// It was told to end and has time left.
    Ending,
    /// It was told to end because its node is silent.
    Cut,
    /// It should have ended; nobody is there to say that it has.
    Overdue,
}

/// What is wanted and what is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look<'a> {
    /// Hash of the pod of each rank that is wanted.
    pub(crate) wanted: &'a BTreeMap<Rank, String>,
    /// The pods.
    pub(crate) pods: &'a BTreeMap<Rank, Seen>,
    /// The store's view; `None` while it is away.
    pub(crate) state: Option<&'a ClusterState>,
    /// Experts per layer.
    pub(crate) experts: u32,
}

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Orders {
    /// Ranks whose pod is to be made.
    pub(crate) create: BTreeSet<Rank>,
    /// Ranks whose pod is to end.
    pub(crate) end: BTreeSet<Rank>,
    /// Ranks whose pod's object is to go without waiting for anybody.
    pub(crate) remove: BTreeSet<Rank>,
    /// Ranks that the plan is to empty.
    pub(crate) leaving: BTreeSet<Rank>,
    /// What all this is about.
    pub(crate) doing: Doing,
}

/// What the fleet is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Doing {
    /// Nothing.
    #[default]
    Settled,
    /// Pods are made or start.
    Starting,
    /// A rank is to be started anew.
    Restarting(Rank),
    /// Ranks are to go.
    Shrinking,
}

/// What to do next.
pub(crate) fn next(look: &Look<'_>) -> Orders {
    let mut orders = Orders::default();
    for (rank, seen) in look.pods {
        match seen.life {
            Life::Ended | Life::Overdue => orders.remove.insert(*rank),
            // Its lease has run out, so it is nobody to the others even if it still lives.
            Life::Cut if is_gone(look, *rank) => orders.remove.insert(*rank),
            Life::Lives | Life::Ending | Life::Cut => false,
        };
    }
    let missing = look
        .wanted
        .keys()
        .filter(|rank| !look.pods.contains_key(rank));
    orders.create.extend(missing);
    if !orders.create.is_empty() || !orders.remove.is_empty() {
        orders.doing = Doing::Starting;
    }
    // A pod that holds nothing and has another configuration than is wanted need not be waited for.
    for (rank, config) in look.wanted {
        let outdated =
            |seen: &Seen| seen.life == Life::Lives && !seen.ready && seen.config != *config;
        if look.pods.get(rank).is_some_and(outdated) && has_not_begun(look, *rank) {
            orders.end.insert(*rank);
            orders.doing = Doing::Starting;
        }
    }
    match first_outdated(look) {
        Some(rank) => restart(look, rank, &mut orders),
        None => shrink(look, &mut orders),
    }
    if orders.doing == Doing::Settled && !all_serve(look, None) {
        orders.doing = Doing::Starting;
    }
    orders
}

/// The first rank that serves with another configuration than is wanted.
fn first_outdated(look: &Look<'_>) -> Option<Rank> {
    let outdated = |(rank, config): &(&Rank, &String)| {
        look.pods.get(rank).is_some_and(|seen| {
            seen.ready && seen.life == Life::Lives && seen.config != **config
        })
    };
    look.wanted.iter().find(outdated).map(|(rank, _)| *rank)
}

/// Empties a rank and starts it anew, if all others serve.
fn restart(look: &Look<'_>, rank: Rank, orders: &mut Orders) {
    if !all_serve(look, Some(rank)) {
        if orders.doing == Doing::Settled {
            orders.doing = Doing::Starting;
        }
        return;
    }
    orders.doing = Doing::Restarting(rank);
    let alone = BTreeSet::from([rank]);
    if !can_do_without(look, &alone) {
        orders.end.insert(rank);
        return;
    }
    if has_left(look, rank) {
        orders.end.insert(rank);
    }
    orders.leaving = alone;
}

/// Empties the ranks that are not wanted and ends those that are empty.
fn shrink(look: &Look<'_>, orders: &mut Orders) {
    let surplus: BTreeSet<Rank> = look
        .pods
        .keys()
        .filter(|rank| !look.wanted.contains_key(rank))
        .copied()
        .collect();
    if surplus.is_empty() {
        return;
    }
    if orders.doing == Doing::Settled {
        orders.doing = Doing::Shrinking;
    }
    for rank in &surplus {
        let lives = look
            .pods
            .get(rank)
            .is_some_and(|seen| seen.life == Life::Lives);
        if lives && has_left(look, *rank) {
            orders.end.insert(*rank);
        }
    }
    orders.leaving.extend(surplus);
}

/// Whether every rank that is wanted has a pod that serves, `but` apart.
fn all_serve(look: &Look<'_>, but: Option<Rank>) -> bool {
    let serves = |rank: &Rank| {
        let seen = look.pods.get(rank);
        seen.is_some_and(|seen| seen.ready && seen.life == Life::Lives)
    };
    let others = look.wanted.keys().filter(|rank| but != Some(**rank));
    others.into_iter().all(serves)
}

/// Whether the other ranks that serve have a slot for every expert.
fn can_do_without(look: &Look<'_>, leaving: &BTreeSet<Rank>) -> bool {
    let others = look.pods.iter().filter(|(rank, seen)| {
        !leaving.contains(rank) && seen.ready && seen.life == Life::Lives
    });
    let slots: u64 = others.map(|(_, seen)| u64::from(seen.slots)).sum();
    slots >= u64::from(look.experts)
}

/// Whether a rank has never served since its pod was made: it is not registered, or still joins. Nothing is known while the
/// store is away.
fn has_not_begun(look: &Look<'_>, rank: Rank) -> bool {
    let state = look.state.filter(|state| state.connected);
    state.is_some_and(|state| {
        let member = state.members.get(&rank);
        member.is_none_or(|member| member.phase == Phase::Joining)
    })
}

/// Whether a rank's registration is no more. Nothing is known while the store is away.
fn is_gone(look: &Look<'_>, rank: Rank) -> bool {
    let state = look.state.filter(|state| state.connected);
    state.is_some_and(|state| !state.members.contains_key(&rank))
}

/// Whether nobody can call a rank any more: the placement in force is without it, nothing else is under way, and no step of
/// an earlier placement is left anywhere. Nothing is known while the store is away.
pub(crate) fn has_left(look: &Look<'_>, rank: Rank) -> bool {
    let Some(state) = look.state.filter(|state| state.connected) else {
        return false;
    };
    let (Some((target, _)), Some((active, _))) = (&state.target, &state.active) else {
        // Nothing was ever placed; a half-made target may still count on it.
        return state.target.is_none() && state.active.is_none();
    };
    if target.epoch != active.epoch || active.ranks.contains(&rank) {
        return false;
    }
    let drained = |other: &Rank| {
        let ack = state.acks.get(other);
        ack.is_some_and(|ack| ack.drained >= active.parent)
    };
    state
        .members
        .keys()
        .filter(|other| **other != rank)
        .all(drained)
}

#[cfg(test)]
mod tests;
