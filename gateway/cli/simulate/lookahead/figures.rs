//! The figures of a run, and of several seeds together.

use serde::Serialize;

use super::cluster::{Life, Run, Step};

/// Bytes of one expert of Qwen3-30B-A3B in 16 bits, over its 48 layers.
const EXPERT_BYTES: f64 = 48.0 * 3.0 * 2048.0 * 768.0 * 2.0;

/// One run, or the mean of several. Latencies are of the middle 80 % of the requests.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Figures {
    /// Distinct experts of a step, mean over layers, by time.
    pub(super) distinct_experts: f64,
    /// The same per token, by step.
    pub(super) experts_per_token: f64,
    /// Bytes of expert weights read per token.
    pub(super) weight_bytes_per_token: f64,
    /// Sequences of a step, by time.
    pub(super) batch: f64,
    pub(super) time_per_token_ms_p50: f64,
    pub(super) time_per_token_ms_p95: f64,
    pub(super) wait_ms_p95: f64,
    pub(super) latency_ms_p50: f64,
    pub(super) latency_ms_p95: f64,
    pub(super) oldest_wait_ms: f64,
    /// Share of the requests that were placed at random to compare with.
    pub(super) control_share: f64,
    pub(super) switch_offs: f64,
    pub(super) decision_us_p50: f64,
    pub(super) decision_us_p99: f64,
}

/// A figure by its name.
pub(super) type Named = (&'static str, fn(&Figures) -> f64);

/// Those that are compared with the baseline.
pub(super) const COMPARED: [Named; 8] = [
    ("distinct_experts", |f| f.distinct_experts),
    ("weight_bytes_per_token", |f| f.weight_bytes_per_token),
    ("time_per_token_ms_p50", |f| f.time_per_token_ms_p50),
    ("time_per_token_ms_p95", |f| f.time_per_token_ms_p95),
    ("wait_ms_p95", |f| f.wait_ms_p95),
    ("latency_ms_p50", |f| f.latency_ms_p50),
    ("latency_ms_p95", |f| f.latency_ms_p95),
    ("oldest_wait_ms", |f| f.oldest_wait_ms),
];

impl Figures {
    pub(super) fn of(run: &Run) -> Self {
        let by_time = |of: fn(&Step) -> f64| {
            let sum: f64 = run.steps.iter().map(|step| of(step) * step.ms).sum();
            sum / run.steps.iter().map(|step| step.ms).sum::<f64>()
        };
        let sum = |of: fn(&Step) -> f64| run.steps.iter().map(of).sum::<f64>();
        let n = run.lives.len();
        let middle = &run.lives[n / 10..n * 9 / 10];
        let at = |percent: f64, of: fn(&Life) -> f64| {
            percentile(middle.iter().map(of).collect(), percent)
        };
        let per_token =
            |life: &Life| (life.ended - life.started) / f64::from(life.tokens.max(1));
        let wait = |life: &Life| life.started - life.arrived;
        let latency = |life: &Life| life.ended - life.arrived;
        let experts_per_token = sum(|s| s.distinct) / sum(|s| s.batch);
        Self {
            distinct_experts: by_time(|step| step.distinct),
            experts_per_token,
            weight_bytes_per_token: experts_per_token * EXPERT_BYTES,
            batch: by_time(|step| step.batch),
            time_per_token_ms_p50: at(50.0, per_token),
            time_per_token_ms_p95: at(95.0, per_token),
            wait_ms_p95: at(95.0, wait),
            latency_ms_p50: at(50.0, latency),
            latency_ms_p95: at(95.0, latency),
            oldest_wait_ms: run.lives.iter().map(wait).fold(0.0, f64::max),
            control_share: run.control_share,
            switch_offs: run.switch_offs as f64,
            decision_us_p50: at(50.0, |life| life.decision_us),
            decision_us_p99: at(99.0, |life| life.decision_us),
        }
    }

    /// Mean over runs.
    pub(super) fn mean(runs: &[Self]) -> Self {
        let mean =
            |of: fn(&Self) -> f64| runs.iter().map(of).sum::<f64>() / runs.len().max(1) as f64;
        Self {
            distinct_experts: mean(|f| f.distinct_experts),
            experts_per_token: mean(|f| f.experts_per_token),
            weight_bytes_per_token: mean(|f| f.weight_bytes_per_token),
            batch: mean(|f| f.batch),
            time_per_token_ms_p50: mean(|f| f.time_per_token_ms_p50),
            time_per_token_ms_p95: mean(|f| f.time_per_token_ms_p95),
            wait_ms_p95: mean(|f| f.wait_ms_p95),
            latency_ms_p50: mean(|f| f.latency_ms_p50),
            latency_ms_p95: mean(|f| f.latency_ms_p95),
            oldest_wait_ms: mean(|f| f.oldest_wait_ms),
            control_share: mean(|f| f.control_share),
            switch_offs: mean(|f| f.switch_offs),
            decision_us_p50: mean(|f| f.decision_us_p50),
            decision_us_p99: mean(|f| f.decision_us_p99),
        }
    }
}

/// A figure in percent: mean over the seeds, lowest and highest.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Change {
    pub(super) mean: f64,
    pub(super) lowest: f64,
    pub(super) highest: f64,
}

impl Change {
    /// Change against a baseline, of pairs (baseline, figure), one per seed.
    pub(super) fn of(pairs: impl Iterator<Item = (f64, f64)>) -> Self {
        let changes: Vec<f64> = pairs
            .filter(|(base, _)| *base > 1e-9)
            .map(|(base, figure)| 100.0 * (figure / base - 1.0))
            .collect();
        Self::over(changes.into_iter())
    }

    /// Of figures, one per seed.
    pub(super) fn over(figures: impl Iterator<Item = f64>) -> Self {
        let changes: Vec<f64> = figures.collect();
        if changes.is_empty() {
            return Self::default();
        }
        Self {
            mean: changes.iter().sum::<f64>() / changes.len() as f64,
            lowest: changes.iter().copied().fold(f64::INFINITY, f64::min),
            highest: changes.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }
}

/// By linear interpolation between neighbours, as numpy does it.
pub(super) fn percentile(mut figures: Vec<f64>, percent: f64) -> f64 {
    figures.sort_by(f64::total_cmp);
    let at = percent / 100.0 * figures.len().saturating_sub(1) as f64;
    let (low, part) = (at.floor() as usize, at.fract());
    let value = |at: usize| figures.get(at).copied();
    match (value(low), value(low + 1)) {
        (Some(low), Some(high)) => low + part * (high - low),
        (Some(only), None) => only,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_neighbours() {
        assert!((percentile(vec![4.0, 1.0, 3.0, 2.0], 50.0) - 2.5).abs() < 1e-9);
        assert!((percentile(vec![7.0], 95.0) - 7.0).abs() < 1e-9);
        assert!(percentile(Vec::new(), 50.0).abs() < 1e-9);
    }

    #[test]
    fn a_change_is_in_percent_of_each_seed() {
        let change = Change::of([(10.0, 9.0), (10.0, 11.0), (0.0, 5.0)].into_iter());
        assert!((change.mean).abs() < 1e-9);
        assert!((change.lowest + 10.0).abs() < 1e-9 && (change.highest - 10.0).abs() < 1e-9);
    }
}
