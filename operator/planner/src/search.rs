//! Local search judged by the best split: which copies, moved, lower the level that no split gets below.
//!
//! A solved split names the set X of ranks that sets the pace: the experts held only inside X carry `W(X)` rows, so no
//! split of this placement gets below `W(X)/|X|` (see [`crate::bound`]). Only operations that let rows out of X lower
//! it: a copy of an expert of X on a rank outside, swapped with a slot there (two copies) or over a redundant copy
//! there (one). Their effect on X is exact and costs no solve; the most promising are then solved, going on from the
//! split at hand, under all loads that the homes shall be good for.

use crate::cover;
use crate::flow::Flow;
use crate::layer::{Layer, Operation, Place, least};
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
const GAP: f64 = 2e-4;
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

    /// Becomes what `from` is after an operation, under one load: the score there, if it is below `most`.
    fn attempt(
        &mut self,
        from: &Self,
        layer: &Layer,
        op: Operation,
        k: usize,
        most: f64,
    ) -> Option<f64> {
        let (flow, w) = (&mut self.flows[k], &self.loads[k]);
        flow.become_like(&from.flows[k]);
        flow.follow(layer, op, w);
        flow.settle_below(most * self.means[k], w, SWEEPS, GAP);
        let score = self.score_under(k);
        (score < most).then_some(score)
    }

    /// The same under all loads: the sum of the scores, if it is below `most`.
    fn attempt_all(
        &mut self,
        from: &Self,
        layer: &Layer,
        op: Operation,
        sets: &[Set<'_>],
        most: f64,
    ) -> Option<f64> {
        // What is still to come is at least the bound of its set.
        let mut sum = bounds(sets, layer, op).sum::<f64>();
        for (k, bound) in bounds(sets, layer, op).enumerate() {
            sum -= bound;
            sum += self.attempt(from, layer, op, k, most - sum)?;
        }
        (sum < most).then_some(sum)
    }

    fn sets(&mut self, layer: &Layer) -> Vec<Set<'a>> {
        let mut sets = Vec::with_capacity(self.flows.len());
        for (k, flow) in self.flows.iter_mut().enumerate() {
            let (bound, size) = flow.tight(&self.loads[k]);
            let mut inside = vec![false; layer.ranks()];
            let first = flow.ranks_by_load().take(size);
            first.for_each(|g| inside[g] = true);
            sets.push(Set {
                k,
                w: &self.loads[k],
                mean: self.means[k],
                inside,
                size: size as f64,
                rows: bound * size as f64,
            });
        }
        sets
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
    let mut work: Option<(Splits<'_>, Splits<'_>)> = None;
    for _ in 0..effort.rounds {
        if splits.expected() >= effort.enough {
            return;
        }
        let spare = effort.limit as isize - layer.moved_from(origin) as isize;
        let worst = splits.worst();
        let sets = splits.sets(layer);
        let most = sets.len() as f64 * (splits.score() - effort.gain);
        let fits = |op: &Operation| {
            bounds(&sets, layer, *op).sum::<f64>() < most
                && cover::allows(room, layer, *op)
                && layer.components_after(*op) <= most_components
        };
        let tries: Vec<Operation> =
            candidates(layer, origin, room, splits, &sets[worst], spare)
                .into_iter()
                .filter(fits)
                .take(effort.tries)
                .collect();
        if tries.is_empty() {
            return;
        }
        let (trial, best) = work.get_or_insert_with(|| (splits.clone(), splits.clone()));
        // Under the load that sets the pace first, and the best of these under all.
        let under_worst = |op: Operation| {
            let others: f64 = bounds(&sets, layer, op)
                .enumerate()
                .map(|(k, bound)| if k == worst { 0.0 } else { bound })
                .sum();
            let got = trial.attempt(splits, layer, op, worst, most - others)?;
            Some((got, op))
        };
        let mut promising: Vec<(f64, Operation)> =
            tries.into_iter().filter_map(under_worst).collect();
        promising.sort_by(least);
        promising.truncate(effort.finals);
        let mut found: Option<(f64, Operation)> = None;
        for (_, op) in promising {
            let most = found.map_or(most, |(least, _)| least);
            if let Some(got) = trial.attempt_all(splits, layer, op, &sets, most) {
                found = Some((got, op));
                std::mem::swap(best, trial);
            }
        }
        let Some((_, op)) = found else {
            return;
        };
        drop(sets);
        layer.apply(op);
        std::mem::swap(splits, best);
        splits.sort(layer);
    }
}

/// The set of ranks that sets the pace under one load.
struct Set<'a> {
    k: usize,
    w: &'a [f64],
    /// Mean load of all ranks.
    mean: f64,
    inside: Vec<bool>,
    /// Ranks of the set.
    size: f64,
    /// Rows of experts held only inside.
    rows: f64,
}

impl Set<'_> {
    /// Overload that no split gets below after an operation.
    fn bound(&self, layer: &Layer, op: Operation) -> f64 {
        let change = match op {
            Operation::Swap { from, to } => {
                let (e, f) = (layer.slots(from.0)[from.1], layer.slots(to.0)[to.1]);
                self.carried(layer, e, from.0, to.0) + self.carried(layer, f, to.0, from.0)
            }
            Operation::Overwrite { at, .. } if self.inside[at.0] => 0.0,
            Operation::Overwrite { expert, at } => {
                let f = layer.slots(at.0)[at.1];
                let goes = self.holds(layer, expert, at.0);
                let comes = self.holds(layer, f, at.0);
                f64::from(u8::from(comes)) * self.w[f]
                    - f64::from(u8::from(goes)) * self.w[expert]
            }
        };
        ((self.rows + change) / (self.size * self.mean)).max(1.0)
    }

    /// Rows that come into the set if the copy of e on `from` goes to `to`.
    fn carried(&self, layer: &Layer, e: usize, from: usize, to: usize) -> f64 {
        if self.inside[from] == self.inside[to] || !self.holds(layer, e, from) {
            0.0
        } else if self.inside[to] {
            self.w[e]
        } else {
            -self.w[e]
        }
    }

    /// Whether all copies of e are inside, that on g apart.
    fn holds(&self, layer: &Layer, e: usize, g: usize) -> bool {
        layer.hosts(e).iter().all(|q| *q == g || self.inside[*q])
    }
}

/// Overload under each load that no split gets below after an operation.
fn bounds<'a>(
    sets: &'a [Set<'_>],
    layer: &'a Layer,
    op: Operation,
) -> impl Iterator<Item = f64> + 'a {
    sets.iter().map(move |set| set.bound(layer, op))
}

/// A slot outside of the set that sets the pace.
struct Outside {
    at: Place,
    expert: usize,
    /// Whether its expert has other copies, and enough of them for its cover.
    redundant: bool,
    /// Rows that come into the set if its copy does.
    comes: f64,
    /// Level of its rank without the rows that its copy carries, if these leave all ranks of that level.
    without: f64,
    /// Ranks of that level: those that rows can still flow to.
    ranks: f64,
    /// Level of these ranks and the set together.
    together: f64,
}

/// Operations that let rows out of the set that sets the pace, the most promising first: by the level that they promise,
/// which is that of what is left in the set, or of both sides together, whichever is higher.
fn candidates(
    layer: &Layer,
    origin: &Layer,
    room: &Room,
    splits: &Splits<'_>,
    set: &Set<'_>,
    spare: isize,
) -> Vec<Operation> {
    let outside = outside(layer, room, &splits.flows[set.k], set);
    let mut found = Promising::default();
    let held = |e: &usize| layer.hosts(*e).iter().all(|g| set.inside[*g]);
    for e in (0..layer.experts()).filter(held) {
        let (w, hosts) = (set.w[e], layer.hosts(e));
        for to in &outside {
            let out = w - to.comes;
            let left = (set.rows - out) / set.size;
            if out <= 0.0 || !found.takes(left / set.mean) {
                continue;
            }
            let mut offer = |level: f64, op: Operation| {
                let promised = left.max(level) / set.mean;
                if found.takes(promised) {
                    let cost = layer.cost(origin, op);
                    if cost <= spare {
                        found.push(promised + PER_COPY * cost as f64, op);
                    }
                }
            };
            // Alone all of e goes, and what its new rank had of the other.
            let there = if hosts.len() == 1 {
                to.without + w / to.ranks
            } else {
                to.together
            };
            for g in hosts.iter().filter(|g| !layer.has(**g, to.expert)) {
                if let Some(s) = layer.slots(*g).iter().position(|x| *x == e) {
                    let (from, to) = ((*g, s), to.at);
                    offer(there, Operation::Swap { from, to });
                }
            }
            if to.redundant {
                let (expert, at) = (e, to.at);
                offer(to.together, Operation::Overwrite { expert, at });
            }
        }
    }
    found.sorted()
}

fn outside(layer: &Layer, room: &Room, flow: &Flow, set: &Set<'_>) -> Vec<Outside> {
    let levels = levels(layer, flow);
    let ranks = (0..layer.ranks()).filter(|h| !set.inside[*h]);
    let of = |h: usize| {
        let (load, ranks) = (flow.loads[h], levels[h]);
        let together = (set.rows + load * ranks) / (set.size + ranks);
        layer
            .slots(h)
            .iter()
            .enumerate()
            .map(move |(t, &f)| Outside {
                at: (h, t),
                expert: f,
                redundant: layer.count(f) > 1 && cover::allows_loss(room, layer, f, h),
                comes: if set.holds(layer, f, h) {
                    set.w[f]
                } else {
                    0.0
                },
                without: load - flow.rows_on(f, h) / ranks,
                ranks,
                together,
            })
    };
    ranks.flat_map(of).collect()
}

/// The [`PROMISING`] operations of the least values.
#[derive(Default)]
struct Promising {
    found: Vec<(f64, Operation)>,
    /// What more than enough are not above.
    most: Option<f64>,
}

impl Promising {
    /// Whether an operation that promises a level may be one of them: it takes back two copies at best.
    fn takes(&self, promised: f64) -> bool {
        self.most
            .is_none_or(|most| promised - 2.0 * PER_COPY <= most)
    }

    fn push(&mut self, value: f64, op: Operation) {
        if self.most.is_none_or(|most| value <= most) {
            self.found.push((value, op));
            if self.found.len() >= 4 * PROMISING {
                self.cut();
            }
        }
    }

    fn cut(&mut self) {
        if self.found.len() > PROMISING {
            self.found.select_nth_unstable_by(PROMISING - 1, least);
            self.found.truncate(PROMISING);
            self.most = self.found.last().map(|(value, _)| *value);
        }
    }

    fn sorted(mut self) -> Vec<Operation> {
        self.cut();
        self.found.sort_unstable_by(least);
        self.found.into_iter().map(|(_, op)| op).collect()
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
