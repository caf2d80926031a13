//! Kinds of requests: which cluster of signatures each worker is for, and what that promises.

use std::collections::BTreeMap;

use foregate_api::ids::Rank;

use super::clusters::{balanced, means, split_mix, squared};
use super::matching::cheapest;
use crate::signature::Profile;

/// Fewest profiles per worker that a fit is made from.
pub const LEAST_PER_WORKER: usize = 8;

/// One kind per worker. Made beside the request path by [`Kinds::fit`], then only read.
#[derive(Debug, Clone, PartialEq)]
pub struct Kinds {
    experts: usize,
    kind_of: BTreeMap<Rank, usize>,
    /// Centre of each kind, square roots of shares.
    centres: Vec<Vec<f32>>,
    /// Mean of all, square roots of shares; stands for a request without a signature.
    mean: Vec<f32>,
    /// Share of the signatures' variance that lies between the kinds, judged on profiles that did not make them.
    pub separation: f64,
    /// Mean shares of all, and per kind, of the profiles that did not make the centres.
    judged: (Vec<f32>, Vec<Vec<f32>>),
}

impl Kinds {
    /// Kinds of `profiles` for `workers`. `before` names the kinds, so that a refit does not send everybody
    /// elsewhere: new centres go to the workers whose old centres are nearest in sum. `None` for too few profiles,
    /// or profiles of several models.
    #[must_use]
    pub fn fit(profiles: &[Profile], workers: &[Rank], before: Option<&Self>) -> Option<Self> {
        let first = profiles.first()?;
        let m = workers.len();
        let enough = m > 1 && profiles.len() >= LEAST_PER_WORKER * m;
        if !enough || !profiles.iter().all(|profile| profile.is_like(first)) {
            return None;
        }
        let points: Vec<Vec<f32>> = profiles.iter().map(|p| p.roots().collect()).collect();
        let seed = profiles.len() as u64;
        let mean = means(&points, &vec![0; points.len()], 1).pop()??;
        let (separation, judged) = judge(&points, m, seed)?;
        let centres = balanced(&points, m, seed).centres;
        let kind_of = name(&centres, workers, before);
        Some(Self {
            experts: first.experts(),
            kind_of,
            centres,
            mean,
            separation,
            judged,
        })
    }

    /// The kind of a worker; `None` for one that came after the fit.
    #[must_use]
    pub fn of(&self, worker: Rank) -> Option<usize> {
        self.kind_of.get(&worker).copied()
    }

    /// Whether these are kinds of exactly these workers.
    #[must_use]
    pub fn are_for(&self, workers: &[Rank]) -> bool {
        workers.len() == self.kind_of.len()
            && workers.iter().all(|rank| self.kind_of.contains_key(rank))
    }

    /// Number of kinds.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.centres.len()
    }

    /// Whether there are none; never so after a fit.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.centres.is_empty()
    }

    /// Whether a profile has the shape of these kinds.
    #[must_use]
    pub fn fits(&self, profile: &Profile) -> bool {
        profile.experts() == self.experts && profile.len() == self.mean.len()
    }

    /// Sampled layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.mean.len().checked_div(self.experts).unwrap_or(0)
    }

    /// Squared distance of a profile to the centre of a kind; to the mean of all where there is no such kind.
    #[must_use]
    pub fn distance(&self, profile: &Profile, kind: Option<usize>) -> f32 {
        let point: Vec<f32> = profile.roots().collect();
        squared(&point, self.centre(kind))
    }

    /// Square roots of the shares of a kind, or of all.
    #[must_use]
    pub(super) fn centre(&self, kind: Option<usize>) -> &[f32] {
        kind.and_then(|kind| self.centres.get(kind))
            .unwrap_or(&self.mean)
    }

    /// Distinct experts of `batch` independent tokens, mean over layers: of all requests mixed, and of each kind
    /// by itself (mean over kinds, which are equally large).
    #[must_use]
    pub fn distinct(&self, batch: f64) -> (f64, f64) {
        let (all, kinds) = &self.judged;
        let layers = self.layers().max(1) as f64;
        let of = |shares: &[f32]| {
            let used = |q: &f32| 1.0 - (1.0 - f64::from(q.clamp(0.0, 0.98))).powf(batch);
            shares.iter().map(used).sum::<f64>() / layers
        };
        let apart = kinds.iter().map(|kind| of(kind)).sum::<f64>() / kinds.len().max(1) as f64;
        (of(all), apart)
    }
}

/// Share of variance between kinds, and mean shares of all and of each kind.
type Judged = (f64, (Vec<f32>, Vec<Vec<f32>>));

/// Fits on half of the points and judges on the rest, because clusters of noise look separate on the points that made
/// them. Nor may a point's own noise choose its kind: for the even entries the kind is the nearest by the odd ones,
/// and the reverse. Between-cluster variance is the mean product of both halves' distances from the common mean, so
/// that noise which they do not share falls out.
fn judge(points: &[Vec<f32>], m: usize, seed: u64) -> Option<Judged> {
    // Drawn, not in turns: what comes in turns would fall into one half.
    let half = |odd: u64| -> Vec<Vec<f32>> {
        let drawn = points
            .iter()
            .enumerate()
            .filter(|(at, _)| split_mix(*at as u64 + 1) & 1 == odd);
        drawn.map(|(_, point)| point.clone()).collect()
    };
    let (made, other) = (half(0), half(1));
    let centres = balanced(&made, m, seed).centres;
    let all = means(&other, &vec![0; other.len()], 1).pop()??;
    let (mut between, mut shares) = (0.0, vec![vec![0.0; all.len()]; m]);
    for parity in 0..2 {
        let of = by_entries(&other, &centres, 1 - parity);
        for (kind, centre) in centres.iter().enumerate() {
            let own: Vec<&Vec<f32>> = other
                .iter()
                .zip(&of)
                .filter(|(_, of)| **of == kind)
                .map(|(p, _)| p)
                .collect();
            for at in (parity..all.len()).step_by(2) {
                let sum =
                    |of: fn(f32) -> f32| own.iter().map(|point| of(point[at])).sum::<f32>();
                let distance = sum(|root| root) - own.len() as f32 * all[at];
                between += f64::from(distance * (centre[at] - all[at]));
                shares[kind][at] = sum(|root| root * root) / own.len().max(1) as f32;
            }
        }
    }
    let variance: f64 = other
        .iter()
        .map(|point| f64::from(squared(point, &all)))
        .sum();
    let squares: Vec<Vec<f32>> = other
        .iter()
        .map(|point| point.iter().map(|root| root * root).collect())
        .collect();
    let mean = means(&squares, &vec![0; other.len()], 1).pop()??;
    Some((
        (between / variance.max(f64::MIN_POSITIVE)).clamp(0.0, 1.0),
        (mean, shares),
    ))
}

/// Nearest centre of each point by its entries of one parity.
fn by_entries(points: &[Vec<f32>], centres: &[Vec<f32>], parity: usize) -> Vec<usize> {
    let part =
        |of: &Vec<f32>| -> Vec<f32> { of.iter().skip(parity).step_by(2).copied().collect() };
    let centres: Vec<Vec<f32>> = centres.iter().map(part).collect();
    let nearest = |point: Vec<f32>| {
        let far = |at: &usize| squared(&point, &centres[*at]);
        (0..centres.len())
            .min_by(|a, b| far(a).total_cmp(&far(b)))
            .unwrap_or(0)
    };
    points.iter().map(|point| nearest(part(point))).collect()
}

/// Which worker has which centre.
fn name(
    centres: &[Vec<f32>],
    workers: &[Rank],
    before: Option<&Kinds>,
) -> BTreeMap<Rank, usize> {
    let old = before.filter(|before| before.mean.len() == centres.first().map_or(0, Vec::len));
    let costs: Vec<Vec<f64>> = workers
        .iter()
        .map(|rank| {
            let own = old.and_then(|old| Some(old.centre(Some(old.of(*rank)?))));
            centres
                .iter()
                .map(|centre| own.map_or(0.0, |own| f64::from(squared(own, centre))))
                .collect()
        })
        .collect();
    workers.iter().copied().zip(cheapest(&costs)).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// `n` profiles of 16 experts in one layer, of `kinds` kinds in turns; `purity` is the share of a kind's own
    /// experts in its tokens.
    pub(in super::super) fn profiles(
        n: usize,
        kinds: usize,
        purity: f64,
        seed: u64,
    ) -> Vec<Profile> {
        (0..n)
            .map(|at| {
                let shares: Vec<f64> = (0..16)
                    .map(|expert| {
                        let own = expert * kinds / 16 == at % kinds;
                        let noise = split_mix(seed ^ (at * 16 + expert) as u64) as f64
                            / u64::MAX as f64;
                        let base = if own { purity } else { (1.0 - purity) / 4.0 };
                        (base * (0.7 + 0.6 * noise)).min(1.0)
                    })
                    .collect();
                Profile::from_shares(16, &shares).unwrap()
            })
            .collect()
    }

    fn ranks(n: u32) -> Vec<Rank> {
        (0..n).map(Rank).collect()
    }

    #[test]
    fn separate_kinds_promise_fewer_experts_and_noise_does_not() {
        let clear = Kinds::fit(&profiles(160, 4, 0.8, 1), &ranks(4), None).unwrap();
        assert!(clear.separation > 0.5, "{}", clear.separation);
        let (mixed, apart) = clear.distinct(4.0);
        assert!(apart < 0.8 * mixed, "{apart} of {mixed}");
        let noise = Kinds::fit(&profiles(160, 4, 0.2, 1), &ranks(4), None).unwrap();
        assert!(noise.separation < 0.05, "{}", noise.separation);
    }

    #[test]
    fn a_refit_keeps_every_worker_its_kind() {
        let first = Kinds::fit(&profiles(160, 4, 0.8, 1), &ranks(4), None).unwrap();
        let again = Kinds::fit(&profiles(200, 4, 0.8, 9), &ranks(4), Some(&first)).unwrap();
        for worker in ranks(4) {
            let (old, new) = (
                first.centre(first.of(worker)),
                again.centre(again.of(worker)),
            );
            let far = squared(old, new);
            let others = ranks(4).into_iter().filter(|other| *other != worker);
            for other in others {
                assert!(far < squared(old, again.centre(again.of(other))));
            }
        }
    }

    #[test]
    fn too_little_or_mixed_evidence_makes_no_kinds() {
        let few = profiles(31, 4, 0.8, 1);
        assert!(Kinds::fit(&few, &ranks(4), None).is_none());
        assert!(Kinds::fit(&profiles(100, 4, 0.8, 1), &ranks(1), None).is_none());
        let mut mixed = profiles(100, 4, 0.8, 1);
        mixed.push(Profile::from_shares(8, &[0.5; 8]).unwrap());
        assert!(Kinds::fit(&mixed, &ranks(4), None).is_none());
    }
}
