//! Load statistics: what experts were asked for, as workers publish it.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, Rank};

/// Tokens per expert over one window on one worker, counted where the gate ran (at the token's home).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadWindow {
    /// The worker that ran the gate.
    pub rank: Rank,
    /// The placement that was active when the window closed.
    pub epoch: Epoch,
    /// Number of the window on this worker, from 1; a reader uses it to tell a new window from an old one.
    pub sequence: u64,
    /// Length of the window in milliseconds.
    pub span_ms: u64,
    /// `gate[l][e]`: rows that this worker's gate sent to expert `e` of MoE layer `l`.
    pub gate: Vec<Vec<u64>>,
    /// `served[l]`: rows that this worker's experts of layer `l` computed, for whoever asked.
    pub served: Vec<u64>,
    /// State of the worker's engine when the window closed.
    pub engine: EngineLoad,
}

/// What an engine is doing at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineLoad {
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences admitted and not yet in the batch.
    pub waiting: u32,
    /// Pages of the KV cache in use by sequences.
    pub kv_pages_used: u32,
    /// Pages of the KV cache.
    pub kv_pages: u32,
    /// Prompt tokens looked up in the prefix cache since start.
    pub prefix_queries: u64,
    /// Prompt tokens found there since start.
    pub prefix_hits: u64,
    /// Sequences preempted since start.
    pub preemptions: u64,
    /// Prompt tokens computed since start.
    pub prompt_tokens: u64,
    /// Tokens generated since start.
    pub generation_tokens: u64,
    /// Engine steps since start.
    pub steps: u64,
    /// Experts loaded by migrations since start.
    pub experts_loaded: u64,
    /// Microseconds by which the last switch of epoch delayed a step.
    pub switch_stall_us: u64,
    /// Rows that came late or were refused by a peer since start.
    pub late_rows: u64,
}

/// Sums the gate counts of several windows: `[layer][expert]`. Windows of another shape are left out.
#[must_use]
#[expect(
    single_use_lifetimes,
    reason = "anonymous lifetimes in impl Trait are unstable"
)]
pub fn sum_gate<'a>(
    windows: impl IntoIterator<Item = &'a LoadWindow>,
    layers: usize,
    experts: usize,
) -> Vec<Vec<u64>> {
    let mut total = vec![vec![0_u64; experts]; layers];
    for window in windows {
        if window.gate.len() != layers || window.gate.iter().any(|row| row.len() != experts) {
            continue;
        }
        for (sum, row) in total.iter_mut().zip(&window.gate) {
            for (sum, count) in sum.iter_mut().zip(row) {
                *sum = sum.saturating_add(*count);
            }
        }
    }
    total
}
