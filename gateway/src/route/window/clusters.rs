//! Balanced k-means: groups of equal size, so that each worker has a kind of its own and no kind has two thirds of
//! the traffic.
//!
//! Lloyd's rounds with caps ⌈n/m⌉: the most decided point, the one with the largest spread of its distances, chooses
//! first. Centres begin as in k-means++ (Arthur and Vassilvitskii 2007). Cost: rounds × n × m × d.

/// Rounds of assignment and averaging.
const ROUNDS: usize = 15;
/// Beginnings tried; the one with the least sum of squared distances stays.
const TRIES: u64 = 3;

/// Groups of points.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Clusters {
    /// Mean of each group.
    pub(super) centres: Vec<Vec<f32>>,
    /// Group of each point.
    pub(crate) of: Vec<usize>,
    spread: f64,
}

/// Groups `points` (all of one length) into `m` of equal size. Same points and seed, same groups.
pub(super) fn balanced(points: &[Vec<f32>], m: usize, seed: u64) -> Clusters {
    let once = |at| {
        rounds(points, m, seed.wrapping_add(at), |costs, of| {
            assign(costs, m, of)
        })
    };
    (0..TRIES)
        .map(once)
        .min_by(|a, b| a.spread.total_cmp(&b.spread))
        .unwrap_or(Clusters {
            centres: Vec::new(),
            of: Vec::new(),
            spread: 0.0,
        })
}

/// Groups `points` into `m` by their nearest centres, of whatever size. Same points and seed, same groups.
pub(crate) fn nearest(points: &[Vec<f32>], m: usize, seed: u64) -> Clusters {
    rounds(points, m, seed, choose)
}

/// Rounds of assignment and averaging until nothing changes. `assign` gives every point a group by its costs, and
/// returns their sum.
fn rounds(
    points: &[Vec<f32>],
    m: usize,
    seed: u64,
    assign: impl Fn(&[Vec<f32>], &mut [usize]) -> f64,
) -> Clusters {
    let mut clusters = Clusters {
        centres: seeds(points, m, seed),
        of: vec![0; points.len()],
        spread: 0.0,
    };
    for _ in 0..ROUNDS {
        let before = clusters.of.clone();
        let costs = distances(points, &clusters.centres);
        clusters.spread = assign(&costs, &mut clusters.of);
        average(points, &mut clusters);
        if clusters.of == before {
            break;
        }
    }
    clusters
}

/// Gives every point the group of least cost. Returns the sum of the costs.
fn choose(costs: &[Vec<f32>], of: &mut [usize]) -> f64 {
    let mut sum = 0.0;
    for (of, costs) in of.iter_mut().zip(costs) {
        let near = (0..costs.len()).min_by(|a, b| costs[*a].total_cmp(&costs[*b]));
        *of = near.unwrap_or(0);
        sum += costs.get(*of).copied().map_or(0.0, f64::from);
    }
    sum
}

/// First centres: each next one a point drawn by its squared distance to the nearest so far.
fn seeds(points: &[Vec<f32>], m: usize, seed: u64) -> Vec<Vec<f32>> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        split_mix(state) as f64 / 2f64.powi(64)
    };
    let mut far = vec![1.0f64; points.len()];
    let mut centres: Vec<Vec<f32>> = Vec::with_capacity(m);
    while centres.len() < m {
        let mut left = uniform() * far.iter().sum::<f64>();
        let at = far
            .iter()
            .position(|weight| {
                left -= weight;
                left <= 0.0
            })
            .unwrap_or(0);
        let Some(point) = points.get(at) else { break };
        let first = centres.is_empty();
        centres.push(point.clone());
        for (far, other) in far.iter_mut().zip(points) {
            let distance = f64::from(squared(point, other));
            *far = if first { distance } else { far.min(distance) };
        }
    }
    centres
}

/// One number of the generator SplitMix64 (Steele, Lea and Flood 2014).
pub(crate) const fn split_mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn distances(points: &[Vec<f32>], centres: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let to = |point: &Vec<f32>| {
        centres
            .iter()
            .map(|centre| squared(point, centre))
            .collect()
    };
    points.iter().map(to).collect()
}

/// Gives every point the group of least cost that has room. The most decided point chooses first. Returns the sum of
/// the costs.
pub(super) fn assign(costs: &[Vec<f32>], m: usize, of: &mut [usize]) -> f64 {
    let decided = |at: &usize| {
        let all = &costs[*at];
        let least = all.iter().copied().fold(f32::INFINITY, f32::min);
        all.iter().copied().fold(0.0, f32::max) - least
    };
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|a, b| decided(b).total_cmp(&decided(a)).then(a.cmp(b)));
    let mut room = vec![costs.len().div_ceil(m.max(1)); m];
    let mut sum = 0.0;
    for at in order {
        let open = (0..m).filter(|group| room[*group] > 0);
        let nearest = open.min_by(|a, b| costs[at][*a].total_cmp(&costs[at][*b]));
        if let Some(group) = nearest {
            room[group] -= 1;
            of[at] = group;
            sum += f64::from(costs[at][group]);
        }
    }
    sum
}

fn average(points: &[Vec<f32>], clusters: &mut Clusters) {
    for (group, mean) in means(points, &clusters.of, clusters.centres.len())
        .into_iter()
        .enumerate()
    {
        // A group that nobody chose keeps its place.
        if let Some(mean) = mean {
            clusters.centres[group] = mean;
        }
    }
}

/// Mean of the points of each group; `None` where there are none.
pub(super) fn means(points: &[Vec<f32>], of: &[usize], m: usize) -> Vec<Option<Vec<f32>>> {
    let width = points.first().map_or(0, Vec::len);
    let mut sums = vec![(0.0f32, vec![0.0f32; width]); m];
    for (point, group) in points.iter().zip(of) {
        let Some((count, sum)) = sums.get_mut(*group) else {
            continue;
        };
        *count += 1.0;
        for (sum, x) in sum.iter_mut().zip(point) {
            *sum += x;
        }
    }
    sums.into_iter()
        .map(|(count, sum)| {
            (count > 0.0).then(|| sum.into_iter().map(|sum| sum / count).collect())
        })
        .collect()
}

/// Squared Euclidean distance, in eight lanes so that the processor may add them at once.
pub(super) fn squared(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a
        .remainder()
        .iter()
        .zip(b.remainder())
        .map(|(x, y)| (x - y) * (x - y))
        .sum();
    for (a, b) in a.zip(b) {
        for (lane, (x, y)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += (x - y) * (x - y);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `per` points around each of `m` far corners, in turns.
    fn corners(m: usize, per: usize) -> Vec<Vec<f32>> {
        let noise = |at: usize, axis: usize| {
            split_mix((at * 31 + axis) as u64 + 7) as f32 / u64::MAX as f32
        };
        (0..m * per)
            .map(|at| {
                let axes = 0..m;
                axes.map(|axis| 10.0 * f32::from(axis == at % m) + noise(at, axis))
                    .collect()
            })
            .collect()
    }

    #[test]
    fn clear_groups_are_found() {
        let points = corners(5, 12);
        let found = balanced(&points, 5, 3);
        for at in 0..points.len() {
            assert_eq!(found.of[at], found.of[at % 5]);
        }
        assert_eq!(found, balanced(&points, 5, 3));
    }

    #[test]
    fn groups_of_any_size_are_those_of_the_nearest_centres() {
        let mut points = corners(3, 2);
        points.extend(corners(1, 30));
        let found = nearest(&points, 3, 5);
        for (point, of) in points.iter().zip(&found.of) {
            let own = squared(point, &found.centres[*of]);
            assert!(
                found
                    .centres
                    .iter()
                    .all(|centre| own <= squared(point, centre))
            );
        }
        assert!(nearest(&[], 3, 1).of.is_empty());
    }

    #[test]
    fn groups_have_equal_size_whatever_the_points() {
        let mut points = corners(2, 10);
        points.extend(vec![vec![0.5, 0.5]; 13]);
        let found = balanced(&points, 4, 1);
        for group in 0..4 {
            let size = found.of.iter().filter(|of| **of == group).count();
            assert!(size <= points.len().div_ceil(4), "{:?}", found.of);
        }
        assert!(balanced(&[], 3, 1).of.is_empty());
    }
}
