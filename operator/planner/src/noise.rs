//! How sure the averaged demand is: the independent rows it rests on.
//!
//! Were rows independent, a window's count of an expert would vary by its square root (Poisson). In service they are
//! not: rows of one sequence are alike, so that counts vary by φ times as much. φ is estimated as the
//! quasi-likelihood does it, by Pearson's statistic over its expectation (McCullagh and Nelder, Generalized Linear
//! Models, 2nd ed. 1989, section 9.2.4), of each window against the one before. A drift is in it as well, and where windows
//! hold many rows it outweighs the noise; against the window before that one there is as much noise and twice the drift
//! (a random walk), so the difference of the two statistics is the drift's part. A shift is in few differences only: the
//! median over some windows does not see it.

use std::collections::VecDeque;

/// Windows whose dispersion is remembered: of seven, three may be shifts.
const MEMORY: usize = 7;

/// The noise of an average over windows that halves the past.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Noise {
    /// Rows of a layer in the average.
    rows: f64,
    /// Their variance, were they independent.
    variance: f64,
    /// Dispersion φ of the last windows, oldest first.
    recent: VecDeque<f64>,
    /// The last window and the one before, `[layer][expert]`; empty before there are any.
    last: [Vec<Vec<u64>>; 2],
}

impl Noise {
    /// Takes in a window with `rows` rows a layer.
    pub(crate) fn window(&mut self, window: &[Vec<u64>], rows: u64) {
        let rows = rows as f64;
        if self.last[0].is_empty() {
            (self.rows, self.variance) = (rows, rows);
        } else {
            (self.rows, self.variance) =
                (0.5 * (self.rows + rows), 0.25 * (self.variance + rows));
        }
        if let Some(near) = dispersion(&self.last[0], window) {
            let drift = dispersion(&self.last[1], window).map_or(0.0, |far| far - near);
            let phi = near - drift.max(0.0);
            if self.recent.len() == MEMORY {
                self.recent.pop_front();
            }
            self.recent.push_back(phi);
        }
        self.last.swap(0, 1);
        self.last[0] = window.to_vec();
    }

    /// Rows drawn independently that would be as sure as the average; 0 before the first window.
    pub(crate) fn evidence(&self) -> f64 {
        if self.variance <= 0.0 {
            return 0.0;
        }
        let mut sorted: Vec<f64> = self.recent.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let median = sorted.get(sorted.len().saturating_sub(1) / 2);
        // Less than independent is not believed: windows that are all alike are luck, or a test.
        let phi = median.copied().unwrap_or(1.0).max(1.0);
        self.rows * self.rows / (self.variance * phi)
    }
}

/// Squared differences of two windows, scaled to each other's rows, over what independent rows give: a count of n
/// rows with probability p varies by n·p·(1 − p). `None` if there is nothing to compare.
fn dispersion(before: &[Vec<u64>], after: &[Vec<u64>]) -> Option<f64> {
    let (mut found, mut expected) = (0.0, 0.0);
    for (before, after) in before.iter().zip(after) {
        let rows = |row: &[u64]| row.iter().map(|x| *x as f64).sum::<f64>();
        let (n, m) = (rows(before), rows(after));
        if n <= 0.0 || m <= 0.0 {
            continue;
        }
        let mut squares = 0.0;
        for (x, y) in before.iter().zip(after) {
            let (x, y) = (*x as f64, *y as f64);
            found += (y * n - x * m).powi(2) / (n * m);
            squares += ((x + y) / (n + m)).powi(2);
        }
        expected += (1.0 - squares) * (n + m);
    }
    (expected > 0.0).then(|| found / expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_average_that_halves_the_past_is_worth_three_windows() {
        let mut noise = Noise::default();
        assert!(noise.evidence().abs() < 1e-9);
        noise.window(&[vec![500, 500]], 1000);
        assert!((noise.evidence() - 1000.0).abs() < 1e-9);
        for _ in 0..20 {
            noise.window(&[vec![500, 500]], 1000);
        }
        assert!((noise.evidence() - 3000.0).abs() < 1.0);
    }

    #[test]
    fn a_drift_is_not_taken_for_noise() {
        let mut noise = Noise::default();
        let mut turned = 0_u64;
        for w in 0..12 {
            // Steps of changing size: a walk, not a line.
            turned += [4_000, 1_000, 7_000, 3_000][w % 4];
            noise.window(&[vec![500_000 - turned, 500_000 + turned]], 1_000_000);
        }
        assert!(noise.evidence() > 1_500_000.0, "{:?}", noise.recent);
    }

    #[test]
    fn rows_in_bursts_are_worth_less_and_a_shift_is_not_taken_for_one() {
        let mut noise = Noise::default();
        for w in 0..20 {
            let more = 50 * (w % 2);
            noise.window(&[vec![450 + more, 550 - more]], 1000);
        }
        // Differences of 50 and 50: 2·50² over ½·2000.
        assert!((noise.recent[0] - 5.0).abs() < 0.1, "{:?}", noise.recent);
        let bursts = noise.evidence();
        assert!((bursts - 600.0).abs() < 10.0, "{bursts}");
        for w in 0..6 {
            let more = 50 * (w % 2);
            noise.window(&[vec![150 + more, 850 - more]], 1000);
            // Steps of 50 stand out more where counts vary less: φ goes from 5 to 9, not to the shift's 280.
            let left = noise.evidence() / bursts;
            assert!((0.5..1.1).contains(&left), "{w}: {noise:?}");
        }
        // Twice the rows of the same mix are no deviation.
        assert!(dispersion(&[vec![30, 10]], &[vec![60, 20]]).unwrap() < 1e-9);
        assert_eq!(dispersion(&[vec![0, 0]], &[vec![60, 20]]), None);
        assert_eq!(dispersion(&[vec![9]], &[vec![60]]), None);
    }
}
