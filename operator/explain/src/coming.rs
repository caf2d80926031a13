//! The move that comes next if the load stays as it was predicted: the planner asked again, from what it decided.

use std::fmt;

use foregate_api::ids::LayerId;
use foregate_api::placement::Placement;
use foregate_planner::{Decision, History, Verdict, plan};
use serde::Serialize;

use crate::record::{Record, ReplayError};

/// Load windows that are looked ahead: a layer that has moved rests for a few.
const AHEAD: u32 = 8;

/// A change that comes if the load stays as it was predicted.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Coming {
    /// Load windows until then, 1 for the next.
    pub windows: u32,
    /// New shares, or copies that move.
    pub verdict: Verdict,
    /// Copies that are loaded for it.
    pub copies: usize,
    /// The layers that it changes, ascending.
    pub layers: Vec<LayerId>,
    /// Predicted balance before, mean over layers.
    pub balance_before: f64,
    /// Predicted balance after, mean over layers.
    pub balance_after: f64,
}

impl fmt::Display for Coming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layers: Vec<String> = self.layers.iter().map(ToString::to_string).collect();
        match self.windows {
            1 => f.write_str("the next load window brings ")?,
            more => write!(f, "the load window after {} others brings ", more - 1)?,
        }
        match self.verdict {
            Verdict::Move => write!(f, "{} copies", self.copies)?,
            Verdict::Reweigh | Verdict::Keep => f.write_str("new shares")?,
        }
        write!(
            f,
            " in layers {}: predicted balance {:.3} -> {:.3}",
            layers.join(", "),
            self.balance_before,
            self.balance_after
        )
    }
}

/// What follows on a decision; `None` if nothing does in the next 8 load windows. `previous` is the placement that it was
/// made on.
///
/// # Errors
/// If the planner does not decide what is recorded.
pub fn coming(
    record: &Record,
    previous: Option<&Placement>,
) -> Result<Option<Coming>, ReplayError> {
    let (decision, history) = record.decide(previous)?;
    following(record, previous, &decision, history)
}

/// The same, by who has made the decision again: with the trigger's memory after it.
pub(crate) fn following(
    record: &Record,
    previous: Option<&Placement>,
    decision: &Decision,
    mut history: History,
) -> Result<Option<Coming>, ReplayError> {
    let Some(placement) = decision.placement().or(previous) else {
        return Ok(None);
    };
    let mut problem = record.problem.clone();
    problem.above = problem.above.max(placement.epoch);
    for windows in 1..=AHEAD {
        let next = plan(&problem, Some(placement), &record.settings, &mut history)?;
        let report = next.report();
        if report.verdict == Verdict::Keep {
            continue;
        }
        let changed = report.layers.iter();
        let changed = changed.filter(|layer| layer.verdict != Verdict::Keep);
        return Ok(Some(Coming {
            windows,
            verdict: report.verdict,
            copies: report.copies_moved,
            layers: changed.map(|layer| layer.layer).collect(),
            balance_before: report.balance_before,
            balance_after: report.balance_after,
        }));
    }
    Ok(None)
}
