//! The results: JSON for machines, a table for people.

use serde::Serialize;

use super::caches::Row;
use super::cluster::Run;
use super::figures::{COMPARED, Change, Figures};

/// A run of the router's benchmark.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) setting: String,
    pub(super) seeds: Vec<u64>,
    /// Correlation of prompt and answer, mean over experts, layers, requests and seeds.
    pub(super) correlation: f64,
    /// Distinct experts of a full batch of random requests.
    pub(super) random_batch: f64,
    /// The first one is the baseline.
    pub(super) policies: Vec<OfPolicy>,
}

/// One policy.
#[derive(Debug, Serialize)]
pub(super) struct OfPolicy {
    pub(super) policy: String,
    pub(super) mean: Figures,
    pub(super) by_seed: Vec<Figures>,
    /// Percent against the baseline, by seed, by figure.
    pub(super) change: Vec<Compared>,
    /// Share of the signatures' variance that lies between the kinds, by seed.
    pub(super) separation: Vec<f64>,
    /// The last gain that the guard saw, as a share of a step's time, by seed.
    pub(super) gain: Vec<Option<f64>>,
}

/// One figure against the baseline.
#[derive(Debug, Serialize)]
pub(super) struct Compared {
    pub(super) figure: &'static str,
    #[serde(flatten)]
    pub(super) percent: Change,
}

impl OfPolicy {
    /// `base`: the figures of the baseline by seed.
    pub(super) fn new(policy: String, runs: &[Run], base: &[Figures]) -> Self {
        let by_seed: Vec<Figures> = runs.iter().map(Figures::of).collect();
        let compared = |(figure, of): &(&'static str, fn(&Figures) -> f64)| Compared {
            figure,
            percent: Change::of(
                base.iter()
                    .zip(&by_seed)
                    .map(|(base, own)| (of(base), of(own))),
            ),
        };
        Self {
            policy,
            mean: Figures::mean(&by_seed),
            change: COMPARED.iter().map(compared).collect(),
            separation: runs.iter().filter_map(|run| run.separation).collect(),
            gain: runs.iter().map(|run| run.gain).collect(),
            by_seed,
        }
    }

    pub(super) fn change_of(&self, figure: &str) -> Change {
        let found = self
            .change
            .iter()
            .find(|compared| compared.figure == figure);
        found.map_or_else(Change::default, |compared| compared.percent)
    }
}

impl Report {
    /// A table in Markdown.
    pub(super) fn text(&self) -> String {
        let seeds = self.seeds.len();
        let mut lines = vec![
            format!(
                "{}, {seeds} seeds: correlation of prompt and answer {:.3}, full random batch {:.1} experts",
                self.setting, self.correlation, self.random_batch
            ),
            String::new(),
            "| policy | distinct experts | experts per token | weight bytes per token | time per token p50 | wait p95 | latency p95 | oldest wait, s | at random | switched off | decision µs p50 / p99 |".to_owned(),
            "|---|---|---|---|---|---|---|---|---|---|---|".to_owned(),
        ];
        for own in &self.policies {
            let mean = &own.mean;
            let change = |name| spread(own.change_of(name));
            lines.push(format!(
                "| {} | {:.1}: {} | {:.2} | {} | {:.2} ms: {} | {:.0} ms: {} | {:.0} ms: {} | {:.1} | {:.1} % | {:.1} | {:.1} / {:.1} |",
                own.policy,
                mean.distinct_experts,
                change("distinct_experts"),
                mean.experts_per_token,
                change("weight_bytes_per_token"),
                mean.time_per_token_ms_p50,
                change("time_per_token_ms_p50"),
                mean.wait_ms_p95,
                change("wait_ms_p95"),
                mean.latency_ms_p95,
                change("latency_ms_p95"),
                mean.oldest_wait_ms / 1000.0,
                100.0 * mean.control_share,
                mean.switch_offs,
                mean.decision_us_p50,
                mean.decision_us_p99,
            ));
        }
        lines.join("\n")
    }
}

/// A run of the caches' benchmark.
#[derive(Debug, Serialize)]
pub(super) struct CacheReport {
    pub(super) setting: &'static str,
    pub(super) seeds: Vec<u64>,
    /// Weight of the demand in a cached expert's value.
    pub(super) share: f64,
    /// What a use still weighs a step later.
    pub(super) decay: f64,
    pub(super) rows: Vec<Row>,
}

impl CacheReport {
    /// A table in Markdown.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![
            format!(
                "{}, {} seeds: share of the signature {}, decay {}",
                self.setting,
                self.seeds.len(),
                self.share,
                self.decay
            ),
            String::new(),
            "| batch | capacity | policy | hit ratio | % of Belady | % of the gap from LRU to Belady |".to_owned(),
            "|---|---|---|---|---|---|".to_owned(),
        ];
        for row in &self.rows {
            lines.push(format!(
                "| {} | {} | {} | {:.3} | {} | {} |",
                row.batch,
                row.capacity,
                row.policy,
                row.hit_ratio,
                plain(row.of_belady),
                plain(row.gap_closed)
            ));
        }
        lines.join("\n")
    }
}

fn spread(change: Change) -> String {
    format!(
        "{:+.1} % ({:+.1} to {:+.1})",
        change.mean, change.lowest, change.highest
    )
}

fn plain(change: Change) -> String {
    format!(
        "{:.1} ({:.1} to {:.1})",
        change.mean, change.lowest, change.highest
    )
}
