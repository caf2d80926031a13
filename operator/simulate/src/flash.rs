//! A planner after the published description of FlashLB (vLLM-Ascend, in vllm#37656): recent windows are stages of the
//! load, copies are packed against all of them, a tree of copy counts is searched, ranks are renamed so that copies
//! stay, and a layer is left alone while its balance holds.
//!
//! It is *like* FlashLB: the description leaves sizes of stages, the tree and the limit open, and those here are ours.

use foregate_api::ids::Rank;
use foregate_api::placement::{LayerPlacement, Placement};
use foregate_planner::split::balance;

use crate::generator::Counts;
use crate::homes::{even_loads, layer_of, renamed_layer};
use crate::shape::Shape;

/// Windows in a stage.
const STAGE: usize = 2;
/// Levels of the tree, counts that are kept on a level, and children of each.
const LEVELS: usize = 3;
const KEPT: usize = 4;
const CHILDREN: usize = 2;
/// A layer stands while it has this part of what a new one would have.
const HOLDS: f64 = 0.95;

/// Rows per expert of each stage, oldest first.
type Stages = Vec<Vec<f64>>;

/// The next placement, from the windows since the last one; `in_force` is none at the start.
pub(crate) fn flash(
    windows: &[Counts],
    in_force: Option<&Placement>,
    shape: &Shape,
) -> Placement {
    let ranks: Vec<Rank> = crate::homes::ranks(shape.ranks);
    let layers = (0..shape.layers)
        .map(|l| {
            let stages = stages(windows, l);
            let new = layer_of(&ranks, &search(&stages, shape), shape.experts);
            let Some(old) = in_force.and_then(|placement| placement.layers.get(l)) else {
                return new;
            };
            if score(old, &stages) >= HOLDS * score(&new, &stages) {
                return old.clone();
            }
            renamed_layer(&ranks, old, &new)
        })
        .collect();
    crate::homes::with_layers(ranks, layers)
}

fn stages(windows: &[Counts], layer: usize) -> Stages {
    let sum = |stage: &[Counts]| {
        let mut rows = vec![0.0; stage[0][layer].len()];
        for window in stage {
            for (sum, n) in rows.iter_mut().zip(&window[layer]) {
                *sum += *n as f64;
            }
        }
        rows
    };
    windows.chunks(STAGE).map(sum).collect()
}

/// Mean balance over the stages, even split.
fn score(layer: &LayerPlacement, stages: &Stages) -> f64 {
    let sum: f64 = stages
        .iter()
        .map(|rows| balance(&even_loads(layer, rows)))
        .sum();
    sum / stages.len().max(1) as f64
}

/// Slots of the best counts of the tree.
fn search(stages: &Stages, shape: &Shape) -> Vec<Vec<usize>> {
    let ranks = crate::homes::ranks(shape.ranks);
    let heat = heat(stages);
    let judged = |counts: Vec<usize>| {
        let slots = pack(stages, &counts, shape);
        let score = score(&layer_of(&ranks, &slots, shape.experts), stages);
        (score, counts, slots)
    };
    let mut level = vec![judged(first_counts(&heat, shape))];
    let mut best = level[0].clone();
    for _ in 0..LEVELS {
        let children = level
            .iter()
            .flat_map(|(_, counts, _)| children(&heat, counts, shape));
        let mut next: Vec<_> = children.map(judged).collect();
        next.sort_by(|a, b| b.0.total_cmp(&a.0));
        next.truncate(KEPT);
        if next.first().is_some_and(|found| found.0 > best.0) {
            best = next[0].clone();
        }
        level = next;
    }
    best.2
}

/// Mean rows of each expert and one standard deviation over the stages.
fn heat(stages: &Stages) -> Vec<f64> {
    let n = stages.len().max(1) as f64;
    let of = |e: usize| {
        let mean = stages.iter().map(|rows| rows[e]).sum::<f64>() / n;
        let squares: f64 = stages.iter().map(|rows| (rows[e] - mean).powi(2)).sum();
        mean + (squares / n).sqrt()
    };
    (0..stages.first().map_or(0, Vec::len)).map(of).collect()
}

fn first_counts(heat: &[f64], shape: &Shape) -> Vec<usize> {
    let mut counts = vec![1; heat.len()];
    for _ in heat.len()..shape.copies {
        let Some(e) = hottest(heat, &counts, shape).next() else {
            break;
        };
        counts[e] += 1;
    }
    counts
}

/// Experts that may have another copy, by heat per copy, descending.
fn hottest(heat: &[f64], counts: &[usize], shape: &Shape) -> impl Iterator<Item = usize> {
    let mut order: Vec<usize> = (0..heat.len())
        .filter(|e| counts[*e] < shape.ranks)
        .collect();
    let per_copy = |e: usize| heat[e] / counts[e] as f64;
    order.sort_by(|a, b| per_copy(*b).total_cmp(&per_copy(*a)));
    order.into_iter()
}

/// Counts with one copy taken from where it is missed least and given to one of the hottest.
fn children(heat: &[f64], counts: &[usize], shape: &Shape) -> Vec<Vec<usize>> {
    let left = |e: usize| heat[e] / (counts[e] - 1) as f64;
    let spare = (0..heat.len())
        .filter(|e| counts[*e] > 1)
        .min_by(|a, b| left(*a).total_cmp(&left(*b)));
    let Some(spare) = spare else {
        return Vec::new();
    };
    let others = hottest(heat, counts, shape).filter(|e| *e != spare);
    others
        .take(CHILDREN)
        .map(|e| {
            let mut child = counts.to_vec();
            child[spare] -= 1;
            child[e] += 1;
            child
        })
        .collect()
}

/// Heaviest copy first, to the rank with room that lacks the expert and whose highest stage stays lowest. Where every
/// rank with room has the expert, it is doubled.
fn pack(stages: &Stages, counts: &[usize], shape: &Shape) -> Vec<Vec<usize>> {
    let total = |e: usize| stages.iter().map(|rows| rows[e]).sum::<f64>() / counts[e] as f64;
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by(|a, b| total(*b).total_cmp(&total(*a)));
    let mut slots = vec![Vec::with_capacity(shape.slots()); shape.ranks];
    let mut loads = vec![vec![0.0; stages.len()]; shape.ranks];
    for e in order {
        let part: Vec<f64> = stages
            .iter()
            .map(|rows| rows[e] / counts[e] as f64)
            .collect();
        for _ in 0..counts[e] {
            let highest = |g: usize| {
                let after = loads[g].iter().zip(&part).map(|(load, part)| load + part);
                after.fold(0.0, f64::max)
            };
            let room = (0..shape.ranks).filter(|g| slots[*g].len() < shape.slots());
            let at = room.min_by(|a, b| {
                let doubled = slots[*a].contains(&e).cmp(&slots[*b].contains(&e));
                doubled.then_with(|| highest(*a).total_cmp(&highest(*b)))
            });
            if let Some(g) = at {
                slots[g].push(e);
                loads[g]
                    .iter_mut()
                    .zip(&part)
                    .for_each(|(load, part)| *load += part);
            }
        }
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Shape {
        Shape {
            layers: 1,
            experts: 4,
            ranks: 2,
            nodes: 1,
            copies: 6,
            ..Shape::named("mixtral-8g").unwrap()
        }
    }

    fn windows(n: usize, rows: [u64; 4]) -> Vec<Counts> {
        vec![vec![rows.to_vec()]; n]
    }

    #[test]
    fn stages_that_take_turns_are_packed_apart() {
        let shape = Shape {
            copies: 4,
            ..small()
        };
        // By their sums (120, 130, 90, 90) expert 2 would go to the lighter rank of 0, which is hot at the same time.
        let both = [windows(2, [100, 30, 80, 10]), windows(2, [20, 100, 10, 80])].concat();
        let placed = flash(&both, None, &shape);
        let balance = score(&placed.layers[0], &stages(&both, 0));
        assert!(balance > 0.95, "{balance}");
    }

    #[test]
    fn a_layer_whose_balance_holds_stands_and_another_is_made_anew() {
        let shape = small();
        let before = windows(4, [90, 40, 30, 20]);
        let placed = flash(&before, None, &shape);
        assert_eq!(flash(&before, Some(&placed), &shape), placed);
        let after = windows(4, [5, 5, 10, 200]);
        let moved = flash(&after, Some(&placed), &shape);
        let now = stages(&after, 0);
        assert!(score(&moved.layers[0], &now) > score(&placed.layers[0], &now));
    }
}
