//! The last change: what triggered it, what it was to bring, and what it brought.

use std::fmt;

use foregate_api::ids::{Epoch, LayerId};
use foregate_api::placement::Reason;
use foregate_planner::Verdict;
use foregate_planner::report::Step;
use serde::Serialize;

use crate::past::{Missing, Past};
use crate::record::{Measured, Predicted, Record, Trigger};
use crate::text;

/// What the change did in a layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerStory {
    /// The layer.
    pub layer: LayerId,
    /// What was done.
    pub verdict: Verdict,
    /// Predicted balance with homes and shares as they were.
    pub before: f64,
    /// The best that a split of these homes gave.
    pub best: f64,
    /// Predicted balance afterwards.
    pub after: f64,
    /// Copies loaded.
    pub copies: usize,
    /// The planner's steps.
    pub steps: Vec<Step>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LastAnswer {
    /// The placement that came of it.
    pub epoch: Epoch,
    /// The one before.
    pub parent: Epoch,
    /// Why.
    pub reason: Option<Reason>,
    /// When it was decided, in milliseconds since 1970.
    pub at_ms: u64,
    /// When the question was asked.
    pub now_ms: u64,
    /// What made the balancer ask.
    pub trigger: Trigger,
    /// Balance below which copies may move.
    pub threshold: f64,
    /// What it was to bring and to cost.
    pub predicted: Predicted,
    /// What it brought and cost.
    pub measured: Measured,
    /// The planner, asked again on the record, gives the placement that is in the store, to the byte.
    pub recomputed: bool,
    /// The change before it that moved copies to follow the load, as far as that is kept.
    pub last_move: Option<Epoch>,
    /// Layers in which something was done.
    pub layers: Vec<LayerStory>,
}

/// Answers about the last change of epoch.
///
/// # Errors
/// What is not recorded.
pub fn last(past: &Past, now_ms: u64) -> Result<LastAnswer, Missing> {
    let record = past.records.values().next_back().ok_or(Missing::Nothing)?;
    story(past, record, now_ms)
}

/// Answers about the change to a placement.
///
/// # Errors
/// What is not recorded.
pub fn change(past: &Past, epoch: Epoch, now_ms: u64) -> Result<LastAnswer, Missing> {
    let record = past.records.get(&epoch).ok_or(Missing::Decision(epoch))?;
    story(past, record, now_ms)
}

/// The newest change before `epoch` that moved copies to follow the load.
fn last_move(past: &Past, epoch: Epoch) -> Option<Epoch> {
    let before = past.records.range(..epoch).rev();
    let moved = |record: &Record| record.reason == Some(Reason::Move);
    before
        .map(|(_, record)| record)
        .find(|record| moved(record))
        .map(|record| record.epoch)
}

fn story(past: &Past, record: &Record, now_ms: u64) -> Result<LastAnswer, Missing> {
    let decision = record
        .replay(past.parent(record)?)
        .map_err(|error| Missing::Replay(error.to_string()))?;
    let kept = past.placement(record.epoch)?;
    let done = |layer: &&foregate_planner::report::LayerReport| layer.verdict != Verdict::Keep;
    let layers = decision.report().layers.iter().filter(done);
    Ok(LastAnswer {
        epoch: record.epoch,
        parent: record.parent,
        reason: record.reason,
        at_ms: record.at_ms,
        now_ms,
        trigger: record.trigger.clone(),
        threshold: record.settings.threshold,
        predicted: record.predicted,
        measured: record.measured,
        recomputed: decision.placement() == Some(kept),
        last_move: last_move(past, record.epoch),
        layers: layers
            .map(|layer| LayerStory {
                layer: layer.layer,
                verdict: layer.verdict,
                before: layer.before,
                best: layer.best,
                after: layer.after,
                copies: layer.copies_moved,
                steps: layer.steps.clone(),
            })
            .collect(),
    })
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::First { remembered: false } => f.write_str("there was no placement"),
            Self::First { remembered: true } => {
                f.write_str("there was no placement, and the load is remembered")
            }
            Self::Window { rows } => {
                write!(f, "a load window closed with {rows} rows a layer")
            }
            Self::Ranks { lost, joined } => {
                let mut said = Vec::new();
                if !lost.is_empty() {
                    said.push(format!("{} went", text::ranks(lost)));
                }
                if !joined.is_empty() {
                    said.push(format!("{} came", text::ranks(joined)));
                }
                if said.is_empty() {
                    said.push("the slots of a rank changed".to_owned());
                }
                f.write_str(&said.join(", "))
            }
        }
    }
}

impl fmt::Display for LastAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "Epoch {} followed {} ({}), {}: {}.",
            self.epoch,
            self.parent,
            self.reason.map_or("keep", Reason::name),
            text::ago(self.at_ms, self.now_ms),
            self.trigger
        )?;
        if self.recomputed {
            writeln!(
                f,
                "The planner, asked again on the record, gives this placement to the byte."
            )?;
        } else {
            writeln!(
                f,
                "The planner, asked again on the record, gives ANOTHER placement than the one in the store."
            )?;
        }
        let (is, was) = (&self.measured, &self.predicted);
        let balance = |figure: Option<f64>| text::or_unknown(figure.map(|b| format!("{b:.3}")));
        let seconds =
            |figure: Option<f64>| text::or_unknown(figure.map(|s| format!("{s:.2} s")));
        let stall = |us: Option<u64>| text::or_unknown(us.map(|us| format!("{us} us")));
        let rows = [
            (
                "balance before",
                balance(Some(was.balance_before)),
                balance(is.balance_before),
            ),
            (
                "balance after",
                balance(Some(was.balance_after)),
                balance(is.balance_after),
            ),
            (
                "loaded",
                text::bytes(was.cost.bytes),
                text::or_unknown(is.bytes.map(text::bytes)),
            ),
            (
                "proposal to switch",
                seconds(was.cost.seconds),
                seconds(is.seconds),
            ),
            (
                "longest stall",
                stall(was.cost.stall_us),
                stall(is.stall_us),
            ),
        ];
        writeln!(f, "\n  {:<20}{:>14}{:>14}", "", "predicted", "measured")?;
        for (what, predicted, measured) in rows {
            writeln!(f, "  {what:<20}{predicted:>14}{measured:>14}")?;
        }
        writeln!(
            f,
            "\n{} to load, at most {} to one rank.{}",
            text::copies(was.cost.copies),
            was.cost.most_to_one_rank,
            match (is.closed, is.windows) {
                (false, _) => " Still being measured.".to_owned(),
                (true, 0) if is.balance_after.is_none() => {
                    " The next change came before a window could be measured.".to_owned()
                }
                (true, 0) => {
                    " Measured in windows that ran in part on the placement before.".to_owned()
                }
                (true, n) => format!(" Measured over {n} windows of each rank."),
            }
        )?;
        for layer in &self.layers {
            write!(f, "  layer {}: ", layer.layer)?;
            match layer.verdict {
                Verdict::Move => write!(f, "{} moved", text::copies(layer.copies))?,
                Verdict::Reweigh => write!(f, "new shares")?,
                Verdict::Keep => write!(f, "kept")?,
            }
            writeln!(
                f,
                ", balance {:.3} (best split {:.3}) -> {:.3}",
                layer.before, layer.best, layer.after
            )?;
        }
        match self.last_move {
            Some(epoch) if self.reason != Some(Reason::Move) => {
                writeln!(
                    f,
                    "Copies last moved to follow the load at epoch {epoch} (`explain epoch {epoch}`)."
                )
            }
            _ => Ok(()),
        }
    }
}
