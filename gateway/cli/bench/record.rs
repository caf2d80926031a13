//! What `foregate bench rebalance` saw: written as JSON, drawn as a plot, read again as a baseline.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::client::{Failure, Seen};
use crate::error::CliError;

/// The cluster at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Sample {
    /// Since the start.
    pub(super) seconds: f64,
    /// Active placement.
    pub(super) epoch: u64,
    /// Most rows of a rank over the mean of all, mean over MoE layers, of the last load window.
    pub(super) imbalance: Option<f64>,
    /// Copies of experts loaded since the start, to come from one active placement to the next.
    #[serde(default)]
    pub(super) copies: u64,
}

/// When one kind took over.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Phase {
    /// Since the start.
    pub(super) seconds: f64,
    /// Which kind.
    pub(super) kind: String,
}

/// All of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    /// Phases in order.
    pub(super) phases: Vec<Phase>,
    /// Samples in order.
    pub(super) samples: Vec<Sample>,
    pub(super) requests: usize,
    pub(super) failed: usize,
    errors: Vec<String>,
    first_epoch: u64,
    pub(super) last_epoch: u64,
    pub(super) longest_pause_ms: f64,
    /// Time between two tokens of a stream: median and 99th percentile, in milliseconds.
    #[serde(default)]
    pub(super) between_tokens_p50_ms: f64,
    #[serde(default)]
    pub(super) between_tokens_p99_ms: f64,
    pub(super) tokens: u64,
}

impl Record {
    /// Reads an earlier record.
    ///
    /// # Errors
    /// A file that is none (exit code 2).
    pub(super) fn read(path: &PathBuf) -> Result<Self, CliError> {
        let wrong =
            |what: String| CliError::Usage(format!("--baseline {}: {what}", path.display()));
        let text = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
        serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))
    }

    /// Puts together what was seen.
    pub(super) fn of(
        phases: Vec<Phase>,
        samples: Vec<Sample>,
        results: &[Result<Seen, Failure>],
    ) -> Self {
        let requests = results.len();
        let failures = results.iter().filter_map(|result| result.as_ref().err());
        let mut errors: Vec<String> = failures.map(Failure::to_string).collect();
        let failed = errors.len();
        errors.sort();
        errors.dedup();
        errors.truncate(10);
        let seen = || results.iter().flatten();
        let longest = seen().map(Seen::longest_pause).max().unwrap_or_default();
        let mut pauses: Vec<f64> = seen().flat_map(Seen::pauses).collect();
        pauses.sort_by(f64::total_cmp);
        Self {
            between_tokens_p50_ms: percentile(&pauses, 0.5),
            between_tokens_p99_ms: percentile(&pauses, 0.99),
            requests,
            failed,
            errors,
            first_epoch: samples.first().map_or(0, |sample| sample.epoch),
            last_epoch: samples.last().map_or(0, |sample| sample.epoch),
            longest_pause_ms: longest.as_secs_f64() * 1000.0,
            tokens: seen().map(|one| one.tokens).sum(),
            phases,
            samples,
        }
    }

    /// How far out of balance each phase was; `None` where no window was seen.
    pub(super) fn imbalance(&self) -> Vec<Option<Imbalance>> {
        let ends = self.phases.iter().skip(1).map(|next| next.seconds);
        let phases = self.phases.iter().zip(ends.chain([f64::INFINITY]));
        phases
            .map(|(phase, end)| {
                let inside = self
                    .samples
                    .iter()
                    .filter(|s| s.seconds >= phase.seconds && s.seconds < end);
                Imbalance::of(&inside.filter_map(|s| s.imbalance).collect::<Vec<_>>())
            })
            .collect()
    }

    /// Copies of experts that were moved.
    pub(super) fn copies(&self) -> u64 {
        self.samples.last().map_or(0, |sample| sample.copies)
    }

    /// A summary for people.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![format!(
            "{} requests, {} failed, {} tokens; epoch {} to {}, {} copies moved; between tokens p50 {:.1} ms, p99 {:.1} ms, \
             longest {:.0} ms",
            self.requests,
            self.failed,
            self.tokens,
            self.first_epoch,
            self.last_epoch,
            self.copies(),
            self.between_tokens_p50_ms,
            self.between_tokens_p99_ms,
            self.longest_pause_ms
        )];
        // The first phase is planned without any load known.
        let begun = self.phases.get(1).map_or(0.0, |phase| phase.seconds);
        let later: Vec<f64> = self
            .samples
            .iter()
            .filter(|s| s.seconds >= begun)
            .filter_map(|s| s.imbalance)
            .collect();
        if !later.is_empty() {
            let mean = later.iter().sum::<f64>() / later.len() as f64;
            lines.push(format!("imbalance after the first phase: mean {mean:.3}"));
        }
        for (phase, seen) in self.phases.iter().zip(self.imbalance()) {
            if let Some(Imbalance { worst, settled, .. }) = seen {
                lines.push(format!(
                    "{:<10} imbalance at worst {worst:.2}, mean of the second half {settled:.2}",
                    phase.kind
                ));
            }
        }
        lines.extend(self.errors.iter().map(|error| format!("error: {error}")));
        lines.join("\n")
    }
}

/// How far out of balance a phase was.
#[derive(Debug, Clone, Copy)]
pub(super) struct Imbalance {
    /// The largest sample.
    pub(super) worst: f64,
    /// Mean over the phase, the shift included.
    pub(super) mean: f64,
    /// Mean of its second half: one sample is one load window and says little, and this is what the plan settled at.
    pub(super) settled: f64,
}

impl Imbalance {
    fn of(samples: &[f64]) -> Option<Self> {
        let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
        let worst = samples.iter().copied().reduce(f64::max)?;
        Some(Self {
            worst,
            mean: mean(samples),
            settled: mean(&samples[samples.len() / 2..]),
        })
    }
}

/// Of ascending figures; 0 of none.
fn percentile(sorted: &[f64], part: f64) -> f64 {
    let at = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_figures_that_were_seen() {
        assert!(percentile(&[], 0.5).abs() < 1e-12);
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert!((percentile(&hundred, 0.99) - 99.0).abs() < 1e-12);
        assert!((percentile(&hundred, 0.5) - 50.0).abs() < 1e-12);
        assert!((percentile(&[7.0], 0.99) - 7.0).abs() < 1e-12);
    }
}
