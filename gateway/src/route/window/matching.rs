//! The assignment of rows to columns with the least sum of costs.

/// Column of each row, for a square matrix of finite costs. Shortest augmenting paths with potentials (Kuhn 1955,
/// Munkres 1957, in the form of Jonker and Volgenant 1987): n³ steps.
pub(super) fn cheapest(costs: &[Vec<f64>]) -> Vec<usize> {
    let n = costs.len();
    // Rows and columns from 1; 0 is the free end of a path.
    let (mut row_price, mut column_price) = (vec![0.0; n + 1], vec![0.0; n + 1]);
    let mut row_of = vec![0; n + 1];
    for row in 1..=n {
        row_of[0] = row;
        let mut column = 0;
        let (mut least, mut from) = (vec![f64::INFINITY; n + 1], vec![0; n + 1]);
        let mut used = vec![false; n + 1];
        while row_of[column] != 0 {
            used[column] = true;
            let here = row_of[column];
            let (mut step, mut next) = (f64::INFINITY, 0);
            for j in (1..=n).filter(|j| !used[*j]) {
                let reduced = costs[here - 1][j - 1] - row_price[here] - column_price[j];
                if reduced < least[j] {
                    (least[j], from[j]) = (reduced, column);
                }
                if least[j] < step {
                    (step, next) = (least[j], j);
                }
            }
            for j in 0..=n {
                if used[j] {
                    row_price[row_of[j]] += step;
                    column_price[j] -= step;
                } else {
                    least[j] -= step;
                }
            }
            if next == 0 {
                // Only costs that are no numbers leave nothing to choose.
                return (0..n).collect();
            }
            column = next;
        }
        while column != 0 {
            row_of[column] = row_of[from[column]];
            column = from[column];
        }
    }
    let mut column_of = vec![0; n];
    for column in 1..=n {
        column_of[row_of[column] - 1] = column - 1;
    }
    column_of
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn best(costs: &[Vec<f64>], row: usize, free: &mut Vec<usize>) -> f64 {
        if row == costs.len() {
            return 0.0;
        }
        let mut least = f64::INFINITY;
        for at in 0..free.len() {
            let column = free.remove(at);
            least = least.min(costs[row][column] + best(costs, row + 1, free));
            free.insert(at, column);
        }
        least
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn no_other_assignment_is_cheaper(
            flat in proptest::collection::vec(0u32..50, 25), n in 1usize..=5
        ) {
            let costs: Vec<Vec<f64>> =
                flat.chunks(5).take(n).map(|row| row[..n].iter().map(|c| f64::from(*c)).collect()).collect();
            let found = cheapest(&costs);
            let mut columns = found.clone();
            columns.sort_unstable();
            prop_assert_eq!(columns, (0..n).collect::<Vec<_>>());
            let sum: f64 = found.iter().enumerate().map(|(row, column)| costs[row][*column]).sum();
            prop_assert!((sum - best(&costs, 0, &mut (0..n).collect())).abs() < 1e-9);
        }
    }

    #[test]
    fn nothing_and_nonsense_end() {
        assert!(cheapest(&[]).is_empty());
        assert_eq!(cheapest(&[vec![f64::NAN; 2], vec![f64::NAN; 2]]), [0, 1]);
    }
}
