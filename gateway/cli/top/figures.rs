//! What follows from a snapshot: loads over the mean, imbalance before and after the split, moves under way, tokens.

use std::collections::BTreeMap;

use foregate_api::ids::{Epoch, Rank};
use foregate_api::member::Phase;
use foregate_api::placement::{LayerPlacement, Placement};

use super::snapshot::{Snapshot, Worker};

/// A rank as it is shown.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RankFigures {
    pub(super) rank: u32,
    pub(super) phase: Option<Phase>,
    /// Rows over the mean of all ranks, mean over layers.
    pub(super) over_mean: f64,
    /// Rows over the mean by layer.
    pub(super) by_layer: Vec<f64>,
    /// Sequences in its batch.
    pub(super) running: u32,
    /// Sequences that wait in it.
    pub(super) waiting: u32,
    /// Part of its KV cache in use.
    pub(super) kv: f64,
    /// Copies that it has to load for the wanted placement, and whether it has.
    pub(super) loads: Option<(usize, bool)>,
    /// Tokens it generates in a second.
    pub(super) tokens: f64,
    /// Counters at the end of its last window: number of the window, tokens.
    seen: (u64, u64),
}

/// All that is shown of a snapshot.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Figures {
    pub(super) snapshot: Snapshot,
    pub(super) ranks: Vec<RankFigures>,
    /// Most over mean load by layer, were every expert's rows split evenly over its copies.
    pub(super) before_split: Vec<f64>,
    /// Most over mean load by layer, as computed.
    pub(super) after_split: Vec<f64>,
    /// Tokens of all ranks in a second.
    pub(super) tokens: f64,
}

impl Figures {
    /// What follows from a snapshot, and, for rates, from the one before.
    pub(super) fn of(snapshot: Snapshot, before: Option<&Self>) -> Self {
        let ranks: Vec<RankFigures> = snapshot
            .workers
            .iter()
            .map(|(rank, worker)| {
                let old = before.and_then(|old| old.ranks.iter().find(|r| r.rank == *rank));
                rank_figures(&snapshot, *rank, worker, old)
            })
            .collect();
        Self {
            before_split: even(&snapshot),
            after_split: (0..snapshot.layers)
                .map(|layer| {
                    let rows = snapshot.rank_rows.values();
                    let of = |rows: &Vec<u64>| rows.get(layer).copied().unwrap_or(0) as f64;
                    most_over_mean(&rows.map(of).collect::<Vec<_>>())
                })
                .collect(),
            tokens: ranks.iter().map(|rank| rank.tokens).sum(),
            ranks,
            snapshot,
        }
    }

    /// The layer of the placement in force.
    pub(super) fn layer(&self, layer: usize) -> Option<&LayerPlacement> {
        self.snapshot.active.as_ref()?.layers.get(layer)
    }

    /// Load of each expert of a layer over the mean.
    pub(super) fn heat(&self, layer: usize) -> Vec<f64> {
        let Some(rows) = self.snapshot.load.get(layer) else {
            return Vec::new();
        };
        let mean = rows.iter().sum::<u64>() as f64 / rows.len().max(1) as f64;
        let over = |rows: &u64| if mean > 0.0 { *rows as f64 / mean } else { 0.0 };
        rows.iter().map(over).collect()
    }
}

fn rank_figures(
    snapshot: &Snapshot,
    rank: u32,
    worker: &Worker,
    old: Option<&RankFigures>,
) -> RankFigures {
    let window = worker.window.as_ref();
    let engine = window.map(|window| window.engine).unwrap_or_default();
    let by_layer: Vec<f64> = (0..snapshot.layers)
        .map(|layer| {
            let of = |rows: &Vec<u64>| rows.get(layer).copied().unwrap_or(0) as f64;
            let sum: f64 = snapshot.rank_rows.values().map(of).sum();
            let mean = sum / snapshot.rank_rows.len().max(1) as f64;
            let own = snapshot.rank_rows.get(&rank).map_or(0.0, of);
            if mean > 0.0 { own / mean } else { 0.0 }
        })
        .collect();
    let seen = window.map_or((0, 0), |window| (window.sequence, engine.generation_tokens));
    RankFigures {
        rank,
        phase: worker.phase,
        over_mean: by_layer.iter().sum::<f64>() / by_layer.len().max(1) as f64,
        by_layer,
        running: engine.running,
        waiting: engine.waiting,
        kv: f64::from(engine.kv_pages_used) / f64::from(engine.kv_pages.max(1)),
        loads: loads(snapshot, rank, worker),
        tokens: tokens(window.map_or(0, |window| window.span_ms), seen, old),
        seen,
    }
}

/// Tokens in a second over the last window. Between two windows the figure stays.
fn tokens(span_ms: u64, seen: (u64, u64), old: Option<&RankFigures>) -> f64 {
    let Some(old) = old else { return 0.0 };
    let windows = seen.0.checked_sub(old.seen.0);
    match (windows, seen.1.checked_sub(old.seen.1)) {
        (Some(0), _) => old.tokens,
        (Some(windows), Some(tokens)) if span_ms > 0 => {
            tokens as f64 * 1000.0 / (span_ms as f64 * windows as f64)
        }
        // It started anew.
        _ => 0.0,
    }
}

/// Copies to load for a placement that is wanted and not in force yet.
fn loads(snapshot: &Snapshot, rank: u32, worker: &Worker) -> Option<(usize, bool)> {
    let (target, active) = (snapshot.target.as_ref()?, snapshot.active.as_ref());
    if active.is_some_and(|active| active.epoch >= target.epoch) {
        return None;
    }
    let copies = target.diff(active, Rank(rank)).load.len();
    let prepared = worker.ack.map_or(Epoch(0), |ack| ack.prepared);
    Some((copies, prepared >= target.epoch))
}

fn even(snapshot: &Snapshot) -> Vec<f64> {
    let of = |(layer, plan): (usize, &LayerPlacement)| {
        let mut loads: BTreeMap<Rank, f64> = BTreeMap::new();
        for rank in snapshot
            .active
            .iter()
            .flat_map(|plan: &Placement| &plan.ranks)
        {
            loads.insert(*rank, 0.0);
        }
        let rows = snapshot.load.get(layer).map_or(&[][..], Vec::as_slice);
        for (copies, rows) in plan.copies.iter().zip(rows) {
            for copy in copies {
                *loads.entry(copy.rank).or_default() += *rows as f64 / copies.len() as f64;
            }
        }
        most_over_mean(&loads.into_values().collect::<Vec<_>>())
    };
    let layers = snapshot.active.iter().flat_map(|plan| plan.layers.iter());
    layers.enumerate().map(of).collect()
}

/// 1 without load.
fn most_over_mean(loads: &[f64]) -> f64 {
    let sum: f64 = loads.iter().sum();
    let most = loads.iter().copied().fold(0.0, f64::max);
    if sum > 0.0 {
        most * loads.len() as f64 / sum
    } else {
        1.0
    }
}

/// Mean of figures; 1 of none.
pub(super) fn mean(of: &[f64]) -> f64 {
    if of.is_empty() {
        1.0
    } else {
        of.iter().sum::<f64>() / of.len() as f64
    }
}
