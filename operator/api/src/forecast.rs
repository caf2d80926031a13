//! A forecast: what a gateway expects experts to be asked for, by the requests that it has admitted.

use serde::{Deserialize, Serialize};

/// What the shares of a layer sum up to, but for rounding.
pub const WHOLE: u16 = u16::MAX;

/// Rows that a gateway's admitted requests will ask of each expert within the horizon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forecast {
    /// Number of the forecast of this gateway, from 1; a reader uses it to tell a new one from one that stands still.
    pub sequence: u64,
    /// How far it looks ahead, in milliseconds.
    pub horizon_ms: u64,
    /// Rows of a layer that are expected within the horizon and whose experts are known.
    pub rows: u64,
    /// Part of all rows expected within the horizon whose experts are known, from 0 to 1.
    pub confidence: f64,
    /// `shares[l][e]`: expert `e`'s part of the rows of MoE layer `l`, in parts of [`WHOLE`]. Empty if nothing is known.
    pub shares: Vec<Vec<u16>>,
}

impl Forecast {
    /// A forecast of `counts`, `[layer][expert]` in any unit, whose `rows` of a layer are `confidence` of all.
    #[must_use]
    pub fn of(horizon_ms: u64, rows: f64, confidence: f64, counts: &[Vec<f64>]) -> Self {
        let share = |row: &Vec<f64>| -> Vec<u16> {
            let sum: f64 = row.iter().sum();
            let part = |count: &f64| {
                let part = if sum > 0.0 { count / sum } else { 0.0 };
                // In [0, WHOLE], whatever the counts are.
                (part * f64::from(WHOLE)).round() as u16
            };
            row.iter().map(part).collect()
        };
        Self {
            sequence: 0,
            horizon_ms,
            rows: rows.max(0.0).round() as u64,
            confidence: if confidence.is_finite() {
                confidence.clamp(0.0, 1.0)
            } else {
                0.0
            },
            shares: counts.iter().map(share).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_become_shares_of_a_layer() {
        let counts = [vec![3.0, 1.0], vec![0.0, 0.0]];
        let forecast = Forecast::of(2000, 8.4, 0.5, &counts);
        assert_eq!(forecast.shares, [[49_151, 16_384], [0, 0]]);
        assert_eq!((forecast.rows, forecast.horizon_ms), (8, 2000));
    }

    #[test]
    fn what_is_no_number_is_nothing() {
        let forecast = Forecast::of(1, f64::NAN, f64::NAN, &[vec![f64::NAN, 1.0]]);
        assert_eq!((forecast.rows, forecast.shares[0][0]), (0, 0));
        assert!(forecast.confidence.abs() < 1e-9);
    }
}
