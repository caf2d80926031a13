//! Gateways' forecasts → what the planner's demand expects of the next window. Pure.
//!
//! The forecasts of all gateways are summed by their rows. Rows whose experts no gateway knows are taken to be like the
//! load of the last windows, so that a gateway that knows little says little.

use std::collections::BTreeMap;
use std::sync::Arc;

use foregate_api::forecast::{Forecast, WHOLE};

/// Closes of a window after which a forecast that did not change is left out: its gateway stands still.
const STALE: u32 = 2;

/// Forecasts that were seen, and for how many closes each has stood still.
#[derive(Debug, Default)]
pub(crate) struct Foretold {
    seen: BTreeMap<i64, (u64, u32)>,
}

/// The forecasts of all gateways in one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Combined {
    /// Expected rows, `[layer][expert]`.
    pub(crate) rows: Vec<Vec<f64>>,
    /// Part of all expected rows whose experts are known, in (0, 1].
    pub(crate) confidence: f64,
    /// Gateways that said something.
    pub(crate) gateways: usize,
}

impl Foretold {
    /// The forecasts of `layers × experts` that are new; `None` if they say nothing. To be called once per close.
    pub(crate) fn combine(
        &mut self,
        forecasts: &BTreeMap<i64, Arc<Forecast>>,
        layers: usize,
        experts: usize,
    ) -> Option<Combined> {
        self.seen
            .retain(|gateway, _| forecasts.contains_key(gateway));
        let mut sum = Combined {
            rows: vec![vec![0.0; experts]; layers],
            confidence: 0.0,
            gateways: 0,
        };
        let (mut known, mut all) = (0.0, 0.0);
        for (gateway, forecast) in forecasts {
            if self.stands_still(*gateway, forecast.sequence)
                || !says(forecast, layers, experts)
            {
                continue;
            }
            let rows = forecast.rows as f64;
            known += rows;
            all += rows / forecast.confidence;
            sum.gateways += 1;
            for (sum, shares) in sum.rows.iter_mut().zip(&forecast.shares) {
                for (sum, share) in sum.iter_mut().zip(shares) {
                    *sum += rows * f64::from(*share) / f64::from(WHOLE);
                }
            }
        }
        sum.confidence = known / all;
        (sum.gateways > 0).then_some(sum)
    }

    fn stands_still(&mut self, gateway: i64, sequence: u64) -> bool {
        let (last, closes) = self.seen.entry(gateway).or_insert((sequence, 0));
        if *last == sequence {
            *closes = closes.saturating_add(1);
        } else {
            (*last, *closes) = (sequence, 1);
        }
        *closes > STALE
    }
}

/// Whether it is of this model and knows something.
fn says(forecast: &Forecast, layers: usize, experts: usize) -> bool {
    forecast.rows > 0
        && forecast.confidence > 0.0
        && forecast.shares.len() == layers
        && forecast.shares.iter().all(|row| row.len() == experts)
}

impl Combined {
    /// What the next window is expected to ask for: the forecast for the rows that are known, `base` for the others.
    pub(crate) fn over(&self, base: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let row = |(own, base): (&Vec<f64>, &Vec<f64>)| {
            let (expected, seen): (f64, f64) = (own.iter().sum(), base.iter().sum());
            if expected <= 0.0 || seen <= 0.0 {
                return own.clone();
            }
            let (ours, theirs) = (self.confidence / expected, (1.0 - self.confidence) / seen);
            own.iter()
                .zip(base)
                .map(|(own, base)| ours * own + theirs * base)
                .collect()
        };
        self.rows.iter().zip(base).map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(of: &[(i64, Forecast)]) -> BTreeMap<i64, Arc<Forecast>> {
        of.iter()
            .map(|(id, forecast)| (*id, Arc::new(forecast.clone())))
            .collect()
    }

    fn forecast(sequence: u64, rows: f64, confidence: f64, counts: &[f64]) -> Forecast {
        let mut made = Forecast::of(2000, rows, confidence, &[counts.to_vec()]);
        made.sequence = sequence;
        made
    }

    #[test]
    fn gateways_are_summed_by_their_rows() {
        let two = all(&[
            (1, forecast(1, 300.0, 1.0, &[1.0, 0.0])),
            (2, forecast(1, 100.0, 0.5, &[0.0, 1.0])),
        ]);
        let sum = Foretold::default().combine(&two, 1, 2).unwrap();
        assert_eq!((sum.gateways, &sum.rows), (2, &vec![vec![300.0, 100.0]]));
        assert!((sum.confidence - 0.8).abs() < 1e-9);
        let over = sum.over(&[vec![0.0, 50.0]]);
        assert!((over[0][0] - 0.6).abs() < 1e-9 && (over[0][1] - 0.4).abs() < 1e-9);
        assert_eq!(sum.over(&[vec![0.0, 0.0]]), sum.rows, "nothing to lean on");
    }

    #[test]
    fn a_forecast_of_another_model_or_of_nothing_says_nothing() {
        for odd in [
            forecast(1, 0.0, 1.0, &[1.0, 0.0]),
            forecast(1, 9.0, 0.0, &[1.0, 0.0]),
            forecast(1, 9.0, 1.0, &[1.0, 0.0, 0.0]),
            Forecast::of(2000, 9.0, 1.0, &[]),
        ] {
            assert_eq!(Foretold::default().combine(&all(&[(1, odd)]), 1, 2), None);
        }
    }

    #[test]
    fn a_gateway_that_stands_still_is_left_out() {
        let mut foretold = Foretold::default();
        let mut close = |sequence| {
            let one = all(&[(5, forecast(sequence, 9.0, 1.0, &[1.0, 0.0]))]);
            foretold.combine(&one, 1, 2).is_some()
        };
        assert_eq!(
            [1, 1, 1, 1, 2].map(&mut close),
            [true, true, false, false, true]
        );
    }
}
