//! The operator's half: what is the next thing to do about the placement that is wanted.

use std::collections::{BTreeMap, BTreeSet};

use foregate_api::ids::{Epoch, Rank};
use foregate_api::member::Ack;
use foregate_api::placement::{Placement, Reason};

/// What the operator knows at a moment.
#[derive(Debug, Clone, Copy)]
pub struct ClusterView<'a> {
    /// Registered workers, with or without expert slots. There is no clock here: a caller who has waited too
    /// long for a rank leaves it out, and it is treated as lost.
    pub alive: &'a BTreeSet<Rank>,
    /// Acknowledgements of live workers; one without is at its very start.
    pub acks: &'a BTreeMap<Rank, Ack>,
    /// The placement that is wanted.
    pub target: Option<&'a Placement>,
    /// The placement that new steps use.
    pub active: Option<&'a Placement>,
}

/// What a wait is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Until {
    /// The ranks hold every expert of the target, verified.
    Prepared,
    /// The ranks serve the active placement and have finished every step of its parent.
    Drained,
}

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// There is no placement at all: make the first one.
    Plan,
    /// Everything wanted is in force and its parent is gone: a new plan may be proposed.
    Settled,
    /// Wait for these ranks. While they drain, a new plan should only be proposed to repair.
    Wait {
        /// Whom to wait for, never empty.
        on: BTreeSet<Rank>,
        /// For what.
        until: Until,
    },
    /// Make the target active, if the target is still this one and the active placement still its parent.
    Activate(Epoch),
    /// Plan again from the active placement over the living: the target (or, without one, the active placement)
    /// counts on these ranks. Empty if the target was planned from a placement that is not in force any more.
    Replan {
        /// Ranks that the plan must do without.
        without: BTreeSet<Rank>,
    },
}

/// The next action. Pure: the same view gives the same answer.
#[must_use]
pub fn next(view: &ClusterView<'_>) -> Action {
    let in_force = view.active.map_or(Epoch(0), |p| p.epoch);
    let pending = view.target.filter(|target| target.epoch > in_force);
    let Some(wanted) = pending.or(view.active) else {
        return Action::Plan;
    };
    let without: BTreeSet<Rank> = missing(wanted, view.alive);
    if !without.is_empty() || (pending.is_some() && wanted.parent != in_force) {
        return Action::Replan { without };
    }
    match pending {
        Some(target) => prepare(view, target),
        None => wait_or(view.using_older(), Until::Drained, Action::Settled),
    }
}

/// The highest epoch that anybody knows of: a new plan's number must be above it ([`crate::Problem::above`]),
/// so that a replaced target or a store that lost its values never meets another plan of the same number.
#[must_use]
pub fn highest_epoch(view: &ClusterView<'_>) -> Epoch {
    let placements = view.target.into_iter().chain(view.active).map(|p| p.epoch);
    let acks = view
        .acks
        .values()
        .map(|a| a.prepared.max(a.serving).max(a.drained));
    placements.chain(acks).max().unwrap_or_default()
}

/// The placement in force under a new number, for when [`Action::Replan`] finds nothing to change: the target is pending
/// and can never be activated, so something else must take its place. Everybody is prepared for this. `None` if nothing
/// is pending.
#[must_use]
pub fn anew(view: &ClusterView<'_>) -> Option<Placement> {
    let (active, target) = (view.active?, view.target?);
    (target.epoch > active.epoch).then(|| Placement {
        epoch: highest_epoch(view).next(),
        parent: active.epoch,
        reason: Reason::Reweigh,
        balance_before: active.balance_after,
        ..active.clone()
    })
}

fn prepare(view: &ClusterView<'_>, target: &Placement) -> Action {
    let unprepared = target.ranks.iter().filter(|rank| {
        view.acks
            .get(rank)
            .is_none_or(|ack| ack.prepared != target.epoch)
    });
    let unprepared: BTreeSet<Rank> = unprepared.copied().collect();
    if !unprepared.is_empty() {
        return wait_or(unprepared, Until::Prepared, Action::Settled);
    }
    wait_or(
        view.using_older(),
        Until::Drained,
        Action::Activate(target.epoch),
    )
}

fn wait_or(on: BTreeSet<Rank>, until: Until, done: Action) -> Action {
    if on.is_empty() {
        return done;
    }
    Action::Wait { on, until }
}

fn missing(placement: &Placement, alive: &BTreeSet<Rank>) -> BTreeSet<Rank> {
    placement
        .ranks
        .iter()
        .filter(|rank| !alive.contains(rank))
        .copied()
        .collect()
}

impl ClusterView<'_> {
    /// Live workers that may still run a step of an epoch before the active one. A worker that serves nothing yet
    /// uses no epoch, and will start with the active one.
    fn using_older(&self) -> BTreeSet<Rank> {
        let Some(active) = self.active else {
            return BTreeSet::new();
        };
        self.alive
            .iter()
            .filter(|rank| {
                self.acks.get(rank).is_some_and(|ack| {
                    ack.serving > Epoch(0)
                        && (ack.serving < active.epoch || ack.drained < active.parent)
                })
            })
            .copied()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(epoch: u64, parent: u64, ranks: &[u32]) -> Placement {
        Placement {
            epoch: Epoch(epoch),
            parent: Epoch(parent),
            reason: Reason::Move,
            ranks: ranks.iter().copied().map(Rank).collect(),
            layers: Vec::new(),
            balance_before: 1.0,
            balance_after: 1.0,
        }
    }

    fn ack(prepared: u64, serving: u64, drained: u64) -> Ack {
        Ack {
            prepared: Epoch(prepared),
            serving: Epoch(serving),
            drained: Epoch(drained),
        }
    }

    struct Case {
        alive: BTreeSet<Rank>,
        acks: BTreeMap<Rank, Ack>,
        target: Option<Placement>,
        active: Option<Placement>,
    }

    impl Case {
        fn new(acks: &[(u32, Ack)]) -> Self {
            Self {
                alive: acks.iter().map(|(r, _)| Rank(*r)).collect(),
                acks: acks.iter().map(|(r, a)| (Rank(*r), *a)).collect(),
                target: None,
                active: None,
            }
        }

        fn target(mut self, plan: Placement) -> Self {
            self.target = Some(plan);
            self
        }

        fn active(mut self, plan: Placement) -> Self {
            self.active = Some(plan);
            self
        }

        fn next(&self) -> Action {
            next(&ClusterView {
                alive: &self.alive,
                acks: &self.acks,
                target: self.target.as_ref(),
                active: self.active.as_ref(),
            })
        }
    }

    fn ranks(ranks: &[u32]) -> BTreeSet<Rank> {
        ranks.iter().copied().map(Rank).collect()
    }

    #[test]
    fn waits_for_the_unprepared_and_then_activates() {
        let first = plan(1, 0, &[0, 1]);
        let case = Case::new(&[(0, ack(1, 0, 0)), (1, ack(0, 0, 0))]).target(first.clone());
        assert_eq!(
            case.next(),
            Action::Wait {
                on: ranks(&[1]),
                until: Until::Prepared
            }
        );
        let case = Case::new(&[(0, ack(1, 0, 0)), (1, ack(1, 0, 0))]).target(first);
        assert_eq!(case.next(), Action::Activate(Epoch(1)));
        assert_eq!(Case::new(&[]).next(), Action::Plan);
    }

    #[test]
    fn a_dead_rank_means_a_new_plan() {
        let case = Case::new(&[(0, ack(2, 1, 0))])
            .active(plan(1, 0, &[0, 1]))
            .target(plan(2, 1, &[0, 1]));
        assert_eq!(
            case.next(),
            Action::Replan {
                without: ranks(&[1])
            }
        );
        // The repair does without the dead rank: that the active one counts on it does not matter any more.
        let case = Case::new(&[(0, ack(3, 1, 0))])
            .active(plan(1, 0, &[0, 1]))
            .target(plan(3, 1, &[0]));
        assert_eq!(case.next(), Action::Activate(Epoch(3)));
    }

    #[test]
    fn the_parent_drains_before_anything_new() {
        let case =
            Case::new(&[(0, ack(2, 2, 1)), (1, ack(2, 2, 0))]).active(plan(2, 1, &[0, 1]));
        assert_eq!(
            case.next(),
            Action::Wait {
                on: ranks(&[1]),
                until: Until::Drained
            }
        );
        let case = Case::new(&[(0, ack(3, 2, 1)), (1, ack(3, 2, 0))])
            .active(plan(2, 1, &[0, 1]))
            .target(plan(3, 2, &[0, 1]));
        assert_eq!(
            case.next(),
            Action::Wait {
                on: ranks(&[1]),
                until: Until::Drained
            }
        );
        let case =
            Case::new(&[(0, ack(2, 2, 1)), (1, ack(2, 2, 1))]).active(plan(2, 1, &[0, 1]));
        assert_eq!(case.next(), Action::Settled);
        // A worker that serves nothing uses nothing.
        let case =
            Case::new(&[(0, ack(2, 2, 1)), (1, ack(0, 0, 0))]).active(plan(2, 1, &[0, 1]));
        assert_eq!(case.next(), Action::Settled);
    }

    #[test]
    fn a_target_planned_from_another_parent_is_planned_again() {
        let case = Case::new(&[(0, ack(2, 2, 1))])
            .active(plan(2, 1, &[0]))
            .target(plan(3, 1, &[0]));
        assert_eq!(
            case.next(),
            Action::Replan {
                without: BTreeSet::new()
            }
        );
    }

    #[test]
    fn a_target_that_cannot_be_is_replaced_by_the_active_placement_anew() {
        let case =
            Case::new(&[(0, ack(3, 2, 1)), (1, ack(3, 2, 1))]).active(plan(2, 1, &[0, 1]));
        let view = |case: &Case| {
            anew(&ClusterView {
                alive: &case.alive,
                acks: &case.acks,
                target: case.target.as_ref(),
                active: case.active.as_ref(),
            })
        };
        assert_eq!(view(&case), None);
        // Planned from a placement that is in force no more.
        let case = case.target(plan(3, 1, &[0, 1]));
        assert!(matches!(case.next(), Action::Replan { .. }));
        let next = view(&case).unwrap();
        assert_eq!((next.epoch, next.parent), (Epoch(4), Epoch(2)));
        assert_eq!(
            case.target(next).next(),
            Action::Wait {
                on: [Rank(0), Rank(1)].into(),
                until: Until::Prepared
            }
        );
    }
}
