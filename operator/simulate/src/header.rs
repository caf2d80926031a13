//! What every document begins with, and the figures that all use.

use foregate_planner::redundancy;
use serde::Serialize;

use crate::generator::VERSION;
use crate::run::Case;
use crate::sums::{mean, percentile};

/// Model, cluster and load of a case.
#[derive(Debug, Clone, Serialize)]
pub struct Header {
    /// Name of the setting.
    pub setting: &'static str,
    layers: usize,
    experts: usize,
    top_k: usize,
    ranks: usize,
    nodes: usize,
    copies: usize,
    slots: usize,
    redundancy: Redundancy,
    /// Most copies that our planner may move per layer and step.
    limit: usize,
    /// What its copies shall span.
    cover: &'static str,
}

/// How the load was made.
#[derive(Debug, Clone, Serialize)]
pub struct Load {
    version: u32,
    /// Name of the regime.
    pub regime: &'static str,
    drift: f64,
    rho: f64,
    /// The seed, if there is one only.
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// All seeds; figures are means over them.
    pub seeds: Vec<u64>,
    /// Steps after the warm-up.
    pub steps: usize,
}

#[derive(Debug, Clone, Serialize)]
struct Redundancy {
    needed: usize,
    components_least: usize,
}

/// A balance: mean and 5th percentile over layers and batches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Balance {
    /// Mean.
    pub mean: f64,
    /// 5th percentile.
    pub p5: f64,
}

impl Balance {
    /// Of the figures of one seed.
    pub(crate) fn of(figures: &[f64]) -> Self {
        Self {
            mean: rounded(mean(figures), 4),
            p5: rounded(percentile(figures, 5.0), 4),
        }
    }
}

/// A time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Time {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Header {
    pub(crate) const fn of(case: &Case) -> Self {
        let shape = &case.shape;
        Self {
            setting: shape.name,
            layers: shape.layers,
            experts: shape.experts,
            top_k: shape.top_k,
            ranks: shape.ranks,
            nodes: shape.nodes,
            copies: shape.copies,
            slots: shape.slots(),
            redundancy: Redundancy {
                needed: redundancy::slots_to_link(shape.experts, shape.ranks),
                components_least: redundancy::least_components(
                    shape.experts,
                    shape.ranks,
                    shape.copies,
                ),
            },
            limit: case.settings.max_moves_per_layer,
            cover: case.cover.name(),
        }
    }

    /// A few words.
    pub(crate) fn words(&self) -> String {
        format!(
            "{} ({} layers × {} experts, {} ranks × {} slots)",
            self.setting, self.layers, self.experts, self.ranks, self.slots,
        )
    }
}

impl Load {
    pub(crate) fn of(case: &Case, seeds: &[u64]) -> Self {
        let (drift, rho) = case.regime.drift();
        Self {
            version: VERSION,
            regime: case.regime.name(),
            drift,
            rho,
            seed: (seeds.len() == 1).then(|| seeds[0]),
            seeds: seeds.to_vec(),
            steps: case.steps,
        }
    }

    /// A few words.
    pub(crate) fn words(&self) -> String {
        format!(
            "{}, seeds {:?}, {} steps",
            self.regime, self.seeds, self.steps
        )
    }
}

/// What is behind the last digit told is noise, and makes files large.
pub(crate) fn rounded(x: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (x * scale).round() / scale
}
