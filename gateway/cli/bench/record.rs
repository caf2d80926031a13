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
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// Phases in order.
    pub(super) phases: Vec<Phase>,
    /// Samples in order.
    pub(super) samples: Vec<Sample>,
    requests: usize,
    failed: usize,
    errors: Vec<String>,
    first_epoch: u64,
    last_epoch: u64,
    longest_pause_ms: f64,
    tokens: u64,
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
        Self {
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

    /// A summary for people.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![format!(
            "{} requests, {} failed, {} tokens; epoch {} to {}; longest pause {:.0} ms",
            self.requests,
            self.failed,
            self.tokens,
            self.first_epoch,
            self.last_epoch,
            self.longest_pause_ms
        )];
        for (at, phase) in self.phases.iter().enumerate() {
            let end = self
                .phases
                .get(at + 1)
                .map_or(f64::INFINITY, |next| next.seconds);
            let inside: Vec<f64> = self
                .samples
                .iter()
                .filter(|s| s.seconds >= phase.seconds && s.seconds < end)
                .filter_map(|s| s.imbalance)
                .collect();
            if let Some(worst) = inside.iter().copied().reduce(f64::max) {
                // One sample is one load window and says little; the second half shows what the plan settled at.
                let settled = &inside[inside.len() / 2..];
                let mean = settled.iter().sum::<f64>() / settled.len() as f64;
                lines.push(format!(
                    "{:<10} imbalance at worst {worst:.2}, mean of the second half {mean:.2}",
                    phase.kind
                ));
            }
        }
        lines.extend(self.errors.iter().map(|error| format!("error: {error}")));
        lines.join("\n")
    }
}
