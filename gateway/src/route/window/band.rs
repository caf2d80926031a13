//! Nearest kinds within a band, the least loaded of them: the baseline of published signature routing (ELDR, arXiv
//! 2607.00466), which takes one request at a time in order of arrival.

use super::Worker;
use super::kinds::Kinds;
use crate::signature::Profile;

/// How much further than the nearest centre a worker's may be.
const BAND: f32 = 0.05;

/// The worker of `open` for a request; without a profile the least loaded one. `None` if none is open.
#[must_use]
pub fn choose(kinds: &Kinds, profile: Option<&Profile>, open: &[Worker]) -> Option<Worker> {
    let known = profile.filter(|profile| kinds.fits(profile));
    let far = |worker: &Worker| known.map_or(0.0, |p| kinds.distance(p, kinds.of(worker.rank)));
    let distances: Vec<f32> = open.iter().map(far).collect();
    let nearest = distances.iter().copied().fold(f32::INFINITY, f32::min);
    let near = open
        .iter()
        .zip(&distances)
        .filter(|(_, far)| **far <= nearest * (1.0 + BAND));
    near.map(|(worker, _)| *worker)
        .min_by_key(|worker| (worker.active, worker.rank))
}

#[cfg(test)]
mod tests {
    use foregate_api::ids::Rank;

    use super::super::kinds::tests::profiles;
    use super::*;

    #[test]
    fn the_nearest_kind_if_it_is_clear_else_the_least_loaded() {
        let ranks: Vec<Rank> = (0..4).map(Rank).collect();
        let profiles = profiles(160, 4, 0.8, 1);
        let kinds = Kinds::fit(&profiles, &ranks, None).unwrap();
        let open: Vec<Worker> = ranks
            .iter()
            .map(|rank| Worker {
                rank: *rank,
                active: 9 - rank.0,
                has_room: true,
            })
            .collect();
        let mut workers: Vec<u32> = profiles[..4]
            .iter()
            .map(|profile| choose(&kinds, Some(profile), &open).unwrap().rank.0)
            .collect();
        workers.sort_unstable();
        assert_eq!(workers, [0, 1, 2, 3], "each kind has its worker");
        assert_eq!(choose(&kinds, None, &open).unwrap().rank, Rank(3));
        assert!(choose(&kinds, None, &[]).is_none());
    }
}
