//! The lock-step discipline between threads of this process, by hand and by NCCL's host side: the same bits as one process, whatever the placement, the
//! number of rows and who has any; and when a rank is lost, everybody stops in time and goes on with the next epoch.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test says what it expects by failing; its threads run on the wall clock, every wait bounded"
)]

mod exchange_rig;
#[path = "../../kernels/cuda/tests/peers/mod.rs"]
mod peers;
mod random;
mod ranks;
mod rig;
mod threads;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::model::{Family, ModelSpec};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_models::experts::{ExpertBatch, Experts};
use foregate_models::{ExpertRows, ExpertWeights, combine, run_expert_rows};
use foregate_worker::engine::{EngineHandle, StepExperts};
use foregate_worker::exchange::lockstep::LockStep;
use foregate_worker::exchange::{Endpoint, EndpointParts, Way};
use foregate_worker::fabric::Identity;
use foregate_worker::load::LoadCounters;
use foregate_worker::metrics::{Collected, WorkerMetrics};
use foregate_worker::residency::Routing;

use exchange_rig::{PATIENCE, drawn, expert, metrics, ops, spec, wait_for};
use random::Random;
use ranks::{Hall, NewHall};
use rig::{Rig, Sizes, collect, prompt, submit};

/// For tests in which somebody is waited for in vain.
const SHORT: Duration = Duration::from_millis(400);

/// A rank of the test's cluster.
struct Node {
    endpoint: Endpoint,
    metrics: Arc<WorkerMetrics>,
}

impl Node {
    fn new(rank: u32, spec: &Arc<ModelSpec>, deadline: Duration) -> Self {
        let metrics = metrics();
        let endpoint = Endpoint::open(EndpointParts {
            me: Identity {
                cluster: "test".into(),
                rank: Rank(rank),
                incarnation: 1,
            },
            spec: Arc::clone(spec),
            ops: ops(),
            callee_ops: ops(),
            way: Way::LockStep,
            load: Arc::new(LoadCounters::new(spec.moe_layers(), spec.experts)),
            metrics: Arc::clone(&metrics),
            deadline,
        })
        .unwrap();
        Self { endpoint, metrics }
    }

    /// Every expert, so that any placement may be switched to at once.
    fn fill(&self, load: impl Fn(LayerId, ExpertId) -> Arc<ExpertWeights>) {
        let (layers, experts) = self.endpoint.residency().shape();
        let items = (0..layers as u32)
            .flat_map(|layer| (0..experts as u32).map(move |e| (LayerId(layer), ExpertId(e))));
        self.endpoint
            .residency()
            .insert(items.map(|item| (item, load(item.0, item.1))));
    }

    fn switch(&self, placement: &Arc<Placement>) {
        let routing = Routing::new(Arc::clone(placement)).unwrap();
        self.endpoint.gate().switch(Arc::new(routing));
    }

    fn lock_step(&self, hall: &Arc<dyn Hall>, rank: u32) -> LockStep {
        let groups = hall.groups(Rank(rank));
        self.endpoint.lock_step(groups, ops()).unwrap()
    }
}

/// Every expert on one to three of the ranks, by chance.
fn scattered(
    random: &mut Random,
    epoch: u64,
    ranks: &[u32],
    spec: &ModelSpec,
) -> Arc<Placement> {
    let ranks: Vec<Rank> = ranks.iter().map(|rank| Rank(*rank)).collect();
    let layers = (0..spec.moe_layers()).map(|_| {
        let mut slots: Vec<BTreeSet<ExpertId>> = vec![BTreeSet::new(); ranks.len()];
        for expert in 0..spec.experts as u32 {
            for _ in 0..random.within(1, 3) {
                let at = random.within(0, ranks.len() as u32 - 1) as usize;
                slots[at].insert(ExpertId(expert));
            }
        }
        let slots = slots
            .into_iter()
            .map(|held| held.into_iter().collect())
            .collect();
        LayerPlacement::from_slots(&ranks, slots, spec.experts)
    });
    Arc::new(Placement {
        epoch: Epoch(epoch),
        parent: Epoch(epoch - 1),
        reason: Reason::Move,
        layers: layers.collect(),
        ranks,
        balance_before: 1.0,
        balance_after: 1.0,
    })
}

/// Rows of one rank in one layer, with their experts and weights.
struct Rows {
    input: Vec<f32>,
    experts: Vec<u32>,
    weights: Vec<f32>,
    dead: Vec<bool>,
}

impl Rows {
    fn draw(random: &mut Random, rows: usize, spec: &ModelSpec) -> Self {
        let top_k = spec.top_k;
        let mut experts = Vec::new();
        for _ in 0..rows {
            let mut chosen = BTreeSet::new();
            while chosen.len() < top_k {
                chosen.insert(random.within(0, spec.experts as u32 - 1));
            }
            experts.extend(chosen);
        }
        Self {
            input: drawn(u64::from(random.next()), rows * spec.hidden),
            weights: drawn(u64::from(random.next()), rows * top_k),
            dead: (0..rows).map(|_| random.chance(10)).collect(),
            experts,
        }
    }

    fn batch<'a>(&'a self, layer: LayerId, spec: &ModelSpec) -> ExpertBatch<'a> {
        ExpertBatch {
            layer,
            input: &self.input,
            hidden: spec.hidden,
            experts: &self.experts,
            weights: &self.weights,
            top_k: spec.top_k,
            dead: &self.dead,
        }
    }

    /// What one process computes.
    fn expected(&self, layer: LayerId, spec: &ModelSpec) -> Vec<f32> {
        let ops = ops();
        let mut results = vec![vec![0.0; spec.hidden]; self.experts.len()];
        for id in 0..spec.experts as u32 {
            let pairs: Vec<usize> = (0..self.experts.len())
                .filter(|pair| self.experts[*pair] == id)
                .collect();
            let rows: Vec<u32> = pairs
                .iter()
                .map(|pair| (pair / spec.top_k) as u32)
                .collect();
            let mut out = vec![0.0; rows.len() * spec.hidden];
            let call = [ExpertRows {
                expert: expert(spec, layer, ExpertId(id)),
                rows: &rows,
            }];
            run_expert_rows(ops.as_ref(), &self.input, spec.hidden, &call, &mut out).unwrap();
            for (pair, row) in pairs.iter().zip(out.chunks(spec.hidden)) {
                results[*pair].copy_from_slice(row);
            }
        }
        let parts: Vec<&[f32]> = results.iter().map(Vec::as_slice).collect();
        let mut out = vec![0.0; self.input.len()];
        let width = spec.hidden;
        combine(
            ops.as_ref(),
            &parts,
            &self.weights,
            spec.top_k,
            width,
            &mut out,
        )
        .unwrap();
        out
    }
}

/// One step: a batch per layer. Gives whether anything was late.
fn step(lock_step: &mut LockStep, batches: &[Rows], spec: &ModelSpec) -> bool {
    lock_step.begin_step(None);
    let mut late_any = false;
    for (layer, rows) in (0_u32..).map(LayerId).zip(batches) {
        let mut out = vec![f32::NAN; rows.input.len()];
        let late = lock_step.run(&rows.batch(layer, spec), &mut out).unwrap();
        late_any |= !late.is_empty();
        let expected = rows.expected(layer, spec);
        for row in (0..rows.dead.len()).filter(|row| !rows.dead[*row]) {
            let at = row * spec.hidden..(row + 1) * spec.hidden;
            let same = late.contains(&(row as u32)) || out[at.clone()] == expected[at];
            assert!(same, "row {row} of layer {layer} differs");
        }
    }
    lock_step.end_step();
    late_any
}

/// Runs `work` for each rank on a thread of its own.
fn on_each<T: Send>(nodes: &[Node], work: impl Fn(u32, &Node) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0_u32..)
            .zip(nodes)
            .map(|(rank, node)| scope.spawn(move || work(rank, node)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// A rank that leaves takes the others' steps with it, so all leave together; and nobody waits for a group of those who left.
fn leave(ended: &std::sync::Barrier, hall: &Arc<dyn Hall>, lock_step: LockStep) {
    ended.wait();
    hall.close();
    drop(lock_step);
}

fn nodes(count: u32, deadline: Duration) -> Vec<Node> {
    let spec = spec();
    let node = |rank| {
        let node = Node::new(rank, &spec, deadline);
        node.fill(|layer, id| expert(&spec, layer, id));
        node
    };
    (0..count).map(node).collect()
}

/// Every form of a step, with ranks that have nothing among those that have much.
fn rows_have_the_bits_of_one_process(new_hall: NewHall) {
    // Rows by rank: one block, several buckets, two rounds, counted.
    let cases: [&[usize]; 6] = [
        &[3],
        &[5, 0],
        &[1, 40, 0],
        &[100, 7, 33, 0],
        &[300, 2, 0],
        &[0, 530, 17],
    ];
    for (case, rows) in cases.into_iter().enumerate() {
        let spec = spec();
        let ranks: Vec<u32> = (0..rows.len() as u32).collect();
        let nodes = nodes(rows.len() as u32, PATIENCE);
        let placement = scattered(&mut Random::new(case as u64), 1, &ranks, &spec);
        let hall = new_hall();
        let ended = std::sync::Barrier::new(rows.len());
        let calls = on_each(&nodes, |rank, node| {
            node.switch(&placement);
            let mut lock_step = node.lock_step(&hall, rank);
            let random = &mut Random::new(1000 * case as u64 + u64::from(rank));
            for _ in 0..2 {
                let rows = rows[rank as usize];
                // Who has nothing leaves it to the idle thread.
                if rows > 0 {
                    let layers = spec.moe_layers();
                    let batches: Vec<Rows> = (0..layers)
                        .map(|_| Rows::draw(random, rows, &spec))
                        .collect();
                    assert!(!step(&mut lock_step, &batches, &spec), "nothing is late");
                }
            }
            leave(&ended, &hall, lock_step);
            node.metrics.collectives_total(Collected::Rows)
        });
        let most = rows.iter().max().unwrap();
        let per_step = if *most > 256 && *most <= 512 { 2 } else { 1 };
        for (calls, bytes) in calls {
            let layers = spec.moe_layers() as u64;
            assert_eq!(calls % layers, 0, "whole steps");
            assert!(
                calls >= 2 * layers * per_step && bytes > 0,
                "{calls} calls of {bytes} bytes"
            );
        }
        assert!(nodes.iter().all(|node| node.metrics.late_rows_total() == 0));
    }
}

/// An engine that gives up in the middle of a step leaves the others no riddle.
fn a_step_that_ends_early_is_walked_to_its_end(new_hall: NewHall) {
    let spec = spec();
    let nodes = nodes(2, PATIENCE);
    let placement = scattered(&mut Random::new(3), 1, &[0, 1], &spec);
    let hall = new_hall();
    let ended = std::sync::Barrier::new(2);
    on_each(&nodes, |rank, node| {
        node.switch(&placement);
        let mut lock_step = node.lock_step(&hall, rank);
        let random = &mut Random::new(u64::from(rank));
        for round in 0..4 {
            let layers = if rank == 1 && round % 2 == 0 {
                1
            } else {
                spec.moe_layers()
            };
            let batches: Vec<Rows> =
                (0..layers).map(|_| Rows::draw(random, 3, &spec)).collect();
            assert!(!step(&mut lock_step, &batches, &spec));
        }
        // A layer out of its order is refused, and costs nobody anything.
        lock_step.begin_step(None);
        let rows = Rows::draw(random, 3, &spec);
        let mut out = vec![0.0; rows.input.len()];
        assert!(
            lock_step
                .run(&rows.batch(LayerId(1), &spec), &mut out)
                .is_err()
        );
        lock_step.end_step();
        ended.wait();
        assert_eq!(node.metrics.lost_groups_total(), 0);
        leave(&ended, &hall, lock_step);
    });
}

/// A worker that drains has no engine any more, and experts that the others need for their last tokens.
fn who_has_no_engine_any_more_still_steps(new_hall: NewHall) {
    let spec = spec();
    let nodes = nodes(2, PATIENCE);
    let placement = scattered(&mut Random::new(9), 1, &[0, 1], &spec);
    let hall = new_hall();
    let ended = std::sync::Barrier::new(2);
    on_each(&nodes, |rank, node| {
        node.switch(&placement);
        let lock_step = node.lock_step(&hall, rank);
        let stand_in = lock_step.stand_in();
        if rank == 0 {
            let calls = node.endpoint.server().calls();
            drop(lock_step);
            ended.wait();
            assert!(
                node.endpoint.server().calls() > calls,
                "its drain would not wait"
            );
        } else {
            let mut lock_step = lock_step;
            let random = &mut Random::new(1);
            for _ in 0..3 {
                let batches: Vec<Rows> = (0..spec.moe_layers())
                    .map(|_| Rows::draw(random, 5, &spec))
                    .collect();
                assert!(!step(&mut lock_step, &batches, &spec), "nothing is late");
            }
            ended.wait();
        }
        stand_in.close();
        hall.close();
    });
    assert!(nodes.iter().all(|node| node.metrics.late_rows_total() == 0));
}

/// The rank that is lost says nothing any more. The others stop within the deadline, lose only this step, and go on with
/// the epoch that does without it.
fn a_lost_rank_costs_a_step_and_not_the_cluster(new_hall: NewHall) {
    let spec = spec();
    let nodes = nodes(3, SHORT);
    let random = &mut Random::new(11);
    let placement = scattered(random, 1, &[0, 1, 2], &spec);
    let next = scattered(random, 2, &[0, 1], &spec);
    let hall = new_hall();
    let lost = std::sync::Barrier::new(3);
    let ended = std::sync::Barrier::new(2);
    on_each(&nodes, |rank, node| {
        node.switch(&placement);
        let mut lock_step = node.lock_step(&hall, rank);
        let random = &mut Random::new(u64::from(rank));
        let mut draw = || -> Vec<Rows> {
            (0..spec.moe_layers())
                .map(|_| Rows::draw(random, 4, &spec))
                .collect()
        };
        while step(&mut lock_step, &draw(), &spec) {}
        lost.wait();
        if rank == 2 {
            drop(lock_step);
            return;
        }
        let begun = Instant::now();
        while node.metrics.lost_groups_total() == 0 {
            step(&mut lock_step, &draw(), &spec);
            assert!(begun.elapsed() < PATIENCE, "the loss is never noticed");
        }
        // Until the operator has planned without it, every row is late, in bounded time.
        let begun = Instant::now();
        assert!(step(&mut lock_step, &draw(), &spec));
        assert!(begun.elapsed() < 20 * SHORT, "{:?}", begun.elapsed());
        node.switch(&next);
        let begun = Instant::now();
        while step(&mut lock_step, &draw(), &spec) {
            assert!(begun.elapsed() < PATIENCE, "no group of the next epoch");
        }
        leave(&ended, &hall, lock_step);
    });
    // A machine that is busy elsewhere may lose more of them.
    assert!(
        nodes[..2]
            .iter()
            .all(|node| node.metrics.lost_groups_total() >= 1)
    );
}

/// Where all live, a group that was too slow is formed anew in the same epoch.
fn a_pause_of_a_rank_is_no_end(new_hall: NewHall) {
    let spec = spec();
    let nodes = nodes(2, SHORT);
    let placement = scattered(&mut Random::new(5), 1, &[0, 1], &spec);
    let hall = new_hall();
    let ended = std::sync::Barrier::new(2);
    on_each(&nodes, |rank, node| {
        node.switch(&placement);
        let mut lock_step = node.lock_step(&hall, rank);
        let random = &mut Random::new(u64::from(rank));
        let mut draw = || -> Vec<Rows> {
            (0..spec.moe_layers())
                .map(|_| Rows::draw(random, 4, &spec))
                .collect()
        };
        while step(&mut lock_step, &draw(), &spec) {}
        if rank == 1 {
            // In the middle of a step: its idle thread cannot stand in for it.
            lock_step.begin_step(None);
            std::thread::park_timeout(SHORT * 3);
            lock_step.end_step();
        }
        let begun = Instant::now();
        while node.metrics.lost_groups_total() == 0 || step(&mut lock_step, &draw(), &spec) {
            assert!(begun.elapsed() < PATIENCE, "no second group");
            std::thread::park_timeout(Duration::from_millis(1));
        }
        leave(&ended, &hall, lock_step);
    });
    for node in &nodes {
        assert!(node.metrics.lost_groups_total() >= 1);
    }
}

/// Engines over lock-step: token streams are those of one process, while placements change under them, at different
/// moments at different ranks, over the same ranks and over fewer.
async fn token_streams_are_those_of_one_process(new_hall: NewHall) {
    for (seed, family) in [(0, Family::Qwen3Moe), (1, Family::Mixtral)] {
        let random = &mut Random::new(seed);
        let rig = Rig::tiny(family);
        let spec = Arc::new(rig.spec().clone());
        let hall = new_hall();
        let nodes: Vec<Node> = (0..3)
            .map(|rank| Node::new(rank, &spec, PATIENCE))
            .collect();
        for node in &nodes {
            node.fill(|layer, id| {
                Arc::new(ExpertWeights::load(&rig.checkpoint, layer, id).unwrap())
            });
        }
        let first = scattered(random, 1, &[0, 1, 2], &spec);
        let engines: Vec<EngineHandle> = (0_u32..)
            .zip(&nodes)
            .map(|(rank, node)| {
                node.switch(&first);
                rig.engine(Sizes::default(), Box::new(node.lock_step(&hall, rank)))
            })
            .collect();
        let requests: Vec<_> = (0..6)
            .map(|number| {
                let tokens = prompt(random.within(1, 40) as usize, spec.vocab, number);
                rig::drawn(&tokens, random.within(30, 60) as usize, number)
            })
            .collect();
        let streams: Vec<_> = requests
            .iter()
            .enumerate()
            .map(|(number, request)| submit(&engines[number % 3], request.clone()))
            .collect();
        for (epoch, ranks) in [(2, vec![0, 1, 2]), (3, vec![0, 1, 2])] {
            let next = scattered(random, epoch, &ranks, &spec);
            for node in &nodes {
                tokio::time::sleep(Duration::from_millis(u64::from(random.within(1, 20))))
                    .await;
                node.switch(&next);
            }
        }
        let mut answers = Vec::new();
        for stream in streams {
            answers.push(collect(stream).await.unwrap());
        }
        let alone = rig.alone(Sizes::default());
        for (request, got) in requests.into_iter().zip(answers) {
            let want = collect(submit(&alone, request.clone())).await.unwrap();
            assert_eq!(
                got.bits(),
                want.bits(),
                "seed {seed} {family:?} {request:?}"
            );
        }
        assert!(
            nodes
                .iter()
                .all(|node| node.metrics.lost_groups_total() == 0)
        );
        // To fewer ranks: the group is left in order, and another one stands.
        let fewer = scattered(random, 4, &[0, 2], &spec);
        for node in &nodes {
            node.switch(&fewer);
        }
        let request = rig::drawn(&prompt(9, spec.vocab, 77), 20, 77);
        let got = collect(submit(&engines[2], request.clone())).await.unwrap();
        let want = collect(submit(&alone, request)).await.unwrap();
        assert_eq!(got.bits(), want.bits());
        wait_for("all to have left in order", || {
            nodes
                .iter()
                .all(|node| node.metrics.lost_groups_total() == 0)
        });
    }
}

/// Every test, by every way that ranks meet.
macro_rules! by {
    ($way:ident) => {
        mod $way {
            use crate::ranks::$way as hall;

            #[test]
            fn rows_have_the_bits_of_one_process() {
                super::rows_have_the_bits_of_one_process(hall);
            }

            #[test]
            fn a_step_that_ends_early_is_walked_to_its_end() {
                super::a_step_that_ends_early_is_walked_to_its_end(hall);
            }

            #[test]
            fn a_lost_rank_costs_a_step_and_not_the_cluster() {
                super::a_lost_rank_costs_a_step_and_not_the_cluster(hall);
            }

            #[test]
            fn a_pause_of_a_rank_is_no_end() {
                super::a_pause_of_a_rank_is_no_end(hall);
            }

            #[test]
            fn who_has_no_engine_any_more_still_steps() {
                super::who_has_no_engine_any_more_still_steps(hall);
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn token_streams_are_those_of_one_process() {
                super::token_streams_are_those_of_one_process(hall).await;
            }
        }
    };
}

by!(by_threads);
by!(by_nccl);
