//! The worker whose KV cache holds the longest prefix of the prompt, within a band of load.
//!
//! Why: what a worker has need not be computed again. But a worker that is liked by all must not drown while others
//! are idle, so only those are asked whose load is within a band of the least. Among them the longest prefix wins, load
//! breaks ties, and then the lower rank.

use std::cmp::Reverse;

use super::{Candidate, Outcome, least_loaded};

/// The band: eight sequences, and half of the least load where there are many. A whole batch may wait behind a prefix,
/// two of them may not.
const fn band(least: u32) -> u32 {
    8 + least / 2
}

pub(super) fn choose(candidates: &[Candidate]) -> Option<(usize, Outcome)> {
    let least = least_loaded::choose(candidates)?;
    let low = candidates[least].load;
    let limit = low.saturating_add(band(low));
    let near = candidates
        .iter()
        .enumerate()
        .filter(|(_, of)| of.load <= limit);
    let (at, chosen) = near.min_by_key(|(at, of)| (Reverse(of.cached), of.load, *at))?;
    let outcome = if chosen.cached > 0 {
        Outcome::Prefix
    } else {
        Outcome::Load
    };
    Some((at, outcome))
}

#[cfg(test)]
mod tests {
    use foregate_api::ids::Rank;

    use super::*;

    /// Workers of (load, cached tokens).
    fn candidates(of: &[(u32, u32)]) -> Vec<Candidate> {
        let one = |(rank, (load, cached)): (u32, &(u32, u32))| Candidate {
            rank: Rank(rank),
            load: *load,
            signature: Vec::new(),
            cached: *cached,
        };
        (0..).zip(of).map(one).collect()
    }

    #[test]
    fn the_longest_prefix_wins_and_load_breaks_ties() {
        let choose = |of: &[(u32, u32)]| choose(&candidates(of));
        assert_eq!(
            choose(&[(0, 16), (5, 64), (3, 32)]),
            Some((1, Outcome::Prefix))
        );
        assert_eq!(
            choose(&[(4, 64), (5, 64), (3, 64)]),
            Some((2, Outcome::Prefix))
        );
        assert_eq!(choose(&[(2, 64), (2, 64)]), Some((0, Outcome::Prefix)));
        assert_eq!(choose(&[(2, 0), (1, 0)]), Some((1, Outcome::Load)));
        assert_eq!(choose(&[]), None);
    }

    #[test]
    fn a_prefix_is_not_worth_any_wait() {
        let choose = |of: &[(u32, u32)]| choose(&candidates(of)).unwrap().0;
        assert_eq!(choose(&[(8, 4096), (0, 0)]), 0);
        assert_eq!(choose(&[(9, 4096), (0, 0)]), 1);
        assert_eq!(choose(&[(38, 4096), (20, 16)]), 0);
        assert_eq!(choose(&[(39, 4096), (20, 16)]), 1);
    }
}
