//! Homes of a whole model: made from slots, compared, and loaded without a split of the batch.
//!
//! A placement here may hold an expert twice on a rank (published planners do that); its copies then list the rank
//! once, its slots twice.

use foregate_api::ids::{Epoch, ExpertId, Rank};
use foregate_api::placement::{Copy, LayerPlacement, Placement, Reason};
use foregate_planner::assign;

use crate::shape::Shape;

/// Experts by `[layer][rank][slot]`.
pub(crate) type Slots = Vec<Vec<Vec<usize>>>;

/// The placement with these slots and even shares, on these ranks.
pub(crate) fn placement(ranks: Vec<Rank>, slots: &Slots, experts: usize) -> Placement {
    let layers = slots
        .iter()
        .map(|layer| layer_of(&ranks, layer, experts))
        .collect();
    with_layers(ranks, layers)
}

/// The placement of these layers.
pub(crate) const fn with_layers(ranks: Vec<Rank>, layers: Vec<LayerPlacement>) -> Placement {
    Placement {
        epoch: Epoch(1),
        parent: Epoch(0),
        reason: Reason::Initial,
        ranks,
        layers,
        balance_before: 0.0,
        balance_after: 0.0,
    }
}

/// The layer with these slots, by rank, and even shares.
pub(crate) fn layer_of(ranks: &[Rank], slots: &[Vec<usize>], experts: usize) -> LayerPlacement {
    let ids = |held: &Vec<usize>| held.iter().map(|e| ExpertId(*e as u32)).collect();
    LayerPlacement::from_slots(ranks, slots.iter().map(ids).collect(), experts)
}

/// Ranks from 0.
pub(crate) fn ranks(count: usize) -> Vec<Rank> {
    (0..count).map(|rank| Rank(rank as u32)).collect()
}

/// The same with its ranks named, layer by layer, so that the most copies of `old` stay where they are. Both are over
/// the same ranks with the same number of slots each.
pub(crate) fn renamed(old: &Placement, new: &Placement) -> Placement {
    let both = old.layers.iter().zip(&new.layers);
    Placement {
        layers: both
            .map(|(old, layer)| renamed_layer(&new.ranks, old, layer))
            .collect(),
        ..new.clone()
    }
}

/// One layer of [`renamed`].
pub(crate) fn renamed_layer(
    ranks: &[Rank],
    old: &LayerPlacement,
    new: &LayerPlacement,
) -> LayerPlacement {
    let row = |rank: &Vec<ExpertId>| {
        let kept = new.slots.iter().map(|column| common(rank, column));
        kept.map(|kept| -(kept as i64)).collect()
    };
    let cost: Vec<Vec<i64>> = old.slots.iter().map(row).collect();
    let column = assign(&cost);
    let held = column.iter().map(|c| new.slots[*c].clone()).collect();
    LayerPlacement::from_slots(ranks, held, new.copies.len())
}

/// Copies that two ranks' slots have in common, as multisets; both ascend.
fn common(a: &[ExpertId], b: &[ExpertId]) -> usize {
    let (mut at, mut found) = (0, 0);
    for expert in a {
        while at < b.len() && b[at] < *expert {
            at += 1;
        }
        if at < b.len() && b[at] == *expert {
            (at, found) = (at + 1, found + 1);
        }
    }
    found
}

/// What is left on the other ranks when these are lost; shares keep their proportions.
pub(crate) fn without(placement: &Placement, lost: &[Rank]) -> Placement {
    let stays = |rank: &Rank| !lost.contains(rank);
    let layer = |layer: &LayerPlacement| {
        let slots = placement.ranks.iter().zip(&layer.slots);
        let left = |copies: &Vec<Copy>| {
            let left = copies.iter().filter(|copy| stays(&copy.rank));
            let total: f32 = left.clone().map(|copy| copy.share).sum();
            let even = 1.0 / left.clone().count().max(1) as f32;
            let part = |share: f32| if total > 0.0 { share / total } else { even };
            left.map(|copy| Copy {
                rank: copy.rank,
                share: part(copy.share),
            })
            .collect()
        };
        LayerPlacement {
            slots: slots
                .filter(|(rank, _)| stays(rank))
                .map(|(_, held)| held.clone())
                .collect(),
            copies: layer.copies.iter().map(left).collect(),
        }
    };
    Placement {
        layers: placement.layers.iter().map(layer).collect(),
        ranks: placement.ranks.iter().copied().filter(stays).collect(),
        ..placement.clone()
    }
}

/// What it takes to go from one placement to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Moved {
    /// Copies to load, over all layers and ranks.
    pub(crate) copies: usize,
    /// Most of them on one rank.
    pub(crate) most_to_one_rank: usize,
    /// Those of which the node had a copy before.
    pub(crate) from_same_node: usize,
}

/// Copies of `new` that `old` has not on the same rank; doubled copies count twice.
pub(crate) fn moved(old: &Placement, new: &Placement, shape: &Shape) -> Moved {
    let mut sum = Moved::default();
    for (at, rank) in new.ranks.iter().enumerate() {
        let before = old.ranks.binary_search(rank).ok();
        let mut copies = 0;
        for (old_layer, layer) in old.layers.iter().zip(&new.layers) {
            let mut left = before.map_or_else(Vec::new, |b| old_layer.slots[b].clone());
            for expert in &layer.slots[at] {
                if let Some(found) = left.iter().position(|e| e == expert) {
                    left.swap_remove(found);
                    continue;
                }
                copies += 1;
                let node = shape.node(rank.index());
                let near = |copy: &Copy| shape.node(copy.rank.index()) == node;
                let held = old_layer.copies[expert.index()].iter().any(near);
                sum.from_same_node += usize::from(held);
            }
        }
        sum.copies += copies;
        sum.most_to_one_rank = sum.most_to_one_rank.max(copies);
    }
    sum
}

/// Groups of ranks that hang together through experts with copies on several of them.
pub(crate) fn components(layer: &LayerPlacement, ranks: &[Rank]) -> usize {
    let mut group: Vec<usize> = (0..ranks.len()).collect();
    let mut count = ranks.len();
    for copies in &layer.copies {
        let mut hosts = copies
            .iter()
            .filter_map(|copy| ranks.binary_search(&copy.rank).ok());
        let Some(first) = hosts.next() else {
            continue;
        };
        for host in hosts {
            let (a, b) = (group[first], group[host]);
            if a != b {
                count -= 1;
                group.iter_mut().filter(|g| **g == b).for_each(|g| *g = a);
            }
        }
    }
    count
}

/// Copies that share a rank with another copy of their expert.
pub(crate) fn doubled(layer: &LayerPlacement) -> usize {
    let slots: usize = layer.slots.iter().map(Vec::len).sum();
    slots - layer.copies.iter().map(Vec::len).sum::<usize>()
}

/// Load of each rank when every slot that holds an expert takes the same part of its rows.
pub(crate) fn even_loads(layer: &LayerPlacement, rows: &[f64]) -> Vec<f64> {
    let mut copies = vec![0_u32; rows.len()];
    for expert in layer.slots.iter().flatten() {
        copies[expert.index()] += 1;
    }
    let part = |e: &ExpertId| rows[e.index()] / f64::from(copies[e.index()]);
    let of = |held: &Vec<ExpertId>| held.iter().map(part).sum();
    layer.slots.iter().map(of).collect()
}

/// Load of each rank when every copy takes its published share.
pub(crate) fn fixed_loads(layer: &LayerPlacement, ranks: &[Rank], rows: &[f64]) -> Vec<f64> {
    let mut loads = vec![0.0; ranks.len()];
    for (copies, rows) in layer.copies.iter().zip(rows) {
        for copy in copies {
            if let Ok(at) = ranks.binary_search(&copy.rank) {
                loads[at] += f64::from(copy.share) * rows;
            }
        }
    }
    loads
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(slots: &[&[usize]], experts: usize) -> Placement {
        let count = slots.len();
        let slots = slots.iter().map(|held| held.to_vec()).collect();
        placement(ranks(count), &vec![slots], experts)
    }

    #[test]
    fn moves_are_counted_as_multisets() {
        let shape = Shape {
            ranks: 2,
            nodes: 2,
            ..Shape::named("mixtral-8g").unwrap()
        };
        let old = of(&[&[0, 1], &[2, 3]], 4);
        assert_eq!(moved(&old, &old, &shape), Moved::default());
        // Rank 0 gets a second copy of 0 (its node has one), rank 1 gets 1 from the other node.
        let new = of(&[&[0, 0], &[1, 3]], 4);
        let expected = Moved {
            copies: 2,
            most_to_one_rank: 1,
            from_same_node: 1,
        };
        assert_eq!(moved(&old, &new, &shape), expected);
        assert_eq!(doubled(&new.layers[0]), 1);
    }

    #[test]
    fn doubled_copies_take_two_parts_of_an_even_split() {
        let p = of(&[&[0, 0], &[0, 1]], 2);
        assert_eq!(even_loads(&p.layers[0], &[30.0, 5.0]), [20.0, 15.0]);
        // A split knows ranks: half on each.
        assert_eq!(
            fixed_loads(&p.layers[0], &p.ranks, &[30.0, 5.0]),
            [15.0, 20.0]
        );
    }

    #[test]
    fn a_rotated_placement_is_named_back_and_doubles_count_twice() {
        let old = of(&[&[0, 0], &[1, 2], &[2, 3]], 4);
        let new = of(&[&[2, 3], &[0, 0], &[1, 2]], 4);
        assert_eq!(renamed(&old, &new), old);
        let ids = |held: &[u32]| held.iter().map(|e| ExpertId(*e)).collect::<Vec<_>>();
        assert_eq!(common(&ids(&[0, 0, 1]), &ids(&[0, 1, 1])), 2);
        assert_eq!(common(&ids(&[0, 0]), &ids(&[0, 0])), 2);
    }

    #[test]
    fn what_is_left_keeps_its_proportions() {
        let mut p = of(&[&[0, 1], &[0, 2], &[0, 3]], 4);
        for (copy, share) in p.layers[0].copies[0].iter_mut().zip([0.2, 0.2, 0.6]) {
            copy.share = share;
        }
        let left = without(&p, &[Rank(1)]);
        assert_eq!(left.ranks, [Rank(0), Rank(2)]);
        let shares: Vec<f32> = left.layers[0].copies[0].iter().map(|c| c.share).collect();
        assert!((shares[0] - 0.25).abs() < 1e-6 && (shares[1] - 0.75).abs() < 1e-6);
        assert!(left.layers[0].copies[2].is_empty(), "nobody has 2 any more");
    }

    #[test]
    fn ranks_hang_together_through_shared_experts() {
        let p = of(&[&[0, 1], &[1, 2], &[3, 4], &[4, 5]], 6);
        assert_eq!(components(&p.layers[0], &p.ranks), 2);
        let linked = of(&[&[0, 1], &[1, 2], &[2, 4], &[4, 5]], 6);
        assert_eq!(components(&linked.layers[0], &linked.ranks), 1);
    }
}
