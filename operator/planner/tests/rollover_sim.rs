//! Both halves of the rollover under a seeded scheduler: one operator, several workers, a store that everybody sees
//! with a lag of his own, revisions that somebody never sees, acknowledgements that come twice, transfers that take a
//! while, crashes, restarts, lost leases, and a store that is away for a while. After every step:
//!
//! * a step that runs under an epoch finds every copy of it resident and accepted on every holder that promised it
//!   (acknowledged it as prepared) and has not crashed since;
//! * as long as nothing crashed, every expert has a resident copy at every moment since the first activation;
//! * epochs only rise, are activated at most once, and a worker accepts at most the active, its parent and a target.
//!
//! After the last fault a fair schedule must end settled, with exactly the active placement's experts in memory.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::member::Ack;
use foregate_api::placement::Placement;
use foregate_planner::rollover::coordinator::{self, Action, ClusterView};
use foregate_planner::rollover::member::{Item, Member, MemberView, Orders};
use foregate_planner::{Decision, History, PlanError, Problem, RankSlots, Settings, plan};

const LAYERS: usize = 2;
const EXPERTS: usize = 6;
const SLOTS: usize = 4;

/// SplitMix64: small, seeded, and good enough to interleave things.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// The store at one revision.
#[derive(Debug, Clone, Default)]
struct Snapshot {
    /// Registered workers with the number of their incarnation.
    members: BTreeMap<Rank, u64>,
    acks: BTreeMap<Rank, Ack>,
    target: Option<Arc<Placement>>,
    active: Option<Arc<Placement>>,
}

impl Snapshot {
    fn alive(&self) -> BTreeSet<Rank> {
        self.members.keys().copied().collect()
    }
}

/// A process.
#[derive(Debug)]
struct Worker {
    incarnation: u64,
    machine: Member,
    /// Revision of the store that it has seen.
    seen: usize,
    resident: BTreeSet<Item>,
    fetching: BTreeSet<Item>,
    serving: Epoch,
    /// Running steps, by their epoch.
    steps: Vec<Epoch>,
    accept: BTreeSet<Epoch>,
    /// Orders not yet carried out.
    orders: Option<Orders>,
    published: Option<Ack>,
    /// Epochs this incarnation acknowledged as prepared.
    promised: BTreeSet<Epoch>,
    /// Its lease is gone though it runs: whatever it calls is refused sooner or later.
    fenced: bool,
}

impl Worker {
    /// Epochs of running steps and of the next one.
    fn used(&self) -> BTreeSet<Epoch> {
        let next = (self.serving > Epoch(0)).then_some(self.serving);
        self.steps.iter().copied().chain(next).collect()
    }
}

/// A placement that was active once, with what each of its ranks holds.
#[derive(Debug)]
struct Known {
    held: Vec<(Rank, BTreeSet<Item>)>,
}

struct World {
    dice: Dice,
    history: Vec<Snapshot>,
    /// The store takes no writes and tells nothing.
    away: bool,
    known: BTreeMap<Epoch, Known>,
    workers: BTreeMap<Rank, Worker>,
    /// Ranks whose process is gone while the store still lists them.
    dying: BTreeMap<Rank, u64>,
    incarnations: u64,
    crashed: bool,
    activated: Vec<Epoch>,
    operator_seen: usize,
    demand: Vec<Vec<f64>>,
    planner: History,
    ranks: u32,
}

impl World {
    fn new(seed: u64, ranks: u32) -> Self {
        let mut world = Self {
            dice: Dice(seed),
            history: vec![Snapshot::default()],
            away: false,
            known: BTreeMap::new(),
            workers: BTreeMap::new(),
            dying: BTreeMap::new(),
            incarnations: 0,
            crashed: false,
            activated: Vec::new(),
            operator_seen: 0,
            demand: vec![vec![0.0; EXPERTS]; LAYERS],
            planner: History::default(),
            ranks,
        };
        for rank in 0..ranks {
            world.start(Rank(rank));
        }
        world
    }

    fn now(&self) -> &Snapshot {
        self.history.last().unwrap()
    }

    /// Callers look first whether the store is away.
    fn write(&mut self, change: impl FnOnce(&mut Snapshot)) {
        assert!(!self.away, "nobody can write");
        let mut next = self.now().clone();
        change(&mut next);
        self.history.push(next);
    }

    fn start(&mut self, rank: Rank) {
        self.incarnations += 1;
        let incarnation = self.incarnations;
        self.dying.remove(&rank);
        self.write(|store| {
            store.members.insert(rank, incarnation);
            store.acks.remove(&rank);
        });
        let seen = self.history.len() - 1;
        self.workers.insert(
            rank,
            Worker {
                incarnation,
                machine: Member::new(rank),
                seen,
                resident: BTreeSet::new(),
                fetching: BTreeSet::new(),
                serving: Epoch(0),
                steps: Vec::new(),
                accept: BTreeSet::new(),
                orders: None,
                published: None,
                promised: BTreeSet::new(),
                fenced: false,
            },
        );
    }

    // === the operator ===

    fn operate(&mut self) {
        let store = self.history[self.operator_seen].clone();
        let alive = store.alive();
        let view = ClusterView {
            alive: &alive,
            acks: &store.acks,
            target: store.target.as_deref(),
            active: store.active.as_deref(),
        };
        match coordinator::next(&view) {
            Action::Wait { .. } => {}
            Action::Activate(epoch) => self.activate(&store, epoch),
            Action::Plan if alive.len() < self.ranks as usize => {}
            Action::Plan | Action::Replan { .. } => self.propose(&store, &view),
            Action::Settled => {
                let listed: BTreeSet<Rank> = store
                    .active
                    .iter()
                    .flat_map(|p| p.ranks.iter().copied())
                    .collect();
                if listed != alive || self.dice.chance(30) {
                    self.shift();
                    self.propose(&store, &view);
                }
            }
        }
    }

    /// The load drifts, so that plans move copies.
    fn shift(&mut self) {
        for row in &mut self.demand {
            for x in row.iter_mut() {
                *x = (self.dice.below(100) + 1) as f64;
            }
        }
    }

    fn propose(&mut self, store: &Snapshot, view: &ClusterView<'_>) {
        let ranks = view.alive.iter().map(|rank| RankSlots {
            rank: *rank,
            slots: SLOTS,
            domain: String::new(),
        });
        let problem = Problem {
            demand: self.demand.clone(),
            above: coordinator::highest_epoch(view),
            ..Problem::uniform(ranks.collect(), LAYERS, EXPERTS)
        };
        let settings = Settings {
            threshold: 0.99,
            ..Settings::default()
        };
        let decision = plan(&problem, view.active, &settings, &mut self.planner);
        let placement = match decision {
            Ok(Decision::Move { placement, .. } | Decision::Reweigh { placement, .. }) => {
                *placement
            }
            Ok(Decision::Keep { .. }) => match coordinator::anew(view) {
                Some(placement) => placement,
                None => return,
            },
            // Too few are left: nothing can be planned until somebody returns.
            Err(PlanError::TooFewSlots { .. } | PlanError::NoRanks) => return,
            Err(other) => panic!("{other}"),
        };
        let same = |a: &Option<Arc<Placement>>, b: &Option<Arc<Placement>>| {
            a.as_ref().map(|p| p.epoch) == b.as_ref().map(|p| p.epoch)
        };
        if !self.away && same(&self.now().target, &store.target) {
            self.write(|now| now.target = Some(Arc::new(placement)));
        }
    }

    /// One transaction over target and active.
    fn activate(&mut self, seen: &Snapshot, epoch: Epoch) {
        let target = seen.target.clone().unwrap();
        let now = self.now();
        let still = now.target.as_ref().map(|p| p.epoch) == Some(epoch)
            && now.active.as_ref().map_or(Epoch(0), |p| p.epoch) == target.parent;
        if still && !self.away {
            assert!(
                self.activated.last().is_none_or(|last| *last < epoch),
                "epochs rise"
            );
            self.assert_ready(seen, &target);
            self.activated.push(epoch);
            let held = target
                .ranks
                .iter()
                .map(|rank| (*rank, target.held_by(*rank)));
            let held = held.collect();
            self.known.insert(epoch, Known { held });
            self.write(|now| now.active = Some(target));
        }
    }

    // === a worker ===

    fn think(&mut self, rank: Rank) {
        let Some(worker) = self.workers.get_mut(&rank) else {
            return;
        };
        let store = &self.history[worker.seen];
        let alive = store.alive();
        let in_use = worker.steps.iter().copied().collect();
        worker.orders = Some(worker.machine.step(&MemberView {
            target: store.target.as_deref(),
            active: store.active.as_deref(),
            alive: &alive,
            acks: &store.acks,
            resident: &worker.resident,
            fetching: &worker.fetching,
            serving: worker.serving,
            in_use: &in_use,
        }));
    }

    /// Carries out what the last thought ordered; the engine may have moved on in between.
    fn act(&mut self, rank: Rank) {
        let Some(worker) = self.workers.get_mut(&rank) else {
            return;
        };
        let Some(orders) = worker.orders.take() else {
            return;
        };
        worker.fetching.extend(orders.fetch);
        for item in orders.abandon {
            worker.fetching.remove(&item);
        }
        worker.accept = orders.accept;
        if orders.ack.prepared > Epoch(0) {
            worker.promised.insert(orders.ack.prepared);
        }
        if let Some(epoch) = orders.switch_to {
            let active = self.history[worker.seen]
                .active
                .as_ref()
                .filter(|p| p.epoch == epoch);
            if let Some(active) = active {
                assert!(
                    active.held_by(rank).is_subset(&worker.resident),
                    "switched unprepared"
                );
            }
            worker.serving = epoch;
        }
        // Now and then an acknowledgement comes twice.
        let news = worker.published != Some(orders.ack) || self.dice.chance(3);
        if news && !worker.fenced && !self.away {
            worker.published = Some(orders.ack);
            self.write(|store| {
                store.acks.insert(rank, orders.ack);
            });
        }
        let worker = self.workers.get_mut(&rank).unwrap();
        for item in orders.release {
            worker.resident.remove(&item);
        }
    }

    fn engine(&mut self, rank: Rank) {
        let Some(worker) = self.workers.get_mut(&rank) else {
            return;
        };
        match self.dice.below(3) {
            0 if worker.serving > Epoch(0) && worker.steps.len() < 2 => {
                worker.steps.push(worker.serving);
            }
            1 if !worker.steps.is_empty() => {
                let at = self.dice.below(worker.steps.len());
                worker.steps.remove(at);
            }
            _ => {
                // Some of what is on its way arrives.
                for _ in 0..=self.dice.below(4) {
                    worker.resident.extend(worker.fetching.pop_first());
                }
            }
        }
    }

    // === faults ===

    fn crash(&mut self, rank: Rank) {
        if let Some(worker) = self.workers.remove(&rank) {
            self.crashed = true;
            if !worker.fenced {
                self.dying.insert(rank, worker.incarnation);
            }
        }
    }

    fn expire(&mut self, rank: Rank) {
        if !self.away && self.dying.remove(&rank).is_some() {
            self.write(|store| {
                store.members.remove(&rank);
                store.acks.remove(&rank);
            });
        }
    }

    fn cut_off(&mut self, rank: Rank) {
        if let Some(worker) = self.workers.get_mut(&rank)
            && !worker.fenced
            && !self.away
        {
            worker.fenced = true;
            self.crashed = true;
            self.write(|store| {
                store.members.remove(&rank);
                store.acks.remove(&rank);
            });
        }
    }

    /// One thing happens. Whether it is of a kind that the invariants speak of: thoughts and looks change nothing.
    fn turn(&mut self, faults: bool) -> bool {
        let rank = Rank(self.dice.below(self.ranks as usize) as u32);
        if self.away && self.dice.chance(2) {
            self.away = false;
        }
        match self.dice.below(if faults { 1017 } else { 1000 }) {
            0..200 => self.think(rank),
            200..400 => {
                self.act(rank);
                return true;
            }
            400..600 => {
                self.engine(rank);
                return true;
            }
            600..900 if self.away => {}
            600..800 => {
                if let Some(worker) = self.workers.get_mut(&rank)
                    && !worker.fenced
                    && worker.seen + 1 < self.history.len()
                {
                    worker.seen += 1 + self.dice.below(self.history.len() - worker.seen - 1);
                }
            }
            800..900 => {
                let behind = self.history.len() - self.operator_seen;
                self.operator_seen += self.dice.below(behind);
            }
            900..1000 => self.operate(),
            1000..1002 => self.crash(rank),
            1002 => self.cut_off(rank),
            1003..1006 => self.expire(rank),
            1006..1008 => self.away = true,
            // A new process; its lease takes the place of the old one's, expired or not.
            _ => {
                let gone = self.workers.get(&rank).is_none_or(|worker| worker.fenced);
                if gone && !self.away {
                    self.start(rank);
                }
            }
        }
        faults
    }

    // === invariants ===

    fn assert_all(&self) {
        for (rank, worker) in &self.workers {
            for epoch in worker.used().iter().filter(|_| !worker.fenced) {
                self.assert_served(*rank, *epoch);
            }
            if !self.crashed {
                assert!(
                    worker.accept.len() <= 3,
                    "rank {rank} accepts {:?}",
                    worker.accept
                );
            }
        }
        if !self.crashed && !self.activated.is_empty() {
            for l in 0..LAYERS as u32 {
                for e in 0..EXPERTS as u32 {
                    let item = (LayerId(l), ExpertId(e));
                    let somebody = self.workers.values().any(|w| w.resident.contains(&item));
                    assert!(somebody, "layer {l} expert {e} is nowhere");
                }
            }
        }
    }

    /// What must hold when a placement becomes the active one: all of its ranks promised it, and, where nothing
    /// crashed, they do hold it and nobody uses an epoch before the one that is replaced.
    fn assert_ready(&self, seen: &Snapshot, target: &Placement) {
        for rank in &target.ranks {
            assert!(seen.members.contains_key(rank), "rank {rank} is not there");
            let prepared = seen.acks.get(rank).map(|ack| ack.prepared);
            assert_eq!(prepared, Some(target.epoch), "rank {rank} is not prepared");
        }
        if self.crashed {
            return;
        }
        for (rank, worker) in &self.workers {
            assert!(target.held_by(*rank).is_subset(&worker.resident));
            let oldest = worker.used().first().copied();
            assert!(
                oldest.is_none_or(|epoch| epoch >= target.parent),
                "three epochs in use"
            );
        }
    }

    /// A caller under `epoch` finds what it was promised.
    fn assert_served(&self, caller: Rank, epoch: Epoch) {
        let known = self.known.get(&epoch);
        let known = known.expect("an epoch in use was active once");
        for (holder, held) in &known.held {
            let Some(worker) = self.workers.get(holder) else {
                continue;
            };
            if worker.fenced || !worker.promised.contains(&epoch) {
                continue;
            }
            assert!(
                held.is_subset(&worker.resident) && worker.accept.contains(&epoch),
                "rank {caller} uses epoch {epoch}, but rank {holder} accepts {:?} and lacks {:?}",
                worker.accept,
                held.difference(&worker.resident).collect::<Vec<_>>(),
            );
        }
    }

    /// No more faults and no more drift: everybody gets his turns, in order. With `gone` one rank never returns.
    fn settle(&mut self, gone: Option<Rank>) {
        self.away = false;
        for rank in (0..self.ranks).map(Rank) {
            if Some(rank) == gone {
                self.crash(rank);
                self.expire(rank);
            } else if self.workers.get(&rank).is_none_or(|w| w.fenced) {
                self.start(rank);
            }
        }
        let living: Vec<Rank> = self.workers.keys().copied().collect();
        for _ in 0..400 {
            for rank in living.iter().copied() {
                let latest = self.history.len() - 1;
                let worker = self.workers.get_mut(&rank).unwrap();
                worker.seen = latest;
                worker.steps.clear();
                worker.resident.append(&mut worker.fetching);
                self.think(rank);
                self.act(rank);
                self.assert_all();
            }
            self.operator_seen = self.history.len() - 1;
            let store = self.now().clone();
            let alive = store.alive();
            let view = ClusterView {
                alive: &alive,
                acks: &store.acks,
                target: store.target.as_deref(),
                active: store.active.as_deref(),
            };
            match coordinator::next(&view) {
                Action::Activate(epoch) => self.activate(&store, epoch),
                Action::Plan | Action::Replan { .. } => self.propose(&store, &view),
                Action::Wait { .. } => {}
                Action::Settled => {
                    let active = store.active.as_ref().unwrap();
                    let exact = |(rank, w): (&Rank, &Worker)| {
                        w.resident == active.held_by(*rank) && w.serving == active.epoch
                    };
                    if self.workers.iter().all(exact) {
                        return;
                    }
                }
            }
            self.assert_all();
        }
        panic!("did not settle: {:?}", self.now().acks);
    }
}

/// What is told of schedules.
#[derive(Debug, Clone, Copy, Default)]
struct Told {
    schedules: usize,
    /// Placements that became active, and schedules in which two or more did: those have a rollover.
    activations: usize,
    rollovers: usize,
}

fn simulate(seed: u64, ranks: u32, turns: usize, faults: bool) -> usize {
    let mut world = World::new(seed, ranks);
    for _ in 0..turns {
        if world.turn(faults) {
            world.assert_all();
        }
    }
    world.assert_all();
    let activated = world.activated.len();
    world.settle((faults && seed.is_multiple_of(2)).then_some(Rank(0)));
    activated
}

/// Schedules of these seeds, each of so many turns, on all processors.
fn schedules(seeds: Range<u64>, turns: usize, faults: bool) -> Told {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let own = |t: usize| {
        let mut told = Told::default();
        for seed in seeds.clone().skip(t).step_by(threads) {
            let one = || simulate(seed, 3 + (seed % 3) as u32, turns, faults);
            let activations = catch_unwind(AssertUnwindSafe(one))
                .unwrap_or_else(|_| panic!("schedule {seed}, {turns} turns: see above"));
            told.schedules += 1;
            told.activations += activations;
            told.rollovers += usize::from(activations > 1);
        }
        told
    };
    std::thread::scope(|scope| {
        let started: Vec<_> = (0..threads).map(|t| scope.spawn(move || own(t))).collect();
        let all = started.into_iter().map(|thread| thread.join().unwrap());
        all.fold(Told::default(), |a, b| Told {
            schedules: a.schedules + b.schedules,
            activations: a.activations + b.activations,
            rollovers: a.rollovers + b.rollovers,
        })
    })
}

#[test]
fn planned_rollovers_never_lose_an_expert() {
    let told = schedules(0..40, 3000, false);
    assert!(told.activations > 40 * 3, "{told:?}");
}

#[test]
fn crashes_restarts_lost_leases_and_outages_keep_every_promise() {
    let told = schedules(1000..1070, 3000, true);
    assert!(told.activations > 70 * 3, "{told:?}");
}

/// Breadth in place of length: about 70 seconds of one processor.
#[test]
fn a_hundred_thousand_schedules_keep_every_promise() {
    let planned = schedules(10_000..40_000, 500, false);
    let faulty = schedules(40_000..110_000, 800, true);
    println!("planned {planned:?}, with faults {faulty:?}");
    assert_eq!(planned.schedules + faulty.schedules, 100_000);
    for told in [planned, faulty] {
        assert!(told.rollovers * 4 > told.schedules, "{told:?}");
    }
}
