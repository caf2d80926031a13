//! Copies per expert: one each, then one more at a time to the largest load per copy.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A load with a total order, as a heap needs it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load(pub f64);

impl Eq for Load {}

impl PartialOrd for Load {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Load {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Copies of each expert for `copies` copies in all, at least one and at most `ranks` each.
///
/// `w[e]` is the expert's load; ties go to the lower expert. With a `floor` of two every expert is given a second copy
/// before any gets a third, the heaviest first as far as copies go. O((N + R) log N). The sum is `copies` unless that is
/// less than the experts or more than `ranks` times the experts.
pub(crate) fn counts(w: &[f64], copies: usize, ranks: usize, floor: usize) -> Vec<usize> {
    let mut counts = vec![1; w.len()];
    let mut spare = copies.saturating_sub(w.len());
    for _ in 1..floor.min(ranks) {
        let mut order: Vec<usize> = (0..w.len()).collect();
        order.sort_by(|a, b| w[*b].total_cmp(&w[*a]).then(a.cmp(b)));
        for e in order.into_iter().take(spare) {
            counts[e] += 1;
            spare -= 1;
        }
    }
    let heat = |e: usize, count: usize| (Load(w[e] / count as f64), Reverse(e));
    let open = (0..w.len()).filter(|e| counts[*e] < ranks);
    let mut heap: BinaryHeap<(Load, Reverse<usize>)> =
        open.map(|e| heat(e, counts[e])).collect();
    for _ in 0..spare {
        let Some((_, Reverse(e))) = heap.pop() else {
            break;
        };
        counts[e] += 1;
        if counts[e] < ranks {
            heap.push(heat(e, counts[e]));
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_per_copy_gets_the_next_one() {
        assert_eq!(counts(&[90.0, 40.0, 10.0], 6, 4, 1), [3, 2, 1]);
        assert_eq!(
            counts(&[1.0, 1.0, 1.0], 4, 4, 1),
            [2, 1, 1],
            "ties go to the lower expert"
        );
        assert_eq!(
            counts(&[90.0, 1.0], 4, 2, 1),
            [2, 2],
            "at most one per rank"
        );
        assert_eq!(counts(&[90.0, 1.0], 4, 1, 1), [1, 1]);
        assert_eq!(counts(&[90.0, 9.0, 1.0], 7, 4, 2), [3, 2, 2]);
        assert_eq!(
            counts(&[1.0, 9.0, 5.0], 5, 4, 2),
            [1, 2, 2],
            "as far as copies go"
        );
    }
}
