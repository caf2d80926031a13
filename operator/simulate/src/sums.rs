//! Means and percentiles, and what is said of a load.

use crate::generator::Counts;

/// Mean; 0 of nothing.
pub(crate) fn mean(of: &[f64]) -> f64 {
    of.iter().sum::<f64>() / of.len().max(1) as f64
}

/// A percentile, on the line between its two neighbours; 0 of nothing.
pub(crate) fn percentile(of: &[f64], percent: f64) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = percent / 100.0 * sorted.len().saturating_sub(1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    match (sorted.get(low), sorted.get(high)) {
        (Some(a), Some(b)) => a + (b - a) * at.fract(),
        _ => 0.0,
    }
}

/// Largest over mean rows of an expert, and their coefficient of variation; means over layers.
pub(crate) fn spread(window: &Counts) -> (f64, f64) {
    let (mut ratio, mut deviation) = (0.0, 0.0);
    for row in window {
        let rows: Vec<f64> = row.iter().map(|n| *n as f64).collect();
        let middle = mean(&rows).max(f64::MIN_POSITIVE);
        let squares: Vec<f64> = rows.iter().map(|x| (x - middle).powi(2)).collect();
        ratio += rows.iter().copied().fold(0.0, f64::max) / middle;
        deviation += mean(&squares).sqrt() / middle;
    }
    let layers = window.len().max(1) as f64;
    (ratio / layers, deviation / layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_neighbours() {
        assert!((percentile(&[3.0, 1.0, 2.0], 50.0) - 2.0).abs() < 1e-12);
        assert!((percentile(&[0.0, 1.0], 5.0) - 0.05).abs() < 1e-12);
        assert!(percentile(&[], 50.0).abs() < 1e-12);
        let (ratio, deviation) = spread(&vec![vec![1, 3], vec![2, 2]]);
        assert!((ratio - 1.25).abs() < 1e-12 && (deviation - 0.25).abs() < 1e-12);
    }
}
