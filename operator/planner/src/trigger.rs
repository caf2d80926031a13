//! Keep, reweigh or move: what a window's demand asks of a layer.

use serde::Serialize;

use crate::Settings;

/// What is done with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing.
    Keep,
    /// Shares solved anew, copies stay.
    Reweigh,
    /// Copies move.
    Move,
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
    /// It does move.
    Moves,
}

/// Windows a layer rests after it moved.
pub(crate) const REST: u8 = 2;
/// How far below the threshold a resting layer moves nevertheless.
const URGENT: f64 = 0.05;
/// By how much shares may fall behind the best ones before they are published anew.
pub(crate) const STALE: f64 = 0.005;

/// The memory of the trigger: which layers rest, and for how long. An explicit value, in and out, since planning
/// has no state of its own. Start with [`History::default`], hand the same value to every call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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

    /// Windows each layer still rests.
    #[must_use]
    pub fn rest(&self) -> &[u8] {
        &self.rest
    }
}

/// Whether a layer may look for a move, given the balance of its best split.
pub(crate) fn may_move(best: f64, resting: bool, settings: &Settings) -> Result<(), Because> {
    if best >= settings.threshold {
        Err(Because::Balanced)
    } else if resting && best >= settings.threshold - URGENT {
        Err(Because::Resting)
    } else {
        Ok(())
    }
}

/// What is left for a layer that does not move.
pub(crate) fn without_move(in_force: f64, best: f64) -> Verdict {
    if in_force < best - STALE {
        Verdict::Reweigh
    } else {
        Verdict::Keep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_rests_two_windows_unless_it_is_urgent() {
        let settings = Settings {
            threshold: 0.97,
            max_moves_per_layer: 4,
        };
        let mut history = History::default();
        history.fit(1);
        assert_eq!(may_move(0.95, history.resting(0), &settings), Ok(()));
        history.passed(0, true);
        for _ in 0..2 {
            assert_eq!(
                may_move(0.95, history.resting(0), &settings),
                Err(Because::Resting)
            );
            assert_eq!(
                may_move(0.91, history.resting(0), &settings),
                Ok(()),
                "urgent"
            );
            history.passed(0, false);
        }
        assert_eq!(may_move(0.95, history.resting(0), &settings), Ok(()));
        assert_eq!(may_move(0.97, true, &settings), Err(Because::Balanced));
    }

    #[test]
    fn stale_shares_are_solved_anew() {
        assert_eq!(without_move(0.90, 0.98), Verdict::Reweigh);
        assert_eq!(without_move(0.976, 0.98), Verdict::Keep);
    }
}
