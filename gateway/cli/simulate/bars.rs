//! Groups of bars as SVG, a bar per series with the range of its seeds.
//!
//! plotters draws shapes only: its text needs fonts of the machine, so words are written into the SVG here.

use std::path::Path;

use plotters::prelude::{
    BLACK, ChartBuilder, IntoDrawingArea, PathElement, Rectangle, SVGBackend, WHITE,
};
use plotters::style::{Color, RGBColor};

use crate::bench::text;
use crate::error::CliError;

const SIZE: (u32, u32) = (960, 400);
const MARGIN: u32 = 56;
/// Width of a letter of the legend, and of the gap after a word.
const LETTER: f64 = 6.2;
const GAP: f64 = 14.0;
const COLOURS: [RGBColor; 10] = [
    RGBColor(150, 150, 150),
    RGBColor(200, 170, 90),
    RGBColor(220, 120, 60),
    RGBColor(110, 170, 220),
    RGBColor(30, 90, 170),
    RGBColor(110, 180, 110),
    RGBColor(180, 110, 180),
    RGBColor(40, 130, 80),
    RGBColor(190, 50, 70),
    RGBColor(70, 70, 70),
];

/// One bar: its height, and the thin line of the lowest and the highest seed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bar {
    pub(crate) mean: f64,
    pub(crate) lowest: f64,
    pub(crate) highest: f64,
}

/// Bars of one colour.
#[derive(Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    /// One per group.
    pub(crate) bars: Vec<Bar>,
}

/// A plot.
#[derive(Debug)]
pub(crate) struct Bars {
    pub(crate) title: String,
    /// Words under the groups.
    pub(crate) groups: Vec<&'static str>,
    pub(crate) series: Vec<Series>,
    /// Where bars begin.
    pub(crate) base: f64,
    /// The bottom and the top; what goes further is cut.
    pub(crate) range: (f64, f64),
    /// Heights that are named, with their words.
    pub(crate) ticks: Vec<(f64, String)>,
}

impl Bars {
    /// Writes the plot.
    pub(crate) fn write(&self, path: &Path) -> Result<(), CliError> {
        let what = format!("plot {}", path.display());
        let mut svg = String::new();
        self.draw(&mut svg)
            .map_err(|error| CliError::Runtime(format!("{what}: {error}")))?;
        let end = svg.rfind("</svg>").unwrap_or(svg.len());
        svg.insert_str(end, &self.words());
        std::fs::write(path, svg).map_err(|error| CliError::runtime(&what, &error))
    }

    fn draw(&self, svg: &mut String) -> Result<(), String> {
        let failed = |error: &dyn std::fmt::Display| error.to_string();
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(|e| failed(&e))?;
        let (low, high) = self.range;
        let mut chart = ChartBuilder::on(&area)
            .margin(MARGIN)
            .build_cartesian_2d(0.0..self.groups.len() as f64, low..high)
            .map_err(|e| failed(&e))?;
        let line =
            |points: &[(f64, f64)]| PathElement::new(points.to_vec(), BLACK.stroke_width(1));
        let cut = |height: f64| height.clamp(low, high);
        let width = 0.9 / self.series.len().max(1) as f64;
        for (at, series) in self.series.iter().enumerate() {
            for (group, bar) in series.bars.iter().enumerate() {
                let left = group as f64 + 0.05 + width * at as f64;
                let middle = left + 0.42 * width;
                let drawn = Rectangle::new(
                    [(left, self.base), (left + 0.85 * width, cut(bar.mean))],
                    COLOURS[at % COLOURS.len()].filled(),
                );
                chart.draw_series([drawn]).map_err(|e| failed(&e))?;
                let seeds = line(&[(middle, cut(bar.lowest)), (middle, cut(bar.highest))]);
                chart.draw_series([seeds]).map_err(|e| failed(&e))?;
            }
        }
        let axes = [
            line(&[(0.0, self.base), (self.groups.len() as f64, self.base)]),
            line(&[(0.0, low), (0.0, high)]),
        ];
        chart.draw_series(axes).map_err(|e| failed(&e))?;
        area.present().map_err(|e| failed(&e))
    }

    fn words(&self) -> String {
        let mut texts = vec![text(f64::from(MARGIN), 16.0, "black", &self.title)];
        let (low, high) = self.range;
        let height = f64::from(SIZE.1 - 2 * MARGIN);
        for (at, word) in &self.ticks {
            let y = f64::from(MARGIN) + (high - at) / (high - low) * height;
            texts.push(text(16.0, y + 4.0, "black", word));
        }
        let wide = f64::from(SIZE.0 - 2 * MARGIN);
        let group = wide / self.groups.len().max(1) as f64;
        for (at, word) in self.groups.iter().enumerate() {
            let x = f64::from(MARGIN) + group * (at as f64 + 0.1);
            texts.push(text(x, f64::from(SIZE.1) - 24.0, "black", word));
        }
        let longest = self.series.iter().map(|own| own.name.len()).max();
        let column = longest.unwrap_or(0) as f64 * LETTER + GAP;
        let columns = ((wide / column) as usize).max(1);
        for (at, own) in self.series.iter().enumerate() {
            let RGBColor(red, green, blue) = COLOURS[at % COLOURS.len()];
            let x = f64::from(MARGIN) + column * (at % columns) as f64;
            let y = 32.0 + 14.0 * (at / columns) as f64;
            texts.push(text(x, y, &format!("rgb({red},{green},{blue})"), &own.name));
        }
        texts.concat()
    }
}
