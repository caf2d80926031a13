//! What a rank holds, and what it means to the others.

use std::fmt;

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use serde::Serialize;

use crate::expert::over_mean;
use crate::past::{Missing, Past};
use crate::text;

/// A rank in one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerLoad {
    /// The layer.
    pub layer: LayerId,
    /// Its load over the mean of all ranks, as published.
    pub over_mean: f64,
    /// The experts it holds.
    pub holds: Vec<ExpertId>,
    /// Those that nobody else holds.
    pub alone: Vec<ExpertId>,
    /// Part of the layer's rows whose only copy it holds.
    pub alone_rows: f64,
    /// Whether it is the most loaded, and then the ranks that set this pace with it.
    pub sets_the_pace: Option<Vec<Rank>>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankAnswer {
    /// The rank.
    pub rank: Rank,
    /// The placement.
    pub epoch: Epoch,
    /// When the prediction was made that it is judged on.
    pub at_ms: u64,
    /// When the question was asked.
    pub now_ms: u64,
    /// Its failure domain, empty if unknown.
    pub domain: String,
    /// Its slots per layer.
    pub slots: usize,
    /// Bytes of the experts it holds.
    pub bytes: u64,
    /// Load over the mean, mean over layers.
    pub over_mean: f64,
    /// Part of all rows that would find no copy if it were lost, mean over layers.
    pub orphaned: f64,
    /// Layer by layer.
    pub layers: Vec<LayerLoad>,
}

/// Answers about a rank, on the newest decision's prediction.
///
/// # Errors
/// What is not recorded, or is not there.
pub fn rank(past: &Past, rank: Rank, now_ms: u64) -> Result<RankAnswer, Missing> {
    let record = past.newest()?;
    let plan = past.placement(record.epoch)?;
    let known = || Missing::Rank {
        rank: rank.0,
        known: text::list(&plan.ranks),
    };
    let at = plan.ranks.binary_search(&rank).map_err(|_| known())?;
    let replayed = record
        .replay(past.parent(record)?)
        .map_err(|error| Missing::Replay(error.to_string()))?;
    let pace = |layer: LayerId| {
        let of = replayed.report().layers.get(layer.index())?;
        (of.heaviest.rank == rank).then(|| of.heaviest.set.clone())
    };
    let layers: Vec<LayerLoad> = (0..plan.layers.len())
        .map(|l| {
            let layer = LayerId(l as u32);
            let (copies, rows) = (&plan.layers[l].copies, &record.problem.demand[l]);
            let holds = plan.layers[l].slots[at].clone();
            let only = |expert: &ExpertId| copies[expert.index()].len() == 1;
            let alone: Vec<ExpertId> = holds.iter().copied().filter(only).collect();
            let total: f64 = rows.iter().sum();
            let orphaned: f64 = alone.iter().map(|e| rows[e.index()]).sum();
            LayerLoad {
                layer,
                over_mean: over_mean(plan, &record.problem, layer)[at],
                holds,
                alone,
                alone_rows: if total > 0.0 { orphaned / total } else { 0.0 },
                sets_the_pace: pace(layer),
            }
        })
        .collect();
    let mean = |of: fn(&LayerLoad) -> f64| {
        layers.iter().map(of).sum::<f64>() / layers.len().max(1) as f64
    };
    let held: usize = layers.iter().map(|layer| layer.holds.len()).sum();
    let room = record.problem.ranks.iter().find(|room| room.rank == rank);
    Ok(RankAnswer {
        rank,
        epoch: plan.epoch,
        at_ms: record.at_ms,
        now_ms,
        domain: room.map_or_else(String::new, |room| room.domain.clone()),
        slots: room.map_or(0, |room| room.slots),
        bytes: record.expert_bytes.saturating_mul(held as u64),
        over_mean: mean(|layer| layer.over_mean),
        orphaned: mean(|layer| layer.alone_rows),
        layers,
    })
}

impl fmt::Display for RankAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let domain = if self.domain.is_empty() {
            String::new()
        } else {
            format!(" ({})", self.domain)
        };
        writeln!(
            f,
            "Rank {}{domain} has {} slots per layer with {} of experts, and {:.3} of the mean load (epoch {}; predicted {}).",
            self.rank,
            self.slots,
            text::bytes(self.bytes),
            self.over_mean,
            self.epoch,
            text::ago(self.at_ms, self.now_ms)
        )?;
        writeln!(
            f,
            "If it were lost, {:.1} % of the rows would find no copy until a repair.\n",
            100.0 * self.orphaned
        )?;
        for layer in &self.layers {
            write!(
                f,
                "  layer {}: {:.3} of the mean; holds {}; alone {} ({:.1} % of the rows)",
                layer.layer,
                layer.over_mean,
                text::list(&layer.holds),
                text::list(&layer.alone),
                100.0 * layer.alone_rows
            )?;
            match layer.sets_the_pace.as_deref() {
                None => {}
                Some(set) if set.len() <= 1 => {
                    write!(f, "; sets the pace")?;
                }
                Some(set) => write!(f, "; sets the pace with {}", text::ranks(set))?,
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
