//! The cost of a step as the workers measure it, in place of the one that the policy assumes.
//!
//! Each worker fits its own decode steps. What a fit explains little of is not believed, and the model in use changes
//! only when it is off by a fifth, so that costs do not tremble.

use std::collections::BTreeMap;

use foregate_api::ids::Rank;

use super::cost::StepModel;

/// Part of the variance that a fit must explain to be believed.
const LEAST_EXPLAINED: f64 = 0.5;
/// Most milliseconds of a coefficient that are believed.
const MOST_MS: f64 = 10_000.0;
/// Part by which a coefficient must be off for the model to change.
const STEADY: f64 = 0.2;

/// What workers have found.
#[derive(Debug, Clone, Default)]
pub(super) struct Fitted {
    by_worker: BTreeMap<Rank, StepModel>,
    in_use: Option<StepModel>,
}

impl Fitted {
    /// A worker's newest fit and the part of the variance that it explains. The model to be used from now on, if that
    /// changes; `None` inside: no fit is believed any more.
    pub(super) fn note(
        &mut self,
        worker: Rank,
        found: StepModel,
        explained: f64,
    ) -> Option<Option<StepModel>> {
        let sound = |ms: f64| (0.0..=MOST_MS).contains(&ms);
        let parts = [found.base, found.expert, found.sequence];
        if explained >= LEAST_EXPLAINED && parts.into_iter().all(sound) {
            self.by_worker.insert(worker, found);
        } else {
            self.by_worker.remove(&worker);
        }
        self.settle()
    }

    /// Forgets workers that are gone.
    pub(super) fn keep_only(
        &mut self,
        alive: impl Fn(Rank) -> bool,
    ) -> Option<Option<StepModel>> {
        self.by_worker.retain(|rank, _| alive(*rank));
        self.settle()
    }

    /// The model in use, if it is measured.
    pub(super) const fn in_use(&self) -> Option<StepModel> {
        self.in_use
    }

    fn settle(&mut self) -> Option<Option<StepModel>> {
        let mean = self.mean();
        let same = match (&self.in_use, &mean) {
            (Some(old), Some(new)) => is_near(old, new),
            (old, new) => old.is_none() && new.is_none(),
        };
        if same {
            return None;
        }
        self.in_use = mean;
        Some(mean)
    }

    fn mean(&self) -> Option<StepModel> {
        let number = self.by_worker.len() as f64;
        let of = |part: fn(&StepModel) -> f64| {
            self.by_worker.values().map(part).sum::<f64>() / number
        };
        (number > 0.0).then(|| StepModel {
            base: of(|model| model.base),
            expert: of(|model| model.expert),
            sequence: of(|model| model.sequence),
        })
    }
}

fn is_near(old: &StepModel, new: &StepModel) -> bool {
    let near = |old: f64, new: f64| (new - old).abs() <= STEADY * old.max(1e-6);
    near(old.base, new.base) && near(old.expert, new.expert) && near(old.sequence, new.sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(expert: f64) -> StepModel {
        StepModel {
            base: 1.0,
            expert,
            sequence: 0.5,
        }
    }

    #[test]
    fn the_mean_of_believed_fits_is_used_and_stays_while_it_is_near() {
        let mut fitted = Fitted::default();
        assert_eq!(
            fitted.note(Rank(0), model(0.2), 0.4),
            None,
            "explains too little"
        );
        assert_eq!(
            fitted.note(Rank(0), model(0.2), 0.9),
            Some(Some(model(0.2)))
        );
        assert_eq!(fitted.note(Rank(1), model(0.22), 0.9), None);
        let changed = fitted.note(Rank(1), model(0.6), 0.9).flatten().unwrap();
        assert!((changed.expert - 0.4).abs() < 1e-9);
        assert_eq!(fitted.in_use(), Some(changed));
        assert_eq!(
            fitted.keep_only(|rank| rank == Rank(0)),
            Some(Some(model(0.2)))
        );
        assert_eq!(fitted.note(Rank(0), model(0.2), 0.1), Some(None));
        assert_eq!(fitted.in_use(), None);
    }

    #[test]
    fn what_no_step_costs_is_not_believed() {
        let mut fitted = Fitted::default();
        for odd in [f64::NAN, f64::INFINITY, -1.0, 1e9] {
            assert_eq!(fitted.note(Rank(0), model(odd), 0.9), None);
        }
    }
}
