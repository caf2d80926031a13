//! How many slots a cluster needs: to link all ranks, so that a split can level almost any batch, also after ranks are
//! lost, and to have a copy of everything outside any one failure domain.
//!
//! A forest over the ranks needs G − 1 redundant copies: `Σ S_g − N ≥ G − 1`, necessary and sufficient. Copies of N
//! experts in two domains each need `Σ_d min(s_d, N) ≥ 2N` of the domains' slots, necessary and sufficient as well: a
//! domain holds at most N halves of the pairs, and degrees none of which exceeds half their sum are those of some
//! multigraph without loops.

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

/// What slots per rank a cluster needs at least, and what for. [`Needs::slots`] is what to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// To link all ranks.
    pub linked: usize,
    /// To link the ranks that are left after `lost` of them are.
    pub after_loss: usize,
    /// Ranks that may be lost.
    pub lost: usize,
    /// To have every expert in two failure domains; `None` if that is not asked for, or if there are not two.
    pub covered: Option<usize>,
}

impl Needs {
    /// For `experts` per layer on ranks of these failure domains (`domains[d]` ranks in the d-th), of which `lost` may be
    /// lost (fewer than there are), with a copy outside any one domain if `cover`.
    #[must_use]
    pub fn of(experts: usize, domains: &[usize], lost: usize, cover: bool) -> Self {
        let ranks: usize = domains.iter().sum();
        let lost = lost.min(ranks.saturating_sub(1));
        Self {
            linked: slots_to_link(experts, ranks),
            after_loss: slots_to_link(experts, ranks - lost),
            lost,
            covered: slots_to_cover(experts, domains).filter(|_| cover),
        }
    }

    /// The largest of all.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.linked
            .max(self.after_loss)
            .max(self.covered.unwrap_or(0))
    }
}

/// Smallest number of slots per rank with which every expert can be in two failure domains, where `domains[d]` ranks are
/// in the d-th. `None` with fewer than two domains.
#[must_use]
pub fn slots_to_cover(experts: usize, domains: &[usize]) -> Option<usize> {
    let of = |slots: usize| {
        domains
            .iter()
            .map(|ranks| ranks.saturating_mul(slots))
            .collect::<Vec<_>>()
    };
    (1..=experts).find(|slots| can_cover(experts, &of(*slots)))
}

/// Whether every expert can have copies in two failure domains, with `slots[d]` slots in the d-th.
#[must_use]
pub fn can_cover(experts: usize, slots: &[usize]) -> bool {
    slots.iter().map(|slots| slots.min(&experts)).sum::<usize>() >= 2 * experts
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
        // The same after one rank is lost, and with every expert in two domains of a rank each.
        let rows = [
            (256, 32, 10, 16),
            (256, 64, 6, 8),
            (256, 72, 5, 8),
            (256, 320, 2, 2),
            (128, 32, 6, 8),
            (32, 4, 12, 16),
            (8, 8, 2, 2),
        ];
        for (experts, ranks, lost, covered) in rows {
            let needs = Needs::of(experts, &vec![1; ranks], 1, true);
            let got = (needs.after_loss, needs.covered);
            assert_eq!(got, (lost, Some(covered)), "{experts} {ranks}");
            assert_eq!(needs.slots(), needs.after_loss.max(covered));
        }
        assert_eq!(slots_to_cover(8, &[3]), None);
        // The domain of one rank must hold a copy of everything.
        assert_eq!(slots_to_cover(4, &[1, 3]), Some(4));
        assert_eq!(slots_to_link(4, 1), 4);
        assert_eq!(slots_to_link(1, 5), 1);
    }
}
