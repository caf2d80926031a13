//! Lower bounds of the maximum load: for a given placement (the certificate) and for any placement.

use crate::table::SplitTable;

/// The certificate and the set of ranks that gives it.
#[derive(Debug, Clone, PartialEq)]
pub struct Certificate {
    /// No split of this placement has a lower maximum load.
    pub bound: f64,
    /// Dense indices of the ranks that hold, among themselves only, the experts that set it; ascending.
    pub set: Vec<usize>,
}

/// A lower bound on the maximum load of any split of this placement under `rows`, in O(R + G log G).
///
/// By max-flow/min-cut the least maximum is `max over sets X of W(X) / |X|`, where `W(X)` are the rows of experts
/// held only inside X. This tries the j most loaded ranks of `loads` for every j: valid for any `loads`, and equal
/// to the optimum when `loads` are those of a converged split.
#[must_use]
pub fn certificate(table: &SplitTable, rows: &[f64], loads: &[f64]) -> Certificate {
    let (order, inside) = inside(table, rows, loads);
    let (mut sum, mut bound, mut size) = (0.0, 0.0, 0);
    for (j, rows) in inside.iter().enumerate() {
        sum += rows;
        let mean = sum / (j + 1) as f64;
        if mean > bound {
            (bound, size) = (mean, j + 1);
        }
    }
    let mut set = order[..size].to_vec();
    set.sort_unstable();
    Certificate { bound, set }
}

/// Ranks by load, descending, and for each position j the rows of experts whose least loaded host is there.
fn inside(table: &SplitTable, rows: &[f64], loads: &[f64]) -> (Vec<usize>, Vec<f64>) {
    let ranks = table.ranks().len();
    let mut order: Vec<usize> = (0..ranks).collect();
    order.sort_by(|a, b| loads[*b].total_cmp(&loads[*a]).then(a.cmp(b)));
    let mut position = vec![0; ranks];
    for (at, rank) in order.iter().enumerate() {
        position[*rank] = at;
    }
    let mut inside = vec![0.0; ranks];
    for (e, rows) in rows.iter().enumerate().take(table.experts()) {
        let copies = table.copies(foregate_api::ids::ExpertId(e as u32));
        let last = copies
            .filter_map(|copy| table.host(copy))
            .map(|g| position[g])
            .max();
        if let Some(last) = last {
            inside[last] += rows;
        }
    }
    (order, inside)
}

/// The least maximum load of *any* placement of `copies` copies on `ranks` ranks and any split:
/// the least T with `T ≥ W/G` and `Σ_e ⌈w_e / T⌉ ≤ R`, by bisection.
#[must_use]
pub fn any_placement(rows: &[f64], ranks: usize, copies: usize) -> f64 {
    let total: f64 = rows.iter().sum();
    let fits = |t: f64| {
        let needed = rows
            .iter()
            .map(|w| (w / t - 1e-9).ceil().max(1.0))
            .sum::<f64>();
        needed <= copies as f64
    };
    let mut low = total / ranks.max(1) as f64;
    let mut high = rows.iter().copied().fold(low, f64::max);
    if low <= 0.0 || fits(low) {
        return low;
    }
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if fits(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    high
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_bound_the_best_placement() {
        // Two copies in all: the hot expert cannot be halved.
        assert!((any_placement(&[90.0, 10.0], 2, 2) - 90.0).abs() < 1e-6);
        assert!((any_placement(&[90.0, 10.0], 2, 3) - 50.0).abs() < 1e-6);
    }
}
