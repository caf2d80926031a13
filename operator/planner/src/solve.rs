//! Shares of real-valued rows: the planner's split of a prediction.

use foregate_api::placement::Copy;

use crate::flow::{Flow, Workspace, share};
use crate::table::SplitTable;

/// Most sweeps of the planner's solve; it stops earlier when the certificate says that nothing is left to gain.
pub const SOLVE_SWEEPS: usize = 160;
/// Relative gap to the certificate at which the planner's solve stops.
pub const SOLVE_GAP: f64 = 2e-4;

/// A solved split of real-valued rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Solved {
    /// Load of each rank, in the order of [`SplitTable::ranks`].
    pub loads: Vec<f64>,
    /// Rows of each copy, by copy index.
    pub flow: Vec<f64>,
    /// Sweeps made.
    pub sweeps: usize,
    /// A lower bound on the maximum load of any split of this placement ([`certificate`](crate::bound::certificate)).
    pub certificate: f64,
}

impl Solved {
    /// The highest load.
    #[must_use]
    pub fn max(&self) -> f64 {
        self.loads.iter().copied().fold(0.0, f64::max)
    }

    /// Mean over maximum load; 1 if there is no load.
    #[must_use]
    pub fn balance(&self) -> f64 {
        balance(&self.loads)
    }
}

/// Mean over maximum load; 1 if there is no load.
#[must_use]
pub fn balance(loads: &[f64]) -> f64 {
    let max = loads.iter().copied().fold(0.0, f64::max);
    if max <= 0.0 || loads.is_empty() {
        return 1.0;
    }
    (loads.iter().sum::<f64>() / loads.len() as f64 / max).min(1.0)
}

/// Solves the least maximum load over all splits of `rows` over the table's copies, from even shares.
///
/// `rows[e]` is the load of expert `e`; missing entries count as zero. At most `sweeps` sweeps, over-relaxed; every
/// eighth tests whether the maximum is within `1 + gap` of the certificate.
#[must_use]
pub fn solve(table: &SplitTable, rows: &[f64], sweeps: usize, gap: f64) -> Solved {
    let w: Vec<f64> = (0..table.experts())
        .map(|e| rows.get(e).copied().unwrap_or(0.0))
        .collect();
    let mut flow = Flow::over(table.ranks.len());
    for (e, rows) in w.iter().enumerate() {
        flow.push(table.hosts[table.span(e)].iter().copied(), *rows);
    }
    settled(flow, &w, sweeps, gap, &mut Workspace::default())
}

/// Settles a flow whose copies are in the order of a table.
pub(crate) fn settled(
    mut flow: Flow,
    w: &[f64],
    sweeps: usize,
    gap: f64,
    work: &mut Workspace,
) -> Solved {
    let start = flow.clone();
    let (certificate, done) = flow.settle(w, sweeps, gap, work);
    if flow.max() > start.max() {
        flow = start;
    }
    Solved {
        flow: flow.copies(),
        loads: flow.loads,
        sweeps: done,
        certificate,
    }
}

/// The layer's copies with the shares of a solved split; an expert without load is shared evenly.
pub(crate) fn shares(table: &SplitTable, solved: &Solved) -> Vec<Vec<Copy>> {
    (0..table.experts())
        .map(|e| {
            let span = table.span(e);
            let total: f64 = solved.flow[span.clone()].iter().sum();
            let copies = span.len();
            span.map(|copy| Copy {
                rank: table.ranks[table.hosts[copy] as usize],
                share: share(solved.flow[copy], total, copies),
            })
            .collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use foregate_api::ids::Rank;

    use super::*;
    use crate::bound::certificate;

    #[test]
    fn a_chain_of_links_levels_all_ranks() {
        // 0-1-2: rank 0 has an excess of 60, it leaves through both links.
        let hosts = [vec![0, 1], vec![1, 2], vec![0], vec![1], vec![2]];
        let t = SplitTable::even(
            &[Rank(0), Rank(1), Rank(2)],
            hosts.iter().map(Vec::as_slice),
        );
        let solved = solve(&t, &[60.0, 60.0, 60.0, 0.0, 0.0], 1000, 1e-9);
        assert!(
            solved.loads.iter().all(|load| (load - 60.0).abs() < 1e-3),
            "{solved:?}"
        );
        assert!((solved.certificate - 60.0).abs() < 1e-3);
    }

    #[test]
    fn an_island_sets_the_pace_and_is_named() {
        // Ranks 1 and 2 share their experts with nobody; rank 0 is nearly idle.
        let hosts = [vec![0], vec![1, 2], vec![1], vec![2]];
        let table = SplitTable::even(
            &[Rank(0), Rank(1), Rank(2)],
            hosts.iter().map(Vec::as_slice),
        );
        let rows = [1.0, 50.0, 30.0, 20.0];
        let solved = solve(&table, &rows, 100, 1e-9);
        let found = certificate(&table, &rows, &solved.loads);
        assert!((found.bound - 50.0).abs() < 1e-9);
        assert_eq!(found.set, [1, 2]);
    }
}
