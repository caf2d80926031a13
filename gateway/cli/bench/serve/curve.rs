//! Latency and throughput against the offered rate, as SVG: two panels over one axis.

use std::path::Path;

use plotters::prelude::{
    BLACK, BLUE, ChartBuilder, DrawingArea, GREEN, IntoDrawingArea, LineSeries, PathElement,
    RED, SVGBackend, WHITE,
};
use plotters::style::{Color, RGBColor};

use super::figures::Figures;
use crate::bench::plot::text;
use crate::error::CliError;

const SIZE: (u32, u32) = (760, 640);
/// Height of a panel.
const PANEL: u32 = 320;
const MARGIN: u32 = 56;

/// One line of a panel.
struct Line {
    name: &'static str,
    colour: RGBColor,
    points: Vec<(f64, f64)>,
}

impl Line {
    fn of(
        runs: &[Figures],
        name: &'static str,
        colour: RGBColor,
        y: impl Fn(&Figures) -> Option<f64>,
    ) -> Self {
        let point = |run: &Figures| Some((run.offered_per_second?, y(run)?));
        let mut points: Vec<(f64, f64)> = runs.iter().filter_map(point).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Self {
            name,
            colour,
            points,
        }
    }
}

/// Lines over a common axis.
struct Panel {
    title: &'static str,
    lines: Vec<Line>,
    right: f64,
    top: f64,
}

impl Panel {
    fn new(title: &'static str, lines: Vec<Line>) -> Self {
        let points = || lines.iter().flat_map(|line| &line.points);
        let right = points().map(|point| point.0).fold(0.0, f64::max) * 1.05;
        let top = points().map(|point| point.1).fold(0.0, f64::max) * 1.05;
        // A panel without a point still has an axis.
        let some = |most: f64| if most > 0.0 { most } else { 1.0 };
        Self {
            title,
            right: some(right),
            top: some(top),
            lines,
        }
    }
}

/// Writes the plot.
pub(super) fn write(path: &Path, runs: &[Figures]) -> Result<(), CliError> {
    let what = format!("plot {}", path.display());
    let svg =
        draw(&panels(runs)).map_err(|error| CliError::Runtime(format!("{what}: {error}")))?;
    std::fs::write(path, svg).map_err(|error| CliError::runtime(&what, &error))
}

fn panels(runs: &[Figures]) -> [Panel; 2] {
    let ttft = |run: &Figures| run.time_to_first_token_ms;
    let latency = vec![
        Line::of(runs, "first token, p50", BLUE, |run| Some(ttft(run).p50)),
        Line::of(runs, "first token, p99", RED, |run| Some(ttft(run).p99)),
        Line::of(runs, "between tokens, p99", GREEN, |run| {
            Some(run.inter_token_latency_ms.p99)
        }),
    ];
    let rates = vec![
        Line::of(runs, "answered", BLUE, |run| Some(run.requests_per_second)),
        Line::of(runs, "within the objective", GREEN, |run| {
            run.goodput_per_second
        }),
    ];
    [
        Panel::new("milliseconds against offered requests/s", latency),
        Panel::new("requests/s against offered requests/s", rates),
    ]
}

fn draw(panels: &[Panel; 2]) -> Result<String, String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(|error| error.to_string())?;
        let (above, below) = area.split_vertically(PANEL);
        shapes(&above, &panels[0])?;
        shapes(&below, &panels[1])?;
        area.present().map_err(|error| error.to_string())?;
    }
    let words: String = panels
        .iter()
        .zip([0.0, f64::from(PANEL)])
        .map(|(panel, down)| words(panel, down))
        .collect();
    let end = svg.rfind("</svg>").unwrap_or(svg.len());
    svg.insert_str(end, &words);
    Ok(svg)
}

fn shapes(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    panel: &Panel,
) -> Result<(), String> {
    let mut chart = ChartBuilder::on(area)
        .margin(MARGIN)
        .build_cartesian_2d(0.0..panel.right, 0.0..panel.top)
        .map_err(|error| error.to_string())?;
    let frame = vec![(0.0, panel.top), (0.0, 0.0), (panel.right, 0.0)];
    chart
        .draw_series([PathElement::new(frame, BLACK.stroke_width(1))])
        .map_err(|error| error.to_string())?;
    for line in &panel.lines {
        let points = line.points.iter().copied();
        chart
            .draw_series(LineSeries::new(points, line.colour.stroke_width(2)).point_size(3))
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// The words of a panel that begins `down` pixels below the top.
fn words(panel: &Panel, down: f64) -> String {
    let (left, bottom) = (f64::from(MARGIN), down + f64::from(PANEL - MARGIN));
    let mut words = vec![
        text(left, down + 20.0, "black", panel.title),
        text(
            4.0,
            down + left + 10.0,
            "black",
            &format!("{:.1}", panel.top),
        ),
        text(left - 16.0, bottom, "black", "0"),
        text(
            f64::from(SIZE.0 - MARGIN) - 12.0,
            bottom + 18.0,
            "black",
            &format!("{:.1}", panel.right),
        ),
    ];
    for (at, line) in (0..).zip(&panel.lines) {
        let RGBColor(r, g, b) = line.colour;
        let colour = format!("rgb({r},{g},{b})");
        let x = left + f64::from(at) * 170.0;
        words.push(text(x, down + 38.0, &colour, line.name));
    }
    words.concat()
}
