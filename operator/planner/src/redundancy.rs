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

/// The same, still true after `lost` ranks are gone. 0 if nobody would be left.
#[must_use]
pub const fn slots_to_link_after(experts: usize, ranks: usize, lost: usize) -> usize {
    slots_to_link(experts, ranks.saturating_sub(lost))
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
            (256, 32, 9, 10),
            (256, 64, 5, 6),
            (256, 72, 5, 5),
            (256, 320, 2, 2),
            (128, 32, 5, 6),
            (32, 4, 9, 12),
            (8, 8, 2, 2),
        ];
        for (experts, ranks, slots, after) in rows {
            assert_eq!(slots_to_link(experts, ranks), slots, "{experts} {ranks}");
            // 32 experts on 3 ranks: 1 + ⌈31/3⌉ = 12; 8 on 7: 1 + ⌈7/7⌉ = 2.
            assert_eq!(
                slots_to_link_after(experts, ranks, 1),
                after,
                "{experts} {ranks}"
            );
        }
        assert_eq!(slots_to_link(4, 1), 4);
        assert_eq!(slots_to_link(1, 5), 1);
    }
}
