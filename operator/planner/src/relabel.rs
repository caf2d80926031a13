//! Names columns so that copies stay: an assignment of packed columns to ranks that keeps the most copies.

use crate::layer::Layer;
use crate::problem::Room;
use crate::settings::Cover;

/// Renames the ranks of `layer` so that the most slots equal those of `old` (both over the same ranks). Columns
/// only go to ranks with room for them and, if a cover is asked for, of their own domain. Returns the layer and the copies it shares with `old`.
pub(crate) fn relabel(layer: &Layer, old: &Layer, room: &Room) -> (Layer, usize) {
    let ranks = layer.ranks();
    let impossible = (layer.copies() + 1) as i64 * (ranks + 1) as i64;
    let cost: Vec<Vec<i64>> = (0..ranks)
        .map(|rank| {
            let price = |column: usize| {
                let held = layer.slots(column);
                let stays =
                    room.cover == Cover::None || room.domain[column] == room.domain[rank];
                if held.len() > room.slots[rank] || !stays {
                    return impossible;
                }
                -(held.iter().filter(|e| old.has(rank, **e)).count() as i64)
            };
            (0..ranks).map(price).collect()
        })
        .collect();
    let column = assign(&cost);
    let renamed: Vec<Vec<usize>> = column.iter().map(|c| layer.slots(*c).to_vec()).collect();
    let layer = Layer::from_slots(&renamed, layer.experts());
    let kept = layer.copies() - layer.moved_from(old);
    (layer, kept)
}

/// The column of each row of a square cost matrix that has the least total cost: shortest augmenting paths with
/// potentials (Kuhn's algorithm after Munkres, in the form of Jonker and Volgenant), O(n³).
///
/// `cost[row][column]`: any integers, as long as sums of them stay far from the limits of `i64`.
#[must_use]
pub fn assign(cost: &[Vec<i64>]) -> Vec<usize> {
    let n = cost.len();
    // Row and column 0 are the start of each path; real ones count from 1.
    let (mut row_price, mut column_price) = (vec![0_i64; n + 1], vec![0_i64; n + 1]);
    let mut row_of = vec![0_usize; n + 1];
    let mut before = vec![0_usize; n + 1];
    for row in 1..=n {
        row_of[0] = row;
        let mut column = 0;
        let mut slack = vec![i64::MAX; n + 1];
        let mut done = vec![false; n + 1];
        while row_of[column] != 0 {
            done[column] = true;
            let (at, mut step, mut next) = (row_of[column], i64::MAX, 0);
            for j in (1..=n).filter(|j| !done[*j]) {
                let reduced = cost[at - 1][j - 1] - row_price[at] - column_price[j];
                if reduced < slack[j] {
                    (slack[j], before[j]) = (reduced, column);
                }
                if slack[j] < step {
                    (step, next) = (slack[j], j);
                }
            }
            for j in 0..=n {
                if done[j] {
                    row_price[row_of[j]] += step;
                    column_price[j] -= step;
                } else {
                    slack[j] = slack[j].saturating_sub(step);
                }
            }
            column = next;
        }
        while column != 0 {
            row_of[column] = row_of[before[column]];
            column = before[column];
        }
    }
    let mut columns = vec![0; n];
    for j in 1..=n {
        columns[row_of[j] - 1] = j - 1;
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_assignment() {
        let cost = [vec![4, 1, 3], vec![2, 0, 5], vec![3, 2, 2]];
        assert_eq!(assign(&cost), [1, 0, 2]);
    }

    #[test]
    fn a_rotated_placement_is_named_back() {
        let old = Layer::from_slots(&[vec![0, 1], vec![2, 3], vec![4, 5]], 6);
        let new = Layer::from_slots(&[vec![4, 5], vec![0, 1], vec![2, 3]], 6);
        assert_eq!(relabel(&new, &old, &Room::plain(&[2, 2, 2])), (old, 6));
    }

    #[test]
    fn a_large_column_never_goes_to_a_small_rank() {
        let old = Layer::from_slots(&[vec![0, 1, 2], vec![3]], 4);
        let new = Layer::from_slots(&[vec![1, 2, 3], vec![0]], 4);
        let (named, kept) = relabel(&new, &old, &Room::plain(&[3, 1]));
        assert_eq!((named, kept), (new, 2));
    }
}
