//! Local search judged by the best split: which copies, moved, lower the level that no split gets below.
//!
//! A solved split names the set X of ranks that sets the pace: the experts held only inside X carry `W(X)` rows, so no
//! split of this placement gets below `W(X)/|X|` (see [`crate::bound`]). Only operations that let rows out of X lower
//! it: a copy of an expert of X on a rank outside, swapped with a slot there (two copies) or over a redundant copy
//! there (one). Their effect on X is exact and costs no solve; the most promising are then solved, going on from the
//! split at hand, under all loads that the homes shall be good for.

use std::ops::RangeInclusive;

use crate::cover;
use crate::flow::Flow;
use crate::layer::{Layer, Operation, least};
use crate::problem::Room;
use crate::solve::{SOLVE_GAP, SOLVE_SWEEPS};

/// What the search may do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    /// Most copies that may differ from the origin.
    pub(crate) limit: usize,
    /// Expected balance that is good enough.
    pub(crate) enough: f64,
    /// Least gain in score of an operation.
    pub(crate) gain: f64,
    /// Operations solved in each round under one load, and the best of these under all.
    pub(crate) tries: usize,
    /// See `tries`.
    pub(crate) finals: usize,
    /// Most rounds.
    pub(crate) rounds: usize,
}

/// Relative gap to the certificate, and most sweeps, of the splits that candidates are judged by.
const GAP: f64 = 1e-3;
const SWEEPS: usize = 16;
/// Weight of the variance of the loads in the score: progress where several sets are equally bad.
const SPREAD: f64 = 0.5;
/// What a copy must promise to be looked at before a cheaper operation, in overload.
const PER_COPY: f64 = 5e-4;
/// Promising operations that are looked at in each round.
const PROMISING: usize = 96;

/// The best splits of one layer's homes under several loads, the prediction first.
#[derive(Debug, Clone)]
pub(crate) struct Splits<'a> {
    loads: &'a [Vec<f64>],
    flows: Vec<Flow>,
    /// Mean load of a rank under each.
    means: Vec<f64>,
}

impl<'a> Splits<'a> {
    pub(crate) fn of(layer: &Layer, loads: &'a [Vec<f64>]) -> Self {
        let first = loads.first().map(|w| Flow::even(layer, w));
        Self::from(first.unwrap_or_default(), loads)
    }

    /// From a split under the prediction.
    pub(crate) fn from(mut flow: Flow, loads: &'a [Vec<f64>]) -> Self {
        let ranks = flow.loads.len();
        let mean = |w: &Vec<f64>| w.iter().sum::<f64>() / ranks as f64;
        let mut flows = Vec::with_capacity(loads.len());
        if let Some(first) = loads.first() {
            flow.settle(first, SOLVE_SWEEPS, SOLVE_GAP);
            for w in &loads[1..] {
                let mut other = flow.scaled(first, w);
                other.settle(w, 2 * SWEEPS, GAP);
                flows.push(other);
            }
            flows.insert(0, flow);
        }
        Self {
            loads,
            flows,
            means: loads.iter().map(mean).collect(),
        }
    }

    fn overload(&self, k: usize) -> f64 {
        self.flows[k].max() / self.means[k]
    }

    /// Balance under the prediction.
    pub(crate) fn predicted(&self) -> f64 {
        (1.0 / self.overload(0)).min(1.0)
    }

    /// Mean balance over the batches, or that under the prediction if none are known.
    pub(crate) fn expected(&self) -> f64 {
        let batches = 1..self.flows.len();
        if batches.is_empty() {
            return self.predicted();
        }
        let count = batches.len() as f64;
        batches
            .map(|k| (1.0 / self.overload(k)).min(1.0))
            .sum::<f64>()
            / count
    }

    /// What the search lowers: overload and a little of the loads' variance, mean over loads.
    fn score(&self) -> f64 {
        let one = |k: usize| self.score_under(k);
        (0..self.flows.len()).map(one).sum::<f64>() / self.flows.len() as f64
    }

    fn score_under(&self, k: usize) -> f64 {
        let (mean, ranks) = (self.means[k], self.flows[k].loads.len() as f64);
        let variance = self.flows[k].squares() / (ranks * mean * mean) - 1.0;
        self.overload(k) + SPREAD * variance
    }

    fn worst(&self) -> usize {
        let by = |a: &usize, b: &usize| self.overload(*a).total_cmp(&self.overload(*b));
        (0..self.flows.len())
            .max_by(|a, b| by(a, b).then(b.cmp(a)))
            .unwrap_or(0)
    }

    /// The split under the prediction.
    pub(crate) fn prediction(&self) -> &Flow {
        &self.flows[0]
    }

    /// The same.
    pub(crate) fn into_prediction(mut self) -> Flow {
        self.flows.swap_remove(0)
    }

    fn become_like(&mut self, other: &Self, under: RangeInclusive<usize>) {
        for k in under {
            self.flows[k].become_like(&other.flows[k]);
        }
    }

    fn follow(&mut self, layer: &Layer, op: Operation, under: RangeInclusive<usize>) {
        for k in under {
            let (flow, w) = (&mut self.flows[k], &self.loads[k]);
            flow.follow(layer, op, w);
            flow.settle(w, SWEEPS, GAP);
        }
    }

    /// Puts copies back into the layer's order.
    fn sort(&mut self, layer: &Layer) {
        for (flow, w) in self.flows.iter_mut().zip(self.loads) {
            *flow = flow.onto(layer, w);
        }
    }
}

/// Moves copies while that lowers the score by `effort.gain` each time, within its limits, never with more components
/// than now and never against the cover asked for.
pub(crate) fn search(
    layer: &mut Layer,
    origin: &Layer,
    room: &Room,
    splits: &mut Splits<'_>,
    effort: Effort,
) {
    let most_components = layer.components();
    let (mut trial, mut best) = (splits.clone(), splits.clone());
    for _ in 0..effort.rounds {
        if splits.expected() >= effort.enough {
            return;
        }
        let score = splits.score();
        let spare = effort.limit as isize - layer.moved_from(origin) as isize;
        let fits = |op: &Operation| {
            cover::allows(room, layer, *op) && layer.components_after(*op) <= most_components
        };
        let tries = candidates(layer, origin, splits, spare)
            .into_iter()
            .filter(fits)
            .take(effort.tries);
        // Under the load that sets the pace first, and the best of these under all.
        let worst = splits.worst();
        let mut promising: Vec<(f64, Operation)> = tries
            .map(|op| {
                trial.become_like(splits, worst..=worst);
                trial.follow(layer, op, worst..=worst);
                (trial.score_under(worst), op)
            })
            .collect();
        promising.sort_by(least);
        promising.truncate(effort.finals);
        let mut found: Option<(f64, Operation)> = None;
        let all = 0..=splits.flows.len() - 1;
        for (_, op) in promising {
            trial.become_like(splits, all.clone());
            trial.follow(layer, op, all.clone());
            let got = trial.score();
            if got < score - effort.gain && found.is_none_or(|(least, _)| got < least) {
                found = Some((got, op));
                std::mem::swap(&mut best, &mut trial);
            }
        }
        let Some((_, op)) = found else {
            return;
        };
        layer.apply(op);
        std::mem::swap(splits, &mut best);
        splits.sort(layer);
    }
}

/// The set that sets the pace under one load.
struct Pace<'a> {
    layer: &'a Layer,
    flow: &'a Flow,
    w: &'a [f64],
    inside: Vec<bool>,
    /// Ranks of the set.
    size: f64,
    /// Rows of experts held only inside.
    rows: f64,
    /// Ranks of each rank's level: those that rows can still flow to.
    level: Vec<f64>,
}

/// Operations that let rows out of the set that sets the pace, the most promising first.
fn candidates(
    layer: &Layer,
    origin: &Layer,
    splits: &mut Splits<'_>,
    spare: isize,
) -> Vec<Operation> {
    let k = splits.worst();
    let (w, mean) = (&splits.loads[k], splits.means[k]);
    let (bound, size) = splits.flows[k].tight(w);
    let flow = &splits.flows[k];
    let mut inside = vec![false; layer.ranks()];
    flow.ranks_by_load()
        .take(size)
        .for_each(|g| inside[g] = true);
    let pace = Pace {
        level: levels(layer, flow),
        layer,
        flow,
        w,
        inside,
        size: size as f64,
        rows: bound * size as f64,
    };
    let mut found: Vec<(f64, Operation)> = Vec::new();
    for g in (0..layer.ranks()).filter(|g| pace.inside[*g]) {
        for (s, &e) in layer.slots(g).iter().enumerate() {
            if !layer.hosts(e).iter().all(|q| pace.inside[*q]) {
                continue;
            }
            for h in (0..layer.ranks()).filter(|h| !pace.inside[*h]) {
                for t in 0..layer.slots(h).len() {
                    pace.offer((g, s), (h, t), |v, op| {
                        let cost = layer.cost(origin, op);
                        if cost <= spare {
                            found.push((v / mean + PER_COPY * cost as f64, op));
                        }
                    });
                }
            }
        }
    }
    let order = |a: &(f64, Operation), b: &(f64, Operation)| least(a, b);
    if found.len() > PROMISING {
        found.select_nth_unstable_by(PROMISING, order);
        found.truncate(PROMISING);
    }
    found.sort_unstable_by(order);
    found.into_iter().map(|(_, op)| op).collect()
}

impl Pace<'_> {
    /// The operations that bring the copy at `from`, in the set, to the slot `to` outside, with the level that they
    /// promise: that of what is left in the set, or of both sides together, whichever is higher.
    fn offer(
        &self,
        from: (usize, usize),
        to: (usize, usize),
        mut take: impl FnMut(f64, Operation),
    ) {
        let Self { layer, w, .. } = self;
        let ((g, s), (h, t)) = (from, to);
        let (e, f) = (layer.slots(g)[s], layer.slots(h)[t]);
        let comes_in = layer.hosts(f).iter().all(|q| *q == h || self.inside[*q]);
        let out = w[e] - if comes_in { w[f] } else { 0.0 };
        if out <= 0.0 || layer.has(h, e) {
            return;
        }
        let left = (self.rows - out) / self.size;
        let (level, ranks) = (self.flow.loads[h], self.level[h]);
        let together = (self.rows + level * ranks) / (self.size + ranks);
        if !layer.has(g, f) {
            let there = if layer.count(e) == 1 {
                // All of e goes, and what h had of f.
                level + (w[e] - self.flow.rows_on(f, h)) / ranks
            } else {
                together
            };
            take(left.max(there), Operation::Swap { from, to });
        }
        // An overwrite does not depend on which copy of e is looked at.
        if layer.count(f) > 1 && layer.hosts(e).first() == Some(&g) {
            take(
                left.max(together),
                Operation::Overwrite { expert: e, at: to },
            );
        }
    }
}

/// For each rank the number of ranks that rows can still flow to or from: they share one level.
fn levels(layer: &Layer, flow: &Flow) -> Vec<f64> {
    let mut parent: Vec<usize> = (0..layer.ranks()).collect();
    for e in (0..layer.experts()).filter(|e| layer.count(*e) > 1) {
        let hosts = layer.hosts(e).iter().copied();
        let mut flowing = hosts.filter(|g| flow.rows_on(e, *g) > 0.0);
        let Some(first) = flowing.next() else {
            continue;
        };
        for g in flowing {
            let (a, b) = (
                crate::layer::root(&mut parent, first),
                crate::layer::root(&mut parent, g),
            );
            parent[a.max(b)] = a.min(b);
        }
    }
    let roots: Vec<usize> = (0..layer.ranks())
        .map(|g| crate::layer::root(&mut parent, g))
        .collect();
    let mut size = vec![0.0; layer.ranks()];
    roots.iter().for_each(|r| size[*r] += 1.0);
    roots.iter().map(|r| size[*r]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EFFORT: Effort = Effort {
        limit: 4,
        enough: 0.97,
        gain: 0.002,
        tries: 12,
        finals: 4,
        rounds: 64,
    };

    /// One copy of expert 0 or 1 alone hardly helps: it takes both.
    #[test]
    fn two_hot_experts_are_shared_although_the_first_copy_looks_useless() {
        let slots = vec![vec![0, 2, 3, 4], vec![1, 3, 5, 6], vec![4, 5, 7, 2]];
        let origin = Layer::from_slots(&slots, 8);
        let loads = [vec![400.0, 380.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0]];
        let mut layer = origin.clone();
        let mut splits = Splits::of(&layer, &loads);
        search(
            &mut layer,
            &origin,
            &Room::plain(&[4; 3]),
            &mut splits,
            EFFORT,
        );
        assert!(
            splits.predicted() >= 0.97,
            "{:?} {splits:?}",
            layer.all_slots()
        );
        assert!(layer.moved_from(&origin) <= 4);
        assert!(layer.components() <= origin.components());
    }
}
