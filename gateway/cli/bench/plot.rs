//! The record of a rebalance as SVG: imbalance as a line, epochs and phases as verticals, and the imbalance of
//! another run for comparison.
//!
//! plotters draws shapes only: its text needs fonts of the machine, so words are written into the SVG here.

use std::path::Path;

use plotters::prelude::{
    BLACK, BLUE, ChartBuilder, GREEN, IntoDrawingArea, LineSeries, PathElement, RED,
    SVGBackend, WHITE,
};
use plotters::style::{Color, RGBColor};

use super::record::Record;
use crate::error::CliError;

const SIZE: (u32, u32) = (960, 360);
const MARGIN: u32 = 48;
const GREY: RGBColor = RGBColor(160, 160, 160);

/// Where the plot's values lie.
struct Range {
    seconds: f64,
    top: f64,
}

impl Range {
    fn of(record: &Record, baseline: Option<&Record>) -> Self {
        let seconds = record
            .samples
            .last()
            .map_or(1.0, |sample| sample.seconds.max(1.0));
        let compared = baseline.into_iter().flat_map(|run| &run.samples);
        let samples = record.samples.iter().chain(compared);
        let figures = samples.filter_map(|sample| sample.imbalance);
        Self {
            seconds,
            top: figures.fold(1.5, f64::max) * 1.05,
        }
    }

    fn x(&self, seconds: f64) -> f64 {
        let width = f64::from(SIZE.0 - 2 * MARGIN);
        f64::from(MARGIN) + seconds / self.seconds * width
    }

    fn y(&self, imbalance: f64) -> f64 {
        let height = f64::from(SIZE.1 - 2 * MARGIN);
        f64::from(SIZE.1 - MARGIN) - (imbalance - 1.0) / (self.top - 1.0) * height
    }
}

/// Writes the plot.
pub(super) fn write(
    path: &Path,
    record: &Record,
    baseline: Option<&Record>,
) -> Result<(), CliError> {
    let what = format!("plot {}", path.display());
    let range = Range::of(record, baseline);
    let mut svg = String::new();
    draw(&mut svg, record, baseline, &range)
        .map_err(|error| CliError::Runtime(format!("{what}: {error}")))?;
    let end = svg.rfind("</svg>").unwrap_or(svg.len());
    svg.insert_str(end, &words(record, &range));
    std::fs::write(path, svg).map_err(|error| CliError::runtime(&what, &error))
}

fn draw(
    svg: &mut String,
    record: &Record,
    baseline: Option<&Record>,
    range: &Range,
) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .margin(MARGIN)
        .build_cartesian_2d(0.0..range.seconds, 1.0..range.top)
        .map_err(|e| failed(&e))?;
    let frame = [(0.0, range.top), (0.0, 1.0), (range.seconds, 1.0)];
    let mut lines = vec![PathElement::new(frame.to_vec(), BLACK.stroke_width(1))];
    let vertical = |x: f64| vec![(x, 1.0), (x, range.top)];
    for phase in &record.phases {
        lines.push(PathElement::new(
            vertical(phase.seconds),
            GREY.stroke_width(1),
        ));
    }
    for (seconds, _) in switches(record) {
        lines.push(PathElement::new(
            vertical(seconds),
            RED.mix(0.5).stroke_width(1),
        ));
    }
    chart.draw_series(lines).map_err(|e| failed(&e))?;
    for (of, colour) in [(baseline, GREEN), (Some(record), BLUE)] {
        let samples = of.into_iter().flat_map(|record| &record.samples);
        let points = samples
            .filter_map(|sample| Some((sample.seconds, sample.imbalance?)))
            .filter(|(seconds, _)| *seconds <= range.seconds);
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))
            .map_err(|e| failed(&e))?;
    }
    area.present().map_err(|e| failed(&e))
}

/// Moments at which another epoch was seen.
fn switches(record: &Record) -> Vec<(f64, u64)> {
    let pairs = record.samples.windows(2);
    pairs
        .filter(|pair| pair[0].epoch != pair[1].epoch)
        .map(|pair| (pair[1].seconds, pair[1].epoch))
        .collect()
}

fn words(record: &Record, range: &Range) -> String {
    let mut texts = vec![
        text(
            f64::from(MARGIN),
            20.0,
            "black",
            "expert imbalance (most rows of a rank / mean), mean over layers; green: the run compared with; red: a new epoch; grey: the mix shifts",
        ),
        text(4.0, range.y(1.0), "black", "1.0"),
        text(
            4.0,
            range.y(range.top) + 10.0,
            "black",
            &format!("{:.2}", range.top),
        ),
        text(
            range.x(range.seconds) - 24.0,
            f64::from(SIZE.1) - 12.0,
            "black",
            &format!("{:.0} s", range.seconds),
        ),
    ];
    for phase in &record.phases {
        texts.push(text(
            range.x(phase.seconds) + 3.0,
            f64::from(SIZE.1) - 30.0,
            "grey",
            &phase.kind,
        ));
    }
    for (seconds, epoch) in switches(record) {
        texts.push(text(
            range.x(seconds) + 2.0,
            36.0,
            "red",
            &epoch.to_string(),
        ));
    }
    texts.concat()
}

/// A line of text for an SVG.
pub(crate) fn text(x: f64, y: f64, colour: &str, words: &str) -> String {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    format!(
        "<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"{colour}\" font-family=\"sans-serif\" font-size=\"11\">{words}</text>\n"
    )
}
