//! Keep, reweigh or move: what a window's demand asks of a layer.

use serde::{Deserialize, Serialize};

use crate::settings::Settings;

/// What is done with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing.
    Keep,
    /// Shares solved anew, copies stay.
    Reweigh,
    /// Copies move.
    Move,
}

impl Verdict {
    /// Its name in statuses, logs and records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Reweigh => "reweigh",
            Self::Move => "move",
        }
    }
}

/// Why copies did not move; the reason of a "keep" or "reweigh".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Because {
    /// The best split of what is there is good enough.
    Balanced,
    /// The layer moved a short while ago.
    Resting,
    /// No allowed move gains anything worth a copy.
    NoGain,
    /// The best move found costs more than it saves before drift has eaten its advantage.
    NotWorth,
    /// Other layers' moves gain more with the bytes that may be moved.
    Budget,
    /// It does move.
    Moves,
}

/// Windows a layer rests after it moved.
pub(crate) const REST: u8 = 2;
/// How far below the threshold a resting layer moves nevertheless.
const URGENT: f64 = 0.01;
/// Least gain in balance that is worth moving a copy for.
pub(crate) const LEAST_GAIN: f64 = 0.002;
/// What each copy must gain beside, in balance.
const LEAST_PER_COPY: f64 = 0.001;
/// Part of the doubt that a move must gain beside. The best split depends on the demand much less than shares in force
/// do, so little of the doubt is about it; without any of it, homes at the edge of the threshold follow every sample.
const MOVE_DOUBT: f64 = 0.05;
/// Least gain in balance that is worth new shares: an epoch costs every worker a switch, and workers split each
/// batch anew from the published shares, so that what is left of the gain there is smaller still.
const LEAST_REWEIGH: f64 = 0.01;
/// The same where there is a new epoch anyway.
const LEAST_ALONG: f64 = 0.001;
/// How often in a window may noise be taken for drift, over all ranks and layers together.
const FALSE_ALARMS: f64 = 0.01;
/// Overload that is followed even if noise may explain it: a strong drift in every window looks like noise, and where
/// windows hold so few rows, shares that chase them are no worse than shares that do not.
const MOST_DOUBT: f64 = 0.25;

/// The memory of the trigger: which layers rest, and for how long. An explicit value, in and out, since planning
/// has no state of its own. Start with [`History::default`], hand the same value to every call.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct History {
    rest: Vec<u8>,
}

impl History {
    pub(crate) fn fit(&mut self, layers: usize) {
        self.rest.resize(layers, 0);
    }

    pub(crate) fn resting(&self, layer: usize) -> bool {
        self.rest.get(layer).is_some_and(|left| *left > 0)
    }

    /// A window has passed, in which the layer moved or did not.
    pub(crate) fn passed(&mut self, layer: usize, moved: bool) {
        if let Some(left) = self.rest.get_mut(layer) {
            *left = if moved { REST } else { left.saturating_sub(1) };
        }
    }
}

/// Whether a layer may look for a move, given the balance that is expected of its best splits.
pub(crate) fn may_move(best: f64, resting: bool, settings: &Settings) -> Result<(), Because> {
    if best >= settings.threshold {
        Err(Because::Balanced)
    } else if resting && best >= settings.threshold - URGENT {
        Err(Because::Resting)
    } else {
        Ok(())
    }
}

/// Overload that noise alone explains, given the standard error of the rank whose load is the least sure, over the
/// mean load, and the number of ranks and layers that are looked at together (`trials`).
///
/// Shares in force were fitted to one sample and are judged by another, so both errors count: √2. A normal variable
/// is above z standard errors with a probability of at most exp(−z²/2) (Chernoff's bound); with the union bound over
/// all trials z = √(2·ln(trials / [`FALSE_ALARMS`])). Never more than [`MOST_DOUBT`].
pub(crate) fn doubt(standard_error: f64, trials: usize) -> f64 {
    let z = (2.0 * (trials.max(1) as f64 / FALSE_ALARMS).ln()).sqrt();
    (std::f64::consts::SQRT_2 * z * standard_error).min(MOST_DOUBT)
}

/// The least gain in balance that copies are moved for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Worth {
    least: f64,
    per_copy: f64,
}

impl Worth {
    /// In service, under a demand of this doubt, where the best split has this balance: an overload of d takes
    /// d · balance² off it.
    pub(crate) const fn in_service(doubt: f64, balance: f64) -> Self {
        Self {
            least: LEAST_GAIN + MOVE_DOUBT * doubt * balance * balance,
            per_copy: LEAST_PER_COPY,
        }
    }

    /// Where copies are loaded anyway.
    pub(crate) const fn anyway() -> Self {
        Self {
            least: LEAST_GAIN,
            per_copy: 0.0,
        }
    }

    pub(crate) fn is_reached(self, gain: f64, copies: usize) -> bool {
        gain > self.least + self.per_copy * copies as f64
    }
}

/// What is left for a layer that does not move: new shares, if they gain enough and noise does not explain the gain.
/// `in_force` and `best` are balances in (0, 1], `doubt` an overload.
pub(crate) fn without_move(in_force: f64, best: f64, doubt: f64) -> Verdict {
    let overload = 1.0 / in_force - 1.0 / best;
    if best - in_force >= LEAST_REWEIGH && overload > doubt {
        Verdict::Reweigh
    } else {
        Verdict::Keep
    }
}

/// Whether a layer that stands gets new shares if there is a new epoch for the sake of others. Both are balances in
/// (0, 1]. Noise is no reason against it: the shares in force were fitted to a sample as well, and to an older one.
pub(crate) fn goes_along(in_force: f64, best: f64) -> bool {
    best - in_force >= LEAST_ALONG
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_rests_two_windows_unless_it_is_urgent() {
        let settings = Settings {
            threshold: 0.97,
            ..Settings::default()
        };
        let mut history = History::default();
        history.fit(1);
        assert_eq!(may_move(0.95, history.resting(0), &settings), Ok(()));
        history.passed(0, true);
        for _ in 0..2 {
            assert_eq!(
                may_move(0.965, history.resting(0), &settings),
                Err(Because::Resting)
            );
            assert_eq!(
                may_move(0.955, history.resting(0), &settings),
                Ok(()),
                "urgent"
            );
            history.passed(0, false);
        }
        assert_eq!(may_move(0.95, history.resting(0), &settings), Ok(()));
        assert_eq!(may_move(0.97, true, &settings), Err(Because::Balanced));
    }

    #[test]
    fn a_move_gains_more_the_more_copies_it_takes_and_the_less_is_known() {
        assert!(!Worth::anyway().is_reached(0.002, 1));
        assert!(Worth::anyway().is_reached(0.0021, 100));
        let sure = Worth::in_service(0.0, 0.95);
        assert!(sure.is_reached(0.0061, 4) && !sure.is_reached(0.0059, 4));
        // A twentieth of the doubt; at half the balance it takes a quarter off.
        let unsure = |balance| Worth::in_service(0.08, balance);
        assert!(unsure(1.0).is_reached(0.0071, 1) && !unsure(1.0).is_reached(0.0069, 1));
        assert!(unsure(0.5).is_reached(0.0041, 1) && !unsure(0.5).is_reached(0.0039, 1));
    }

    #[test]
    fn stale_shares_are_solved_anew_if_noise_does_not_explain_it() {
        assert_eq!(without_move(0.90, 0.98, 0.0), Verdict::Reweigh);
        assert_eq!(without_move(0.972, 0.98, 0.0), Verdict::Keep);
        // An overload of 9 % is drift, or nothing, by how sure the demand is.
        assert_eq!(without_move(0.90, 0.98, 0.08), Verdict::Reweigh);
        assert_eq!(without_move(0.90, 0.98, 0.10), Verdict::Keep);
        assert!((doubt(f64::INFINITY, 8) - MOST_DOUBT).abs() < 1e-12);
        assert!((doubt(0.01, 8) - 0.0517).abs() < 1e-4);
    }
}
