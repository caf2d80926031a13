//! Scripted workers: they speak to the operator through the store alone, with the planner's own member machine,
//! so that only weights and steps are missing.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    reason = "part of a test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::load::{EngineLoad, LoadWindow};
use foregate_api::member::{Ack, Member, Phase};
use foregate_api::model::{Family, ModelSpec};
use foregate_api::node::OperatorConfig;
use foregate_api::placement::{Cover, LayerPlacement, Placement};
use foregate_api::weights::{WeightFormat, WeightFormats};
use foregate_operator::Deps;
use foregate_planner::rollover::member::{Member as Machine, MemberView};
use foregate_store::{ClusterState, Coord, Lease, MemoryStore, Store};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

pub const LAYERS: usize = 2;
pub const EXPERTS: usize = 8;
pub const WINDOW: Duration = Duration::from_millis(1000);
const LEASE: Duration = Duration::from_secs(3);
/// How long a fetch of one expert takes.
const FETCH: Duration = Duration::from_millis(30);

/// Rows per expert and window of one worker; all layers alike.
pub type Mix = [u64; EXPERTS];

/// A cluster of scripted workers over one store in memory.
pub struct Rig {
    pub store: MemoryStore,
    pub coord: Coord,
    pub states: watch::Receiver<Arc<ClusterState>>,
    pub mix: watch::Sender<Mix>,
    workers: BTreeMap<Rank, Running>,
    incarnation: u64,
    tasks: JoinSet<()>,
    _stop: tokio_util::sync::DropGuard,
}

struct Running {
    lease: Arc<dyn Lease>,
    task: AbortHandle,
    phase: watch::Sender<Phase>,
}

/// What a worker does besides the usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Habit {
    #[default]
    Sound,
    /// Registers, and never gets ready for anything.
    Stuck,
    /// Has another arithmetic than all others.
    SumsOtherwise,
}

impl Rig {
    pub fn new() -> Self {
        let store = MemoryStore::new();
        let coord = Coord::new(Arc::new(store.clone()), "test");
        let stop = CancellationToken::new();
        Self {
            states: coord.watch_cluster(stop.clone()),
            mix: watch::channel([100; EXPERTS]).0,
            store,
            coord,
            workers: BTreeMap::new(),
            incarnation: 0,
            tasks: JoinSet::new(),
            _stop: stop.drop_guard(),
        }
    }

    pub async fn join(&mut self, rank: u32, slots: u32) {
        self.join_as(rank, slots, Habit::Sound).await;
    }

    pub async fn join_as(&mut self, rank: u32, slots: u32, habit: Habit) {
        self.join_in(rank, slots, habit, "").await;
    }

    pub async fn join_in(&mut self, rank: u32, slots: u32, habit: Habit, domain: &str) {
        self.incarnation += 1;
        let lease = self.store.lease(LEASE).await.unwrap();
        let phase = watch::channel(Phase::Ready).0;
        let mut member = member(Rank(rank), self.incarnation, slots);
        domain.clone_into(&mut member.domain);
        if habit == Habit::SumsOtherwise {
            "amx".clone_into(&mut member.cpu_path);
        }
        let worker = Worker {
            coord: self.coord.clone(),
            member,
            lease: Arc::clone(&lease),
            states: self.states.clone(),
            mix: self.mix.subscribe(),
            phase: phase.subscribe(),
            habit,
        };
        let task = self.tasks.spawn(worker.run());
        let running = Running { lease, task, phase };
        self.workers.insert(Rank(rank), running);
    }

    /// A crash: the process is gone at once, its keys with its lease.
    pub fn kill(&mut self, rank: u32) {
        let running = self.workers.remove(&Rank(rank)).unwrap();
        running.task.abort();
        self.store.expire(running.lease.id());
    }

    pub fn drain(&self, rank: u32) {
        self.workers[&Rank(rank)]
            .phase
            .send_replace(Phase::Draining);
    }

    /// Starts an operator; aborting it is a crash, its lease runs out by itself.
    pub fn operator(&mut self, config: OperatorConfig) -> Operator {
        let registry = prometheus::Registry::new();
        let shutdown = CancellationToken::new();
        let (config, settings) = watch::channel(config);
        let deps = Deps {
            cluster: "test".to_owned(),
            config: settings,
            store: Arc::new(self.store.clone()),
            registry: registry.clone(),
            shutdown: shutdown.clone(),
        };
        let task = self
            .tasks
            .spawn(async move { foregate_operator::run(deps).await.unwrap() });
        Operator {
            config,
            registry,
            shutdown,
            task,
        }
    }

    /// Writes what nobody of the cluster would, under no lease.
    pub async fn spoil(&self, key: &str, value: &'static [u8]) {
        let value = bytes::Bytes::from_static(value);
        let key = format!("/foregate/test/{key}");
        self.store.put(&key, value, None).await.unwrap();
    }

    /// What is under a key of the cluster, as text.
    pub async fn found(&self, key: &str) -> String {
        let found = self.store.get(&format!("/foregate/test/{key}")).await;
        String::from_utf8_lossy(&found.unwrap().unwrap().value).into_owned()
    }

    pub fn state(&self) -> Arc<ClusterState> {
        Arc::clone(&self.states.borrow())
    }

    pub fn active(&self) -> Arc<Placement> {
        Arc::clone(&self.state().active.as_ref().expect("an active placement").0)
    }

    /// Waits (in simulated time) until the cluster is so.
    pub async fn until(
        &self,
        what: &str,
        condition: impl Fn(&ClusterState) -> bool,
    ) -> Arc<ClusterState> {
        let mut states = self.states.clone();
        let found = states.wait_for(|state| condition(state));
        match timeout(Duration::from_secs(900), found).await {
            Ok(state) => Arc::clone(&state.unwrap()),
            Err(_) => {
                let state = self.state();
                let epoch =
                    |p: &Option<(Arc<Placement>, u64)>| p.as_ref().map(|(p, _)| p.epoch);
                panic!(
                    "never: {what}; members {:?}, target {:?}, active {:?}, acks {:?}",
                    state.members.keys(),
                    epoch(&state.target),
                    epoch(&state.active),
                    state.acks
                );
            }
        }
    }

    /// Waits until a placement that is so is active and every live rank serves it and has drained its parent.
    pub async fn until_settled(
        &self,
        what: &str,
        condition: impl Fn(&Placement) -> bool,
    ) -> Arc<Placement> {
        let state = self
            .until(what, |state| {
                state.active.as_ref().is_some_and(|(plan, _)| {
                    condition(plan)
                        && state
                            .target
                            .as_ref()
                            .is_some_and(|(t, _)| t.epoch == plan.epoch)
                        && plan.ranks.iter().all(|rank| serves(state, *rank, plan))
                })
            })
            .await;
        Arc::clone(&state.active.as_ref().unwrap().0)
    }
}

fn serves(state: &ClusterState, rank: Rank, plan: &Placement) -> bool {
    let ack = state.acks.get(&rank);
    ack.is_some_and(|ack| ack.serving == plan.epoch && ack.drained >= plan.parent)
}

pub struct Operator {
    /// Changes its settings.
    pub config: watch::Sender<OperatorConfig>,
    pub registry: prometheus::Registry,
    pub shutdown: CancellationToken,
    pub task: AbortHandle,
}

impl Operator {
    /// Sum of a metric over the series whose labels contain `label`.
    pub fn metric(&self, name: &str, label: &str) -> f64 {
        let families = self.registry.gather();
        let family = families.iter().find(|f| f.name() == name);
        let metrics = family.map_or(&[][..], |f| f.get_metric());
        metrics
            .iter()
            .filter(|m| label.is_empty() || m.get_label().iter().any(|l| l.value() == label))
            .map(|m| m.get_counter().get_value() + m.get_gauge().get_value())
            .sum()
    }

    pub fn leads(&self) -> bool {
        self.metric("foregate_operator_leader", "") > 0.5
    }
}

pub fn config(workers: u32) -> OperatorConfig {
    OperatorConfig {
        workers,
        enabled: true,
        window_ms: u64::try_from(WINDOW.as_millis()).unwrap(),
        threshold: 0.97,
        max_moves_per_layer: 4,
        min_rows: 10,
        forecast: true,
        cover: Cover::Spread,
        max_move_bytes: None,
        economy: None,
        leaving: Vec::new(),
    }
}

/// Mean over maximum load of the ranks under the shares of a placement, mean over layers.
pub fn balance(plan: &Placement, mix: &Mix) -> f64 {
    let mut sum = 0.0;
    for layer in &plan.layers {
        let mut loads: BTreeMap<Rank, f64> = plan.ranks.iter().map(|r| (*r, 0.0)).collect();
        for (copies, rows) in layer.copies.iter().zip(mix) {
            for copy in copies {
                *loads.get_mut(&copy.rank).unwrap() += f64::from(copy.share) * *rows as f64;
            }
        }
        let max = loads.values().copied().fold(0.0, f64::max);
        sum += loads.values().sum::<f64>() / loads.len() as f64 / max;
    }
    sum / plan.layers.len() as f64
}

/// Whether every expert has a copy.
pub fn is_complete(plan: &Placement) -> bool {
    plan.layers.len() == LAYERS
        && plan
            .layers
            .iter()
            .all(|l| l.copies.len() == EXPERTS && l.copies.iter().all(|c| !c.is_empty()))
}

fn member(rank: Rank, incarnation: u64, slots: u32) -> Member {
    Member {
        rank,
        incarnation,
        rpc: "127.0.0.1:1".to_owned(),
        exchange: format!("local:{rank}"),
        domain: String::new(),
        slots,
        phase: Phase::Ready,
        model: ModelSpec {
            family: Family::Qwen3Moe,
            formats: WeightFormats::all(WeightFormat::Float32),
            vocab: 16,
            hidden: 8,
            layers: LAYERS,
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
            max_positions: 64,
            rope_theta: 1e4,
            norm_eps: 1e-6,
            qkv_bias: false,
            clip_qkv: None,
            tied_embeddings: true,
            dense_inner: 8,
            moe_blocks: vec![true; LAYERS],
            experts: EXPERTS,
            top_k: 2,
            expert_inner: 8,
            norm_top_k: true,
            shared_inner: None,
            eos: vec![0],
            bos: None,
        },
        cpu_path: "none".to_owned(),
        kv_pages: 1,
        page_tokens: 16,
    }
}

struct Worker {
    coord: Coord,
    member: Member,
    lease: Arc<dyn Lease>,
    states: watch::Receiver<Arc<ClusterState>>,
    mix: watch::Receiver<Mix>,
    phase: watch::Receiver<Phase>,
    habit: Habit,
}

/// What a worker has and does.
struct Holds {
    machine: Machine,
    resident: BTreeSet<(LayerId, ExpertId)>,
    fetching: BTreeMap<(LayerId, ExpertId), Instant>,
    serving: Epoch,
    said: Option<Ack>,
}

impl Worker {
    async fn run(mut self) {
        let rank = self.member.rank;
        while self
            .coord
            .register(&self.member, self.lease.as_ref())
            .await
            .is_err()
        {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let mut holds = Holds {
            machine: Machine::new(rank),
            resident: BTreeSet::new(),
            fetching: BTreeMap::new(),
            serving: Epoch(0),
            said: None,
        };
        let mut sequence = 0;
        let mut window = tokio::time::interval(WINDOW);
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        loop {
            tokio::select! {
                _ = window.tick() => {
                    sequence += 1;
                    self.publish(sequence, holds.serving).await;
                }
                changed = self.states.changed() => if changed.is_err() { return },
                _ = tick.tick() => {}
            }
            if self.phase.has_changed().unwrap_or(false) {
                self.member.phase = *self.phase.borrow_and_update();
                let _unused = self.coord.register(&self.member, self.lease.as_ref()).await;
            }
            if self.habit == Habit::Sound {
                self.step(&mut holds).await;
            }
        }
    }

    /// Errors are the store's absence; the next window tells the same.
    async fn publish(&self, sequence: u64, epoch: Epoch) {
        let mix = *self.mix.borrow();
        let window = LoadWindow {
            rank: self.member.rank,
            epoch,
            sequence,
            span_ms: 1000,
            gate: vec![mix.to_vec(); LAYERS],
            served: self.served(&mix),
            engine: EngineLoad::default(),
        };
        let _unused = self.coord.publish_load(&window, self.lease.as_ref()).await;
    }

    /// Rows that its copies get by the published shares, of all workers' mixes together: by layer.
    fn served(&self, mix: &Mix) -> Vec<u64> {
        let state = self.states.borrow();
        let Some((plan, _)) = &state.active else {
            return vec![0; LAYERS];
        };
        let of = |layer: &LayerPlacement| {
            let copies = layer.copies.iter().zip(mix);
            let rows = copies.flat_map(|(copies, rows)| {
                let own = copies.iter().filter(|copy| copy.rank == self.member.rank);
                own.map(|copy| f64::from(copy.share) * *rows as f64)
            });
            (rows.sum::<f64>() * plan.ranks.len() as f64).round() as u64
        };
        plan.layers.iter().map(of).collect()
    }

    async fn step(&self, holds: &mut Holds) {
        let now = Instant::now();
        let done: Vec<_> = holds
            .fetching
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(i, _)| *i)
            .collect();
        for item in done {
            holds.fetching.remove(&item);
            holds.resident.insert(item);
        }
        let state = Arc::clone(&self.states.borrow());
        if !state.connected {
            return;
        }
        let alive: BTreeSet<Rank> = state.members.keys().copied().collect();
        let fetching: BTreeSet<_> = holds.fetching.keys().copied().collect();
        let orders = holds.machine.step(&MemberView {
            target: state.target.as_ref().map(|(plan, _)| plan.as_ref()),
            active: state.active.as_ref().map(|(plan, _)| plan.as_ref()),
            alive: &alive,
            acks: &state.acks,
            resident: &holds.resident,
            fetching: &fetching,
            serving: holds.serving,
            in_use: &BTreeSet::new(),
        });
        for item in orders.abandon {
            holds.fetching.remove(&item);
        }
        for item in orders.fetch {
            holds.fetching.insert(item, now + FETCH);
        }
        for item in orders.release {
            holds.resident.remove(&item);
        }
        if let Some(epoch) = orders.switch_to {
            holds.serving = epoch;
        }
        if holds.said != Some(orders.ack) {
            let lease = self.lease.as_ref();
            let told = self
                .coord
                .acknowledge(self.member.rank, orders.ack, lease)
                .await;
            holds.said = told.is_ok().then_some(orders.ack);
        }
    }
}
