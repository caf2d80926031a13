use std::sync::Arc;

use foregate_api::ids::{Epoch, ExpertId};
use foregate_api::member::{Ack, Member};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_store::ClusterState;

use super::*;

const EXPERTS: u32 = 8;

/// A fleet that the orders are carried out on, with a plan that follows `leaving` as the balancer does.
#[derive(Debug)]
struct World {
    wanted: BTreeMap<Rank, String>,
    slots: u32,
    pods: BTreeMap<Rank, Seen>,
    state: ClusterState,
    leaving: BTreeSet<Rank>,
}

impl World {
    fn new(count: u32, slots: u32) -> Self {
        let mut world = Self {
            wanted: BTreeMap::new(),
            slots,
            pods: BTreeMap::new(),
            state: ClusterState {
                connected: true,
                ..ClusterState::default()
            },
            leaving: BTreeSet::new(),
        };
        world.want(count, "a");
        world.settle();
        world
    }

    fn want(&mut self, count: u32, config: &str) {
        self.wanted = (0..count)
            .map(|rank| (Rank(rank), config.to_owned()))
            .collect();
    }

    fn orders(&self) -> Orders {
        next(&Look {
            wanted: &self.wanted,
            pods: &self.pods,
            state: Some(&self.state),
            experts: EXPERTS,
        })
    }

    /// One round: pods are made, serve and end at once; then the plan follows. Every invariant is checked before.
    fn round(&mut self) -> Orders {
        let orders = self.orders();
        self.check(&orders);
        for rank in orders.end.iter().chain(&orders.remove) {
            self.pods.remove(rank);
            self.state.members.remove(rank);
            self.state.acks.remove(rank);
        }
        for rank in &orders.create {
            let seen = Seen {
                config: self.wanted[rank].clone(),
                slots: self.slots,
                ready: true,
                life: Life::Lives,
            };
            self.pods.insert(*rank, seen);
        }
        self.leaving.clone_from(&orders.leaving);
        self.plan();
        orders
    }

    /// The balancer: all ranks but the leaving ones, if they hold every expert.
    fn plan(&mut self) {
        for (rank, seen) in &self.pods {
            self.state
                .members
                .insert(*rank, Arc::new(member(*rank, seen.slots)));
        }
        let ranks: Vec<Rank> = self
            .pods
            .keys()
            .filter(|rank| !self.leaving.contains(rank))
            .copied()
            .collect();
        let slots: u32 = ranks.iter().map(|rank| self.pods[rank].slots).sum();
        let before = self.state.active.as_ref().map(|(plan, _)| Arc::clone(plan));
        if slots < EXPERTS || before.as_ref().is_some_and(|plan| plan.ranks == ranks) {
            return;
        }
        let epoch = before.as_ref().map_or(Epoch(1), |plan| plan.epoch.next());
        let parent = before.map_or(Epoch(0), |plan| plan.epoch);
        let plan = Arc::new(placement(epoch, parent, &ranks));
        for rank in self.pods.keys() {
            let ack = Ack {
                prepared: epoch,
                serving: epoch,
                drained: parent,
            };
            self.state.acks.insert(*rank, ack);
        }
        self.state.target = Some((Arc::clone(&plan), epoch.0));
        self.state.active = Some((plan, epoch.0));
    }

    fn check(&self, orders: &Orders) {
        let Some((plan, _)) = &self.state.active else {
            return;
        };
        for rank in &orders.end {
            let slots: u32 = self
                .pods
                .iter()
                .filter(|(other, seen)| *other != rank && seen.ready)
                .map(|(_, seen)| seen.slots)
                .sum();
            let serves = self.pods[rank].ready;
            assert!(
                !plan.ranks.contains(rank) || slots < EXPERTS || !serves,
                "{rank} ends with experts that others could hold: {orders:?}"
            );
        }
        let restarted = orders
            .end
            .iter()
            .filter(|rank| self.wanted.contains_key(rank) && self.pods[*rank].ready);
        assert!(restarted.count() <= 1, "{orders:?}");
    }

    /// Rounds until nothing is to do.
    fn settle(&mut self) -> usize {
        for rounds in 0..50 {
            if self.round().doing == Doing::Settled {
                return rounds;
            }
        }
        panic!("it does not settle: {self:?}");
    }

    fn ranks(&self) -> Vec<u32> {
        self.pods.keys().map(|rank| rank.0).collect()
    }
}

fn placement(epoch: Epoch, parent: Epoch, ranks: &[Rank]) -> Placement {
    let slots = ranks
        .iter()
        .map(|_| (0..EXPERTS).map(ExpertId).collect())
        .collect();
    Placement {
        epoch,
        parent,
        reason: Reason::Resize,
        ranks: ranks.to_vec(),
        layers: vec![LayerPlacement::from_slots(ranks, slots, EXPERTS as usize)],
        balance_before: 1.0,
        balance_after: 1.0,
    }
}

fn member(rank: Rank, slots: u32) -> Member {
    Member {
        rank,
        incarnation: 1,
        rpc: String::new(),
        exchange: String::new(),
        domain: String::new(),
        slots,
        phase: Phase::Ready,
        model: crate::testing::model(EXPERTS as usize),
        cpu_path: "portable".to_owned(),
        kv_pages: 1,
        page_tokens: 16,
    }
}

#[test]
fn a_fleet_starts_grows_and_shrinks() {
    let mut world = World::new(2, 6);
    assert_eq!(world.ranks(), [0, 1]);
    world.want(4, "a");
    world.settle();
    assert_eq!(world.ranks(), [0, 1, 2, 3]);
    world.want(3, "a");
    let orders = world.round();
    assert_eq!(orders.leaving, BTreeSet::from([Rank(3)]));
    assert!(orders.end.is_empty(), "its experts move first");
    assert_eq!(orders.doing, Doing::Shrinking);
    world.settle();
    assert_eq!(world.ranks(), [0, 1, 2]);
}

#[test]
fn ranks_are_started_anew_one_after_the_other_and_emptied_first() {
    let mut world = World::new(3, 6);
    world.want(3, "b");
    let orders = world.round();
    assert_eq!(orders.doing, Doing::Restarting(Rank(0)));
    assert_eq!((orders.end.len(), orders.leaving.len()), (0, 1));
    let orders = world.round();
    assert_eq!(orders.end, BTreeSet::from([Rank(0)]));
    let orders = world.round();
    assert_eq!(orders.create, BTreeSet::from([Rank(0)]));
    world.settle();
    assert!(world.pods.values().all(|seen| seen.config == "b"));
}

#[test]
fn a_restart_that_nobody_can_stand_in_for_goes_without() {
    let mut world = World::new(2, 4);
    world.want(2, "b");
    let orders = world.round();
    assert_eq!(orders.end, BTreeSet::from([Rank(0)]));
    assert!(orders.leaving.is_empty());
    world.settle();
    assert!(world.pods.values().all(|seen| seen.config == "b"));
}

/// Three ranks need more slots than four did, so they are started anew while the fourth still holds its part.
#[test]
fn what_stays_is_made_ready_before_anything_leaves() {
    let mut world = World::new(4, 3);
    world.want(3, "b");
    world.slots = 4;
    let mut ended = Vec::new();
    for _ in 0..40 {
        let orders = world.round();
        ended.extend(orders.end.iter().copied());
        if orders.doing == Doing::Settled {
            break;
        }
    }
    assert_eq!(ended, [0, 1, 2, 3].map(Rank));
}

#[test]
fn a_lost_rank_comes_back_alone() {
    let mut world = World::new(3, 6);
    world.pods.remove(&Rank(1));
    let orders = world.orders();
    assert_eq!(orders.create, BTreeSet::from([Rank(1)]));
    assert!(orders.end.is_empty() && orders.leaving.is_empty());
    // A pod whose node is gone never says that it has ended.
    let mut world = World::new(3, 6);
    for life in [Life::Ending, Life::Overdue, Life::Ended] {
        world.pods.get_mut(&Rank(1)).unwrap().life = life;
        let orders = world.orders();
        assert_eq!(
            orders.remove.contains(&Rank(1)),
            life != Life::Ending,
            "{life:?}"
        );
        assert!(orders.create.is_empty(), "its name is taken until then");
        assert!(orders.end.is_empty());
    }
}

#[test]
fn nothing_is_restarted_while_another_rank_is_away_or_the_store_is() {
    let mut world = World::new(3, 6);
    world.want(3, "b");
    world.pods.get_mut(&Rank(2)).unwrap().ready = false;
    let orders = world.orders();
    assert_eq!((orders.end.len(), orders.leaving.len()), (0, 0));
    // A rank that has never served holds nothing, and is replaced at once.
    world.state.members.remove(&Rank(2));
    let orders = world.orders();
    assert_eq!(orders.end, BTreeSet::from([Rank(2)]));
    assert!(orders.leaving.is_empty());
    let mut world = World::new(3, 6);
    world.want(2, "a");
    world.state.connected = false;
    let orders = world.orders();
    assert!(orders.end.is_empty(), "nobody knows where experts are");
    assert_eq!(orders.leaving, BTreeSet::from([Rank(2)]));
}

#[test]
fn a_rank_has_left_when_no_step_can_call_it() {
    let mut world = World::new(3, 6);
    world.want(2, "a");
    world.leaving = BTreeSet::from([Rank(2)]);
    world.plan();
    let left = |world: &World| {
        has_left(
            &Look {
                wanted: &world.wanted,
                pods: &world.pods,
                state: Some(&world.state),
                experts: EXPERTS,
            },
            Rank(2),
        )
    };
    assert!(left(&world));
    // A step of the placement before still runs on rank 0.
    world.state.acks.get_mut(&Rank(0)).unwrap().drained = Epoch(0);
    assert!(!left(&world));
    world.state.acks.get_mut(&Rank(0)).unwrap().drained = Epoch(1);
    assert!(left(&world));
    // The next placement is being prepared; it may count on anybody.
    let next = placement(Epoch(9), Epoch(2), &[Rank(0), Rank(2)]);
    world.state.target = Some((Arc::new(next), 9));
    assert!(!left(&world));
}

/// Whatever is wanted in whatever order, with ranks lost in between: it settles as wanted, and no order breaks an invariant.
#[test]
fn any_history_settles() {
    let mut seed = 7_u64;
    let mut draw = move |below: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for _ in 0..200 {
        let mut world = World::new(1 + draw(4) as u32, 3 + draw(6) as u32);
        for _ in 0..6 {
            let config = ["a", "b", "c"][draw(3) as usize];
            world.slots = 3 + draw(6) as u32;
            world.want(1 + draw(5) as u32, config);
            for _ in 0..draw(4) {
                world.round();
            }
            if draw(3) == 0 {
                let lost = Rank(draw(5) as u32);
                world.pods.remove(&lost);
                world.state.members.remove(&lost);
                world.state.acks.remove(&lost);
            }
        }
        world.slots = EXPERTS;
        world.want(3, "last");
        world.settle();
        assert_eq!(world.ranks(), [0, 1, 2]);
        assert!(world.pods.values().all(|seen| seen.config == "last"));
    }
}

#[test]
fn a_pod_of_a_silent_node_goes_once_its_lease_has_run_out() {
    let mut world = World::new(3, 8);
    let rank = Rank(1);
    world.pods.get_mut(&rank).unwrap().life = Life::Cut;
    assert!(world.orders().remove.is_empty(), "it may still serve");
    world.state.members.remove(&rank);
    assert_eq!(world.orders().remove, BTreeSet::from([rank]));
    world.state.connected = false;
    assert!(world.orders().remove.is_empty(), "nothing is known");
}
