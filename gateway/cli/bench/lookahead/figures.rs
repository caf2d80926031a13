//! What is compared of two arms, each figure from the requests and the samples of its blocks.

use super::block::{One, Sample};

/// A figure by its name, its unit or place in the table, and how it is made.
pub(super) struct Figure {
    /// In the JSON.
    pub(super) name: &'static str,
    /// In the table and the plot.
    pub(super) words: &'static str,
    pub(super) of: fn(&[One], &[Sample]) -> Option<f64>,
}

/// All of them.
pub(super) const FIGURES: [Figure; 11] = [
    Figure {
        name: "experts_per_step",
        words: "distinct experts per step",
        of: |_, samples| {
            ratio(
                samples,
                |c| c.counted.decode_experts,
                |c| c.counted.decode_steps,
            )
        },
    },
    Figure {
        name: "batch",
        words: "sequences per step",
        of: |_, samples| {
            ratio(
                samples,
                |c| c.counted.decode_rows,
                |c| c.counted.decode_steps,
            )
        },
    },
    Figure {
        name: "experts_per_token",
        words: "experts read per token",
        of: |_, samples| {
            ratio(
                samples,
                |c| c.counted.decode_experts,
                |c| c.counted.decode_rows,
            )
        },
    },
    Figure {
        name: "decode_step_ms",
        words: "decode step, ms",
        of: |_, samples| {
            let seconds = ratio(
                samples,
                |c| c.counted.decode_seconds,
                |c| c.counted.decode_steps,
            );
            seconds.map(|seconds| seconds * 1000.0)
        },
    },
    Figure {
        name: "tokens_per_second",
        words: "tokens per second",
        of: |_, samples| ratio(samples, |c| c.counted.generated, |c| c.seconds),
    },
    Figure {
        name: "time_per_token_ms_p50",
        words: "time per token p50, ms",
        of: |requests, _| percentile(requests.iter().filter_map(|one| one.per_token), 50),
    },
    Figure {
        name: "time_per_token_ms_p95",
        words: "time per token p95, ms",
        of: |requests, _| percentile(requests.iter().filter_map(|one| one.per_token), 95),
    },
    Figure {
        name: "first_token_ms_p50",
        words: "first token p50, ms",
        of: |requests, _| percentile(requests.iter().map(|one| one.first), 50),
    },
    Figure {
        name: "first_token_ms_p95",
        words: "first token p95, ms",
        of: |requests, _| percentile(requests.iter().map(|one| one.first), 95),
    },
    Figure {
        name: "latency_ms_p50",
        words: "latency p50, ms",
        of: |requests, _| percentile(requests.iter().map(|one| one.total), 50),
    },
    Figure {
        name: "latency_ms_p95",
        words: "latency p95, ms",
        of: |requests, _| percentile(requests.iter().map(|one| one.total), 95),
    },
];

fn ratio(
    samples: &[Sample],
    above: fn(&Sample) -> f64,
    below: fn(&Sample) -> f64,
) -> Option<f64> {
    let below: f64 = samples.iter().map(below).sum();
    (below > 0.0).then(|| samples.iter().map(above).sum::<f64>() / below)
}

/// By the nearest-rank rule.
fn percentile(figures: impl Iterator<Item = f64>, percent: usize) -> Option<f64> {
    let mut figures: Vec<f64> = figures.collect();
    let at = (figures.len() * percent).div_ceil(100).checked_sub(1)?;
    let (_, found, _) = figures.select_nth_unstable_by(at, f64::total_cmp);
    Some(*found)
}
