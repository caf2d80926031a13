//! The worker with the fewest running and waiting sequences; the lowest rank among equals.

use super::Candidate;

pub(super) fn choose(candidates: &[Candidate]) -> Option<usize> {
    (0..candidates.len()).min_by_key(|at| (candidates[*at].load, candidates[*at].rank))
}

#[cfg(test)]
mod tests {
    use super::*;
    use foregate_api::ids::Rank;

    #[test]
    fn the_smallest_load_then_the_lowest_rank() {
        let loads = [3, 1, 1]
            .into_iter()
            .enumerate()
            .map(|(at, load)| Candidate {
                rank: Rank(at as u32),
                load,
                signature: Vec::new(),
                cached: 0,
            });
        assert_eq!(choose(&loads.collect::<Vec<_>>()), Some(1));
        assert_eq!(choose(&[]), None);
    }
}
