//! One layer of a placement under a prediction: what another arrangement of its copies would give.

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_planner::Problem;
use foregate_planner::bound;
use foregate_planner::split::{SOLVE_GAP, SOLVE_SWEEPS, Solved, SplitTable, solve};

/// Rows that the planner adds to every expert, so that an unused one counts like any other.
const FLOOR: f64 = 1e-3;

/// A layer: who holds what, and what is asked for.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) ranks: Vec<Rank>,
    /// Experts by dense rank.
    pub(crate) slots: Vec<Vec<ExpertId>>,
    /// Rows by expert.
    pub(crate) rows: Vec<f64>,
}

impl Case {
    /// A layer of `plan` under the problem's prediction; `None` if one of them has no such layer.
    pub(crate) fn of(plan: &Placement, problem: &Problem, layer: LayerId) -> Option<Self> {
        let rows = problem.demand.get(layer.index())?;
        Some(Self {
            ranks: plan.ranks.clone(),
            slots: plan.layers.get(layer.index())?.slots.clone(),
            rows: rows.iter().map(|rows| rows + FLOOR).collect(),
        })
    }

    /// How many copies an expert has.
    pub(crate) fn count(&self, expert: ExpertId) -> usize {
        self.slots
            .iter()
            .filter(|held| held.contains(&expert))
            .count()
    }

    /// Whether a dense rank holds an expert.
    pub(crate) fn holds(&self, at: usize, expert: ExpertId) -> bool {
        self.slots[at].contains(&expert)
    }

    /// The layer with a slot's expert exchanged for another; `None` leaves the slot empty.
    pub(crate) fn with(&self, at: usize, out: ExpertId, new: Option<ExpertId>) -> Self {
        let mut other = self.clone();
        let held = &mut other.slots[at];
        held.retain(|expert| *expert != out);
        held.extend(new);
        other
    }

    /// The best split.
    pub(crate) fn solved(&self) -> Option<Solved> {
        let table = self.table()?;
        Some(solve(&table, &self.rows, SOLVE_SWEEPS, SOLVE_GAP))
    }

    /// Balance of the best split; 0 if an expert has no copy.
    pub(crate) fn balance(&self) -> f64 {
        let orphan = (0..self.rows.len()).any(|e| self.count(ExpertId(e as u32)) == 0);
        if orphan {
            return 0.0;
        }
        self.solved().map_or(0.0, |solved| solved.balance())
    }

    /// Load of each dense rank if every expert's rows are split evenly over its copies.
    pub(crate) fn even_loads(&self) -> Vec<f64> {
        let part = |expert: &ExpertId| {
            let rows = self.rows.get(expert.index()).copied().unwrap_or(0.0);
            rows / self.count(*expert).max(1) as f64
        };
        self.slots
            .iter()
            .map(|held| held.iter().map(part).sum())
            .collect()
    }

    /// Part of the rows whose expert has one copy.
    pub(crate) fn alone(&self) -> f64 {
        let alone = |e: &usize| self.count(ExpertId(*e as u32)) == 1;
        let rows: f64 = (0..self.rows.len())
            .filter(alone)
            .map(|e| self.rows[e])
            .sum();
        rows / self.rows.iter().sum::<f64>()
    }

    /// Groups of ranks that hang together through experts with several copies.
    pub(crate) fn components(&self) -> usize {
        let mut group: Vec<usize> = (0..self.ranks.len()).collect();
        for e in 0..self.rows.len() {
            let mut hosts = (0..group.len()).filter(|g| self.holds(*g, ExpertId(e as u32)));
            let Some(first) = hosts.next() else { continue };
            for other in hosts {
                let (into, from) = (group[first], group[other]);
                group
                    .iter_mut()
                    .filter(|g| **g == from)
                    .for_each(|g| *g = into);
            }
        }
        group.sort_unstable();
        group.dedup();
        group.len()
    }

    /// The least copies that carry an expert in any placement of as many copies.
    pub(crate) fn least_copies(&self, expert: ExpertId) -> usize {
        let copies = self.slots.iter().map(Vec::len).sum();
        let most = bound::any_placement(&self.rows, self.ranks.len(), copies);
        let rows = self.rows.get(expert.index()).copied().unwrap_or(0.0);
        if most <= 0.0 {
            return 1;
        }
        (rows / most - 1e-9).ceil().max(1.0) as usize
    }

    fn table(&self) -> Option<SplitTable> {
        let layer =
            LayerPlacement::from_slots(&self.ranks, self.slots.clone(), self.rows.len());
        let alone = Placement {
            epoch: Epoch(0),
            parent: Epoch(0),
            reason: Reason::Move,
            ranks: self.ranks.clone(),
            layers: vec![layer],
            balance_before: 0.0,
            balance_after: 0.0,
        };
        SplitTable::new(&alone, LayerId(0))
    }
}
