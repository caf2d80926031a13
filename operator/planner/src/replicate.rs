//! Copies per expert: one each, then one more at a time to the largest load per copy.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A non-negative finite load with a total order.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Load(f64);

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
/// `w[e]` is the expert's load; ties go to the lower expert. O((N + R) log N). The sum is `copies` unless that is
/// less than the experts or more than `ranks` times the experts.
pub(crate) fn counts(w: &[f64], copies: usize, ranks: usize) -> Vec<usize> {
    let mut counts = vec![1; w.len()];
    let mut heap: BinaryHeap<(Load, Reverse<usize>)> = if ranks > 1 {
        w.iter()
            .enumerate()
            .map(|(e, w)| (Load(*w), Reverse(e)))
            .collect()
    } else {
        BinaryHeap::new()
    };
    for _ in w.len()..copies {
        let Some((_, Reverse(e))) = heap.pop() else {
            break;
        };
        counts[e] += 1;
        if counts[e] < ranks {
            heap.push((Load(w[e] / counts[e] as f64), Reverse(e)));
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_per_copy_gets_the_next_one() {
        assert_eq!(counts(&[90.0, 40.0, 10.0], 6, 4), [3, 2, 1]);
        assert_eq!(
            counts(&[1.0, 1.0, 1.0], 4, 4),
            [2, 1, 1],
            "ties go to the lower expert"
        );
        assert_eq!(counts(&[90.0, 1.0], 4, 2), [2, 2], "at most one per rank");
        assert_eq!(counts(&[90.0, 1.0], 4, 1), [1, 1]);
    }
}
