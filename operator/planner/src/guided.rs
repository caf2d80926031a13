//! Local search judged by the best split itself, where even split hides what a copy is worth.
//!
//! A first copy of a hot expert can raise the highest load under even split and still be what lets the split level
//! the batch. Solving the split for a candidate costs tens of microseconds, so only few are tried: the heaviest
//! experts of the most loaded rank against the slots of the least loaded ranks.

use crate::layer::{Layer, least};
use crate::problem::Room;
use crate::solve::Solved;
use crate::trigger::LEAST_GAIN;

/// Experts of the most loaded rank that are tried.
const HEAVY: usize = 2;
/// Least loaded ranks that are tried.
const LIGHT: usize = 2;

/// Moves copies until the best split reaches `threshold`, nothing gains [`LEAST_GAIN`], or more than `limit` copies
/// would differ from `origin`; with never more components than `origin` has. Returns the best split of the result.
/// Every round gains, so it ends.
pub(crate) fn follow_split(
    layer: &mut Layer,
    origin: &Layer,
    room: &Room,
    w: &[f64],
    limit: usize,
    threshold: f64,
) -> Solved {
    let mut solved = layer.best_split(room, w);
    let most_components = origin.components();
    while solved.balance() < threshold {
        let better = candidates(layer, &solved, w)
            .into_iter()
            .filter(|candidate| candidate.moved_from(origin) <= limit)
            .filter(|candidate| candidate.components() <= most_components)
            .map(|candidate| (candidate.best_split(room, w), candidate))
            .enumerate()
            .min_by(|(i, (a, _)), (j, (b, _))| least(&(a.max(), *i), &(b.max(), *j)));
        match better {
            Some((_, (next, candidate))) if next.balance() > solved.balance() + LEAST_GAIN => {
                (solved, *layer) = (next, candidate);
            }
            Some(_) | None => break,
        }
    }
    solved
}

fn candidates(layer: &Layer, solved: &Solved, w: &[f64]) -> Vec<Layer> {
    let mut ranks: Vec<usize> = (0..layer.ranks()).collect();
    ranks.sort_by(|a, b| least(&(solved.loads[*a], *a), &(solved.loads[*b], *b)));
    let Some((&h, lighter)) = ranks.split_last() else {
        return Vec::new();
    };
    let mut heavy: Vec<usize> = (0..layer.slots(h).len()).collect();
    heavy.sort_by(|a, b| least(&(-w[layer.slots(h)[*a]], *a), &(-w[layer.slots(h)[*b]], *b)));
    let mut found = Vec::new();
    for s in heavy.into_iter().take(HEAVY) {
        let e = layer.slots(h)[s];
        for g in lighter
            .iter()
            .copied()
            .take(LIGHT)
            .filter(|g| !layer.has(*g, e))
        {
            for (t, f) in layer.slots(g).iter().copied().enumerate() {
                if layer.count(f) > 1 {
                    let mut candidate = layer.clone();
                    candidate.overwrite(g, t, e);
                    found.push(candidate);
                }
                if !layer.has(h, f) {
                    let mut candidate = layer.clone();
                    candidate.swap((h, s), (g, t));
                    found.push(candidate);
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use foregate_api::ids::Rank;

    #[test]
    fn two_hot_experts_are_shared_although_the_first_copy_looks_useless() {
        let slots = vec![vec![0, 2, 3, 4], vec![1, 3, 5, 6], vec![4, 5, 7, 2]];
        let origin = Layer::from_slots(&slots, 8);
        let w = [400.0, 380.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0];
        let room = Room {
            ranks: (0..3).map(Rank).collect(),
            slots: vec![4; 3],
            domains: vec![String::new(); 3],
        };
        let mut layer = origin.clone();
        let solved = follow_split(&mut layer, &origin, &room, &w, 4, 0.97);
        assert_eq!(solved.loads, layer.best_split(&room, &w).loads);
        assert!(
            layer.best_split(&room, &w).balance() >= 0.97,
            "{:?}",
            layer.all_slots()
        );
        assert!(layer.moved_from(&origin) <= 4);
    }
}
