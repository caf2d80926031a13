//! A worker's half: what to fetch, what to acknowledge, when to switch, whom to serve, what to release.

use std::collections::{BTreeMap, BTreeSet};

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::member::Ack;
use foregate_api::placement::Placement;

/// One expert of one layer, the unit that is fetched and released.
pub type Item = (LayerId, ExpertId);

/// What a worker sees at a moment, of the cluster and of itself.
#[derive(Debug, Clone, Copy)]
pub struct MemberView<'a> {
    /// The placement that is wanted, as the store last said.
    pub target: Option<&'a Placement>,
    /// The placement that new steps use, as the store last said.
    pub active: Option<&'a Placement>,
    /// All registered workers, this one included or not.
    pub alive: &'a BTreeSet<Rank>,
    /// Acknowledgements of the others; this worker's own is not read.
    pub acks: &'a BTreeMap<Rank, Ack>,
    /// Experts in memory here whose hash was verified.
    pub resident: &'a BTreeSet<Item>,
    /// Experts on their way here.
    pub fetching: &'a BTreeSet<Item>,
    /// Epoch the engine uses for new steps; `Epoch(0)` before the first switch.
    pub serving: Epoch,
    /// Epochs that steps still running here were started with.
    pub in_use: &'a BTreeSet<Epoch>,
}

/// What to do now. Everything is idempotent: orders may be carried out late, or be given again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orders {
    /// Experts to fetch that are neither resident nor on their way, most urgent first: those of the active
    /// placement, then those of the target.
    pub fetch: Vec<Item>,
    /// Experts on their way that nothing needs any more.
    pub abandon: Vec<Item>,
    /// Epoch the engine takes at its next step boundary, if it is not the one it uses.
    pub switch_to: Option<Epoch>,
    /// Epochs whose calls are served; calls of any other are refused (retryable for the caller).
    pub accept: BTreeSet<Epoch>,
    /// Resident experts that nobody can call any more.
    pub release: Vec<Item>,
    /// Progress to publish, if it differs from what was published last. Publish it *after* `accept` is in
    /// effect, and release only after that.
    pub ack: Ack,
}

/// The worker's machine. It remembers only which placements may still be called; a new process starts empty.
#[derive(Debug, Clone)]
pub struct Member {
    rank: Rank,
    active: Option<Held>,
    target: Option<Held>,
    /// Earlier active placements whose release is still open, by epoch.
    retained: BTreeMap<Epoch, BTreeSet<Item>>,
}

/// A placement as far as this rank is concerned.
#[derive(Debug, Clone)]
struct Held {
    epoch: Epoch,
    ranks: Vec<Rank>,
    items: BTreeSet<Item>,
}

impl Held {
    fn of(placement: &Placement, rank: Rank) -> Self {
        Self {
            epoch: placement.epoch,
            ranks: placement.ranks.clone(),
            items: placement.held_by(rank),
        }
    }
}

impl Member {
    /// The machine of a worker that has just started.
    #[must_use]
    pub const fn new(rank: Rank) -> Self {
        Self {
            rank,
            active: None,
            target: None,
            retained: BTreeMap::new(),
        }
    }

    /// Takes in a view and says what to do.
    pub fn step(&mut self, view: &MemberView<'_>) -> Orders {
        self.observe(view);
        let ack = self.ack(view);
        self.forget(view, ack);
        let needed = self.needed();
        let missing = |held: &Option<Held>| -> Vec<Item> {
            let items = held.iter().flat_map(|h| &h.items);
            items
                .filter(|i| !view.resident.contains(i) && !view.fetching.contains(i))
                .copied()
                .collect()
        };
        let mut fetch = missing(&self.active);
        let first: BTreeSet<Item> = fetch.iter().copied().collect();
        fetch.extend(
            missing(&self.target)
                .into_iter()
                .filter(|i| !first.contains(i)),
        );
        Orders {
            fetch,
            abandon: view.fetching.difference(&needed).copied().collect(),
            switch_to: self.switch_to(view),
            accept: self.accept(view),
            release: view.resident.difference(&needed).copied().collect(),
            ack,
        }
    }

    /// Takes over newer placements; an older active one is a stale view and changes nothing.
    fn observe(&mut self, view: &MemberView<'_>) {
        let known = self.active.as_ref().map_or(Epoch(0), |held| held.epoch);
        if let Some(active) = view.active.filter(|active| active.epoch > known) {
            let next = match self.target.take_if(|t| t.epoch == active.epoch) {
                Some(held) => held,
                None => Held::of(active, self.rank),
            };
            if let Some(old) = self.active.replace(next) {
                self.retained.insert(old.epoch, old.items);
            }
        }
        let known = self.active.as_ref().map_or(Epoch(0), |held| held.epoch);
        match view.target.filter(|target| target.epoch > known) {
            None => self.target = None,
            Some(target) => {
                if self
                    .target
                    .as_ref()
                    .is_none_or(|held| held.epoch != target.epoch)
                {
                    self.target = Some(Held::of(target, self.rank));
                }
            }
        }
    }

    fn ack(&self, view: &MemberView<'_>) -> Ack {
        let prepared = [&self.target, &self.active]
            .into_iter()
            .flatten()
            .find(|held| held.items.is_subset(view.resident))
            .map_or(Epoch(0), |held| held.epoch);
        let oldest = view
            .in_use
            .first()
            .copied()
            .unwrap_or(view.serving)
            .min(view.serving);
        Ack {
            prepared,
            serving: view.serving,
            drained: Epoch(oldest.0.saturating_sub(1)),
        }
    }

    /// Lets go of earlier placements that no live worker can call any more.
    fn forget(&mut self, view: &MemberView<'_>, own: Ack) {
        let Some(active) = &self.active else {
            return;
        };
        let everybody: BTreeSet<Rank> = view.alive.iter().copied().chain([self.rank]).collect();
        // A live rank of the active placement that acknowledges nothing counts against the release as well: it
        // may be on its way back, and until it holds its experts the parent's copies stand in for them.
        let lowest = everybody.iter().map(|rank| {
            let ack = if *rank == self.rank {
                Some(&own)
            } else {
                view.acks.get(rank)
            };
            ack.filter(|ack| ack.serving >= active.epoch)
                .map(|ack| ack.drained)
        });
        let Some(drained) = lowest.min().flatten() else {
            return;
        };
        self.retained.retain(|epoch, _| *epoch > drained);
    }

    fn needed(&self) -> BTreeSet<Item> {
        let now = [&self.active, &self.target]
            .into_iter()
            .flatten()
            .map(|h| &h.items);
        now.chain(self.retained.values())
            .flatten()
            .copied()
            .collect()
    }

    fn switch_to(&self, view: &MemberView<'_>) -> Option<Epoch> {
        let active = self.active.as_ref()?;
        let ready = active.epoch > view.serving && active.items.is_subset(view.resident);
        ready.then_some(active.epoch)
    }

    fn accept(&self, view: &MemberView<'_>) -> BTreeSet<Epoch> {
        let current = [&self.active, &self.target]
            .into_iter()
            .flatten()
            .filter(|held| held.ranks.contains(&self.rank))
            .map(|held| (held.epoch, &held.items));
        let retained = self.retained.iter().map(|(epoch, items)| (*epoch, items));
        current
            .chain(retained)
            .filter(|(_, items)| items.is_subset(view.resident))
            .map(|(epoch, _)| epoch)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use foregate_api::placement::{LayerPlacement, Reason};

    use super::*;

    /// One layer of two experts; `homes[i]` are the experts of rank i.
    fn plan(epoch: u64, homes: &[&[u32]]) -> Placement {
        let ranks: Vec<Rank> = (0..homes.len() as u32).map(Rank).collect();
        let slots = homes
            .iter()
            .map(|h| h.iter().copied().map(ExpertId).collect());
        Placement {
            epoch: Epoch(epoch),
            parent: Epoch(epoch - 1),
            reason: Reason::Move,
            layers: vec![LayerPlacement::from_slots(&ranks, slots.collect(), 2)],
            ranks,
            balance_before: 1.0,
            balance_after: 1.0,
        }
    }

    fn item(expert: u32) -> Item {
        (LayerId(0), ExpertId(expert))
    }

    fn ack(prepared: u64, serving: u64, drained: u64) -> Ack {
        Ack {
            prepared: Epoch(prepared),
            serving: Epoch(serving),
            drained: Epoch(drained),
        }
    }

    #[derive(Default)]
    struct World {
        target: Option<Placement>,
        active: Option<Placement>,
        alive: BTreeSet<Rank>,
        acks: BTreeMap<Rank, Ack>,
        resident: BTreeSet<Item>,
        serving: Epoch,
        in_use: BTreeSet<Epoch>,
    }

    impl World {
        fn step(&self, member: &mut Member) -> Orders {
            member.step(&MemberView {
                target: self.target.as_ref(),
                active: self.active.as_ref(),
                alive: &self.alive,
                acks: &self.acks,
                resident: &self.resident,
                fetching: &BTreeSet::new(),
                serving: self.serving,
                in_use: &self.in_use,
            })
        }
    }

    #[test]
    fn a_life_from_first_placement_to_release() {
        let mut member = Member::new(Rank(0));
        let mut world = World {
            alive: [Rank(0), Rank(1)].into(),
            target: Some(plan(1, &[&[0], &[1]])),
            ..World::default()
        };
        let orders = world.step(&mut member);
        assert_eq!(orders.fetch, [item(0)]);
        assert_eq!(orders.ack, ack(0, 0, 0));
        assert!(orders.accept.is_empty());

        world.resident.insert(item(0));
        let orders = world.step(&mut member);
        assert_eq!(orders.ack, ack(1, 0, 0));
        assert_eq!(orders.switch_to, None, "prepared is not active");
        assert_eq!(orders.accept, [Epoch(1)].into(), "a peer may switch first");

        world.active = world.target.clone();
        assert_eq!(world.step(&mut member).switch_to, Some(Epoch(1)));
        world.serving = Epoch(1);

        // The experts change places.
        world.target = Some(plan(2, &[&[1], &[0]]));
        let orders = world.step(&mut member);
        assert_eq!((orders.fetch, orders.release), (vec![item(1)], vec![]));
        world.resident.insert(item(1));
        world.active = world.target.clone();
        world.in_use.insert(Epoch(1));
        assert_eq!(world.step(&mut member).switch_to, Some(Epoch(2)));
        world.serving = Epoch(2);
        let orders = world.step(&mut member);
        assert_eq!(orders.ack, ack(2, 2, 0), "a step of epoch 1 still runs");
        assert_eq!(orders.accept, [Epoch(1), Epoch(2)].into());
        world.in_use.clear();
        world.acks.insert(Rank(1), ack(2, 1, 0));
        let orders = world.step(&mut member);
        assert_eq!(orders.ack, ack(2, 2, 1));
        assert!(orders.release.is_empty(), "rank 1 still calls epoch 1");
        world.acks.insert(Rank(1), ack(2, 2, 0));
        assert!(
            world.step(&mut member).release.is_empty(),
            "rank 1 has not drained"
        );
        world.acks.insert(Rank(1), ack(2, 2, 1));
        let orders = world.step(&mut member);
        assert_eq!(orders.release, [item(0)]);
        assert_eq!(orders.accept, [Epoch(2)].into());
    }

    #[test]
    fn a_returning_process_starts_with_the_active_placement() {
        let mut member = Member::new(Rank(1));
        let mut world = World {
            alive: [Rank(0), Rank(1)].into(),
            active: Some(plan(4, &[&[0], &[1]])),
            target: Some(plan(5, &[&[1], &[0]])),
            ..World::default()
        };
        let orders = world.step(&mut member);
        assert_eq!(orders.fetch, [item(1), item(0)], "the active ones first");
        assert_eq!((orders.ack, orders.switch_to), (ack(0, 0, 0), None));
        world.resident.insert(item(1));
        let orders = world.step(&mut member);
        assert_eq!(
            (orders.ack, orders.switch_to),
            (ack(4, 0, 0), Some(Epoch(4)))
        );
    }

    #[test]
    fn an_older_active_placement_is_ignored_and_a_replaced_target_dropped() {
        let mut member = Member::new(Rank(0));
        let mut world = World {
            alive: [Rank(0)].into(),
            active: Some(plan(3, &[&[0], &[1]])),
            target: Some(plan(4, &[&[0, 1], &[1]])),
            resident: [item(0), item(1)].into(),
            serving: Epoch(3),
            ..World::default()
        };
        assert_eq!(world.step(&mut member).ack.prepared, Epoch(4));
        world.target = Some(plan(5, &[&[0], &[1]]));
        let orders = world.step(&mut member);
        assert_eq!(
            (orders.ack.prepared, orders.release),
            (Epoch(5), vec![item(1)])
        );
        world.active = Some(plan(2, &[&[1], &[0]]));
        world.resident.remove(&item(1));
        let orders = world.step(&mut member);
        assert_eq!((orders.fetch, orders.switch_to), (vec![], None));
    }

    #[test]
    fn a_rank_without_experts_follows_without_fetching() {
        let mut member = Member::new(Rank(7));
        let world = World {
            alive: [Rank(0), Rank(1), Rank(7)].into(),
            active: Some(plan(1, &[&[0], &[1]])),
            ..World::default()
        };
        let orders = world.step(&mut member);
        assert_eq!((orders.fetch, orders.switch_to), (vec![], Some(Epoch(1))));
        assert!(orders.accept.is_empty(), "it has nothing to be called for");
    }
}
