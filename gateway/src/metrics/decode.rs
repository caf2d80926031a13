//! Decode steps of the workers, as they tell with the end of a sequence.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use foregate_api::ids::Rank;
use foregate_wire::generation::Steps;
use prometheus::{CounterVec, Opts};

use super::Make;

/// Metrics of decode steps.
#[derive(Debug)]
pub(super) struct DecodeMetrics {
    /// What each worker said last.
    last: Mutex<BTreeMap<Rank, (u64, [f64; 4])>>,
    totals: [CounterVec; 4],
}

impl DecodeMetrics {
    pub(super) fn new(make: &Make<'_>) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| {
            let counter = CounterVec::new(Opts::new(name, help), &["engine"])?;
            make.0.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        Ok(Self {
            last: Mutex::default(),
            totals: [
                counter(
                    "foregate_gateway_decode_steps_total",
                    "Steps of a worker in which every sequence had one row.",
                )?,
                counter("foregate_gateway_decode_rows_total", "Rows of these steps.")?,
                counter(
                    "foregate_gateway_decode_experts_total",
                    "Distinct experts that the rows of these steps chose, mean over MoE layers.",
                )?,
                counter(
                    "foregate_gateway_decode_seconds_total",
                    "Time of these steps.",
                )?,
            ],
        })
    }

    /// Adds what is new since the worker spoke last. Less than before is a worker that started anew.
    pub(super) fn note(&self, worker: Rank, steps: &Steps) {
        let now = [
            steps.steps as f64,
            steps.rows as f64,
            steps.experts,
            steps.ms / 1000.0,
        ];
        if !now.iter().all(|total| total.is_finite() && *total >= 0.0) {
            return;
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (number, before) = last.entry(worker).or_default();
        // Two sequences of a worker may end in one order and be heard of in another.
        let anew = steps.steps < *number / 2;
        if steps.steps <= *number && !anew {
            return;
        }
        *number = steps.steps;
        let engine = worker.to_string();
        for ((total, now), before) in self.totals.iter().zip(now).zip(*before) {
            let more = if anew { now } else { now - before };
            total.with_label_values(&[&engine]).inc_by(more.max(0.0));
        }
        *before = now;
    }
}

#[cfg(test)]
mod tests {
    use prometheus::Registry;

    use super::*;

    #[test]
    fn totals_grow_by_what_is_new() {
        let registry = Registry::new();
        let metrics = DecodeMetrics::new(&Make(&registry)).unwrap();
        let steps = |steps: u64| Steps {
            steps,
            rows: 2 * steps,
            experts: 3.0 * steps as f64,
            ms: 1000.0,
            fit: None,
        };
        for number in [10, 14, 12, 14, 3] {
            metrics.note(Rank(1), &steps(number));
        }
        let of = |at: usize| metrics.totals[at].with_label_values(&["1"]).get();
        assert!((of(0) - 17.0).abs() < 1e-9, "14, and 3 of a new process");
        assert!((of(1) - 34.0).abs() < 1e-9);
        assert!((of(2) - 51.0).abs() < 1e-9);
    }
}
