//! One worker of the bench's cluster: the dense model, its part of the experts, its end of the exchange.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::cpu::{self, Pinning};
use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::model::ModelSpec;
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_kernels::{Cpu, Seats};
use foregate_models::{ExpertWeights, Model};
use foregate_worker::exchange::{Endpoint, EndpointParts, Way};
use foregate_worker::fabric::{Identity, PeerAddress};
use foregate_worker::load::LoadCounters;
use foregate_worker::metrics::WorkerMetrics;
use foregate_worker::residency::Routing;
use prometheus::Registry;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::rig::{Load, Running, drive, start_engine};
use super::shares::Share;
use super::steps::{Kept, Ledger};
use crate::error::CliError;

/// Time after which rows are late: so long that a machine which does something else loses none.
const DEADLINE: Duration = Duration::from_secs(20);
/// Longest wait for connections to the peers.
const PATIENCE: Duration = Duration::from_secs(60);
/// The only placement.
const EPOCH: Epoch = Epoch(1);

/// Which worker of how many, and how it computes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seat {
    pub(super) rank: Rank,
    pub(super) workers: u32,
    pub(super) threads: u32,
}

impl Seat {
    /// The processors of its threads.
    pub(super) fn bind(self, pinning: Pinning) -> Result<Seats, CliError> {
        let seat = cpu::Seat {
            index: self.rank.0,
            of: self.workers,
        };
        foregate_worker::seats(pinning, seat, self.threads)
            .map_err(|error| CliError::Usage(format!("--pinning: {error}")))
    }
}

/// What a worker measured in one turn.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Turn {
    /// Until all its sequences had their first token.
    pub(super) prefill_ms: f64,
    /// Steps that decoded all its sequences.
    pub(super) step_ms: Vec<f64>,
    /// Rows that came late, of the engine's whole life.
    pub(super) late_rows: u64,
}

/// A worker without its store, its gRPC and its operator.
pub(super) struct Node {
    seat: Seat,
    model: Model,
    endpoint: Endpoint,
    job: Option<Job>,
}

/// An engine for one load.
struct Job {
    share: Share,
    load: Load,
    engine: Running,
    ledger: Ledger,
}

impl Node {
    /// A worker that computes `model` with `cpu`; its experts come from `expert`.
    pub(super) fn open(
        model: Model,
        cpu: Arc<Cpu>,
        seat: Seat,
        way: Way,
        expert: impl Fn(LayerId, ExpertId) -> Result<Arc<ExpertWeights>, CliError>,
    ) -> Result<Self, CliError> {
        let failed = |error: &dyn Error| CliError::runtime("a worker", &error);
        let spec = Arc::new(model.spec().clone());
        let metrics = WorkerMetrics::register(&Registry::new(), "bench");
        let endpoint = Endpoint::open(EndpointParts {
            me: Identity {
                cluster: "bench".to_owned(),
                rank: seat.rank,
                incarnation: 1,
            },
            spec: Arc::clone(&spec),
            ops: Arc::<Cpu>::clone(&cpu),
            callee_ops: cpu,
            way,
            load: Arc::new(LoadCounters::new(spec.moe_layers(), spec.experts)),
            metrics: Arc::new(metrics.map_err(|error| failed(&error))?),
            deadline: DEADLINE,
        })
        .map_err(|error| failed(&error))?;
        let plan = Arc::new(placement(&spec, seat.workers));
        for item in plan.held_by(seat.rank) {
            let weights = expert(item.0, item.1)?;
            endpoint.residency().insert([(item, weights)]);
        }
        let routing = Routing::new(plan).map_err(|error| failed(&error))?;
        endpoint.gate().set_accept(BTreeSet::from([EPOCH]));
        endpoint.gate().switch(Arc::new(routing));
        Ok(Self {
            seat,
            model,
            endpoint,
            job: None,
        })
    }

    /// Where peers reach it.
    pub(super) fn address(&self) -> String {
        self.endpoint.fabric().address()
    }

    /// Tells where all workers are, by rank, and waits until it reaches them.
    pub(super) async fn join(&self, addresses: &[String]) -> Result<(), CliError> {
        let peers: BTreeMap<Rank, PeerAddress> = (0..)
            .map(Rank)
            .zip(addresses)
            .filter(|(rank, _)| *rank != self.seat.rank)
            .map(|(rank, exchange)| {
                let exchange = exchange.clone();
                (
                    rank,
                    PeerAddress {
                        exchange,
                        incarnation: 1,
                    },
                )
            })
            .collect();
        self.endpoint.set_peers(&peers);
        let since = Instant::now();
        let fabric = self.endpoint.fabric();
        while !peers.keys().all(|rank| fabric.is_up(*rank)) {
            if since.elapsed() > PATIENCE {
                return Err(CliError::Runtime(format!(
                    "worker {} does not reach its peers",
                    self.seat.rank
                )));
            }
            sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Starts an engine for its share of a load, if it has one.
    pub(super) fn prepare(&mut self, whole: Load) -> Result<(), CliError> {
        let share = Share {
            whole,
            workers: self.seat.workers,
            rank: self.seat.rank.0,
        };
        let load = share.load();
        if load.sequences == 0 {
            return Ok(());
        }
        let ledger = Ledger::default();
        let experts = Kept::new(self.endpoint.exchange(), &ledger);
        self.job = Some(Job {
            share,
            load,
            engine: start_engine(&load, true, &self.model, experts)?,
            ledger,
        });
        Ok(())
    }

    /// Runs its share once.
    pub(super) async fn go(&mut self, turn: u32) -> Result<Turn, CliError> {
        let Some(job) = &self.job else {
            return Ok(Turn::default());
        };
        let vocab = self.model.spec().vocab;
        let requests = job.share.numbers();
        let requests = requests.map(|number| job.share.whole.request(turn, number, vocab));
        let prefilled = drive(&job.engine, requests.collect()).await?;
        let steps = job.load.decode_steps(&job.ledger).into_iter();
        Ok(Turn {
            prefill_ms: prefilled.as_secs_f64() * 1000.0,
            step_ms: steps
                .filter_map(|step| Some(step.time?.as_secs_f64() * 1000.0))
                .collect(),
            late_rows: job.engine.late_rows(),
        })
    }

    /// Ends the engine; the experts stay.
    pub(super) async fn end(&mut self) {
        if let Some(job) = self.job.take() {
            job.engine.stop().await;
        }
    }
}

/// Expert `e` of every layer lives on rank `e mod workers`, one copy each.
fn placement(spec: &ModelSpec, workers: u32) -> Placement {
    let ranks: Vec<Rank> = (0..workers).map(Rank).collect();
    let held = |rank: &Rank| {
        let experts = (0..).take(spec.experts).map(ExpertId);
        experts.filter(|e| e.0 % workers == rank.0).collect()
    };
    let slots: Vec<Vec<ExpertId>> = ranks.iter().map(held).collect();
    let layer = LayerPlacement::from_slots(&ranks, slots, spec.experts);
    Placement {
        epoch: EPOCH,
        parent: Epoch(0),
        reason: Reason::Initial,
        ranks,
        layers: vec![layer; spec.moe_layers()],
        balance_before: 1.0,
        balance_after: 1.0,
    }
}
