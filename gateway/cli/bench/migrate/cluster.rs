//! Workers in this process over the memory store, with the bench as their operator.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::cpu::{CpuPath, Pinning, Seat};
use foregate_api::ids::{Epoch, ExpertId, Rank};
use foregate_api::member::Ack;
use foregate_api::model::ModelSpec;
use foregate_api::node::{FabricKind, WorkerConfig};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_api::weights::WeightSettings;
use foregate_checkpoint::Checkpoint;
use foregate_store::coord::{ClusterState, Coord};
use foregate_store::kv::Store;
use foregate_store::memory::MemoryStore;
use foregate_wire::connect::channel;
use foregate_wire::generation::generation_client::GenerationClient;
use foregate_wire::tonic::transport::Channel;
use foregate_worker::dense::DenseWeights;
use foregate_worker::fabric::local::LocalHub;
use foregate_worker::{Deps, Health, WorkerError};
use prometheus::Registry;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::gaps::Migration;
use crate::error::CliError;
use crate::status;

const NAME: &str = "bench";
/// Longest wait for the workers to follow.
const PATIENCE: Duration = Duration::from_secs(120);
const PAGE_TOKENS: u32 = 16;

/// Sizes of the cluster and of its load.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) workers: u32,
    pub(super) threads: u32,
    pub(super) streams: u32,
    /// Of a sequence.
    pub(super) tokens: u32,
    /// Experts that a rank takes over per layer and migration.
    pub(super) moves: u32,
}

/// Running workers.
pub(super) struct Cluster {
    spec: ModelSpec,
    shape: Shape,
    ranks: Vec<Rank>,
    coord: Coord,
    state: watch::Receiver<Arc<ClusterState>>,
    workers: JoinSet<Result<(), WorkerError>>,
    clients: Vec<GenerationClient<Channel>>,
    registries: Vec<Registry>,
    epoch: Epoch,
    shutdown: CancellationToken,
}

impl Cluster {
    /// Starts the workers and waits until all are registered; none serves yet.
    pub(super) async fn start(dir: &Path, shape: Shape) -> Result<Self, CliError> {
        let path = dir.display().to_string();
        let checkpoint =
            Checkpoint::open(dir).map_err(|error| CliError::runtime(&path, &error))?;
        let spec = checkpoint.spec().clone();
        if spec.max_positions < shape.tokens as usize {
            return Err(CliError::Usage(format!(
                "--max-tokens: with the prompt a sequence has {} tokens, the model has {} positions",
                shape.tokens, spec.max_positions
            )));
        }
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let coord = Coord::new(Arc::clone(&store), NAME);
        let shutdown = CancellationToken::new();
        let mut cluster = Self {
            ranks: (0..shape.workers).map(Rank).collect(),
            state: coord.watch_cluster(shutdown.clone()),
            coord,
            workers: JoinSet::new(),
            clients: Vec::new(),
            registries: Vec::new(),
            epoch: Epoch(0),
            shutdown,
            spec,
            shape,
        };
        let hub = LocalHub::new();
        let dense = DenseWeights::new();
        for rank in cluster.ranks.clone() {
            let deps = cluster.worker(&path, rank, &store, (&hub, &dense)).await?;
            cluster.workers.spawn(foregate_worker::run(deps));
        }
        let all = cluster.ranks.len();
        cluster
            .until("all workers are registered", |state| {
                state.members.len() == all
            })
            .await?;
        Ok(cluster)
    }

    async fn worker(
        &mut self,
        path: &str,
        rank: Rank,
        store: &Arc<dyn Store>,
        (hub, dense): (&Arc<LocalHub>, &Arc<DenseWeights>),
    ) -> Result<Deps, CliError> {
        let (rpc_listener, address) = status::bind("127.0.0.1:0")
            .await
            .map_err(|error| CliError::Runtime(error.to_string()))?;
        let channel = channel(&address.to_string(), None)
            .map_err(|error| CliError::runtime("a worker's address", &error))?;
        self.clients.push(GenerationClient::new(channel));
        let registry = Registry::new();
        self.registries.push(registry.clone());
        Ok(Deps {
            cluster: NAME.to_owned(),
            config: config(path, rank, &self.spec, self.shape),
            keys: None,
            store: Arc::clone(store),
            local_hub: Some(Arc::clone(hub)),
            dense: Arc::clone(dense),
            cards: foregate_worker::Cards::none(),
            rpc_listener,
            exchange_listener: None,
            registry,
            progress: Arc::new(|_| {}),
            health: Health::new(),
            shutdown: self.shutdown.clone(),
        })
    }

    /// Clients of the workers, by rank.
    pub(super) fn clients(&self) -> &[GenerationClient<Channel>] {
        &self.clients
    }

    /// Tokens of the vocabulary.
    pub(super) const fn vocab(&self) -> usize {
        self.spec.vocab
    }

    /// Copies that one migration loads, over all ranks and layers.
    pub(super) fn copies_moved(&self) -> usize {
        let plan = |epoch| self.placement(Epoch(epoch));
        let (old, new) = (plan(1), plan(2));
        old.layers
            .iter()
            .zip(&new.layers)
            .flat_map(|(old, new)| old.slots.iter().zip(&new.slots))
            .map(|(old, new)| new.iter().filter(|expert| !old.contains(expert)).count())
            .sum()
    }

    /// A counter's sum over all workers and labels.
    pub(super) fn count(&self, name: &str) -> u64 {
        let families = self.registries.iter().flat_map(Registry::gather);
        families
            .filter(|family| family.name() == name)
            .flat_map(|family| family.get_metric().to_vec())
            .map(|metric| metric.get_counter().get_value() as u64)
            .sum()
    }

    /// Brings the next placement into force, as the operator does, and tells when.
    pub(super) async fn migrate(&mut self) -> Result<Migration, CliError> {
        self.epoch = self.epoch.next();
        let plan = self.placement(self.epoch);
        let epoch = self.epoch;
        let failed = |error| CliError::runtime("the store", &error);
        let refused = || CliError::Runtime("the store refused a placement".to_owned());
        let acked = |state: &ClusterState, reached: fn(&Ack) -> Epoch| {
            let acks = plan.ranks.iter().map(|rank| state.acks.get(rank));
            acks.into_iter()
                .all(|ack| ack.is_some_and(|ack| reached(ack) >= epoch))
        };
        let proposed = Instant::now();
        let seen = self.state.borrow().target.as_ref().map(|found| found.1);
        if !self.coord.propose(&plan, seen).await.map_err(failed)? {
            return Err(refused());
        }
        self.until("a placement is prepared", |state| {
            acked(state, |ack| ack.prepared)
        })
        .await?;
        let activated = Instant::now();
        let seen = self.state.borrow().active.as_ref().map(|found| found.1);
        if !self.coord.activate(&plan, seen).await.map_err(failed)? {
            return Err(refused());
        }
        let before = Epoch(epoch.0 - 1);
        self.until(
            "a placement is in use and the one before drained",
            |state| {
                acked(state, |ack| ack.serving)
                    && state.acks.values().all(|ack| ack.drained >= before)
            },
        )
        .await?;
        Ok(Migration {
            proposed,
            activated,
            settled: Instant::now(),
        })
    }

    /// Expert `e` lives on rank `e mod ranks`; the first few of each rank go one rank on with every epoch.
    fn placement(&self, epoch: Epoch) -> Placement {
        let ranks = self.ranks.len();
        let at = |expert: usize| {
            let moves = expert / ranks < self.shape.moves as usize;
            let on = if moves { epoch.0 as usize } else { 0 };
            (expert + on) % ranks
        };
        let layer = || {
            let mut slots = vec![Vec::new(); ranks];
            for (expert, id) in (0..self.spec.experts).zip(0_u32..) {
                slots[at(expert)].push(ExpertId(id));
            }
            LayerPlacement::from_slots(&self.ranks, slots, self.spec.experts)
        };
        Placement {
            epoch,
            parent: Epoch(epoch.0.saturating_sub(1)),
            reason: Reason::Move,
            ranks: self.ranks.clone(),
            layers: (0..self.spec.moe_layers()).map(|_| layer()).collect(),
            balance_before: 1.0,
            balance_after: 1.0,
        }
    }

    async fn until(
        &mut self,
        what: &str,
        holds: impl Fn(&ClusterState) -> bool,
    ) -> Result<(), CliError> {
        let reached = timeout(PATIENCE, self.state.wait_for(|state| holds(state))).await;
        if matches!(reached, Ok(Ok(_))) {
            return Ok(());
        }
        let seconds = PATIENCE.as_secs();
        Err(match self.workers.try_join_next() {
            Some(Ok(Err(error))) => CliError::runtime("a worker", &error),
            _ => CliError::Runtime(format!("not after {seconds} s: {what}")),
        })
    }

    /// Drains all workers.
    pub(super) async fn stop(mut self) -> Result<(), CliError> {
        self.shutdown.cancel();
        while let Some(end) = self.workers.join_next().await {
            end.map_err(|error| CliError::runtime("a worker", &error))?
                .map_err(|error| CliError::runtime("a worker", &error))?;
        }
        Ok(())
    }
}

fn config(path: &str, rank: Rank, spec: &ModelSpec, shape: Shape) -> WorkerConfig {
    let pages = shape.tokens.div_ceil(PAGE_TOKENS) + 1;
    let tokens = u64::from(pages * PAGE_TOKENS) * u64::from(shape.streams);
    let experts = u32::try_from(spec.experts).unwrap_or(u32::MAX);
    WorkerConfig {
        rank,
        model_dir: path.to_owned(),
        weights: WeightSettings::default(),
        served_name: NAME.to_owned(),
        rpc_listen: String::new(),
        exchange_listen: String::new(),
        fabric: FabricKind::Local,
        duty: foregate_api::member::Duty::Both,
        slots: experts.div_ceil(shape.workers).saturating_add(shape.moves),
        device: foregate_api::node::Device::Cpu,
        threads: shape.threads,
        cpu_path: CpuPath::Auto,
        pinning: Pinning::None,
        seat: Seat::ALONE,
        max_num_seqs: shape.streams,
        max_num_batched_tokens: 512.max(shape.streams),
        max_waiting: shape.streams,
        overtake_ms: 0,
        max_model_len: shape.tokens,
        page_tokens: PAGE_TOKENS,
        kv_bytes: tokens * spec.kv_bytes_per_token() as u64,
        exchange_deadline_ms: 2000,
        domain: String::new(),
        window_ms: 1000,
    }
}
