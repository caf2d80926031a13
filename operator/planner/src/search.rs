//! Local search judged by the best split: which copies, moved, lower the level that no split gets below.
//!
//! A solved split names the set X of ranks that sets the pace: the experts held only inside X carry `W(X)` rows, so no
//! split of this placement gets below `W(X)/|X|` (see [`crate::bound`]). Only operations that let rows out of X lower
//! it: a copy of an expert of X on a rank outside, swapped with a slot there (two copies) or over a redundant copy
//! there (one). Their effect on X is exact and costs no solve; the most promising are then solved, going on from the
//! split at hand, under all loads that the homes shall be good for.

use crate::cover;
use crate::flow::{Flow, Workspace};
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
    pub(crate) fn of(layer: &Layer, loads: &'a [Vec<f64>], work: &mut Workspace) -> Self {
        let first = loads.first().map(|w| Flow::even(layer, w));
        Self::from(first.unwrap_or_default(), loads, work)
    }

    /// From a split under the prediction.
    pub(crate) fn from(mut flow: Flow, loads: &'a [Vec<f64>], work: &mut Workspace) -> Self {
        let ranks = flow.loads.len();
        let mean = |w: &Vec<f64>| w.iter().sum::<f64>() / ranks as f64;
        let mut flows = Vec::with_capacity(loads.len());
        if let Some(first) = loads.first() {
            flow.settle(first, SOLVE_SWEEPS, SOLVE_GAP, work);
            for w in &loads[1..] {
                let mut other = work.spare();
                other.become_scaled(&flow, first, w);
                other.settle(w, 2 * SWEEPS, GAP, work);
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
        let flows = self.flows.iter().zip(&self.means);
        flows.map(|(flow, mean)| score(flow, *mean)).sum::<f64>() / self.flows.len() as f64
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

    /// Makes `flow` what the split under one load is after an operation: the score there, if it is below `most`.
    fn attempt(
        &self,
        flow: &mut Flow,
        layer: &Layer,
        op: Operation,
        (k, most): (usize, f64),
        work: &mut Workspace,
    ) -> Option<f64> {
        let w = &self.loads[k];
        flow.become_like(&self.flows[k]);
        flow.follow(layer, op, w, work);
        flow.settle_below(most * self.means[k], w, SWEEPS, GAP, work);
        let score = score(flow, self.means[k]);
        (score < most).then_some(score)
    }

    fn sets(&self, layer: &Layer, work: &mut Workspace) -> Vec<Set<'a>> {
        let mut sets = Vec::with_capacity(self.flows.len());
        for (k, flow) in self.flows.iter().enumerate() {
            let (bound, size) = flow.tight(&self.loads[k], work);
            let mut inside = vec![false; layer.ranks()];
            let first = work.ranks_by_load().take(size);
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

    /// Takes over the splits of an operation that was applied to the layer, its copies put back into the layer's order.
    fn become_sorted(&mut self, found: Vec<Flow>, layer: &Layer, work: &mut Workspace) {
        for (k, flow) in found.into_iter().enumerate() {
            self.flows[k].become_sorted(&flow, layer, &self.loads[k]);
            work.retire(flow);
        }
    }

    pub(crate) fn retire(self, work: &mut Workspace) {
        self.flows.into_iter().for_each(|flow| work.retire(flow));
    }
}

/// What the search lowers, under one load.
fn score(flow: &Flow, mean: f64) -> f64 {
    let ranks = flow.loads.len() as f64;
    let variance = flow.squares() / (ranks * mean * mean) - 1.0;
    flow.max() / mean + SPREAD * variance
}

/// Moves copies while that lowers the score by `effort.gain` each time, within its limits, never with more components
/// than now and never against the cover asked for.
pub(crate) fn search(
    layer: &mut Layer,
    origin: &Layer,
    room: &Room,
    splits: &mut Splits<'_>,
    effort: Effort,
    work: &mut Workspace,
) {
    let most_components = layer.components();
    for _ in 0..effort.rounds {
        if splits.expected() >= effort.enough {
            return;
        }
        let spare = effort.limit as isize - layer.moved_from(origin) as isize;
        let round = Round::of(layer, splits, effort, work);
        let fits = |op: &Operation| {
            round.bounds(*op).sum::<f64>() < round.most
                && cover::allows(room, layer, *op)
                && layer.components_after(*op) <= most_components
        };
        let set = &round.sets[round.worst];
        let tries = candidates(layer, origin, room, splits, set, spare);
        let tries = tries.into_iter().filter(fits).take(effort.tries);
        let promising = round.promising(tries, effort.finals, work);
        let Some((op, flows)) = round.best(promising, work) else {
            return;
        };
        layer.apply(op);
        splits.become_sorted(flows, layer, work);
    }
}

/// An operation, solved under the load that sets the pace.
struct Tried {
    score: f64,
    op: Operation,
    flow: Flow,
}

/// One round of the search: what it starts from, and what its operation has to beat.
struct Round<'a> {
    layer: &'a Layer,
    splits: &'a Splits<'a>,
    /// The set that sets the pace under each load.
    sets: Vec<Set<'a>>,
    /// The load with the highest overload.
    worst: usize,
    /// What the sum of the scores must be below.
    most: f64,
}

impl<'a> Round<'a> {
    fn of(
        layer: &'a Layer,
        splits: &'a Splits<'a>,
        effort: Effort,
        work: &mut Workspace,
    ) -> Self {
        let sets = splits.sets(layer, work);
        Self {
            most: sets.len() as f64 * (splits.score() - effort.gain),
            worst: splits.worst(),
            layer,
            splits,
            sets,
        }
    }

    /// Overload under each load that no split gets below after an operation.
    fn bounds(&self, op: Operation) -> impl Iterator<Item = f64> + '_ {
        self.sets.iter().map(move |set| set.bound(self.layer, op))
    }

    /// The best of `tries` under the load that sets the pace, best first and at most `finals`.
    fn promising(
        &self,
        tries: impl Iterator<Item = Operation>,
        finals: usize,
        work: &mut Workspace,
    ) -> Vec<Tried> {
        let mut found: Vec<Tried> = Vec::with_capacity(finals + 1);
        for op in tries {
            let but_worst =
                |(k, bound): (usize, f64)| if k == self.worst { 0.0 } else { bound };
            let mut most = self.most - self.bounds(op).enumerate().map(but_worst).sum::<f64>();
            if let (true, Some(last)) = (found.len() == finals, found.last()) {
                // As good as the last may still be before it, by the order of operations.
                most = most.min(last.score.next_up());
            }
            // The score is the overload and more.
            if self.sets[self.worst].bound(self.layer, op) >= most {
                continue;
            }
            let mut flow = work.spare();
            let at = (self.worst, most);
            let Some(score) = self.splits.attempt(&mut flow, self.layer, op, at, work) else {
                work.retire(flow);
                continue;
            };
            let before = |x: &Tried| least(&(x.score, x.op), &(score, op)).is_lt();
            found.insert(found.partition_point(before), Tried { score, op, flow });
            if found.len() > finals
                && let Some(last) = found.pop()
            {
                work.retire(last.flow);
            }
        }
        found
    }

    /// The best of them under all loads, with its splits.
    fn best(
        &self,
        promising: Vec<Tried>,
        work: &mut Workspace,
    ) -> Option<(Operation, Vec<Flow>)> {
        let mut found: Option<(f64, Operation, Vec<Flow>)> = None;
        for tried in promising {
            let most = found.as_ref().map_or(self.most, |(least, ..)| *least);
            let op = tried.op;
            let (score, mut flows) = self.under_all(tried, most, work);
            if let Some(score) = score {
                flows = found
                    .replace((score, op, flows))
                    .map_or_else(Vec::new, |(.., flows)| flows);
            }
            flows.into_iter().for_each(|flow| work.retire(flow));
        }
        found.map(|(_, op, flows)| (op, flows))
    }

    /// The sum of an operation's scores under all loads, if it is below `most`, and its splits as far as they were solved.
    fn under_all(
        &self,
        tried: Tried,
        most: f64,
        work: &mut Workspace,
    ) -> (Option<f64>, Vec<Flow>) {
        let Tried { score, op, flow } = tried;
        let mut known = Some((score, flow));
        let mut flows = Vec::with_capacity(self.sets.len());
        // What is still to come is at least the bound of its set.
        let mut sum = self.bounds(op).sum::<f64>();
        for (k, bound) in self.bounds(op).enumerate() {
            sum -= bound;
            let most = most - sum;
            let (score, flow) = match known.take_if(|_| k == self.worst) {
                Some((score, flow)) => ((score < most).then_some(score), flow),
                None => {
                    let mut flow = work.spare();
                    let at = (k, most);
                    (
                        self.splits.attempt(&mut flow, self.layer, op, at, work),
                        flow,
                    )
                }
            };
            flows.push(flow);
            let Some(score) = score else {
                if let Some((_, flow)) = known {
                    work.retire(flow);
                }
                return (None, flows);
            };
            sum += score;
        }
        ((sum < most).then_some(sum), flows)
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
    // Those that take the most out of the set first: what follows one that promises too little does as well.
    let mut outside = outside(layer, room, &splits.flows[set.k], set);
    outside.sort_by(|a, b| a.comes.total_cmp(&b.comes));
    let held = |e: &usize| layer.hosts(*e).iter().all(|g| set.inside[*g]);
    let mut inside: Vec<usize> = (0..layer.experts()).filter(held).collect();
    inside.sort_by(|e, f| set.w[*f].total_cmp(&set.w[*e]));
    let mut found = Promising::default();
    for e in inside {
        let (w, hosts) = (set.w[e], layer.hosts(e));
        for to in &outside {
            let out = w - to.comes;
            let left = (set.rows - out) / set.size;
            if out <= 0.0 || !found.takes(left / set.mean) {
                break;
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
        let mut work = Workspace::default();
        let mut splits = Splits::of(&layer, &loads, &mut work);
        search(
            &mut layer,
            &origin,
            &Room::plain(&[4; 3]),
            &mut splits,
            EFFORT,
            &mut work,
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
