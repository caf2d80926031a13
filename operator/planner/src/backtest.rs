//! Which of several ways to predict a window has been right: each is judged by what came, and one that costs more than
//! the plain way must have earned it.

use std::collections::VecDeque;

/// Windows that are remembered.
const MEMORY: usize = 10;
/// Part by which the error must be below that of the plain way.
const ADVANTAGE: f64 = 0.02;
/// By how much it must be below in any case: what matters to no plan is not followed.
const LEAST: f64 = 0.002;

/// Errors of `N` ways over the last windows; way 0 is the plain one.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct BackTest<const N: usize> {
    errors: VecDeque<[f64; N]>,
}

impl<const N: usize> BackTest<N> {
    /// Notes what each way was off by.
    pub(crate) fn note(&mut self, errors: [f64; N]) {
        if self.errors.len() == MEMORY {
            self.errors.pop_front();
        }
        self.errors.push_back(errors);
    }

    /// The way with the least mean error if that is clearly less than the plain way's, else 0. Ties go to the lower.
    pub(crate) fn best(&self) -> usize {
        let sum = |way: usize| self.errors.iter().map(|errors| errors[way]).sum::<f64>();
        let plain = sum(0);
        let least = LEAST * self.errors.len() as f64;
        (1..N)
            .filter(|way| sum(*way) < plain * (1.0 - ADVANTAGE) - least)
            .min_by(|a, b| sum(*a).total_cmp(&sum(*b)).then(a.cmp(b)))
            .unwrap_or(0)
    }
}

/// Mean over layers of the total variation between a prediction and what came, both as shares; in [0, 1].
pub(crate) fn variation(predicted: impl Fn(usize, usize) -> f64, came: &[Vec<u64>]) -> f64 {
    let mut sum = 0.0;
    let mut layers = 0_u32;
    for (l, row) in came.iter().enumerate() {
        let total: f64 = row.iter().map(|x| *x as f64).sum();
        let expected: f64 = (0..row.len()).map(|e| predicted(l, e)).sum();
        if total <= 0.0 || expected <= 0.0 {
            continue;
        }
        let off =
            |(e, x): (usize, &u64)| (*x as f64 / total - predicted(l, e) / expected).abs();
        sum += 0.5 * row.iter().enumerate().map(off).sum::<f64>();
        layers += 1;
    }
    sum / f64::from(layers.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_must_earn_its_use_and_loses_it_again() {
        let mut test = BackTest::<3>::default();
        assert_eq!(test.best(), 0);
        test.note([0.10, 0.099, 0.2]);
        assert_eq!(test.best(), 0, "one percent is not enough");
        test.note([0.10, 0.08, 0.2]);
        assert_eq!(test.best(), 1);
        for _ in 0..MEMORY {
            test.note([0.10, 0.12, 0.10]);
        }
        assert_eq!(test.best(), 0);
    }

    #[test]
    fn variation_compares_shares() {
        let came = [vec![30, 10], vec![0, 0]];
        assert!(variation(|_, e| [3.0, 1.0][e], &came) < 1e-12);
        assert!((variation(|_, _| 1.0, &came) - 0.25).abs() < 1e-12);
    }
}
