//! How speed grows: decode against batch and against context, prefill against prompt length, each with its limit.
//!
//! plotters draws shapes only: its text needs fonts of the machine, so words are written into the SVG here.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::{
    BLACK, BLUE, ChartBuilder, Circle, DrawingArea, IntoDrawingArea, LineSeries, PathElement,
    RED, SVGBackend, WHITE,
};
use plotters::style::Color;

use super::figures::Figures;
use crate::bench::plot::text;
use crate::error::CliError;

/// Of one panel.
const SIZE: (u32, u32) = (420, 320);
const MARGIN: u32 = 48;

/// A figure at one size of the load.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Point {
    at: u32,
    measured: f64,
    limit: Option<f64>,
}

/// One of the plots.
#[derive(Debug, PartialEq)]
struct Panel {
    title: String,
    points: Vec<Point>,
}

impl Panel {
    /// Highest value of all lines, with room above.
    fn top(&self) -> f64 {
        let values = self
            .points
            .iter()
            .flat_map(|point| [Some(point.measured), point.limit]);
        values.flatten().fold(1.0, f64::max) * 1.08
    }

    /// The least and the greatest size as powers of two, a little apart.
    fn ends(&self) -> (f64, f64) {
        let of = |point: &Point| f64::from(point.at).log2();
        let low = self.points.iter().map(of).fold(f64::INFINITY, f64::min);
        let high = self.points.iter().map(of).fold(low, f64::max);
        (low, high.max(low + 1.0))
    }
}

/// What a run can show; a plot of fewer than two sizes is left out.
fn panels(figures: &Figures) -> Vec<Panel> {
    let decode = &figures.decode;
    let (context, batch) = decode
        .first()
        .map_or((0, 0), |first| (first.context, first.batch));
    let of = |decode: &super::figures::Decode, at| Point {
        at,
        measured: decode.tokens_per_second,
        limit: Some(decode.limit_tokens_per_second),
    };
    let by_batch = decode.iter().filter(|d| d.context == context);
    let by_context = decode.iter().filter(|d| d.batch == batch);
    let mut panels = vec![
        Panel {
            title: format!("decode, tokens/s against batch (context {context})"),
            points: by_batch.map(|d| of(d, d.batch)).collect(),
        },
        Panel {
            title: format!("decode, tokens/s against context (batch {batch})"),
            points: by_context.map(|d| of(d, d.context)).collect(),
        },
    ];
    let mut counts: Vec<u32> = figures.prefill.iter().map(|p| p.prompts).collect();
    counts.dedup();
    for count in counts {
        let points = figures.prefill.iter().filter(|p| p.prompts == count);
        panels.push(Panel {
            title: format!("prefill, tokens/s against prompt length (prompts: {count})"),
            points: points
                .map(|p| Point {
                    at: p.tokens,
                    measured: p.tokens_per_second,
                    limit: p.limit(),
                })
                .collect(),
        });
    }
    for panel in &mut panels {
        panel.points.sort_by_key(|point| point.at);
    }
    panels.retain(|panel| panel.points.len() > 1);
    panels
}

/// Writes the plots of a run, side by side.
///
/// # Errors
/// When no figure was measured at two sizes, or the file cannot be written.
pub(super) fn write(path: &Path, figures: &Figures) -> Result<(), CliError> {
    let what = format!("plot {}", path.display());
    let panels = panels(figures);
    if panels.is_empty() {
        return Err(CliError::Usage(
            "--svg: nothing was measured at two sizes; give several of --batch, --context or --prefill".to_owned(),
        ));
    }
    let mut svg = String::new();
    draw(&mut svg, &panels).map_err(|error| CliError::Runtime(format!("{what}: {error}")))?;
    let end = svg.rfind("</svg>").unwrap_or(svg.len());
    let words: String = panels.iter().zip(0..).map(|(p, at)| words(p, at)).collect();
    svg.insert_str(end, &words);
    std::fs::write(path, svg).map_err(|error| CliError::runtime(&what, &error))
}

fn draw(svg: &mut String, panels: &[Panel]) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let width = SIZE.0 * u32::try_from(panels.len()).unwrap_or(1);
    let area = SVGBackend::with_string(svg, (width, SIZE.1)).into_drawing_area();
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    for (area, panel) in area.split_evenly((1, panels.len())).iter().zip(panels) {
        draw_panel(area, panel)?;
    }
    area.present().map_err(|e| failed(&e))
}

fn draw_panel(area: &DrawingArea<SVGBackend<'_>, Shift>, panel: &Panel) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let ((low, high), top) = (panel.ends(), panel.top());
    let mut chart = ChartBuilder::on(area)
        .margin(MARGIN)
        .build_cartesian_2d(low..high, 0.0..top)
        .map_err(|e| failed(&e))?;
    let frame = vec![(low, top), (low, 0.0), (high, 0.0)];
    let frame = PathElement::new(frame, BLACK.stroke_width(1));
    chart.draw_series([frame]).map_err(|e| failed(&e))?;
    let measured = |point: &Point| (f64::from(point.at).log2(), point.measured);
    let limit = |point: &Point| Some((f64::from(point.at).log2(), point.limit?));
    let limits = panel.points.iter().filter_map(limit);
    chart
        .draw_series(LineSeries::new(limits, RED.stroke_width(2)))
        .map_err(|e| failed(&e))?;
    let line = panel.points.iter().map(measured);
    chart
        .draw_series(LineSeries::new(line.clone(), BLUE.stroke_width(2)))
        .map_err(|e| failed(&e))?;
    chart
        .draw_series(line.map(|at| Circle::new(at, 3, BLUE.filled())))
        .map_err(|e| failed(&e))?;
    Ok(())
}

fn words(panel: &Panel, number: u32) -> String {
    let left = f64::from(SIZE.0 * number);
    let (margin, height) = (f64::from(MARGIN), f64::from(SIZE.1));
    let ((low, high), top) = (panel.ends(), panel.top());
    let mut texts = vec![
        text(left + 8.0, 18.0, "black", &panel.title),
        text(left + 8.0, 34.0, "blue", "measured"),
        text(
            left + 70.0,
            34.0,
            "red",
            "limit by memory, for prefill also by arithmetic",
        ),
        text(left + 4.0, margin + 4.0, "black", &format!("{top:.0}")),
        text(left + 4.0, height - margin, "black", "0"),
    ];
    for point in &panel.points {
        let along = (f64::from(point.at).log2() - low) / (high - low);
        let x = left + margin + along * (f64::from(SIZE.0) - 2.0 * margin);
        texts.push(text(x - 8.0, height - 30.0, "black", &point.at.to_string()));
    }
    texts.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panel_spans_its_sizes_and_both_lines() {
        let point = |at, measured, limit| Point {
            at,
            measured,
            limit,
        };
        let panel = Panel {
            title: "a < b".to_owned(),
            points: vec![point(1, 50.0, Some(100.0)), point(64, 80.0, None)],
        };
        assert_eq!((panel.ends(), panel.top()), ((0.0, 6.0), 108.0));
        let mut svg = String::new();
        draw(&mut svg, &[panel]).unwrap();
        assert!(
            svg.matches("<circle").count() == 2 && svg.contains("<polyline"),
            "{svg}"
        );
    }
}
