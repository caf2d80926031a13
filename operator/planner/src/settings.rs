//! What an operator may set.

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
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            threshold: 0.97,
            max_moves_per_layer: 4,
        }
    }
}

impl Settings {
    pub(crate) fn validate(&self) -> Result<(), PlanError> {
        if self.threshold > 0.0 && self.threshold <= 1.0 {
            return Ok(());
        }
        Err(PlanError::Setting {
            field: "balancing.threshold",
            value: self.threshold,
            range: "(0, 1]",
        })
    }
}
