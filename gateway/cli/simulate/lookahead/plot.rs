//! The changes against the baseline as SVG: a group of bars per figure, a bar per policy with the range of the seeds.
//!
//! plotters draws shapes only: its text needs fonts of the machine, so words are written into the SVG here.

use std::path::Path;

use plotters::prelude::{
    BLACK, ChartBuilder, IntoDrawingArea, PathElement, Rectangle, SVGBackend, WHITE,
};
use plotters::style::{Color, RGBColor};

use super::figures::Change;
use super::report::Report;
use crate::bench::text;
use crate::error::CliError;

const SIZE: (u32, u32) = (960, 400);
const MARGIN: u32 = 56;
/// What is drawn, by its name in the report and its words.
const DRAWN: [(&str, &str); 5] = [
    ("distinct_experts", "distinct experts"),
    ("weight_bytes_per_token", "weight bytes per token"),
    ("time_per_token_ms_p50", "time per token p50"),
    ("wait_ms_p95", "wait p95"),
    ("latency_ms_p95", "latency p95"),
];
/// Percent at the bottom and the top; what goes further is cut.
const RANGE: (f64, f64) = (-45.0, 15.0);
const COLOURS: [RGBColor; 7] = [
    RGBColor(150, 150, 150),
    RGBColor(200, 170, 90),
    RGBColor(220, 120, 60),
    RGBColor(110, 170, 220),
    RGBColor(30, 90, 170),
    RGBColor(110, 180, 110),
    RGBColor(180, 110, 180),
];

/// Writes the plot.
pub(super) fn write(path: &Path, report: &Report) -> Result<(), CliError> {
    let what = format!("plot {}", path.display());
    let mut svg = String::new();
    draw(&mut svg, report).map_err(|error| CliError::Runtime(format!("{what}: {error}")))?;
    let end = svg.rfind("</svg>").unwrap_or(svg.len());
    svg.insert_str(end, &words(report));
    std::fs::write(path, svg).map_err(|error| CliError::runtime(&what, &error))
}

fn draw(svg: &mut String, report: &Report) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .margin(MARGIN)
        .build_cartesian_2d(0.0..DRAWN.len() as f64, RANGE.0..RANGE.1)
        .map_err(|e| failed(&e))?;
    let line = |points: &[(f64, f64)]| PathElement::new(points.to_vec(), BLACK.stroke_width(1));
    let compared = report.policies.iter().skip(1);
    let width = 0.9 / compared.clone().count().max(1) as f64;
    for (at, own) in compared.enumerate() {
        for (group, (figure, _)) in DRAWN.iter().enumerate() {
            let Change {
                mean,
                lowest,
                highest,
            } = own.change_of(figure);
            let cut = |percent: f64| percent.clamp(RANGE.0, RANGE.1);
            let left = group as f64 + 0.05 + width * at as f64;
            let bar = Rectangle::new(
                [(left, 0.0), (left + 0.85 * width, cut(mean))],
                COLOURS[at % COLOURS.len()].filled(),
            );
            let middle = left + 0.42 * width;
            chart.draw_series([bar]).map_err(|e| failed(&e))?;
            chart
                .draw_series([line(&[(middle, cut(lowest)), (middle, cut(highest))])])
                .map_err(|e| failed(&e))?;
        }
    }
    let axes = [
        line(&[(0.0, 0.0), (DRAWN.len() as f64, 0.0)]),
        line(&[(0.0, RANGE.0), (0.0, RANGE.1)]),
    ];
    chart.draw_series(axes).map_err(|e| failed(&e))?;
    area.present().map_err(|e| failed(&e))
}

fn words(report: &Report) -> String {
    let base = report
        .policies
        .first()
        .map_or("", |own| own.policy.as_str());
    let mut texts = vec![text(
        f64::from(MARGIN),
        16.0,
        "black",
        &format!(
            "{}: change against {base} in percent, mean of {} seeds; thin lines: lowest and highest seed",
            report.setting,
            report.seeds.len()
        ),
    )];
    let y = |percent: f64| {
        let height = f64::from(SIZE.1 - 2 * MARGIN);
        f64::from(MARGIN) + (RANGE.1 - percent) / (RANGE.1 - RANGE.0) * height
    };
    for percent in [-40.0, -30.0, -20.0, -10.0, 0.0, 10.0] {
        texts.push(text(
            16.0,
            y(percent) + 4.0,
            "black",
            &format!("{percent:+.0}"),
        ));
    }
    let group = f64::from(SIZE.0 - 2 * MARGIN) / DRAWN.len() as f64;
    for (at, (_, word)) in DRAWN.iter().enumerate() {
        let x = f64::from(MARGIN) + group * (at as f64 + 0.1);
        texts.push(text(x, f64::from(SIZE.1) - 24.0, "black", word));
    }
    for (at, own) in report.policies.iter().skip(1).enumerate() {
        let RGBColor(red, green, blue) = COLOURS[at % COLOURS.len()];
        let x = f64::from(MARGIN) + 110.0 * at as f64;
        texts.push(text(
            x,
            36.0,
            &format!("rgb({red},{green},{blue})"),
            &own.policy,
        ));
    }
    texts.concat()
}
