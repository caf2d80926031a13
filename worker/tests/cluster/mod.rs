//! Whole workers in this process, over the memory store; the test is their operator.
#![allow(unreachable_pub, reason = "a module of a test target")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use foregate_api::cpu::{CpuPath, Pinning, Seat};
use foregate_api::ids::{Epoch, ExpertId, Rank};
use foregate_api::model::ModelSpec;
use foregate_api::node::{Device, FabricKind, WorkerConfig};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_api::tls::TlsRole;
use foregate_api::weights::WeightSettings;
use foregate_store::coord::{ClusterState, Coord};
use foregate_store::kv::Store;
use foregate_store::memory::MemoryStore;
use foregate_wire::connect::channel;
use foregate_wire::generation::GenerateRequest;
use foregate_wire::generation::generation_client::GenerationClient;
use foregate_wire::tonic::transport::Channel;
use foregate_worker::dense::DenseWeights;
use foregate_worker::fabric::local::LocalHub;
use foregate_worker::{Cards, Deps, Health, Progress, WorkerError};
use prometheus::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::desk::Desk;
use crate::random::Random;
use crate::rig::{Answer, Gather};

/// Longest any single wait may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What differs between two clusters that must give the same bits.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    pub workers: u32,
    pub fabric: FabricKind,
    pub threads: u32,
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    pub page_tokens: u32,
    pub kv_bytes: u64,
    /// Slots per layer beyond those that hold each expert once, on each worker.
    pub spare_slots: u32,
    pub weights: WeightSettings,
    /// Whether all prove themselves to each other.
    pub proven: bool,
    /// Whether each computes on a card of its own.
    pub cards: bool,
}

pub struct Cluster {
    spec: ModelSpec,
    coord: Coord,
    state: watch::Receiver<Arc<ClusterState>>,
    workers: JoinSet<Result<(), WorkerError>>,
    clients: BTreeMap<Rank, GenerationClient<Channel>>,
    /// What each worker told of its start.
    told: Vec<Arc<Mutex<Vec<Progress>>>>,
    shutdown: CancellationToken,
    slots: u32,
    epoch: Epoch,
    /// Whose files the keys are.
    desk: Option<Desk>,
}

impl Cluster {
    /// Starts workers over a model directory and waits until all are registered.
    pub async fn start(dir: &Path, spec: &ModelSpec, form: Form, cards: &Cards) -> Self {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let coord = Coord::new(Arc::clone(&store), "test");
        let shutdown = CancellationToken::new();
        let hub = LocalHub::new();
        let dense = DenseWeights::new();
        let slots = (spec.experts as u32).div_ceil(form.workers) + form.spare_slots;
        let mut cluster = Self {
            spec: spec.clone(),
            state: coord.watch_cluster(shutdown.clone()),
            coord,
            workers: JoinSet::new(),
            clients: BTreeMap::new(),
            told: Vec::new(),
            shutdown,
            slots,
            epoch: Epoch(0),
            desk: None,
        };
        let desk = form.proven.then(Desk::new);
        let keys = |role| desk.as_ref().map(|desk| desk.keys(role));
        let (gateway, worker) = (keys(TlsRole::Gateway), keys(TlsRole::Worker));
        for rank in (0..form.workers).map(Rank) {
            let rpc_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = rpc_listener.local_addr().unwrap().to_string();
            let client = GenerationClient::new(channel(&address, gateway.as_ref()).unwrap());
            cluster.clients.insert(rank, client);
            let told = Arc::<Mutex<Vec<Progress>>>::default();
            cluster.told.push(Arc::clone(&told));
            let deps = Deps {
                cluster: "test".to_owned(),
                config: config(dir, rank, slots, form),
                keys: worker.clone(),
                store: Arc::clone(&store),
                local_hub: Some(Arc::clone(&hub)),
                dense: Arc::clone(&dense),
                cards: cards.clone(),
                rpc_listener,
                exchange_listener: Some(std::net::TcpListener::bind("127.0.0.1:0").unwrap()),
                registry: Registry::new(),
                progress: Arc::new(move |now| told.lock().unwrap().push(now)),
                health: Health::new(),
                shutdown: cluster.shutdown.child_token(),
            };
            cluster.workers.spawn(foregate_worker::run(deps));
        }
        cluster.desk = desk;
        let all = form.workers as usize;
        cluster
            .until("all registered", move |state| state.members.len() == all)
            .await;
        cluster
    }

    /// Moves the cluster to another random placement, as the operator does: propose, wait until every
    /// worker has prepared, activate, wait until every worker serves it.
    pub async fn move_to_random(&mut self, random: &mut Random) {
        let plan = self.draw(random);
        let (epoch, ranks) = (plan.epoch, plan.ranks.clone());
        let state = Arc::clone(&self.state.borrow());
        let seen = state.target.as_ref().map(|(_, revision)| *revision);
        assert!(self.coord.propose(&plan, seen).await.unwrap());
        let acked =
            move |state: &ClusterState, reached: fn(&foregate_api::member::Ack) -> Epoch| {
                ranks.iter().all(|rank| {
                    state
                        .acks
                        .get(rank)
                        .is_some_and(|ack| reached(ack) >= epoch)
                })
            };
        self.until("prepared", |state| acked(state, |ack| ack.prepared))
            .await;
        let state = Arc::clone(&self.state.borrow());
        let seen = state.active.as_ref().map(|(_, revision)| *revision);
        assert!(self.coord.activate(&plan, seen).await.unwrap());
        self.until("serving", |state| acked(state, |ack| ack.serving))
            .await;
        self.epoch = epoch;
    }

    /// Every expert somewhere, copies in the slots that are left.
    fn draw(&self, random: &mut Random) -> Placement {
        let ranks: Vec<Rank> = self.clients.keys().copied().collect();
        let layers = (0..self.spec.moe_layers())
            .map(|_| {
                let mut experts: Vec<ExpertId> =
                    (0..self.spec.experts as u32).map(ExpertId).collect();
                random.shuffle(&mut experts);
                let mut slots = vec![Vec::new(); ranks.len()];
                for (at, expert) in experts.iter().enumerate() {
                    slots[at % ranks.len()].push(*expert);
                }
                for held in &mut slots {
                    random.shuffle(&mut experts);
                    for expert in &experts {
                        if held.len() < self.slots as usize && !held.contains(expert) {
                            held.push(*expert);
                        }
                    }
                }
                LayerPlacement::from_slots(&ranks, slots, self.spec.experts)
            })
            .collect();
        Placement {
            epoch: self.epoch.next(),
            parent: self.epoch,
            reason: Reason::Move,
            ranks,
            layers,
            balance_before: 1.0,
            balance_after: 1.0,
        }
    }

    /// Sends a request to a worker and reads its stream to the end.
    pub fn ask(
        &self,
        rank: Rank,
        request: GenerateRequest,
    ) -> impl Future<Output = Answer> + use<> {
        let mut client = self.clients[&rank]
            .clone()
            .max_decoding_message_size(64 << 20);
        async move {
            let mut stream = client.generate(request).await.unwrap().into_inner();
            let mut gather = Gather::default();
            while let Some(event) = timeout(PATIENCE, stream.message()).await.unwrap().unwrap()
            {
                gather.add(event.event.unwrap());
            }
            gather.end()
        }
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&ClusterState) -> bool) {
        let reached = timeout(PATIENCE, self.state.wait_for(|state| holds(state))).await;
        assert!(
            matches!(reached, Ok(Ok(_))),
            "never: {what}; {:?}",
            self.workers.try_join_next()
        );
    }

    /// Drains all workers.
    pub async fn stop(mut self) {
        for told in &self.told {
            all_loaded(&told.lock().unwrap());
        }
        self.shutdown.cancel();
        while let Some(end) = timeout(PATIENCE, self.workers.join_next()).await.unwrap() {
            end.unwrap().unwrap();
        }
    }
}

/// Bytes only grow, dense weights before experts, until all are here.
fn all_loaded(told: &[Progress]) {
    assert!(told.is_sorted_by_key(|progress| progress.done), "{told:?}");
    assert!(
        told.iter().all(|progress| progress.done <= progress.total),
        "{told:?}"
    );
    let last = told.last().unwrap();
    assert!(last.done == last.total && told[0].done == 0, "{told:?}");
}

/// Settings of a worker.
pub fn config(dir: &Path, rank: Rank, slots: u32, form: Form) -> WorkerConfig {
    WorkerConfig {
        rank,
        model_dir: dir.to_str().unwrap().to_owned(),
        weights: form.weights,
        served_name: "tiny".to_owned(),
        rpc_listen: String::new(),
        exchange_listen: String::new(),
        fabric: form.fabric,
        duty: foregate_api::member::Duty::Both,
        slots,
        device: match form.cards {
            true => Device::Cuda { card: rank.0 },
            false => Device::Cpu,
        },
        threads: form.threads,
        cpu_path: CpuPath::Auto,
        pinning: Pinning::None,
        seat: Seat::ALONE,
        max_num_seqs: form.max_num_seqs,
        max_num_batched_tokens: form.max_num_batched_tokens,
        max_waiting: 64,
        // Only sequences with a hint are overtaken or overtake.
        overtake_ms: 2_000,
        max_model_len: 256,
        page_tokens: form.page_tokens,
        kv_bytes: form.kv_bytes,
        exchange_deadline_ms: 5_000,
        domain: String::new(),
        window_ms: 500,
    }
}
