//! What changes were to bring and to cost, beside what they brought and cost.

use foregate_explain::Record;
use prometheus::{GaugeVec, Histogram, HistogramOpts, IntCounterVec, Opts, Registry};

/// Predicted and measured figures of changes whose measurement is over.
#[derive(Debug)]
pub(super) struct Outcome {
    balance: GaugeVec,
    error: Histogram,
    bytes: IntCounterVec,
    stall: Histogram,
}

impl Outcome {
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let outcome = Self {
            balance: GaugeVec::new(
                Opts::new(
                    "foregate_operator_change_balance",
                    "Mean over maximum load before and after the last change, predicted and measured",
                ),
                &["figure", "when"],
            )?,
            error: Histogram::with_opts(
                HistogramOpts::new(
                    "foregate_operator_change_balance_error",
                    "Measured less predicted balance after a change",
                )
                .buckets(vec![
                    -0.3, -0.2, -0.1, -0.05, -0.02, -0.01, 0.0, 0.01, 0.02, 0.05,
                ]),
            )?,
            bytes: IntCounterVec::new(
                Opts::new(
                    "foregate_operator_change_bytes_total",
                    "Bytes of experts that changes loaded, predicted and measured",
                ),
                &["figure"],
            )?,
            stall: Histogram::with_opts(
                HistogramOpts::new(
                    "foregate_operator_change_stall_seconds",
                    "Longest delay of a step by the switch to a placement, over its ranks",
                )
                .buckets(prometheus::exponential_buckets(1e-5, 4.0, 10)?),
            )?,
        };
        registry.register(Box::new(outcome.balance.clone()))?;
        registry.register(Box::new(outcome.error.clone()))?;
        registry.register(Box::new(outcome.bytes.clone()))?;
        registry.register(Box::new(outcome.stall.clone()))?;
        Ok(outcome)
    }

    /// A figure that was not measured keeps its last value.
    pub(super) fn measured(&self, record: &Record) {
        let (predicted, measured) = (&record.predicted, &record.measured);
        let balances = [
            ("predicted", "before", Some(predicted.balance_before)),
            ("predicted", "after", Some(predicted.balance_after)),
            ("measured", "before", measured.balance_before),
            ("measured", "after", measured.balance_after),
        ];
        for (figure, when, balance) in balances {
            if let Some(balance) = balance {
                self.balance.with_label_values(&[figure, when]).set(balance);
            }
        }
        if let Some(after) = measured.balance_after {
            self.error.observe(after - predicted.balance_after);
        }
        if let Some(bytes) = measured.bytes {
            self.bytes
                .with_label_values(&["predicted"])
                .inc_by(predicted.cost.bytes);
            self.bytes.with_label_values(&["measured"]).inc_by(bytes);
        }
        if let Some(stall) = measured.stall_us {
            self.stall.observe(stall as f64 / 1e6);
        }
    }
}
