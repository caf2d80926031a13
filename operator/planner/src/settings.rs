//! What an operator may set.

pub use foregate_api::placement::Cover;
use serde::{Deserialize, Serialize};

use crate::problem::PlanError;

/// What an operator may set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Balance (mean over maximum after the best split) below which copies may move, in (0, 1].
    pub threshold: f64,
    /// Most copies to move per layer and call; 0 never moves a copy to follow the load. What repair and new ranks
    /// need is not counted.
    pub max_moves_per_layer: usize,
    /// Most bytes to move per call over all layers, spent where they gain most; `None`: no limit. What repair and new
    /// ranks need is not counted.
    pub max_bytes: Option<u64>,
    /// What a move costs and how long it lasts; `None`: a move is made if it gains at all.
    pub economy: Option<Economy>,
    /// Threads that plan layers side by side; the plan does not depend on it.
    pub threads: usize,
}

/// What decides whether a move pays.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Economy {
    /// Part of the time that steps spend in experts, all layers together, were they balanced; in [0, 1].
    pub busy: f64,
    /// Seconds until drift has eaten the advantage of a move.
    pub horizon_s: f64,
    /// Bytes per second that a rank's link gives to moves, above 0.
    pub link_bytes_per_s: f64,
    /// Part of the speed that is lost while copies are on their way, in [0, 1].
    pub slowdown: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            threshold: 0.98,
            max_moves_per_layer: 4,
            max_bytes: None,
            economy: None,
            threads: 1,
        }
    }
}

impl Settings {
    pub(crate) fn validate(&self) -> Result<(), PlanError> {
        let wrong = |field, value, range| {
            Err(PlanError::Setting {
                field,
                value,
                range,
            })
        };
        if !(self.threshold > 0.0 && self.threshold <= 1.0) {
            return wrong("balancing.threshold", self.threshold, "(0, 1]");
        }
        let Some(economy) = &self.economy else {
            return Ok(());
        };
        let part = |x: f64| (0.0..=1.0).contains(&x);
        let positive = |x: f64| x > 0.0 && x.is_finite();
        if !part(economy.busy) {
            return wrong("busy", economy.busy, "[0, 1]");
        }
        if !part(economy.slowdown) {
            return wrong("slowdown", economy.slowdown, "[0, 1]");
        }
        if !positive(economy.horizon_s) {
            return wrong("horizon_s", economy.horizon_s, "(0, ∞)");
        }
        if !positive(economy.link_bytes_per_s) {
            return wrong("link_bytes_per_s", economy.link_bytes_per_s, "(0, ∞)");
        }
        Ok(())
    }
}
