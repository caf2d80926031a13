//! Medians with the interval that they are known to.

/// Median, and the order statistics between which the true one lies with 95 of 100 chances: how many of n
/// figures are below it is binomial with p = 1/2, here by its normal approximation.
pub(super) fn median(mut figures: Vec<f64>) -> (f64, (f64, f64)) {
    figures.sort_by(f64::total_cmp);
    let n = figures.len();
    let Some(last) = n.checked_sub(1) else {
        return (f64::NAN, (f64::NAN, f64::NAN));
    };
    let out = ((n as f64 - 1.96 * (n as f64).sqrt()) / 2.0).max(0.0) as usize;
    let middle = f64::midpoint(figures[last / 2], figures[n / 2]);
    (middle, (figures[out], figures[last - out]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lies_in_its_interval() {
        let figures = (1..=100).rev().map(f64::from).collect();
        // Ranks 41 and 60 of 100.
        assert_eq!(median(figures), (50.5, (41.0, 60.0)));
        assert_eq!(median(vec![3.0]), (3.0, (3.0, 3.0)));
        assert_eq!(median(vec![4.0, 1.0]), (2.5, (1.0, 4.0)));
        assert!(median(Vec::new()).0.is_nan());
    }
}
