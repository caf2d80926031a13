//! The exchange: [`Experts`] over a [`Fabric`]. A model asks for one layer's experts and never knows where
//! they are.
//!
//! ```text
//!  run(batch) ── plan.rs ──► shipments ──┬── remote: Fabric::send ──► peers' serve.rs
//!                                        └── local: run while the remote ones are on their way,
//!                                                   together with what peers call for (`queue.rs`)
//!  answers, in any order ──► results ──► combine, in ascending order of expert ──► out
//! ```
//!
//! Invariants:
//! - A step uses one placement from `begin_step` to `end_step`; every call names its epoch.
//! - Rows are combined in ascending order of expert whatever the order of arrival, so the bits do not depend
//!   on who computed what, or when.
//! - A peer that refuses, is lost, or has not answered by the soft deadline loses its rows to another copy if
//!   there is one. What has come from nobody by the deadline is late: `run` names those rows, the engine does
//!   the token again. Nothing waits longer than the deadline.
//! - Rows that are dead already are not sent.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foregate_api::ids::{Epoch, Rank};
use foregate_api::model::ModelSpec;
use foregate_kernels::{Anywhere, Executor, Ops, View, ViewMut};
use foregate_models::combine;
use foregate_models::experts::{ExpertBatch, Experts, ExpertsError, LateRows, through_host};
use foregate_planner::split::SplitTable;
use foregate_wire::frame::{HEADER, MAX_FRAME, TraceContext};

use self::flight::Flight;
use self::plan::Planner;
use crate::engine::StepExperts;
use crate::fabric::{Fabric, Inbox};
use crate::metrics::WorkerMetrics;
use crate::residency::{EpochGate, Residency, Routing};

pub mod endpoint;
mod flight;
mod loads;
pub mod lockstep;
pub mod plan;
mod queue;
pub mod serve;
pub(crate) mod trace;
mod whole;
mod workbench;

pub use endpoint::{Endpoint, EndpointParts, Way};

/// What an exchange is made of.
pub struct ExchangeParts {
    /// This worker.
    pub rank: Rank,
    /// The model's shape.
    pub spec: Arc<ModelSpec>,
    /// Numbers; used on the engine's thread.
    pub ops: Arc<dyn Ops>,
    /// Experts of this worker.
    pub residency: Arc<Residency>,
    /// The placement of new steps.
    pub gate: Arc<EpochGate>,
    /// The way to peers.
    pub fabric: Arc<dyn Fabric>,
    /// Where the fabric leaves answers. Nobody else reads it.
    pub inbox: Arc<Inbox>,
    /// The callee side of this worker: what waits there is its own base load in the split, and rows that
    /// its experts compute are counted there, whoever asked.
    pub server: Arc<serve::Server>,
    /// Counters.
    pub metrics: Arc<WorkerMetrics>,
    /// Time after which rows are late.
    pub deadline: Duration,
}

impl fmt::Debug for ExchangeParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExchangeParts")
            .field("rank", &self.rank)
            .finish_non_exhaustive()
    }
}

/// The experts of a cluster, as one worker's engine sees them.
pub struct Exchange {
    parts: ExchangeParts,
    planner: Planner,
    loads: loads::PeerLoads,
    step: Step,
    next_call: u64,
    company: flight::Company,
    desk: serve::Desk,
    whole: whole::WholeLayers,
}

/// What holds for the running step.
#[derive(Debug, Default)]
struct Step {
    routing: Option<Arc<Routing>>,
    trace: Option<TraceContext>,
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange")
            .field("rank", &self.parts.rank)
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}

impl Exchange {
    /// An exchange between steps.
    #[must_use]
    pub fn new(parts: ExchangeParts) -> Self {
        Self {
            parts,
            planner: Planner::default(),
            loads: loads::PeerLoads::default(),
            step: Step::default(),
            next_call: 1,
            company: flight::Company::default(),
            desk: serve::Desk::of_engine(),
            whole: whole::WholeLayers::default(),
        }
    }

    /// Routes of one call such that its answer fits a frame with room to spare.
    fn most_routes(&self) -> usize {
        let row = (self.parts.spec.hidden * size_of::<f32>()).max(1);
        // A call has at most as many rows as routes, and 8 bytes for each route beside them.
        ((MAX_FRAME / 2 - HEADER) / (row + 8)).max(1)
    }

    fn exchange(
        &mut self,
        routing: &Routing,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        let batch = &batch.again();
        let failed = |what: String| ExpertsError {
            layer: batch.layer,
            what,
        };
        let table = routing.layer(batch.layer).ok_or_else(|| {
            failed(format!("placement {} has no such layer", routing.epoch()))
        })?;
        let base = self.base(table);
        let most = self.most_routes();
        let plan = self
            .planner
            .plan(table, batch, &base, most)
            .map_err(|error| failed(error.to_string()))?;
        let span = self.span(batch, &plan);
        // Answers of an earlier layer that came too late.
        self.parts.inbox.clear();
        let mut flight = Flight::new(flight::FlightParts {
            exchange: &self.parts,
            loads: &mut self.loads,
            next_call: &mut self.next_call,
            company: &mut self.company,
            desk: &mut self.desk,
            epoch: routing.epoch(),
            trace: span.as_ref().and_then(trace::context_of),
            table,
            batch,
            most,
        });
        flight
            .fly(plan.shipments)
            .map_err(|error| failed(error.to_string()))?;
        let late = flight.late_rows();
        let parts = flight.into_results();
        combine(
            self.parts.ops.as_ref(),
            &parts.of_pairs(),
            batch.weights,
            batch.top_k,
            batch.hidden,
            out,
        )
        .map_err(|error| failed(error.to_string()))?;
        self.desk.bench.give_back(parts.into_largest());
        self.parts.metrics.late(late.len());
        Ok(late)
    }

    /// Loads of the table's ranks before this batch; not finite for a rank that cannot be reached.
    fn base(&self, table: &SplitTable) -> Vec<f64> {
        let own = self.parts.rank;
        let load = |rank: &Rank| {
            if *rank == own {
                return self.parts.server.queued() as f64;
            }
            if self.parts.fabric.is_up(*rank) {
                self.loads.of(*rank)
            } else {
                f64::INFINITY
            }
        };
        table.ranks().iter().map(load).collect()
    }

    fn span(&self, batch: &ExpertBatch<'_>, plan: &plan::Plan) -> Option<tracing::Span> {
        let parent = self.step.trace.filter(TraceContext::is_sampled)?;
        let remote = |s: &&plan::Shipment| s.rank != self.parts.rank;
        let span = tracing::info_span!(
            "exchange",
            layer = batch.layer.0,
            rows = batch.dead.len(),
            calls = plan.shipments.iter().filter(remote).count(),
        );
        trace::adopt(&span, &parent);
        Some(span)
    }
}

impl Experts for Exchange {
    #[expect(
        clippy::disallowed_methods,
        reason = "measures the engine thread on the wall clock"
    )]
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        let begun = Instant::now();
        let late = match self.step.routing.clone() {
            Some(routing) => self.exchange(&routing, batch, out)?,
            // Before the first placement nobody has experts: the engine tries again later.
            None => live_rows(batch),
        };
        self.parts.metrics.exchange(begun.elapsed().as_secs_f64());
        Ok(late)
    }

    /// A layer whose experts are all on this worker's device is computed there: nothing comes to the host.
    fn run_on(
        &mut self,
        executor: &dyn Executor,
        batch: &ExpertBatch<'_, Anywhere>,
        mut out: ViewMut<'_, f32>,
    ) -> Result<LateRows, ExpertsError> {
        let on_device = matches!(batch.input, View::Device(_)) && self.step.routing.is_some();
        // Rows that are lost already are left out only by who sorts them on the host.
        if on_device && !batch.dead.contains(&true) {
            let resident = self.parts.residency.snapshot();
            if self.whole.run(executor, &resident, batch, &mut out)? {
                let routes = batch.dead.len() * batch.top_k;
                self.parts.server.ran_here(batch.layer, routes);
                return Ok(LateRows::new());
            }
        }
        through_host(batch, out, |batch, out| self.run(batch, out))
    }
}

impl StepExperts for Exchange {
    fn begin_step(&mut self, trace: Option<TraceContext>) -> Epoch {
        self.parts.server.begin_step(&self.parts.inbox);
        let begun = self.parts.gate.begin();
        let epoch = begun
            .routing
            .as_ref()
            .map_or(Epoch(0), |routing| routing.epoch());
        if let Some(stall) = begun.stall {
            self.parts.metrics.switched(stall);
            self.parts.metrics.serving(epoch.0);
        }
        self.step = Step {
            routing: begun.routing,
            trace,
        };
        epoch
    }

    fn end_step(&mut self) {
        self.step = Step::default();
        self.parts.gate.end();
        self.parts.server.end_step();
    }
}

fn live_rows(batch: &ExpertBatch<'_>) -> LateRows {
    let rows = 0_u32..;
    rows.zip(batch.dead)
        .filter(|(_, dead)| !**dead)
        .map(|(row, _)| row)
        .collect()
}
