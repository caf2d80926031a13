//! Balance of all policies: a group per kind of split, a bar per policy; copies moved stand in the legend.

use std::path::Path;

use foregate_simulate::{Document, OfPolicy, OfSeed};

use crate::error::CliError;
use crate::simulate::bars::{Bar, Bars, Series};

/// What is drawn.
const DRAWN: [(&str, fn(&OfSeed) -> f64); 5] = [
    ("even split", |s| s.even.mean),
    ("fixed shares", |s| s.fixed.mean),
    ("split per batch", |s| s.split.mean),
    ("split per batch, p5", |s| s.split.p5),
    ("prefill, split", |s| s.prefill.map_or(0.0, |b| b.mean)),
];
const RANGE: (f64, f64) = (0.3, 1.0);
const TICKS: [f64; 8] = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// Writes the plot.
pub(super) fn write(path: &Path, document: &Document) -> Result<(), CliError> {
    Bars {
        title: format!(
            "{}, {}: balance (mean over maximum load); thin lines: lowest and highest seed; in brackets: copies moved in ten steps",
            document.header.setting,
            document.source(),
        ),
        groups: DRAWN.map(|(words, _)| words).to_vec(),
        series: document.policies.iter().map(series).collect(),
        base: RANGE.0,
        range: RANGE,
        ticks: TICKS.map(|at| (at, format!("{at:.1}"))).to_vec(),
    }
    .write(path)
}

fn series(own: &OfPolicy) -> Series {
    let bar = |(_, of): (&str, fn(&OfSeed) -> f64)| {
        let seeds = || own.by_seed.iter().map(of);
        Bar {
            mean: seeds().sum::<f64>() / own.by_seed.len().max(1) as f64,
            lowest: seeds().fold(f64::MAX, f64::min),
            highest: seeds().fold(f64::MIN, f64::max),
        }
    };
    Series {
        name: format!("{} ({:.1} %)", own.name, 100.0 * own.figures.copies_share),
        bars: DRAWN.map(bar).to_vec(),
    }
}
