//! Percentiles.

use serde::Serialize;

/// Percentiles of a set of figures.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub(super) struct Spread {
    /// How many.
    pub(super) count: usize,
    /// Mean.
    pub(super) mean: f64,
    /// Median.
    pub(super) p50: f64,
    /// 90 of 100 are not above.
    pub(super) p90: f64,
    /// 95 of 100 are not above.
    pub(super) p95: f64,
    /// 99 of 100 are not above.
    pub(super) p99: f64,
    /// The largest.
    pub(super) max: f64,
}

impl Spread {
    /// By the nearest-rank rule: every percentile is a figure that occurred.
    pub(super) fn of(mut figures: Vec<f64>) -> Self {
        if figures.is_empty() {
            return Self::default();
        }
        figures.sort_by(f64::total_cmp);
        let count = figures.len();
        let at = |percent: usize| figures[(count * percent).div_ceil(100).max(1) - 1];
        Self {
            count,
            mean: figures.iter().sum::<f64>() / count as f64,
            p50: at(50),
            p90: at(90),
            p95: at(95),
            p99: at(99),
            max: figures[count - 1],
        }
    }

    /// One line in milliseconds.
    pub(super) fn line(&self, name: &str) -> String {
        format!(
            "{name:<22} mean {:>8.2}  p50 {:>8.2}  p90 {:>8.2}  p95 {:>8.2}  p99 {:>8.2}  max {:>8.2} ms",
            self.mean, self.p50, self.p90, self.p95, self.p99, self.max
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_figures_that_occurred() {
        let spread = Spread::of((1..=200).rev().map(f64::from).collect());
        assert_eq!(
            (spread.p50, spread.p90, spread.p95, spread.p99, spread.max),
            (100.0, 180.0, 190.0, 198.0, 200.0)
        );
        assert_eq!(Spread::of(vec![3.0]).p99, 3.0);
        assert_eq!(Spread::of(Vec::new()).count, 0);
    }
}
