//! The worker whose running requests use the most similar experts, within a band of load.
//!
//! Why: sequences that use the same experts share them in a step's grouped GEMM, so a worker's step reads
//! fewer expert weights, and its rows go to fewer peers.
//!
//! Fit of a prompt with histogram `p` and a worker with summed histogram `s`, per layer: the cosine between
//! the square roots of the counts, `Σ √(p·s) / √(Σp·Σs)` (the Bhattacharyya coefficient of the two
//! distributions; the root keeps one hot expert from deciding alone). The fit is the mean over the layers, in
//! [0, 1]. A worker without known sequences counts as one that uses all experts alike: a prompt joins others
//! only where it fits better than among strangers.
//!
//! Only workers with `load ≤ least + band` are asked, so a good fit never costs more than the band in queueing.

use super::{Candidate, Outcome, least_loaded};
use crate::signature::{Known, Signature};

/// The band: two sequences, and an eighth of the least load where there are many.
const fn band(least: u32) -> u32 {
    2 + least / 8
}

pub(super) fn choose(
    candidates: &[Candidate],
    known: &Known,
) -> Option<(usize, Outcome, Option<f64>)> {
    let least = least_loaded::choose(candidates)?;
    let Some(signature) = known.signature.as_deref() else {
        return Some((least, Outcome::Load, None));
    };
    let low = candidates[least].load;
    let limit = low.saturating_add(band(low));
    let mut best = (least, fit(signature, &candidates[least].signature));
    for (at, candidate) in candidates.iter().enumerate() {
        if candidate.load > limit || at == least {
            continue;
        }
        let fit = fit(signature, &candidate.signature);
        // A tie keeps the one with less load.
        if fit > best.1 + 1e-9 {
            best = (at, fit);
        }
    }
    Some((best.0, Outcome::Fit, Some(best.1)))
}

/// The fit as above, in [0, 1]. `running` of another shape counts as unknown.
fn fit(prompt: &Signature, running: &[f64]) -> f64 {
    let known =
        running.len() == prompt.counts.len() && running.iter().any(|count| *count > 0.0);
    let mut total = 0.0;
    let mut layers = 0.0;
    for (layer, counts) in prompt.counts.chunks(prompt.experts).enumerate() {
        let sum: f64 = counts.iter().copied().map(f64::from).sum();
        if sum == 0.0 {
            continue;
        }
        layers += 1.0;
        let from = layer * prompt.experts;
        let others = if known {
            &running[from..from + counts.len()]
        } else {
            &[]
        };
        let theirs: f64 = others.iter().sum();
        let product: f64 = if theirs > 0.0 {
            counts
                .iter()
                .zip(others)
                .map(|(count, other)| (f64::from(*count) * other).sqrt())
                .sum::<f64>()
                / (sum * theirs).sqrt()
        } else {
            counts
                .iter()
                .map(|count| f64::from(*count).sqrt())
                .sum::<f64>()
                / (sum * counts.len() as f64).sqrt()
        };
        total += product;
    }
    if layers > 0.0 {
        (total / layers).clamp(0.0, 1.0)
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foregate_api::ids::Rank;
    use std::sync::Arc;

    fn candidate(rank: u32, load: u32, signature: &[f64]) -> Candidate {
        Candidate {
            rank: Rank(rank),
            load,
            signature: signature.to_vec(),
            cached: 0,
        }
    }

    fn known(counts: &[u32]) -> Known {
        Known {
            signature: Some(Arc::new(Signature::new(4, counts.to_vec()).unwrap())),
            tokens: 32,
        }
    }

    #[test]
    fn like_goes_to_like_within_the_band() {
        let prompt = known(&[10, 0, 0, 0]);
        let like = [5.0, 0.0, 0.0, 0.0];
        let unlike = [0.0, 0.0, 5.0, 0.0];
        let near = [candidate(0, 1, &unlike), candidate(1, 3, &like)];
        let (at, outcome, fit) = choose(&near, &prompt).unwrap();
        assert_eq!((at, outcome), (1, Outcome::Fit));
        assert!((fit.unwrap() - 1.0).abs() < 1e-9);
        let far = [candidate(0, 1, &unlike), candidate(1, 4, &like)];
        assert_eq!(choose(&far, &prompt).unwrap().0, 0);
    }

    #[test]
    fn strangers_go_to_the_idle_worker() {
        let prompt = known(&[10, 0, 0, 0]);
        let workers = [candidate(0, 1, &[0.0, 9.0, 9.0, 9.0]), candidate(1, 0, &[])];
        let (at, _, fit) = choose(&workers, &prompt).unwrap();
        assert_eq!(at, 1);
        assert!((fit.unwrap() - 0.5).abs() < 1e-9);
    }

    #[test]
    fn an_unknown_prompt_goes_by_load() {
        let workers = [candidate(0, 2, &[1.0; 4]), candidate(1, 1, &[1.0; 4])];
        assert_eq!(
            choose(&workers, &Known::default()),
            Some((1, Outcome::Load, None))
        );
    }

    #[test]
    fn another_shape_counts_as_unknown() {
        let prompt = known(&[1, 1, 1, 1]);
        let (_, _, fit) = choose(&[candidate(0, 0, &[1.0; 3])], &prompt).unwrap();
        assert!((fit.unwrap() - 1.0).abs() < 1e-9);
    }
}
