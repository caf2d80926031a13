//! What each way adds, and what it can do, as bars with the least and the most of all rounds.

use super::figures::{Middle, Summary};
use crate::bench::text;

const WIDTH: f64 = 760.0;
/// Of a panel.
const HEIGHT: f64 = 190.0;
/// Left of the bars, for their names.
const LEFT: f64 = 90.0;
const RIGHT: f64 = 90.0;
const BAR: f64 = 22.0;

struct Panel {
    title: &'static str,
    bars: Vec<(&'static str, Middle)>,
}

impl Panel {
    fn of(
        title: &'static str,
        ways: &[Summary],
        figure: impl Fn(&Summary) -> Option<Middle>,
    ) -> Self {
        let bars = ways.iter().filter_map(|way| Some((way.way, figure(way)?)));
        Self {
            title,
            bars: bars.collect(),
        }
    }

    /// From `down` pixels below the top.
    fn draw(&self, down: f64) -> String {
        let most = self.bars.iter().map(|bar| bar.1.high).fold(0.0, f64::max);
        let most = if most > 0.0 { most } else { 1.0 };
        // What a way seems to win over the direct one is noise: its bar has no length, its figure stands beside it.
        let x = |value: f64| LEFT + value.max(0.0) / most * (WIDTH - LEFT - RIGHT);
        let mut svg = text(4.0, down + 20.0, "black", self.title);
        for (place, (way, of)) in (0_u32..).zip(&self.bars) {
            let y = down + 32.0 + f64::from(place) * (BAR + 14.0);
            let middle = y + BAR / 2.0;
            svg += &text(4.0, middle + 4.0, "black", way);
            svg += &format!(
                "<rect x=\"{LEFT:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR:.1}\" fill=\"{}\"/>\n\
                 <line x1=\"{:.1}\" y1=\"{middle:.1}\" x2=\"{:.1}\" y2=\"{middle:.1}\" stroke=\"black\"/>\n",
                x(of.median) - LEFT,
                colour(way),
                x(of.low),
                x(of.high),
            );
            svg += &text(
                x(of.high) + 6.0,
                middle + 4.0,
                "black",
                &format!("{:.2}", of.median),
            );
        }
        svg
    }
}

fn colour(way: &str) -> &'static str {
    match way {
        super::arms::FOREGATE => "#3b6fd4",
        super::arms::DIRECT => "#b0b0b0",
        _ => "#d49a3b",
    }
}

/// The whole picture as SVG.
pub(super) fn draw(ways: &[Summary]) -> String {
    let panels = [
        Panel::of("added to the first token, p99, ms", ways, |way| {
            Some(way.first?.p99)
        }),
        Panel::of("added to an answer in one piece, p99, ms", ways, |way| {
            Some(way.whole?.p99)
        }),
        Panel::of("streams per second", ways, |way| Some(way.per_second)),
        Panel::of(
            "processor milliseconds of the gateway per stream",
            ways,
            |way| way.cpu_ms,
        ),
    ];
    let height = HEIGHT * panels.len() as f64;
    let drawn: String = (0_u32..)
        .zip(&panels)
        .map(|(place, panel)| panel.draw(f64::from(place) * HEIGHT))
        .collect();
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{drawn}</svg>\n"
    )
}
