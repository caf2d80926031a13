//! `foregate-worker`: one rank of the cluster. Attention for its own sequences, experts for everybody.
//!
//! What goes in: a [`WorkerConfig`](foregate_api::node::WorkerConfig), a store, listeners. What comes out:
//! token streams over gRPC ([`serve`]), expert rows over the exchange ([`exchange`]), experts as data
//! ([`residency`]), load windows and progress in the store ([`membership`]).
//!
//! Invariants:
//! - A sequence's bits do not depend on the number of workers, the placement, the fabric, a migration, or on
//!   what else is in the batch.
//! - A step uses one placement from begin to end; epochs switch between steps only.
//! - A worker holds only experts that a placement gives it, and serves only epochs it holds in full.
//! - The store away stops re-balancing, never serving.
//!
//! Start reading at [`run`], then [`engine`], then [`exchange`].
#![forbid(unsafe_code)]

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::Epoch;
use foregate_api::load::EngineLoad;
use foregate_api::member::{Ack, Member, Phase};
use foregate_api::node::WorkerConfig;
use foregate_store::coord::Coord;
use foregate_store::kv::Store;
use foregate_tls::Keys;
use foregate_wire::serve as grpc;
use prometheus::Registry;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::dense::DenseWeights;
use crate::engine::{EngineHandle, EngineParts, EngineState, StepExperts};
use crate::exchange::lockstep::StandIn;
use crate::exchange::{Endpoint, EndpointParts};
use crate::fabric::Identity;
use crate::fabric::local::LocalHub;
use crate::fabric::nccl::NcclGroups;
use crate::load::{LoadCounters, WindowHeader};
use crate::loading::Loading;
use crate::membership::{CloseWindow, Publisher, PublisherHandle, Wanted};
use crate::metrics::WorkerMetrics;
use crate::residency::follow::{Follower, FollowerParts, Stranger};
use crate::residency::migrate::Loader;
use crate::residency::serve::ExpertsService;
use crate::serve::GenerationService;

pub mod dense;
mod device;
mod drain;
pub mod engine;
pub mod error;
pub mod exchange;
pub mod fabric;
pub mod health;
pub mod kv_cache;
pub mod load;
pub mod loading;
pub mod membership;
pub mod metrics;
pub mod residency;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod serve;
mod start;

pub use device::{Card, Cards};
pub use error::WorkerError;
pub use health::Health;
pub use loading::{Progress, ProgressSink};
pub use start::{cpu, seats};

/// How often the engine's gauges are brought up to date.
const GAUGES: Duration = Duration::from_millis(250);
/// How long open gRPC calls may take after the engine has ended.
const RPC_GRACE: Duration = Duration::from_secs(5);

/// What a worker is given.
pub struct Deps {
    /// Name of the cluster.
    pub cluster: String,
    /// Settings.
    pub config: WorkerConfig,
    /// What this worker and who calls it prove themselves with; without them everybody is believed.
    pub keys: Option<Keys>,
    /// The store.
    pub store: Arc<dyn Store>,
    /// The hub of this process; needed by the local fabric only.
    pub local_hub: Option<Arc<LocalHub>>,
    /// The dense weights of this process.
    pub dense: Arc<DenseWeights>,
    /// The cards that a worker may be told to compute on.
    pub cards: Cards,
    /// Bound listener of the gRPC services.
    pub rpc_listener: tokio::net::TcpListener,
    /// Bound listener of the exchange; needed by the TCP fabric only.
    pub exchange_listener: Option<TcpListener>,
    /// Receives the worker's metrics; one per worker.
    pub registry: Registry,
    /// Told how far the start has come.
    pub progress: ProgressSink,
    /// Answers `/healthz` and `/readyz`.
    pub health: Health,
    /// Begins the drain.
    pub shutdown: CancellationToken,
}

impl std::fmt::Debug for Deps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deps")
            .field("cluster", &self.cluster)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Runs one worker until `shutdown`, then drains: takes nothing new, finishes running sequences up to
/// a deadline, keeps its experts available to peers that still call, leaves the store.
///
/// # Errors
/// When the configuration, the model or a socket cannot be used, or when the engine dies.
pub async fn run(deps: Deps) -> Result<(), WorkerError> {
    start::check(&deps.config)?;
    let rpc = local_address(&deps.rpc_listener)?;
    let metrics = Arc::new(WorkerMetrics::register(
        &deps.registry,
        &deps.config.served_name,
    )?);
    let loading = Loading::new(Arc::clone(&deps.progress), Arc::clone(&metrics));
    let loaded = tokio::select! {
        loaded = start::load(&deps.config, Arc::clone(&deps.dense), deps.cards.clone(), loading.clone()) => loaded?,
        () = deps.shutdown.cancelled() => return Ok(()),
    };
    let health = deps.health.clone();
    let shutdown = deps.shutdown.clone();
    let worker = Worker::start(deps, loaded, loading, metrics, rpc)?;
    health.started(worker.health());
    worker.until(shutdown).await
}

/// A worker that runs.
struct Worker {
    endpoint: Endpoint,
    /// None in a worker that holds experts only.
    engine: Option<EngineHandle>,
    wanted: tokio::sync::watch::Sender<Wanted>,
    rpc: JoinHandle<Result<(), foregate_wire::tonic::transport::Error>>,
    stop_rpc: CancellationToken,
    follower: JoinHandle<Result<(), Stranger>>,
    gauges: JoinHandle<()>,
    stop_follower: CancellationToken,
    publisher: JoinHandle<()>,
    stop_publisher: CancellationToken,
    /// Steps with the others where rows travel in lock-step, also when the engine has ended.
    stand_in: Option<StandIn>,
}

impl Worker {
    fn start(
        deps: Deps,
        loaded: start::Loaded,
        loading: Loading,
        metrics: Arc<WorkerMetrics>,
        rpc: String,
    ) -> Result<Self, WorkerError> {
        let Deps {
            cluster,
            config,
            keys,
            store,
            local_hub,
            dense: _,
            cards: _,
            rpc_listener,
            exchange_listener,
            registry: _,
            progress: _,
            health: _,
            shutdown: _,
        } = deps;
        let spec = Arc::new(loaded.checkpoint.spec().clone());
        let me = Identity {
            cluster: cluster.clone(),
            rank: config.rank,
            incarnation: incarnation(),
        };
        let load = Arc::new(LoadCounters::new(spec.moe_layers(), spec.experts));
        let endpoint = Endpoint::open(EndpointParts {
            me: me.clone(),
            spec: Arc::clone(&spec),
            ops: loaded.device.ops(),
            callee_ops: loaded.device.callee_ops(),
            way: start::way(&config, local_hub, exchange_listener, keys.clone())?,
            load: Arc::clone(&load),
            metrics: Arc::clone(&metrics),
            deadline: Duration::from_millis(config.exchange_deadline_ms),
        })
        .map_err(io("opening the exchange"))?;
        let member = Member {
            rank: me.rank,
            incarnation: me.incarnation,
            rpc,
            exchange: endpoint.fabric().address(),
            domain: config.domain.clone(),
            slots: config.slots,
            phase: Phase::Joining,
            model: spec.as_ref().clone(),
            cpu_path: loaded.device.path(),
            kv_pages: loaded.attention.as_ref().map_or(0, |attention| {
                u32::try_from(attention.shape.pages).unwrap_or(u32::MAX)
            }),
            page_tokens: config.page_tokens,
        };
        let coord = Coord::new(store, &cluster);
        let (experts, stand_in): (Box<dyn StepExperts>, _) = match loaded.comms {
            None => (Box::new(endpoint.exchange()), None),
            Some(comms) => {
                let groups = NcclGroups::new(me.rank, coord.clone(), comms, Handle::current());
                let lock_step = endpoint
                    .lock_step(Arc::new(groups), loaded.device.callee_ops())
                    .map_err(io("starting the thread that steps with others"))?;
                let stand_in = lock_step.stand_in();
                (Box::new(lock_step), Some(stand_in))
            }
        };
        let start = |attention: start::Attention| {
            engine::start(EngineParts {
                model: attention.model,
                kv: attention.kv,
                experts,
                config: config.clone(),
                load: Arc::clone(&load),
            })
        };
        let engine = loaded.attention.map(start).transpose();
        let engine = engine.map_err(io("starting the engine's thread"))?;

        let stop_follower = CancellationToken::new();
        let window = CloseWindow::from(window_closer(
            &config,
            Arc::clone(&load),
            engine.clone(),
            Arc::clone(endpoint.gate()),
            Arc::clone(&metrics),
        ));
        let (publisher, handle) = Publisher::new(
            coord.clone(),
            Wanted {
                member,
                ack: NOTHING,
            },
            Duration::from_millis(config.window_ms),
            window,
        );
        let PublisherHandle { wanted, published } = handle;
        let loader = Loader::new(
            Arc::clone(&spec),
            Arc::clone(&loaded.checkpoint),
            Arc::clone(&metrics),
            Arc::clone(loaded.device.cpu()),
            loaded.device.executor(),
            keys.clone(),
        );
        let follower = Follower::new(FollowerParts {
            rank: me.rank,
            cluster: coord.watch_cluster(stop_follower.clone()),
            residency: Arc::clone(endpoint.residency()),
            gate: Arc::clone(endpoint.gate()),
            fabric: Arc::clone(endpoint.fabric()),
            loader: Arc::new(loader),
            publisher: PublisherHandle {
                wanted: wanted.clone(),
                published,
            },
            metrics: Arc::clone(&metrics),
            progress: {
                let (dense, expert) = (loaded.dense_bytes, spec.expert_bytes() as u64);
                Box::new(move |here, wanted| {
                    loading.tell(dense + here as u64 * expert, dense + wanted as u64 * expert);
                })
            },
        });
        let generation = engine
            .clone()
            .map(|it| GenerationService::new(it).into_server());
        let router = grpc::server()
            .add_service(ExpertsService::server(Arc::clone(endpoint.residency())))
            .add_optional_service(generation);
        let (stop_rpc, stop_publisher) = (CancellationToken::new(), CancellationToken::new());
        Ok(Self {
            rpc: spawn(grpc::serve(router, rpc_listener, keys, stop_rpc.clone())),
            follower: spawn(follower.run(stop_follower.clone())),
            gauges: spawn(gauges(metrics, engine.clone(), stop_follower.clone())),
            publisher: spawn(publisher.run(stop_publisher.clone())),
            endpoint,
            engine,
            wanted,
            stop_rpc,
            stop_follower,
            stop_publisher,
            stand_in,
        })
    }

    fn health(&self) -> health::Parts {
        health::Parts {
            engine: self.engine.clone(),
            server: Arc::clone(self.endpoint.server()),
            wanted: self.wanted.subscribe(),
        }
    }

    async fn until(mut self, shutdown: CancellationToken) -> Result<(), WorkerError> {
        let ended = tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            () = engine_ended(self.engine.as_ref()) => Ok(()),
            broke = &mut self.rpc => match broke {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(error.into()),
                Err(error) => Err(error.into()),
            },
            // Peers would wait for it in vain; the engine alone does not notice.
            () = self.endpoint.server().ended() => Err(WorkerError::ExpertsDied),
            died = &mut self.follower => match died {
                Ok(left) => left.map_err(WorkerError::from),
                Err(error) => Err(error.into()),
            },
            died = &mut self.publisher => died.map_err(WorkerError::from),
        };
        self.wanted
            .send_modify(|wanted| wanted.member.phase = Phase::Draining);
        let state = self
            .engine
            .as_ref()
            .map_or(EngineState::Running, EngineHandle::state);
        if state == EngineState::Running {
            drain::drain(self.engine.as_ref(), &self.endpoint).await;
        }
        self.leave().await;
        match state {
            EngineState::Failed(what) => Err(WorkerError::EngineDied(what)),
            EngineState::Running | EngineState::Stopped => ended,
        }
    }

    /// Stops everything, the store's entries before the sockets: who still looks finds nobody.
    async fn leave(self) {
        self.stop_follower.cancel();
        self.stop_publisher.cancel();
        end("publisher", self.publisher).await;
        end("follower", self.follower).await;
        end("gauges", self.gauges).await;
        self.stop_rpc.cancel();
        end("rpc", self.rpc).await;
        let (endpoint, stand_in) = (self.endpoint, self.stand_in);
        let close = move || {
            if let Some(stand_in) = &stand_in {
                stand_in.close();
            }
            drop(stand_in);
            endpoint.close();
        };
        // Joins threads: not on a runtime thread.
        if let Err(error) = tokio::task::spawn_blocking(close).await {
            tracing::error!(%error, "exchange_close_failed");
        }
    }
}

/// Until the engine's thread is over; for ever where there is none.
async fn engine_ended(engine: Option<&EngineHandle>) {
    let Some(engine) = engine else {
        return std::future::pending().await;
    };
    let mut state = engine.watch();
    // An engine whose state nobody can change any more is over as well.
    let _over = state.wait_for(|state| *state != EngineState::Running).await;
}

/// No progress at all: the state of a new worker.
const NOTHING: Ack = Ack {
    prepared: Epoch(0),
    serving: Epoch(0),
    drained: Epoch(0),
};

#[expect(
    clippy::disallowed_methods,
    reason = "each task is kept in `Worker` and joined in `leave`"
)]
fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(task)
}

/// Waits for a task that was told to end; cuts it off after a grace. One that has been joined is skipped.
async fn end<T>(name: &'static str, mut task: JoinHandle<T>) {
    if task.is_finished() {
        return;
    }
    if tokio::time::timeout(RPC_GRACE, &mut task).await.is_err() {
        tracing::warn!(name, "task_cut_off");
        task.abort();
    }
}

/// Closes one load window after the other.
fn window_closer(
    config: &WorkerConfig,
    load: Arc<LoadCounters>,
    engine: Option<EngineHandle>,
    gate: Arc<residency::EpochGate>,
    metrics: Arc<WorkerMetrics>,
) -> CloseWindow {
    let rank = config.rank;
    Box::new(move |sequence, span| {
        load.drain(WindowHeader {
            rank,
            epoch: gate.view().serving,
            sequence,
            span_ms: u64::try_from(span.as_millis()).unwrap_or(u64::MAX),
            engine: engine_load(engine.as_ref(), &metrics),
        })
    })
}

/// The engine's own figures with those that residency and exchange know.
fn engine_load(engine: Option<&EngineHandle>, metrics: &WorkerMetrics) -> EngineLoad {
    EngineLoad {
        experts_loaded: metrics.experts_loaded_total(),
        switch_stall_us: metrics.last_stall_us(),
        late_rows: metrics.late_rows_total(),
        ..engine.map(EngineHandle::load).unwrap_or_default()
    }
}

async fn gauges(
    metrics: Arc<WorkerMetrics>,
    engine: Option<EngineHandle>,
    shutdown: CancellationToken,
) {
    let Some(engine) = engine else { return };
    let mut ticks = tokio::time::interval(GAUGES);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {
                metrics.engine(&engine.load());
                metrics.decoded(&engine.decoded());
            }
        }
    }
}

/// A number for this start of the process, from the system's randomness.
fn incarnation() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn local_address(listener: &tokio::net::TcpListener) -> Result<String, WorkerError> {
    let address = listener.local_addr().map_err(io("rpc_listen"))?;
    start::reachable("rpc_listen", address)
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> WorkerError {
    move |source| WorkerError::Io { what, source }
}
