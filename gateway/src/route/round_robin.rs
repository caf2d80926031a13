//! One worker after the other, by rank.

use super::Candidate;

pub(super) fn choose(candidates: &[Candidate], turn: usize) -> Option<usize> {
    turn.checked_rem(candidates.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use foregate_api::ids::Rank;

    #[test]
    fn everybody_in_turn() {
        let candidates: Vec<Candidate> = (0..3)
            .map(|rank| Candidate {
                rank: Rank(rank),
                load: 9,
                signature: Vec::new(),
                cached: 0,
            })
            .collect();
        let turns: Vec<_> = (0..4)
            .filter_map(|turn| choose(&candidates, turn))
            .collect();
        assert_eq!(turns, [0, 1, 2, 0]);
        assert_eq!(choose(&[], 5), None);
    }
}
