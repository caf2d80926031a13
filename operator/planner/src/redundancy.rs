//! How many slots link all ranks, so that a split can level almost any batch.
//!
//! A forest over the ranks needs G − 1 redundant copies: `Σ S_g − N ≥ G − 1`, necessary and sufficient.

/// Smallest number of slots per rank that lets all ranks hang together through shared experts:
/// `1 + ⌈(N−1)/G⌉`, at most N (more slots than experts hold nothing). 0 without ranks or experts.
#[must_use]
pub const fn slots_to_link(experts: usize, ranks: usize) -> usize {
    if experts == 0 || ranks == 0 {
        return 0;
    }
    let slots = 1 + (experts - 1).div_ceil(ranks);
    if slots < experts { slots } else { experts }
}

/// The least number of components that `copies` copies of `experts` experts on `ranks` ranks can have.
#[must_use]
pub const fn least_components(experts: usize, ranks: usize, copies: usize) -> usize {
    let least = (ranks + experts).saturating_sub(copies);
    if least > 1 { least } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_known_sizes() {
        let rows = [
            (256, 32, 9),
            (256, 64, 5),
            (256, 72, 5),
            (256, 320, 2),
            (128, 32, 5),
            (32, 4, 9),
            (8, 8, 2),
        ];
        for (experts, ranks, slots) in rows {
            assert_eq!(slots_to_link(experts, ranks), slots, "{experts} {ranks}");
        }
        assert_eq!(slots_to_link(4, 1), 4);
        assert_eq!(slots_to_link(1, 5), 1);
    }
}
