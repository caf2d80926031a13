//! All blocks as a table, as JSON and as a plot.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::arm::Arm;
use super::block::{Block, Line};
use super::cluster::Said;
use super::figures::{FIGURES, Figure};
use super::headroom::Kinds;
use super::interval::{Change, compare, whole};
use crate::error::CliError;
use crate::simulate::bars::{Bar, Bars, Series};

/// Percent at the bottom and the top of the plot.
const RANGE: (f64, f64) = (-30.0, 30.0);
const TICKS: [f64; 7] = [-30.0, -20.0, -10.0, 0.0, 10.0, 20.0, 30.0];
/// What is drawn.
const DRAWN: [&str; 6] = [
    "experts_per_step",
    "experts_per_token",
    "tokens_per_second",
    "time_per_token_ms_p50",
    "first_token_ms_p95",
    "latency_ms_p95",
];

/// What was run.
#[derive(Debug, Serialize)]
pub(super) struct Settings {
    pub(super) model: String,
    pub(super) workers: u32,
    pub(super) redundant_slots: u32,
    pub(super) places: u32,
    /// Sequences in a worker's batch; absent: more than its share of the places.
    pub(super) batch: Option<u32>,
    pub(super) overtake_ms: u64,
    /// Part of the measured capacity; absent if the rate was given.
    pub(super) load: Option<f64>,
    pub(super) requests_per_second: f64,
    pub(super) requests: u32,
    pub(super) rounds: u32,
    pub(super) prompt_tokens: String,
    pub(super) output_tokens: String,
    pub(super) seed: u64,
}

/// One arm over all its blocks.
#[derive(Debug, Serialize)]
struct OfArm {
    arm: String,
    /// Answered requests that count.
    requests: usize,
    failed: usize,
    failures: Vec<String>,
    figures: BTreeMap<&'static str, Change>,
    gateway: Said,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    settings: Settings,
    /// Experts that batches of one kind of text use less than mixed ones as large as the baseline's, as a part; absent
    /// without a record of the model's kinds.
    headroom: Option<f64>,
    /// Answers of which some arm gave another one than the baseline.
    differing_answers: usize,
    compared_answers: usize,
    arms: Vec<OfArm>,
    /// In the order in which they ran.
    blocks: Vec<Line>,
}

impl Report {
    pub(super) fn of(
        settings: Settings,
        arms: &[Arm],
        blocks: &[Block],
        gateways: Vec<Said>,
        kinds: Option<Kinds>,
    ) -> Self {
        let of = |arm: usize| -> Vec<&Block> {
            blocks.iter().filter(|block| block.arm == arm).collect()
        };
        let base = of(0);
        let batch = FIGURES.iter().find(|figure| figure.name == "batch");
        let batch = batch.and_then(|figure| whole(figure, &base));
        let (differing_answers, compared_answers) = differing(blocks);
        let arms: Vec<OfArm> = arms
            .iter()
            .zip(gateways)
            .enumerate()
            .map(|(at, (arm, gateway))| OfArm::of(*arm, &of(at), &base, gateway))
            .collect();
        Self {
            headroom: batch.and_then(|batch| kinds?.headroom(batch)),
            settings,
            differing_answers,
            compared_answers,
            blocks: blocks.iter().map(|block| line(block, &arms)).collect(),
            arms,
        }
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let settings = &self.settings;
        let mut lines = vec![format!(
            "{} workers, {} places, {:.2} requests/s{}; {} of {} answers differ from the baseline's{}",
            settings.workers,
            settings.places,
            settings.requests_per_second,
            settings
                .load
                .map_or(String::new(), |load| format!(" ({load} of the capacity)")),
            self.differing_answers,
            self.compared_answers,
            self.headroom.map_or(String::new(), |headroom| format!(
                "; headroom {:.1} %",
                100.0 * headroom
            )),
        )];
        let names: Vec<&str> = self.arms.iter().map(|own| own.arm.as_str()).collect();
        lines.push(format!("| figure | {} |", names.join(" | ")));
        lines.push(format!("|---|{}", "---|".repeat(names.len())));
        for figure in &FIGURES {
            let cells = self
                .arms
                .iter()
                .enumerate()
                .map(|(at, own)| own.cell(figure, at == 0));
            let cells: Vec<String> = cells.collect();
            lines.push(format!("| {} | {} |", figure.words, cells.join(" | ")));
        }
        for own in self.arms.iter().filter(|own| own.failed > 0) {
            lines.push(format!(
                "{}: {} failed, such as {:?}",
                own.arm, own.failed, own.failures
            ));
        }
        lines.join("\n")
    }

    /// Writes the plot.
    pub(super) fn draw(&self, path: &Path) -> Result<(), CliError> {
        let drawn = DRAWN.map(|name| FIGURES.iter().find(|figure| figure.name == name));
        let drawn: Vec<&Figure> = drawn.into_iter().flatten().collect();
        let base = self.arms.first().map_or("", |own| own.arm.as_str());
        Bars {
            title: format!("change against {base} in percent; thin lines: 95 % intervals"),
            groups: drawn.iter().map(|figure| figure.words).collect(),
            series: self
                .arms
                .iter()
                .skip(1)
                .map(|own| own.series(&drawn))
                .collect(),
            base: 0.0,
            range: RANGE,
            ticks: TICKS.map(|at| (at, format!("{at:+.0}"))).to_vec(),
        }
        .write(path)
    }
}

impl OfArm {
    fn of(arm: Arm, own: &[&Block], base: &[&Block], gateway: Said) -> Self {
        let failures = || own.iter().flat_map(|block| &block.failures);
        let figures = FIGURES
            .iter()
            .filter_map(|figure| Some((figure.name, compare(figure, own, base)?)));
        Self {
            arm: arm.to_string(),
            requests: own.iter().map(|block| block.requests.len()).sum(),
            failed: failures().count(),
            failures: failures().take(3).cloned().collect(),
            figures: figures.collect(),
            gateway,
        }
    }

    fn cell(&self, figure: &Figure, is_base: bool) -> String {
        let Some(change) = self.figures.get(figure.name) else {
            return "–".to_owned();
        };
        let value = match change.value {
            large if large >= 100.0 => format!("{large:.0}"),
            small => format!("{small:.2}"),
        };
        if is_base {
            return value;
        }
        let percent = |part: f64| 100.0 * part;
        format!(
            "{value}: {:+.1} % ({:+.1} to {:+.1})",
            percent(change.change),
            percent(change.low),
            percent(change.high)
        )
    }

    fn series(&self, drawn: &[&Figure]) -> Series {
        let bar = |figure: &&Figure| {
            let change = self.figures.get(figure.name);
            let of = |part: fn(&Change) -> f64| change.map_or(0.0, part) * 100.0;
            Bar {
                mean: of(|change| change.change),
                lowest: of(|change| change.low),
                highest: of(|change| change.high),
            }
        };
        Series {
            name: self.arm.clone(),
            bars: drawn.iter().map(bar).collect(),
        }
    }
}

/// Answers that differ from those that the first arm gave to the same prompt, and how many were compared.
fn differing(blocks: &[Block]) -> (usize, usize) {
    let (mut differing, mut compared) = (0, 0);
    for block in blocks.iter().filter(|block| block.arm != 0) {
        let same = |other: &&Block| other.arm == 0 && other.half == block.half;
        let Some(base) = blocks.iter().find(same) else {
            continue;
        };
        for pair in block.answers.iter().zip(&base.answers) {
            if let (Some(own), Some(base)) = pair {
                compared += 1;
                differing += usize::from(own != base);
            }
        }
    }
    (differing, compared)
}

fn line(block: &Block, arms: &[OfArm]) -> Line {
    let figure = |name: &str| {
        let figure = FIGURES.iter().find(|figure| figure.name == name);
        figure
            .and_then(|figure| whole(figure, &[block]))
            .unwrap_or(0.0)
    };
    Line {
        arm: arms
            .get(block.arm)
            .map_or(String::new(), |own| own.arm.clone()),
        half: block.half,
        seconds: block.seconds,
        experts_per_step: figure("experts_per_step"),
        batch: figure("batch"),
        latency_ms_p95: figure("latency_ms_p95"),
        failed: block.failures.len(),
        prefix_hits: block.counted.prefix_hits,
    }
}
