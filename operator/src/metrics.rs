//! The operator's metrics. Label values are enums, but for the layer number (at most one series per MoE layer).

use foregate_api::ids::Epoch;
use foregate_api::placement::Reason;
use foregate_explain::Record;
use foregate_planner::{Because, Report, Verdict};
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

mod foresight;
mod outcome;

use crate::forecast::Combined;
use foresight::Foresight;
use outcome::Outcome;

/// All of them.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// 1 while this operator leads.
    pub(crate) leader: IntGauge,
    /// 1 while the store's view is fresh.
    pub(crate) connected: IntGauge,
    /// Epochs of target and active placement.
    pub(crate) epoch: IntGaugeVec,
    /// Ranks by state.
    pub(crate) ranks: IntGaugeVec,
    /// Proposals that somebody else's overtook.
    pub(crate) stale: IntCounter,
    /// Calls of the planner that gave an error.
    pub(crate) failures: IntCounter,
    /// Seconds of one call of the planner.
    pub(crate) plan_seconds: Histogram,
    /// Seconds from a proposal to its activation.
    pub(crate) rollover_seconds: Histogram,
    /// Records of decisions that the archive did not take in time.
    pub(crate) records_dropped: IntCounter,
    outcome: Outcome,
    foresight: Foresight,
    plans: IntCounterVec,
    keeps: IntCounterVec,
    moved: IntCounter,
    balance: GaugeVec,
    imbalance: GaugeVec,
}

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            leader: IntGauge::new("foregate_operator_leader", "1 while this operator leads")?,
            connected: IntGauge::new(
                "foregate_operator_store_connected",
                "1 while the view of the store is fresh",
            )?,
            epoch: IntGaugeVec::new(
                Opts::new("foregate_operator_epoch", "Epoch of a placement"),
                &["placement"],
            )?,
            ranks: IntGaugeVec::new(
                Opts::new("foregate_operator_ranks", "Workers by state"),
                &["state"],
            )?,
            stale: IntCounter::new(
                "foregate_operator_stale_writes_total",
                "Compare-and-puts that found another value than expected",
            )?,
            failures: IntCounter::new(
                "foregate_operator_plan_failures_total",
                "Calls of the planner that gave an error",
            )?,
            plan_seconds: Histogram::with_opts(
                HistogramOpts::new("foregate_operator_plan_seconds", "One call of the planner")
                    .buckets(prometheus::exponential_buckets(0.0005, 4.0, 9)?),
            )?,
            rollover_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "foregate_operator_rollover_seconds",
                    "From the proposal of a placement to its activation",
                )
                .buckets(prometheus::exponential_buckets(0.01, 3.0, 10)?),
            )?,
            records_dropped: IntCounter::new(
                "foregate_operator_records_dropped_total",
                "Records of decisions that the archive did not take in time",
            )?,
            outcome: Outcome::register(registry)?,
            foresight: Foresight::register(registry)?,
            plans: IntCounterVec::new(
                Opts::new(
                    "foregate_operator_plans_total",
                    "Placements proposed, by reason",
                ),
                &["reason"],
            )?,
            keeps: IntCounterVec::new(
                Opts::new(
                    "foregate_operator_layers_kept_total",
                    "Layers whose copies stayed at a decision, by reason",
                ),
                &["because"],
            )?,
            moved: IntCounter::new(
                "foregate_operator_copies_moved_total",
                "Copies of experts that proposed placements had to load",
            )?,
            balance: GaugeVec::new(
                Opts::new(
                    "foregate_operator_predicted_balance",
                    "Mean over maximum load of the ranks, mean over layers, at the last decision",
                ),
                &["when"],
            )?,
            imbalance: GaugeVec::new(
                Opts::new(
                    "foregate_operator_layer_imbalance",
                    "Maximum over mean load less one, per MoE layer, at the last decision",
                ),
                &["layer"],
            )?,
        };
        metrics.register_all(registry)?;
        Ok(metrics)
    }

    fn register_all(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        let all: [Box<dyn prometheus::core::Collector>; 14] = [
            Box::new(self.leader.clone()),
            Box::new(self.connected.clone()),
            Box::new(self.epoch.clone()),
            Box::new(self.ranks.clone()),
            Box::new(self.stale.clone()),
            Box::new(self.failures.clone()),
            Box::new(self.records_dropped.clone()),
            Box::new(self.plan_seconds.clone()),
            Box::new(self.rollover_seconds.clone()),
            Box::new(self.plans.clone()),
            Box::new(self.keeps.clone()),
            Box::new(self.moved.clone()),
            Box::new(self.balance.clone()),
            Box::new(self.imbalance.clone()),
        ];
        for collector in all {
            registry.register(collector)?;
        }
        Ok(())
    }

    /// Notes what the planner said.
    pub(crate) fn decided(&self, report: &Report) {
        self.balance
            .with_label_values(&["before"])
            .set(report.balance_before);
        self.balance
            .with_label_values(&["after"])
            .set(report.balance_after);
        for layer in &report.layers {
            let balance = if layer.verdict == Verdict::Keep {
                layer.before
            } else {
                layer.after
            };
            if balance > 0.0 {
                self.imbalance
                    .with_label_values(&[&layer.layer.to_string()])
                    .set(1.0 / balance - 1.0);
            }
            if layer.verdict != Verdict::Move {
                self.keeps
                    .with_label_values(&[because_label(layer.because)])
                    .inc();
            }
        }
    }

    /// Notes a placement that was proposed.
    pub(crate) fn proposed(&self, reason: Reason, copies: usize) {
        self.plans.with_label_values(&[reason.name()]).inc();
        self.moved.inc_by(copies as u64);
    }

    /// Notes what a change has brought.
    pub(crate) fn measured(&self, record: &Record) {
        self.outcome.measured(record);
    }

    /// Shows what gateways expected at the close of a window, and the weight that it has in the prediction.
    pub(crate) fn foreseen(&self, said: Option<(&Combined, f64)>) {
        self.foresight.show(said);
    }

    /// Shows the epochs in the store.
    pub(crate) fn epochs(&self, target: Epoch, active: Epoch) {
        for (placement, epoch) in [("target", target), ("active", active)] {
            let shown = i64::try_from(epoch.0).unwrap_or(i64::MAX);
            self.epoch.with_label_values(&[placement]).set(shown);
        }
    }

    /// Shows how many ranks are in a state.
    pub(crate) fn ranks(&self, state: &'static str, count: usize) {
        let shown = i64::try_from(count).unwrap_or(i64::MAX);
        self.ranks.with_label_values(&[state]).set(shown);
    }
}

const fn because_label(because: Because) -> &'static str {
    match because {
        Because::Balanced => "balanced",
        Because::Resting => "resting",
        Because::NoGain => "no_gain",
        Because::NotWorth => "not_worth",
        Because::Budget => "budget",
        Because::Moves => "moves",
    }
}

/// Of the operator on Kubernetes as a whole.
#[derive(Debug)]
pub(crate) struct Controls {
    /// 1 while this process holds the Lease.
    pub(crate) leader: IntGauge,
    /// Looks at clusters by how they ended.
    pub(crate) looks: IntCounterVec,
}

impl Controls {
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let controls = Self {
            leader: IntGauge::new(
                "foregate_operator_lease_held",
                "1 while this process holds the Lease and works on clusters",
            )?,
            looks: IntCounterVec::new(
                Opts::new(
                    "foregate_operator_looks_total",
                    "Looks at clusters by how they ended",
                ),
                &["end"],
            )?,
        };
        registry.register(Box::new(controls.leader.clone()))?;
        registry.register(Box::new(controls.looks.clone()))?;
        Ok(controls)
    }
}
