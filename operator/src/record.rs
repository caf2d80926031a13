//! What is recorded of the balancer's decisions, and what becomes of them.
//!
//! ```text
//!  decision ─ kept ────── the newest of any kind ───────────────────────────┐
//!           └ proposed ── decision and placement by epoch ── opened         ├─ keeper ─ archive
//!  window ── meter ────── enough of them on the new epoch ── closed: measured┘
//! ```
//!
//! Recording never holds up a decision: what the archive does not take in time is dropped and counted.

mod keeper;
mod meter;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::{Epoch, Rank};
use foregate_api::load::LoadWindow;
use foregate_api::model::ModelSpec;
use foregate_api::placement::Placement;
use foregate_explain::Record;
use foregate_explain::record::{Measured, Trigger};
use foregate_planner::{Because, History, Problem, Report, Settings};
use foregate_store::Archive;
use foregate_store::past::Item;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::memory::Memory;
use crate::metrics::Metrics;
pub(crate) use keeper::Keeper;
use keeper::Write;
use meter::Meter;

/// Decisions that led to a placement and are kept.
pub(crate) const KEPT: usize = 16;
/// Windows of each rank that an outcome is measured over.
const MEASURED: u32 = 3;
/// How often "keep" is written, unless its reason changes.
const KEEP_EVERY: Duration = Duration::from_secs(10);
/// Outcomes that the next one's cost is predicted from.
const REMEMBERED: usize = 9;

/// What a decision was made on.
#[derive(Debug, Clone)]
pub(crate) struct Inputs {
    pub(crate) problem: Problem,
    pub(crate) settings: Settings,
    pub(crate) history: History,
    pub(crate) trigger: Trigger,
    pub(crate) window_ms: u64,
    pub(crate) expert_bytes: u64,
    pub(crate) dense_bytes: u64,
}

impl Inputs {
    /// Sizes of the model that costs are told in.
    pub(crate) fn sizes(model: &ModelSpec) -> (u64, u64) {
        (model.expert_bytes() as u64, model.dense_bytes() as u64)
    }
}

/// A change that is under way or being measured.
#[derive(Debug)]
struct Open {
    record: Record,
    ranks: Vec<Rank>,
    active: bool,
}

/// What earlier changes cost.
#[derive(Debug, Default)]
struct Costs {
    /// Seconds per copy that the busiest rank loaded.
    seconds_per_copy: VecDeque<f64>,
    /// Copies that the busiest rank loaded in a second, of changes that moved some.
    copies_per_second: VecDeque<f64>,
    stall_us: VecDeque<f64>,
}

/// Takes down decisions and measures what they bring.
#[derive(Debug)]
pub(crate) struct Recorder {
    archive: Archive,
    writes: mpsc::Sender<Write>,
    metrics: Arc<Metrics>,
    meter: Meter,
    open: Option<Open>,
    /// The change before it, until all ranks have told of it.
    closing: Option<Open>,
    costs: Costs,
    /// What was written of the last "keep": when, of which placement, and what it said.
    kept: Option<(Instant, Epoch, Vec<Because>)>,
    /// The newest placement that was handed on.
    placement: Epoch,
    wall: Wall,
}

/// Wall time read once, carried on by the monotonic clock.
#[derive(Debug)]
struct Wall {
    started: Instant,
    unix_ms: u64,
}

impl Wall {
    fn start() -> Self {
        Self {
            started: Instant::now(),
            unix_ms: u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(0),
        }
    }

    fn now_ms(&self) -> u64 {
        let passed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.unix_ms.saturating_add(passed)
    }
}

impl Recorder {
    /// A recorder that has seen nothing, and who writes what it takes down.
    pub(crate) fn new(archive: Archive, metrics: Arc<Metrics>) -> (Self, Keeper) {
        let (writes, keeper) = Keeper::new(archive.clone());
        let recorder = Self {
            archive,
            writes,
            metrics,
            meter: Meter::default(),
            open: None,
            closing: None,
            costs: Costs::default(),
            kept: None,
            placement: Epoch(0),
            wall: Wall::start(),
        };
        (recorder, keeper)
    }

    /// Takes in a load window, each as often as it is seen.
    pub(crate) fn window(&mut self, window: &LoadWindow) {
        if !self.meter.observe(window) {
            return;
        }
        let told = |open: &Open| self.meter.told(&open.ranks, open.record.epoch);
        if self.closing.as_ref().is_some_and(told) {
            let closing = self.closing.take();
            self.close(closing);
        }
        let measured =
            |open: &Open| self.meter.windows(&open.ranks, open.record.epoch) >= MEASURED;
        if self.open.as_ref().is_some_and(measured) {
            let open = self.open.take();
            self.close(open);
        }
    }

    /// What is remembered of a model's load; nothing if the store does not answer or the value cannot be read.
    pub(crate) async fn recall(&self, model: &str) -> Memory {
        let found = self.archive.get(&Item::Load(model.to_owned())).await;
        found
            .unwrap_or_else(|error| {
                tracing::warn!(%error, "what was remembered of the load is not used");
                None
            })
            .unwrap_or_default()
    }

    /// Keeps what is remembered of a model's load.
    pub(crate) fn remember(&self, model: String, memory: &Memory) {
        self.write(Write::Load(model, memory.clone()));
    }

    /// Copies that a rank loads in a second, as the last moves were seen; `None` before the first.
    pub(crate) fn copies_per_second(&self) -> Option<f64> {
        median(&self.costs.copies_per_second)
    }

    /// Milliseconds since 1970.
    pub(crate) fn now_ms(&self) -> u64 {
        self.wall.now_ms()
    }

    /// Notes that the placement in force stands.
    pub(crate) fn kept(
        &mut self,
        inputs: Inputs,
        report: &Report,
        active: Option<&Placement>,
        now: Instant,
    ) {
        let why: Vec<Because> = report.layers.iter().map(|layer| layer.because).collect();
        let told = self.kept.as_ref().is_some_and(|(at, epoch, last)| {
            now < *at + KEEP_EVERY && *epoch == report.epoch && *last == why
        });
        if told {
            return;
        }
        self.kept = Some((now, report.epoch, why));
        let record = self.record(inputs, report, None);
        self.placement(active);
        self.write(Write::Latest(Box::new(record)));
    }

    fn placement(&mut self, plan: Option<&Placement>) {
        let new = plan.filter(|plan| plan.epoch != self.placement);
        if let Some(plan) = new {
            self.placement = plan.epoch;
            self.write(Write::Placement(Box::new(plan.clone())));
        }
    }

    /// Notes what was proposed. What is still open is closed as soon as all ranks have told of it.
    pub(crate) fn proposed(
        &mut self,
        inputs: Inputs,
        report: &Report,
        plan: &Placement,
        parent: Option<&Placement>,
    ) {
        let before = self.closing.take();
        self.close(before);
        self.closing = self.open.take();
        let mut record = self.record(inputs, report, Some(plan));
        record.measured.balance_before = parent
            .and_then(|parent| self.meter.balance(&parent.ranks, parent.epoch))
            .map(|seen| seen.balance);
        self.placement(parent);
        self.placement(Some(plan));
        self.write(Write::Decision(Box::new(record.clone())));
        self.write(Write::Latest(Box::new(record.clone())));
        self.kept = None;
        self.open = Some(Open {
            record,
            ranks: plan.ranks.clone(),
            active: false,
        });
    }

    /// Notes that a placement was brought into force, `seconds` after it was proposed.
    pub(crate) fn activated(&mut self, epoch: Epoch, seconds: Option<f64>) {
        let Some(open) = self.open.as_mut().filter(|open| open.record.epoch == epoch) else {
            return;
        };
        open.active = true;
        open.record.measured.seconds = seconds;
        let record = open.record.clone();
        self.write(Write::Decision(Box::new(record)));
    }

    fn record(&self, inputs: Inputs, report: &Report, plan: Option<&Placement>) -> Record {
        let mut predicted = Record::predict(report, inputs.expert_bytes);
        if report.reason.is_some() {
            self.costs.predict(&mut predicted.cost);
        }
        Record {
            at_ms: self.wall.now_ms(),
            trigger: inputs.trigger,
            verdict: report.verdict,
            // The operator may have named it anew.
            reason: plan.map(|plan| plan.reason),
            parent: report.parent,
            epoch: report.epoch,
            problem: inputs.problem,
            settings: inputs.settings,
            history: inputs.history,
            window_ms: inputs.window_ms,
            expert_bytes: inputs.expert_bytes,
            dense_bytes: inputs.dense_bytes,
            predicted,
            measured: Measured::default(),
        }
    }

    /// Ends the measurement of a change.
    fn close(&mut self, open: Option<Open>) {
        let Some(Open {
            mut record,
            ranks,
            active,
        }) = open
        else {
            return;
        };
        let measured = &mut record.measured;
        if active {
            if let Some(seen) = self.meter.balance(&ranks, record.epoch) {
                measured.balance_after = Some(seen.balance);
                measured.windows = seen.windows;
            }
            measured.stall_us = self.meter.stall_us(&ranks, record.epoch);
            let loaded = self.meter.loaded(&ranks, record.epoch);
            measured.bytes = loaded.map(|copies| copies.saturating_mul(record.expert_bytes));
        }
        measured.closed = true;
        self.costs.learn(&record);
        self.metrics.measured(&record);
        self.write(Write::Decision(Box::new(record)));
    }

    fn write(&self, write: Write) {
        if self.writes.try_send(write).is_err() {
            self.metrics.records_dropped.inc();
        }
    }
}

impl Costs {
    fn learn(&mut self, record: &Record) {
        let push = |to: &mut VecDeque<f64>, figure: f64| {
            if to.len() == REMEMBERED {
                to.pop_front();
            }
            to.push_back(figure);
        };
        let most = record.predicted.cost.most_to_one_rank;
        if let Some(seconds) = record.measured.seconds {
            push(&mut self.seconds_per_copy, seconds / most.max(1) as f64);
            if most > 0 && seconds > 0.0 {
                push(&mut self.copies_per_second, most as f64 / seconds);
            }
        }
        if let Some(stall) = record.measured.stall_us {
            push(&mut self.stall_us, stall as f64);
        }
    }

    fn predict(&self, cost: &mut foregate_explain::record::Cost) {
        let most = cost.most_to_one_rank.max(1) as f64;
        cost.seconds = median(&self.seconds_per_copy).map(|per_copy| per_copy * most);
        cost.stall_us = median(&self.stall_us).map(|us| us.round() as u64);
    }
}

fn median(of: &VecDeque<f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = of.iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}
