//! The policies: who decides where experts live, and when.

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::load::{EngineLoad, LoadWindow};
use foregate_api::placement::{LayerPlacement, Placement};
use foregate_planner::demand::Demand;
use foregate_planner::split::{SOLVE_GAP, SOLVE_SWEEPS, SplitTable, solve};
use foregate_planner::{History, Problem, RankSlots, plan};

use crate::eplb::{Cluster, eplb};
use crate::flash::flash;
use crate::generator::{Counts, Rows};
use crate::homes::{self, Moved, moved};
use crate::run::{Case, SimulateError, Watch};
use crate::shape::Shape;
use crate::source::Window;

/// Windows before the first step, and between two plans of the policies that plan now and then.
pub(crate) const EVERY: usize = 10;

/// A policy by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Experts in order, copies of the first ones in the slots left over.
    InOrder,
    /// EPLB on the windows of the warm-up.
    EplbOnce,
    /// EPLB every ten steps on the sum of the last ten windows, as engines run it.
    Eplb10,
    /// The same with ranks renamed so that the most copies stay.
    Eplb10Renamed,
    /// EPLB every step on the last window.
    EplbStep,
    /// As [`Self::Eplb10`], with groups of experts kept on a node.
    EplbHierarchical10,
    /// Like FlashLB, every ten steps on the last ten windows.
    FlashLike10,
    /// The operator's first plan, never moved.
    ConnectedOnce,
    /// The operator's first plan, made afresh every step: what its homes could be if copies cost nothing.
    ConnectedStep,
    /// The operator's planner with its trigger.
    ConnectedLazy,
}

impl Policy {
    /// All, anchors first.
    pub const ALL: [Self; 10] = [
        Self::InOrder,
        Self::EplbOnce,
        Self::Eplb10,
        Self::Eplb10Renamed,
        Self::EplbStep,
        Self::EplbHierarchical10,
        Self::FlashLike10,
        Self::ConnectedOnce,
        Self::ConnectedStep,
        Self::ConnectedLazy,
    ];

    /// Name on the command line and in figures.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InOrder => "in-order",
            Self::EplbOnce => "eplb-once",
            Self::Eplb10 => "eplb-10",
            Self::Eplb10Renamed => "eplb-10-renamed",
            Self::EplbStep => "eplb-step",
            Self::EplbHierarchical10 => "eplb-hierarchical-10",
            Self::FlashLike10 => "flashlb-like-10",
            Self::ConnectedOnce => "connected-once",
            Self::ConnectedStep => "connected-step",
            Self::ConnectedLazy => "connected-lazy",
        }
    }

    /// Whether the policy has a meaning in this setting.
    ///
    /// # Errors
    /// Why not.
    pub fn fits(self, shape: &Shape) -> Result<(), SimulateError> {
        if self == Self::EplbHierarchical10
            && (shape.groups == 1 || !shape.groups.is_multiple_of(shape.nodes))
        {
            return Err(SimulateError::Policy {
                policy: self.name(),
                setting: shape.name,
                why: "it needs groups of experts that the nodes divide",
            });
        }
        Ok(())
    }

    const fn is_ours(self) -> bool {
        matches!(
            self,
            Self::ConnectedOnce | Self::ConnectedStep | Self::ConnectedLazy
        )
    }
}

/// What our planner is told of the step to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forecast {
    /// Nothing: it plans on the windows.
    Off,
    /// The topics of 500 requests of the step, times exact histograms of the topics.
    Topics,
    /// The step's expected load, with an error of its own for each expert.
    Noisy,
    /// The step's expected load: nobody knows it, and so it bounds what knowing is worth.
    Exact,
}

impl Forecast {
    /// All.
    pub const ALL: [Self; 4] = [Self::Off, Self::Topics, Self::Noisy, Self::Exact];

    /// Name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Topics => "topics",
            Self::Noisy => "noisy",
            Self::Exact => "exact",
        }
    }
}

/// What has been seen when a plan is made.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) windows: Vec<Counts>,
    /// Steps that engines have made.
    steps: u64,
    pub(crate) demand: Demand,
}

impl Seen {
    pub(crate) fn nothing(shape: &Shape) -> Self {
        Self {
            windows: Vec::new(),
            steps: 0,
            demand: Demand::new(shape.layers, shape.experts),
        }
    }

    /// What gateways foretell of the step to come; the demand blends it in while it earns its use.
    pub(crate) fn foretell(&mut self, forecast: Option<Rows>) -> Result<(), SimulateError> {
        if let Some(forecast) = forecast {
            self.demand.expect(forecast)?;
        }
        Ok(())
    }

    /// Takes in a window as the operator does.
    pub(crate) fn window(&mut self, window: Window) -> Result<(), SimulateError> {
        let layers = window.rows.len();
        self.steps += window.steps;
        let window = LoadWindow {
            rank: Rank(0),
            epoch: Epoch(1),
            sequence: self.windows.len() as u64 + 1,
            span_ms: 1000,
            gate: window.rows,
            served: vec![0; layers],
            engine: EngineLoad {
                steps: self.steps,
                ..EngineLoad::default()
            },
        };
        self.demand.observe(&window)?;
        self.demand.close(1);
        self.windows.push(window.gate);
        Ok(())
    }

    /// The last `n` windows.
    fn last(&self, n: usize) -> &[Counts] {
        &self.windows[self.windows.len().saturating_sub(n)..]
    }

    /// Rows of the last `n` windows.
    pub(crate) fn sum(&self, n: usize) -> Rows {
        let last = self.last(n);
        let Some(first) = last.first() else {
            return Vec::new();
        };
        let mut sum: Rows = first.iter().map(|row| vec![0.0; row.len()]).collect();
        for window in last {
            for (sum, row) in sum.iter_mut().zip(window) {
                for (sum, n) in sum.iter_mut().zip(row) {
                    *sum += *n as f64;
                }
            }
        }
        sum
    }
}

/// A policy at work.
#[derive(Debug)]
pub(crate) struct Arm {
    pub(crate) policy: Policy,
    /// In force; its shares are the published ones.
    pub(crate) placement: Placement,
    history: History,
    /// By step.
    pub(crate) moves: Vec<Moved>,
    pub(crate) plan_ms: Vec<f64>,
}

impl Arm {
    /// The policy with its first placement.
    pub(crate) fn new(policy: Policy, case: &Case, seen: &Seen) -> Result<Self, SimulateError> {
        let shape = &case.shape;
        let mut history = History::default();
        let placement = match policy {
            Policy::InOrder => in_order(shape),
            Policy::EplbHierarchical10 => anchor(shape, &seen.sum(EVERY), true),
            Policy::EplbOnce | Policy::Eplb10 | Policy::Eplb10Renamed | Policy::EplbStep => {
                anchor(shape, &seen.sum(EVERY), false)
            }
            Policy::FlashLike10 => flash(seen.last(EVERY), None, shape),
            Policy::ConnectedOnce | Policy::ConnectedStep | Policy::ConnectedLazy => {
                let problem = problem(case, seen, &[]);
                let first = plan(&problem, None, &case.settings, &mut history)?;
                let placed = first.placement().cloned();
                placed.ok_or(SimulateError::NoPlan)?
            }
        };
        Ok(Self {
            policy,
            placement,
            history,
            moves: Vec::new(),
            plan_ms: Vec::new(),
        })
    }

    /// Plans step `t` from what was seen before it.
    pub(crate) fn step(
        &mut self,
        t: usize,
        case: &Case,
        seen: &Seen,
        watch: &dyn Watch,
    ) -> Result<(), SimulateError> {
        let shape = &case.shape;
        let again = t > 0 && t.is_multiple_of(EVERY);
        let began = watch.micros();
        let next = match self.policy {
            Policy::Eplb10 if again => Some(anchor(shape, &seen.sum(EVERY), false)),
            Policy::EplbHierarchical10 if again => Some(anchor(shape, &seen.sum(EVERY), true)),
            Policy::Eplb10Renamed if again => {
                let new = anchor(shape, &seen.sum(EVERY), false);
                Some(homes::renamed(&self.placement, &new))
            }
            Policy::FlashLike10 if again => {
                Some(flash(seen.last(EVERY), Some(&self.placement), shape))
            }
            Policy::EplbStep => Some(anchor(shape, &seen.sum(1), false)),
            Policy::ConnectedStep => {
                let problem = problem(case, seen, &[]);
                let fresh = plan(&problem, None, &case.settings, &mut History::default())?;
                fresh.placement().cloned()
            }
            Policy::ConnectedLazy => {
                let problem = problem(case, seen, &[]);
                let before = Some(&self.placement);
                plan(&problem, before, &case.settings, &mut self.history)?
                    .placement()
                    .cloned()
            }
            Policy::InOrder
            | Policy::EplbOnce
            | Policy::Eplb10
            | Policy::Eplb10Renamed
            | Policy::EplbHierarchical10
            | Policy::FlashLike10
            | Policy::ConnectedOnce => None,
        };
        if next.is_some() || self.policy == Policy::ConnectedLazy {
            self.plan_ms.push((watch.micros() - began) / 1000.0);
        }
        let moves = next
            .as_ref()
            .map(|next| moved(&self.placement, next, shape));
        self.moves.push(moves.unwrap_or_default());
        self.placement = next.unwrap_or_else(|| self.placement.clone());
        Ok(())
    }

    /// Anchors publish no shares of their own; where shares are fixed they are solved for the demand, as ours.
    pub(crate) fn solve_shares(&mut self, seen: &Seen) -> Result<(), SimulateError> {
        if self.policy.is_ours() {
            return Ok(());
        }
        for (l, rows) in seen.demand.prediction().iter().enumerate() {
            let table = SplitTable::new(&self.placement, LayerId(l as u32))
                .ok_or(SimulateError::Homeless { layer: l })?;
            let solved = solve(&table, rows, SOLVE_SWEEPS, SOLVE_GAP);
            for (e, copies) in self.placement.layers[l].copies.iter_mut().enumerate() {
                let span = table.copies(ExpertId(e as u32));
                let total: f64 = solved.flow[span.clone()].iter().sum();
                for (copy, flow) in copies.iter_mut().zip(&solved.flow[span]) {
                    if total > 0.0 {
                        copy.share = (flow / total) as f32;
                    }
                }
            }
        }
        Ok(())
    }
}

fn in_order(shape: &Shape) -> Placement {
    let rank = |g: usize| {
        let slots = g * shape.slots()..(g + 1) * shape.slots();
        slots.map(|slot| slot % shape.experts).collect()
    };
    let layer: Vec<Vec<usize>> = (0..shape.ranks).map(rank).collect();
    let ranks = homes::ranks(shape.ranks);
    homes::placement(ranks, &vec![layer; shape.layers], shape.experts)
}

pub(crate) fn anchor(shape: &Shape, load: &[Vec<f64>], hierarchical: bool) -> Placement {
    let cluster = Cluster {
        copies: shape.copies,
        ranks: shape.ranks,
        nodes: if hierarchical { shape.nodes } else { 1 },
        groups: if hierarchical { shape.groups } else { 1 },
    };
    let ranks = homes::ranks(shape.ranks);
    homes::placement(ranks, &eplb(load, cluster), shape.experts)
}

/// EPLB's homes for a load (`[layer][expert]`), as an operator can propose them: on these ranks of `slots` slots each,
/// with even shares. A rank that EPLB gives an expert twice has it once, and an empty slot.
#[must_use]
pub fn eplb_layers(load: &Rows, ranks: &[Rank], slots: usize) -> Vec<LayerPlacement> {
    let cluster = Cluster {
        copies: slots * ranks.len(),
        ranks: ranks.len(),
        nodes: 1,
        groups: 1,
    };
    let layer = |(load, mut slots): (&Vec<f64>, Vec<Vec<usize>>)| {
        for held in &mut slots {
            held.sort_unstable();
            held.dedup();
        }
        homes::layer_of(ranks, &slots, load.len())
    };
    load.iter().zip(eplb(load, cluster)).map(layer).collect()
}

/// The operator's problem: what it plans from, without the ranks that are lost.
pub(crate) fn problem(case: &Case, seen: &Seen, lost: &[Rank]) -> Problem {
    let shape = &case.shape;
    let mut ranks = ranks_with_slots(shape);
    ranks.retain(|rank| !lost.contains(&rank.rank));
    // Ranks that are left go on with batches of their size.
    let left = ranks.len() as f64 / shape.ranks as f64;
    Problem {
        demand: seen.demand.prediction(),
        evidence: seen.demand.evidence(),
        batch_rows: seen.demand.batch_rows() * left,
        expert_bytes: shape.expert_bytes() as u64,
        cover: case.cover,
        ..Problem::uniform(ranks, shape.layers, shape.experts)
    }
}

/// Largest part of the rows whose experts have all their copies on one node: what its loss would leave without a
/// copy. Mean over layers.
pub(crate) fn orphaned_by_a_node(placement: &Placement, shape: &Shape, rows: &Rows) -> f64 {
    let mut alone = vec![0.0; shape.nodes];
    for (layer, rows) in placement.layers.iter().zip(rows) {
        let total: f64 = rows.iter().sum();
        for (copies, rows) in layer.copies.iter().zip(rows) {
            let mut nodes = copies.iter().map(|copy| shape.node(copy.rank.index()));
            if let Some(first) = nodes.next()
                && nodes.all(|node| node == first)
            {
                alone[first] += rows / total / placement.layers.len() as f64;
            }
        }
    }
    alone.into_iter().fold(0.0, f64::max)
}

/// Every rank with its slots; its node is its failure domain.
pub(crate) fn ranks_with_slots(shape: &Shape) -> Vec<RankSlots> {
    let rank = |rank: usize| RankSlots {
        rank: Rank(rank as u32),
        slots: shape.slots(),
        domain: format!("node-{}", shape.node(rank)),
    };
    (0..shape.ranks).map(rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_alone_holds_by_hand() {
        // Four ranks on two nodes, two experts each.
        let shape = Shape {
            layers: 1,
            experts: 4,
            ranks: 4,
            nodes: 2,
            copies: 8,
            ..crate::shape::SETTINGS[0]
        };
        let layer = vec![vec![0, 1], vec![0, 2], vec![2, 3], vec![1, 3]];
        let placement = homes::placement(homes::ranks(4), &vec![layer], 4);
        // Expert 0 is on node 0 alone, 3 on node 1 alone, 1 and 2 on both.
        let alone = |rows: [f64; 4]| orphaned_by_a_node(&placement, &shape, &vec![rows.into()]);
        assert!((alone([1.0, 5.0, 1.0, 3.0]) - 0.3).abs() < 1e-12);
        assert!((alone([4.0, 5.0, 1.0, 0.0]) - 0.4).abs() < 1e-12);
    }
}
