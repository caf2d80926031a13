//! Placements change while calls run: three workers over the in-memory store follow the epoch protocol, fetch
//! experts from each other over gRPC, and every layer of every step keeps the bits of one process. No row is
//! late, and what nobody can call any more is released.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test says what it expects by failing; its threads run on the wall clock, every wait bounded"
)]

mod exchange_rig;

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::load::{EngineLoad, LoadWindow};
use foregate_api::member::{Ack, Member, Phase};
use foregate_api::model::{Family, ModelSpec};
use foregate_api::placement::Placement;
use foregate_checkpoint::Checkpoint;
use foregate_checkpoint::tiny::Tiny;
use foregate_kernels::{Cpu, Ops};
use foregate_models::LocalExperts;
use foregate_models::experts::{ExpertBatch, Experts};
use foregate_planner::rollover::coordinator::{Action, ClusterView, next};
use foregate_store::coord::{ClusterState, Coord};
use foregate_store::kv::Store;
use foregate_store::memory::MemoryStore;
use foregate_worker::engine::StepExperts;
use foregate_worker::exchange::{Endpoint, EndpointParts, Exchange, Way};
use foregate_worker::fabric::Identity;
use foregate_worker::fabric::local::LocalHub;
use foregate_worker::fabric::tcp::TcpSettings;
use foregate_worker::load::LoadCounters;
use foregate_worker::membership::{Publisher, PublisherHandle, Wanted};
use foregate_worker::metrics::WorkerMetrics;
use foregate_worker::residency::follow::{Follower, FollowerParts, Stranger};
use foregate_worker::residency::migrate::Loader;
use foregate_worker::residency::serve::ExpertsService;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use exchange_rig::{PATIENCE, drawn, metrics};

const WORKERS: u32 = 3;
const WINDOW: Duration = Duration::from_millis(40);

/// A model on disk, its oracle, and what everybody shares.
struct Model {
    checkpoint: Arc<Checkpoint>,
    spec: Arc<ModelSpec>,
    cpu: Arc<Cpu>,
    _dir: tempfile::TempDir,
}

impl Model {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Tiny::new(Family::Qwen3Moe).write(dir.path()).unwrap();
        let checkpoint = Arc::new(Checkpoint::open(dir.path()).unwrap());
        Self {
            spec: Arc::new(checkpoint.spec().clone()),
            checkpoint,
            cpu: Arc::new(Cpu::new(1)),
            _dir: dir,
        }
    }

    fn ops(&self) -> Arc<dyn Ops> {
        self.cpu.clone()
    }

    fn oracle(&self) -> LocalExperts {
        LocalExperts::load(&self.checkpoint, Arc::clone(&self.cpu)).unwrap()
    }

    /// A placement with `slots[r]` on rank `r` in every layer.
    fn placement(&self, epoch: u64, slots: &[&[u32]]) -> Placement {
        let mut plan = exchange_rig::placement(epoch, epoch - 1, slots);
        plan.layers.truncate(self.spec.moe_layers());
        plan
    }
}

/// One worker without gRPC for sequences: residency, exchange, membership.
struct Node {
    rank: Rank,
    endpoint: Arc<Endpoint>,
    metrics: Arc<WorkerMetrics>,
    follower: tokio::task::JoinHandle<Result<(), Stranger>>,
    stop: CancellationToken,
    /// Keeps the registration in the store when the follower has left.
    _registered: watch::Sender<Wanted>,
}

/// Whether workers talk over channels or sockets.
#[derive(Clone)]
enum Fabrics {
    Local(Arc<LocalHub>),
    Tcp,
}

impl Fabrics {
    fn way(&self) -> Way {
        match self {
            Self::Local(hub) => Way::Local(hub.clone()),
            Self::Tcp => Way::Tcp(
                TcpListener::bind("127.0.0.1:0").unwrap(),
                TcpSettings::default(),
                None,
            ),
        }
    }
}

struct Cluster {
    model: Model,
    store: Arc<MemoryStore>,
    coord: Coord,
    state: watch::Receiver<Arc<ClusterState>>,
    tasks: TaskTracker,
    stop: CancellationToken,
    fabrics: Fabrics,
}

impl Cluster {
    fn new(fabrics: Fabrics) -> Self {
        let store = Arc::new(MemoryStore::new());
        let shared: Arc<dyn Store> = store.clone();
        let coord = Coord::new(shared, "test");
        let stop = CancellationToken::new();
        Self {
            model: Model::new(),
            store,
            state: coord.watch_cluster(stop.clone()),
            coord,
            tasks: TaskTracker::new(),
            stop,
            fabrics,
        }
    }

    async fn node(&self, rank: Rank, incarnation: u64) -> Node {
        let path = self.model.cpu.path().to_string();
        self.node_that_says(rank, incarnation, path).await
    }

    /// A node that is told apart by the name of its instruction path.
    async fn node_that_says(&self, rank: Rank, incarnation: u64, cpu_path: String) -> Node {
        let model = &self.model;
        let metrics = metrics();
        let endpoint = Arc::new(
            Endpoint::open(EndpointParts {
                me: Identity {
                    cluster: "test".into(),
                    rank,
                    incarnation,
                },
                spec: model.spec.clone(),
                ops: model.ops(),
                callee_ops: model.ops(),
                way: self.fabrics.way(),
                load: Arc::new(LoadCounters::new(
                    model.spec.moe_layers(),
                    model.spec.experts,
                )),
                metrics: metrics.clone(),
                deadline: PATIENCE,
            })
            .unwrap(),
        );
        let rpc = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let member = Member {
            rank,
            incarnation,
            rpc: rpc.local_addr().unwrap().to_string(),
            exchange: endpoint.fabric().address(),
            domain: String::new(),
            slots: 8,
            phase: Phase::Joining,
            model: model.spec.as_ref().clone(),
            cpu_path,
            kv_pages: 1,
            page_tokens: 16,
        };
        let stop = self.stop.child_token();
        let gate = Arc::clone(endpoint.gate());
        let close = move |sequence, span: Duration| LoadWindow {
            rank,
            epoch: gate.view().serving,
            sequence,
            span_ms: span.as_millis() as u64,
            gate: Vec::new(),
            served: Vec::new(),
            engine: EngineLoad::default(),
        };
        let nothing = Ack {
            prepared: Epoch(0),
            serving: Epoch(0),
            drained: Epoch(0),
        };
        let wanted = Wanted {
            member,
            ack: nothing,
        };
        let (publisher, handle) =
            Publisher::new(self.coord.clone(), wanted, WINDOW, Box::new(close));
        let PublisherHandle { wanted, published } = handle;
        let _registered = wanted.clone();
        let follower = Follower::new(FollowerParts {
            rank,
            cluster: self.coord.watch_cluster(stop.clone()),
            residency: endpoint.residency().clone(),
            gate: endpoint.gate().clone(),
            fabric: endpoint.fabric().clone(),
            loader: Arc::new(Loader::new(
                model.spec.clone(),
                model.checkpoint.clone(),
                metrics.clone(),
                self.model.cpu.clone(),
                Arc::new(foregate_kernels::OnHost::new(self.model.cpu.clone())),
                None,
            )),
            publisher: PublisherHandle { wanted, published },
            metrics: metrics.clone(),
            progress: Box::new(|_, _| {}),
        });
        self.tasks.spawn(publisher.run(stop.clone()));
        let follower = self.tasks.spawn(follower.run(stop.clone()));
        let service = ExpertsService::server(endpoint.residency().clone());
        let router = foregate_wire::serve::server().add_service(service);
        self.tasks
            .spawn(foregate_wire::serve::serve(router, rpc, None, stop.clone()));
        Node {
            rank,
            endpoint,
            metrics,
            follower,
            stop,
            _registered,
        }
    }

    /// Waits until the store's state is as wanted.
    async fn until(&self, what: &str, holds: impl Fn(&ClusterState) -> bool) {
        let mut state = self.state.clone();
        let waited = timeout(PATIENCE, state.wait_for(|state| holds(state))).await;
        assert!(waited.is_ok(), "waited too long for {what}");
    }

    async fn until_settled(&self) {
        self.until("the rollover to settle", |state| {
            action(state) == Action::Settled
        })
        .await;
    }

    /// Proposes a placement and plays the operator until it is in force and its parent is gone.
    async fn roll_to(&self, plan: Placement) {
        let seen = self.state.borrow().target.as_ref().map(|(_, at)| *at);
        assert!(self.coord.propose(&plan, seen).await.unwrap());
        self.until("permission to activate", |state| {
            action(state) == Action::Activate(plan.epoch)
        })
        .await;
        let seen = self.state.borrow().active.as_ref().map(|(_, at)| *at);
        assert!(self.coord.activate(&plan, seen).await.unwrap());
        // "Settled" alone does not say that a worker which served nothing before has begun to serve.
        let epoch = plan.epoch;
        self.until("everybody to serve the new epoch", |state| {
            state.acks.len() == WORKERS as usize
                && state.acks.values().all(|ack| ack.serving == epoch)
        })
        .await;
        self.until_settled().await;
    }

    async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        timeout(PATIENCE, self.tasks.wait()).await.unwrap();
    }
}

fn action(state: &ClusterState) -> Action {
    let alive: BTreeSet<Rank> = state.members.keys().copied().collect();
    if alive.len() < WORKERS as usize {
        return Action::Plan;
    }
    next(&ClusterView {
        alive: &alive,
        acks: &state.acks,
        target: state.target.as_ref().map(|(plan, _)| plan.as_ref()),
        active: state.active.as_ref().map(|(plan, _)| plan.as_ref()),
    })
}

/// An engine that does nothing but exchanges, step after step, and compares every layer with the oracle.
struct Driver {
    stop: Arc<AtomicBool>,
    steps: Arc<AtomicU64>,
    thread: JoinHandle<BTreeSet<Epoch>>,
}

impl Driver {
    fn start(model: &Model, node: &Node) -> Self {
        let (stop, steps) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (exchange, oracle) = (node.endpoint.exchange(), model.oracle());
        let (spec, rank) = (model.spec.clone(), node.rank);
        let (stop_there, steps_there) = (stop.clone(), steps.clone());
        let thread = std::thread::spawn(move || {
            drive(exchange, oracle, &spec, rank, &stop_there, &steps_there)
        });
        Self {
            stop,
            steps,
            thread,
        }
    }

    /// Waits for some more steps.
    async fn more(&self, steps: u64) {
        let goal = self.steps.load(Ordering::Acquire) + steps;
        let reached = async {
            while self.steps.load(Ordering::Acquire) < goal && !self.thread.is_finished() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, reached).await.expect("steps in time");
        assert!(!self.thread.is_finished(), "the driver failed");
    }

    /// Epochs that its steps used.
    fn end(self) -> BTreeSet<Epoch> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}

fn drive(
    mut exchange: Exchange,
    mut oracle: LocalExperts,
    spec: &ModelSpec,
    rank: Rank,
    stop: &AtomicBool,
    steps: &AtomicU64,
) -> BTreeSet<Epoch> {
    let mut epochs = BTreeSet::new();
    let mut seed = u64::from(rank.0) + 1;
    while !stop.load(Ordering::Acquire) {
        epochs.insert(exchange.begin_step(None));
        for layer in 0..spec.moe_layers() {
            seed += u64::from(WORKERS);
            compare(
                &mut exchange,
                &mut oracle,
                spec,
                LayerId(layer as u32),
                seed,
            );
        }
        exchange.end_step();
        steps.fetch_add(1, Ordering::AcqRel);
    }
    epochs
}

/// One layer's batch through the cluster and through one process.
fn compare(
    exchange: &mut Exchange,
    oracle: &mut LocalExperts,
    spec: &ModelSpec,
    layer: LayerId,
    seed: u64,
) {
    let rows = 1 + (seed % 40) as usize;
    let input = drawn(seed, rows * spec.hidden);
    let weights = drawn(seed + 1, rows * spec.top_k);
    let experts: Vec<u32> = drawn(seed + 2, rows)
        .iter()
        .flat_map(|x| {
            let first = ((x + 0.5) * (spec.experts - 1) as f32) as u32;
            [
                first,
                first + 1 + (seed % 2) as u32 * u32::from(first + 2 < spec.experts as u32),
            ]
        })
        .collect();
    let dead: Vec<bool> = (0..rows).map(|row| row % 7 == 3).collect();
    let batch: ExpertBatch<'_> = ExpertBatch {
        layer,
        input: &input,
        hidden: spec.hidden,
        experts: &experts,
        weights: &weights,
        top_k: spec.top_k,
        dead: &dead,
    };
    let (mut found, mut expected) = (vec![0.0; input.len()], vec![0.0; input.len()]);
    let late = exchange.run(&batch, &mut found).unwrap();
    assert!(late.is_empty(), "late rows {late:?} in layer {layer}");
    oracle.run(&batch, &mut expected).unwrap();
    for row in (0..rows).filter(|row| !dead[*row]) {
        let at = row * spec.hidden..(row + 1) * spec.hidden;
        let same = found[at.clone()]
            .iter()
            .zip(&expected[at])
            .all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "row {row} of layer {layer} differs");
    }
}

async fn connected(nodes: &[Node]) {
    let all_up = || {
        nodes.iter().all(|node| {
            nodes
                .iter()
                .filter(|peer| peer.rank != node.rank)
                .all(|peer| node.endpoint.fabric().is_up(peer.rank))
        })
    };
    let connect = async {
        while !all_up() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, connect)
        .await
        .expect("connections in time");
}

async fn experts_move_while_calls_run(fabrics: Fabrics) {
    let cluster = Cluster::new(fabrics);
    let mut nodes = Vec::new();
    for rank in 0..WORKERS {
        nodes.push(cluster.node(Rank(rank), 100 + u64::from(rank)).await);
    }
    cluster
        .until("three members", |state| state.members.len() == 3)
        .await;
    let plans: [[&[u32]; 3]; 4] = [
        [&[0, 1, 2], &[3, 4, 5], &[5, 6, 7]],
        [&[3, 6, 7], &[0, 1, 2, 4], &[5, 0, 6]],
        [&[0, 1, 2, 3, 4, 5, 6, 7], &[1, 7], &[2, 6]],
        [&[0, 1, 2], &[3, 4, 5], &[6, 7, 0]],
    ];
    cluster.roll_to(cluster.model.placement(1, &plans[0])).await;
    connected(&nodes).await;
    let drivers: Vec<Driver> = nodes
        .iter()
        .map(|node| Driver::start(&cluster.model, node))
        .collect();
    for (epoch, slots) in (2..).zip(&plans[1..]) {
        for driver in &drivers {
            driver.more(3).await;
        }
        cluster.roll_to(cluster.model.placement(epoch, slots)).await;
    }
    for driver in &drivers {
        driver.more(3).await;
    }
    for driver in drivers {
        let epochs = driver.end();
        assert!(
            epochs.contains(&Epoch(1)) && epochs.contains(&Epoch(4)),
            "{epochs:?}"
        );
    }
    let last = cluster.model.placement(4, &plans[3]);
    for node in &nodes {
        // Released what the earlier placements gave it, once everybody had drained.
        let wanted = last.held_by(node.rank);
        let released = async {
            while node.endpoint.residency().items() != wanted {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(PATIENCE, released).await.expect("release in time");
        assert_eq!(node.metrics.late_rows_total(), 0);
        // Loaded once per new (layer, expert): nothing is fetched twice.
        assert!(node.metrics.experts_loaded_total() >= wanted.len() as u64);
    }
    let from_peers: u64 = nodes
        .iter()
        .map(|node| {
            node.metrics
                .loaded_from(foregate_worker::metrics::Source::Peer)
        })
        .sum();
    assert!(from_peers > 0, "no expert came from a peer");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn experts_move_while_calls_run_over_channels() {
    experts_move_while_calls_run(Fabrics::Local(LocalHub::new())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn experts_move_while_calls_run_over_sockets() {
    experts_move_while_calls_run(Fabrics::Tcp).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_lease_is_taken_anew_and_the_store_may_go_away() {
    let cluster = Cluster::new(Fabrics::Local(LocalHub::new()));
    let mut nodes = Vec::new();
    for rank in 0..WORKERS {
        nodes.push(cluster.node(Rank(rank), 100 + u64::from(rank)).await);
    }
    cluster
        .until("three members", |state| state.members.len() == 3)
        .await;
    let slots: [&[u32]; 3] = [&[0, 1, 2], &[3, 4, 5], &[6, 7]];
    cluster.roll_to(cluster.model.placement(1, &slots)).await;
    let drivers: Vec<Driver> = nodes
        .iter()
        .map(|node| Driver::start(&cluster.model, node))
        .collect();

    cluster.store.interrupt();
    for driver in &drivers {
        driver.more(5).await;
    }
    cluster.store.resume();
    for driver in &drivers {
        driver.more(5).await;
    }
    // The next rollover works as if nothing had been.
    let slots: [&[u32]; 3] = [&[3, 4, 5], &[6, 7], &[0, 1, 2]];
    cluster
        .until("a fresh view", |state| {
            state.connected && state.members.len() == 3
        })
        .await;
    cluster.until_settled().await;
    cluster.roll_to(cluster.model.placement(2, &slots)).await;
    for driver in drivers {
        assert!(driver.end().contains(&Epoch(1)));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_worker_prepares_anew() {
    let cluster = Cluster::new(Fabrics::Local(LocalHub::new()));
    let mut nodes = BTreeMap::new();
    for rank in 0..WORKERS {
        let node = cluster.node(Rank(rank), 100 + u64::from(rank)).await;
        nodes.insert(rank, node);
    }
    cluster
        .until("three members", |state| state.members.len() == 3)
        .await;
    let slots: [&[u32]; 3] = [&[0, 1, 2], &[3, 4, 5], &[6, 7, 0]];
    cluster.roll_to(cluster.model.placement(1, &slots)).await;

    let old = nodes.remove(&2).unwrap();
    old.stop.cancel();
    old.endpoint.close();
    drop(old);
    cluster
        .until("its old life to leave", |state| {
            !state.members.contains_key(&Rank(2))
        })
        .await;
    let new = cluster.node(Rank(2), 999).await;
    cluster
        .until("its new life to serve", |state| {
            let member = state.members.get(&Rank(2));
            let ack = state.acks.get(&Rank(2));
            member.is_some_and(|m| m.incarnation == 999 && m.phase == Phase::Ready)
                && ack.is_some_and(|ack| ack.serving == Epoch(1))
        })
        .await;
    let held = cluster.model.placement(1, &slots).held_by(Rank(2));
    assert_eq!(new.endpoint.residency().items(), held);
    // Expert 0 is resident at a peer, the others came from the checkpoint.
    assert!(held.contains(&(LayerId(0), ExpertId(0))));
    wait_up(&nodes[&0], Rank(2)).await;
    let driver = Driver::start(&cluster.model, &nodes[&0]);
    driver.more(3).await;
    driver.end();
    cluster.stop().await;
}

/// A newcomer with another arithmetic leaves, whatever its rank, and nobody calls it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_that_sums_otherwise_leaves() {
    let cluster = Cluster::new(Fabrics::Local(LocalHub::new()));
    let mut nodes = BTreeMap::new();
    for rank in 0..WORKERS {
        let node = cluster.node(Rank(rank), 100 + u64::from(rank)).await;
        nodes.insert(rank, node);
    }
    cluster
        .until("three members", |state| state.members.len() == 3)
        .await;
    let slots: [&[u32]; 3] = [&[0, 1, 2], &[3, 4, 5], &[6, 7, 0]];
    cluster.roll_to(cluster.model.placement(1, &slots)).await;

    let old = nodes.remove(&0).unwrap();
    old.stop.cancel();
    old.endpoint.close();
    drop(old);
    cluster
        .until("rank 0 to leave", |state| state.members.len() == 2)
        .await;
    for rank in [0, 3] {
        let other = cluster
            .node_that_says(Rank(rank), 200, "amx".to_owned())
            .await;
        let left = timeout(PATIENCE, other.follower).await.unwrap().unwrap();
        let error = left.unwrap_err();
        assert_eq!((error.own.as_str(), error.rank), ("amx", Rank(1)));
        assert!(
            error.to_string().contains("spec.workers.cpuPath"),
            "{error}"
        );
        cluster
            .until("the others to see it", |state| {
                state.members.contains_key(&Rank(rank))
            })
            .await;
        wait_up(&nodes[&1], Rank(2)).await;
        assert!(!nodes[&1].endpoint.fabric().is_up(Rank(rank)));
    }
    assert!(nodes.values().all(|node| !node.follower.is_finished()));
    cluster.stop().await;
}

async fn wait_up(node: &Node, peer: Rank) {
    let up = async {
        while !node.endpoint.fabric().is_up(peer) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, up).await.expect("a connection in time");
}
