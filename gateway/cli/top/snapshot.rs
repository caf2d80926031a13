//! What the gateway says of experts and ranks: `/debug/experts`.

use std::collections::BTreeMap;

use foregate_api::load::LoadWindow;
use foregate_api::member::{Ack, Phase};
use foregate_api::placement::Placement;
use serde::Deserialize;
use serde_json::Value;

/// A look at the cluster.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Snapshot {
    /// Whether the gateway's view of the store is fresh.
    pub(super) connected: bool,
    /// Name of the leading operator.
    pub(super) leader: Option<String>,
    /// MoE layers.
    pub(super) layers: usize,
    /// Experts per layer.
    pub(super) experts: usize,
    /// The placement in force.
    pub(super) active: Option<Placement>,
    /// The placement that is wanted.
    pub(super) target: Option<Placement>,
    /// Rows by layer and expert in the last windows.
    pub(super) load: Vec<Vec<u64>>,
    /// Rows by rank and layer that its experts computed in its last window.
    pub(super) rank_rows: BTreeMap<u32, Vec<u64>>,
    /// Workers by rank.
    pub(super) workers: BTreeMap<u32, Worker>,
}

/// A worker.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Worker {
    /// Where it is in its life.
    pub(super) phase: Option<Phase>,
    /// Expert slots per layer.
    pub(super) slots: Option<u32>,
    /// Its progress in a rollover.
    pub(super) ack: Option<Ack>,
    /// Its last load window.
    pub(super) window: Option<LoadWindow>,
}

impl Snapshot {
    /// From the gateway's document.
    ///
    /// # Errors
    /// If it is another one.
    pub(super) fn read(document: &Value) -> Result<Self, serde_json::Error> {
        // By way of text: numbers as keys of a map are read from there only.
        serde_json::from_str(&document.to_string())
    }
}
