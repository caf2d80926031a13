//! One decision of the balancer as it is kept: what it was made on, what it was to bring, and what it brought.

use foregate_api::ids::{Epoch, Rank};
use foregate_api::placement::{Placement, Reason};
use foregate_planner::{Decision, History, PlanError, Problem, Report, Settings, Verdict};
use serde::{Deserialize, Serialize};

/// Part of a row to which predictions are rounded before a plan is made on them: the record is then short, and exactly
/// what the planner saw.
pub const GRAIN: f64 = 1.0 / 16.0;

/// What made the balancer ask the planner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Trigger {
    /// There was no placement.
    First {
        /// The load is remembered from before a restart; else every expert counts the same.
        remembered: bool,
    },
    /// A load window closed.
    Window {
        /// Rows of its busiest layer.
        rows: u64,
    },
    /// The placement's ranks are not those that can hold experts.
    Ranks {
        /// Gone, or about to go.
        lost: Vec<Rank>,
        /// Newly there.
        joined: Vec<Rank>,
    },
}

/// What a change costs.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Copies to load, over all ranks and layers.
    pub copies: usize,
    /// Most copies that one rank loads.
    pub most_to_one_rank: usize,
    /// Bytes to load.
    pub bytes: u64,
    /// Seconds from the proposal to the activation; `None` if nothing like it was measured yet.
    pub seconds: Option<f64>,
    /// Microseconds by which the switch delays a step, on the worst rank; `None` as above.
    pub stall_us: Option<u64>,
}

/// What was expected.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Predicted {
    /// Balance (mean over maximum load, mean over layers) with the placement in force; 0 without any.
    pub balance_before: f64,
    /// The same with what was decided.
    pub balance_after: f64,
    /// What it costs.
    pub cost: Cost,
}

/// What was seen. A figure is `None` until it is measured, and stays so if the next change came first.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Balance of the rows that ranks computed in the last windows before.
    pub balance_before: Option<f64>,
    /// The same in the first windows that ran on what was decided.
    pub balance_after: Option<f64>,
    /// Windows of one rank in `balance_after` that ran wholly on what was decided; 0: only in part.
    pub windows: u32,
    /// Seconds from the proposal to the activation.
    pub seconds: Option<f64>,
    /// Bytes of experts that the ranks say they loaded meanwhile.
    pub bytes: Option<u64>,
    /// Microseconds by which the switch delayed a step, on the worst rank.
    pub stall_us: Option<u64>,
    /// Nothing will be added.
    pub closed: bool,
}

/// A decision of the balancer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// What made the balancer ask.
    pub trigger: Trigger,
    /// The strongest answer of all layers.
    pub verdict: Verdict,
    /// Why the placement was made; `None` for "keep".
    pub reason: Option<Reason>,
    /// The placement in force, 0 without any.
    pub parent: Epoch,
    /// The placement decided on; the parent for "keep".
    pub epoch: Epoch,
    /// What the planner was given: ranks, prediction, and how sure it is.
    pub problem: Problem,
    /// What it was allowed.
    pub settings: Settings,
    /// Which layers rested.
    pub history: History,
    /// Length of a load window in milliseconds.
    pub window_ms: u64,
    /// Bytes of one expert of one layer.
    pub expert_bytes: u64,
    /// Bytes of the weights that every worker holds.
    pub dense_bytes: u64,
    /// What was expected.
    pub predicted: Predicted,
    /// What was seen.
    pub measured: Measured,
}

/// What the record does not give again.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The planner does not take the inputs.
    #[error("the planner of this version does not take the recorded inputs: {0}")]
    Plan(#[from] PlanError),
    /// The planner decides otherwise today: it is of another version.
    #[error("the planner of this version decides otherwise on the recorded inputs")]
    Otherwise,
}

impl Record {
    /// What a report comes to.
    #[must_use]
    pub fn predict(report: &Report, expert_bytes: u64) -> Predicted {
        Predicted {
            balance_before: report.balance_before,
            balance_after: report.balance_after,
            cost: Cost {
                copies: report.copies_moved,
                most_to_one_rank: report.most_to_one_rank,
                bytes: expert_bytes.saturating_mul(report.copies_moved as u64),
                seconds: None,
                stall_us: None,
            },
        }
    }

    /// Whether it led to another placement.
    #[must_use]
    pub fn changed(&self) -> bool {
        self.epoch != self.parent
    }

    /// Asks the planner again, on what it was given then. `previous` is the parent's placement.
    ///
    /// # Errors
    /// If the planner does not decide what is recorded.
    pub fn replay(&self, previous: Option<&Placement>) -> Result<Decision, ReplayError> {
        self.decide(previous).map(|(decision, _)| decision)
    }

    /// As [`Self::replay`], with the trigger's memory after it.
    pub(crate) fn decide(
        &self,
        previous: Option<&Placement>,
    ) -> Result<(Decision, History), ReplayError> {
        let mut history = self.history.clone();
        let mut decision =
            foregate_planner::plan(&self.problem, previous, &self.settings, &mut history)?;
        let report = decision.report();
        let same = report.verdict == self.verdict
            && report.epoch == self.epoch
            && report.parent == self.parent
            && report
                .balance_after
                .total_cmp(&self.predicted.balance_after)
                .is_eq()
            && report.copies_moved == self.predicted.cost.copies;
        if !same {
            return Err(ReplayError::Otherwise);
        }
        // The operator knows what the planner does not: that lost ranks left by intent.
        if let (
            Decision::Move { placement, .. } | Decision::Reweigh { placement, .. },
            Some(reason),
        ) = (&mut decision, self.reason)
        {
            placement.reason = reason;
        }
        Ok((decision, history))
    }
}

/// Rounds a prediction to what is recorded of it; never to nothing what was asked for.
#[must_use]
pub fn rounded(mut demand: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    for rows in demand.iter_mut().flatten() {
        if *rows > 0.0 {
            *rows = (*rows / GRAIN).round().max(1.0) * GRAIN;
        }
    }
    demand
}
