//! The next decision: when it is due, and what is near.

use std::fmt;

use foregate_api::ids::{Epoch, LayerId};
use foregate_planner::{Because, Verdict};
use serde::Serialize;

use crate::coming::{Coming, following};
use crate::past::{Missing, Past};
use crate::record::{ReplayError, Trigger};
use crate::text;

/// How near a layer is to a move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NearLayer {
    /// The layer.
    pub layer: LayerId,
    /// Balance with the shares in force after the last decision.
    pub balance: f64,
    /// The best that a split of its copies gives; copies may move when this is below the threshold.
    pub best: f64,
    /// Why its copies did not move at the last decision, or that they did.
    pub because: Because,
    /// Overload that sampling alone explains; new shares must gain more.
    pub doubt: f64,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NextAnswer {
    /// The placement in force when it was last decided.
    pub epoch: Epoch,
    /// What was decided.
    pub verdict: Verdict,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// When the question was asked.
    pub now_ms: u64,
    /// What made the balancer ask.
    pub trigger: Trigger,
    /// Length of a load window in milliseconds: a decision follows at the end of each that has enough rows.
    pub window_ms: u64,
    /// Balance below which copies may move.
    pub threshold: f64,
    /// The layers, nearest to a move first.
    pub layers: Vec<NearLayer>,
    /// What comes next if the load stays as it was predicted; `None`: nothing soon.
    pub coming: Option<Coming>,
}

/// Answers about the next decision.
///
/// # Errors
/// What is not recorded.
pub fn next(past: &Past, now_ms: u64) -> Result<NextAnswer, Missing> {
    let record = past.newest()?;
    let parent = past.parent(record)?;
    let replay = |error: ReplayError| Missing::Replay(error.to_string());
    let (decision, history) = record.decide(parent).map_err(replay)?;
    let near = |layer: &foregate_planner::report::LayerReport| NearLayer {
        layer: layer.layer,
        balance: layer.after,
        // A layer that has just moved is judged by what it has now.
        best: if layer.verdict == Verdict::Move {
            layer.after
        } else {
            layer.best
        },
        because: layer.because,
        doubt: layer.doubt,
    };
    let mut layers: Vec<NearLayer> = decision.report().layers.iter().map(near).collect();
    layers.sort_by(|a, b| a.best.total_cmp(&b.best).then(a.layer.cmp(&b.layer)));
    Ok(NextAnswer {
        epoch: record.epoch,
        verdict: record.verdict,
        at_ms: record.at_ms,
        now_ms,
        trigger: record.trigger.clone(),
        window_ms: record.window_ms,
        threshold: record.settings.threshold,
        layers,
        coming: following(record, parent, &decision, history).map_err(replay)?,
    })
}

impl fmt::Display for NextAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Keep => "keep",
            Verdict::Reweigh => "new shares",
            Verdict::Move => "move copies",
        };
        writeln!(
            f,
            "The last decision that is kept was \"{verdict}\", {}: {} (epoch {}).",
            text::ago(self.at_ms, self.now_ms),
            self.trigger,
            self.epoch
        )?;
        writeln!(
            f,
            "The next is due at the end of a load window ({:.1} s) that has enough rows, or when ranks come or go.",
            self.window_ms as f64 / 1000.0
        )?;
        match &self.coming {
            Some(coming) => writeln!(f, "If the load stays as it was predicted, {coming}.")?,
            None => writeln!(
                f,
                "If the load stays as it was predicted, nothing changes soon."
            )?,
        }
        writeln!(
            f,
            "Copies of a layer may move when its best split falls below {:.3}:\n",
            self.threshold
        )?;
        for layer in &self.layers {
            let why = match layer.because {
                Because::Balanced => "good enough",
                Because::Resting => "it moved a short while ago and rests",
                Because::NoGain => "no allowed move gains enough",
                Because::NotWorth => {
                    "a move costs more than it saves before the load has drifted on"
                }
                Because::Budget => {
                    "moves of other layers gain more with the bytes that may be moved"
                }
                Because::Moves => "it has just moved",
            };
            writeln!(
                f,
                "  layer {}: best split {:.3}, in force {:.3}; {why}",
                layer.layer, layer.best, layer.balance
            )?;
        }
        Ok(())
    }
}
