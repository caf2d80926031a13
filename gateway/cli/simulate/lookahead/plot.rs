//! The changes against the baseline: a group per figure, a bar per policy.

use std::path::Path;

use super::figures::Change;
use super::report::{OfPolicy, Report};
use crate::error::CliError;
use crate::simulate::bars::{Bar, Bars, Series};

/// What is drawn, by its name in the report and its words.
const DRAWN: [(&str, &str); 5] = [
    ("distinct_experts", "distinct experts"),
    ("weight_bytes_per_token", "weight bytes per token"),
    ("time_per_token_ms_p50", "time per token p50"),
    ("wait_ms_p95", "wait p95"),
    ("latency_ms_p95", "latency p95"),
];
/// Percent at the bottom and the top.
const RANGE: (f64, f64) = (-45.0, 15.0);
const TICKS: [f64; 6] = [-40.0, -30.0, -20.0, -10.0, 0.0, 10.0];

/// Writes the plot.
pub(super) fn write(path: &Path, report: &Report) -> Result<(), CliError> {
    let base = report
        .policies
        .first()
        .map_or("", |own| own.policy.as_str());
    Bars {
        title: format!(
            "{}: change against {base} in percent, mean of {} seeds; thin lines: lowest and highest seed",
            report.setting,
            report.seeds.len()
        ),
        groups: DRAWN.map(|(_, words)| words).to_vec(),
        series: report.policies.iter().skip(1).map(series).collect(),
        base: 0.0,
        range: RANGE,
        ticks: TICKS.map(|at| (at, format!("{at:+.0}"))).to_vec(),
    }
    .write(path)
}

fn series(own: &OfPolicy) -> Series {
    let bar = |(figure, _): (&str, &str)| {
        let Change {
            mean,
            lowest,
            highest,
        } = own.change_of(figure);
        Bar {
            mean,
            lowest,
            highest,
        }
    };
    Series {
        name: own.policy.clone(),
        bars: DRAWN.map(bar).to_vec(),
    }
}
