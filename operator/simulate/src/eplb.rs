//! The published EPLB algorithm (DeepSeek), from its description: expert groups to nodes, copies inside a node, copies
//! to ranks; each time heaviest first to the lightest bin with room.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use foregate_planner::Load;

use crate::homes::Slots;

/// The cluster that EPLB places on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cluster {
    /// Copies per layer, a multiple of the ranks.
    pub(crate) copies: usize,
    pub(crate) ranks: usize,
    /// A divisor of the ranks. If it does not divide the groups, groups and nodes are not looked at.
    pub(crate) nodes: usize,
    /// Groups of experts that stay together on a node.
    pub(crate) groups: usize,
}

/// Places every layer anew; `load[l][e]` are rows. The answer may hold an expert twice on a rank, as the published
/// one.
pub(crate) fn eplb(load: &[Vec<f64>], cluster: Cluster) -> Slots {
    load.iter().map(|row| layer(row, cluster)).collect()
}

fn layer(load: &[f64], cluster: Cluster) -> Vec<Vec<usize>> {
    let Cluster {
        copies,
        ranks,
        nodes,
        groups,
    } = cluster;
    let (groups, nodes) = if groups % nodes == 0 {
        (groups, nodes)
    } else {
        (1, 1)
    };
    let size = load.len() / groups;
    let group_loads: Vec<f64> = load.chunks(size).map(|group| group.iter().sum()).collect();
    let home = pack(&group_loads, nodes);
    let mut slots = Vec::with_capacity(ranks);
    for node in 0..nodes {
        let mine: Vec<usize> = (0..load.len()).filter(|e| home[e / size] == node).collect();
        let loads: Vec<f64> = mine.iter().map(|e| load[*e]).collect();
        let (of, count) = replicate(&loads, copies / nodes);
        let per_copy: Vec<f64> = of.iter().map(|e| loads[*e] / count[*e] as f64).collect();
        let bins = pack(&per_copy, ranks / nodes);
        for rank in 0..ranks / nodes {
            let held = (0..of.len()).filter(|copy| bins[*copy] == rank);
            slots.push(held.map(|copy| mine[of[copy]]).collect());
        }
    }
    slots
}

/// The bin of each item, the same number in each bin: heaviest first to the lightest bin with room. Where a bin takes
/// one item only, items keep their order.
fn pack(loads: &[f64], bins: usize) -> Vec<usize> {
    let room = loads.len() / bins;
    if room == 1 {
        return (0..loads.len()).collect();
    }
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_by(|a, b| loads[*b].total_cmp(&loads[*a]));
    let mut lightest: BinaryHeap<Reverse<(Load, usize, usize)>> = (0..bins)
        .map(|bin| Reverse((Load(0.0), bin, room)))
        .collect();
    let mut bin_of = vec![0; loads.len()];
    for item in order {
        let Some(Reverse((load, bin, room))) = lightest.pop() else {
            break;
        };
        bin_of[item] = bin;
        if room > 1 {
            lightest.push(Reverse((Load(load.0 + loads[item]), bin, room - 1)));
        }
    }
    bin_of
}

/// The expert of each of `copies` copies, and the copies of each expert: one each, then one more at a time to the
/// largest load per copy.
fn replicate(loads: &[f64], copies: usize) -> (Vec<usize>, Vec<usize>) {
    let mut of: Vec<usize> = (0..loads.len()).collect();
    let mut count = vec![1; loads.len()];
    let mut heaviest: BinaryHeap<(Load, Reverse<usize>)> = loads
        .iter()
        .enumerate()
        .map(|(e, load)| (Load(*load), Reverse(e)))
        .collect();
    while of.len() < copies {
        let Some((_, Reverse(e))) = heaviest.pop() else {
            break;
        };
        of.push(e);
        count[e] += 1;
        heaviest.push((Load(loads[e] / count[e] as f64), Reverse(e)));
    }
    (of, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn global(copies: usize, ranks: usize) -> Cluster {
        Cluster {
            copies,
            ranks,
            nodes: 1,
            groups: 1,
        }
    }

    #[test]
    fn by_hand_the_hottest_is_doubled_and_the_rest_packed() {
        // Expert 0 gets the fifth and the sixth copy (90, 45, 30 > 20): copies 30, 30, 30, 20, 10, 4.
        let load = [90.0, 20.0, 10.0, 4.0];
        let (of, count) = replicate(&load, 6);
        assert_eq!((of, count), (vec![0, 1, 2, 3, 0, 0], vec![3, 1, 1, 1]));
        // Heaviest first: 30 → rank 0, 30 → 1, 30 → 2, 20 → 0, 10 → 1, 4 → 2.
        assert_eq!(layer(&load, global(6, 3)), [[0, 1], [2, 0], [3, 0]]);
    }

    /// A layer and what the reference made of it.
    #[derive(serde::Deserialize)]
    struct Recorded {
        copies: usize,
        ranks: usize,
        nodes: usize,
        groups: usize,
        load: Vec<f64>,
        slots: Vec<Vec<usize>>,
    }

    /// Recorded from a reference in Python (numpy 2.4, `heapq`), written apart from this one after the same description:
    /// global and hierarchical, with many ties, one slot a rank, groups that nodes do not divide.
    #[test]
    fn recorded_layers_come_out_slot_by_slot() {
        let cases: Vec<Recorded> =
            serde_json::from_str(include_str!("eplb/recorded.json")).unwrap();
        assert!(cases.len() >= 9);
        for (at, case) in cases.iter().enumerate() {
            let cluster = Cluster {
                copies: case.copies,
                ranks: case.ranks,
                nodes: case.nodes,
                groups: case.groups,
            };
            assert_eq!(layer(&case.load, cluster), case.slots, "case {at}");
        }
    }

    #[test]
    fn by_hand_ties_go_to_the_lower_expert_and_bin() {
        assert_eq!(replicate(&[5.0, 5.0], 3).1, [2, 1]);
        assert_eq!(pack(&[1.0, 1.0, 1.0, 1.0], 2), [0, 1, 0, 1]);
        assert_eq!(
            pack(&[1.0, 9.0], 2),
            [0, 1],
            "one item a bin keeps its order"
        );
    }

    #[test]
    fn by_hand_two_copies_may_meet_on_a_rank() {
        // All copies of the only hot expert find room: 3 copies, 2 ranks.
        let held = layer(&[100.0, 1.0], global(4, 2));
        assert_eq!(held, [[0, 0], [1, 0]]);
    }

    #[test]
    fn by_hand_groups_stay_on_their_node() {
        // Groups of two: loads 11, 3, 6, 8. Heaviest first over two nodes: {0, 1} → 0, {6, 7} → 1, {4, 5} → 1,
        // {2, 3} → 0.
        let load = [10.0, 1.0, 2.0, 1.0, 5.0, 1.0, 4.0, 4.0];
        let cluster = Cluster {
            copies: 12,
            ranks: 4,
            nodes: 2,
            groups: 4,
        };
        let held = layer(&load, cluster);
        let on = |node: usize| {
            let mut experts: Vec<usize> = held[2 * node..2 * node + 2].concat();
            experts.sort_unstable();
            experts
        };
        // Node 0 doubles 0 twice (10, 5); node 1 doubles 4 (5) and then 6 (4).
        assert_eq!(on(0), [0, 0, 0, 1, 2, 3]);
        assert_eq!(on(1), [4, 4, 5, 6, 6, 7]);
    }

    #[test]
    fn groups_that_nodes_do_not_divide_are_not_looked_at() {
        let load: Vec<f64> = (0..8).map(|e| f64::from(e) + 1.0).collect();
        let odd = Cluster {
            copies: 12,
            ranks: 6,
            nodes: 3,
            groups: 4,
        };
        assert_eq!(layer(&load, odd), layer(&load, global(12, 6)));
    }
}
