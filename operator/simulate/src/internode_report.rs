//! What nodes send each other: the document and the table.

use serde::Serialize;

use crate::header::{Header, rounded};
use crate::internode::{InternodeOutcome, Visits, bytes_per_visit};
use crate::run::Case;
use crate::tokens::{LAYERS, TOGETHER};

/// All seeds of a comparison.
#[derive(Debug, Clone, Serialize)]
pub struct InternodeDocument {
    /// Model and cluster.
    #[serde(flatten)]
    pub header: Header,
    /// Figures are means over them.
    pub seeds: Vec<u64>,
    /// Layers that stand for all.
    pub sampled_layers: usize,
    /// How strongly experts are used together.
    pub co_activation: f64,
    /// KiB that one visit of a node costs, there and back.
    pub kib_per_visit: f64,
    /// Means over layers and seeds.
    pub policies: Vec<InternodePolicy>,
}

/// One policy.
#[derive(Debug, Clone, Serialize)]
pub struct InternodePolicy {
    /// Its name.
    pub name: &'static str,
    /// Other nodes per token and layer, copies chosen at random.
    pub remote_nodes_random: f64,
    /// Other nodes per token and layer, copies near the token first.
    pub remote_nodes_local_first: f64,
    /// KiB between nodes per token and layer, copies near the token first.
    pub kib_per_token_and_layer: f64,
    /// Lowest and highest seed of it.
    pub kib_range: [f64; 2],
    /// Balance of the ranks' rows, even split.
    pub even: f64,
    /// The same with shares solved.
    pub split: f64,
}

/// The document of a comparison.
#[must_use]
pub fn internode_document(case: &Case, outcomes: &[InternodeOutcome]) -> InternodeDocument {
    let seeds: Vec<u64> = outcomes.iter().map(|outcome| outcome.seed).collect();
    let kib = bytes_per_visit(&case.shape) / 1024.0;
    let count = outcomes.first().map_or(0, |outcome| outcome.policies.len());
    let policy = |at: usize| {
        let runs: Vec<&Visits> = outcomes.iter().map(|o| &o.policies[at]).collect();
        let over = |of: fn(&Visits) -> f64, digits: i32| {
            let sum: f64 = runs.iter().map(|v| of(v)).sum();
            rounded(sum / runs.len() as f64, digits)
        };
        let local = || runs.iter().map(|v| v.local_first * kib);
        InternodePolicy {
            name: runs[0].name,
            remote_nodes_random: over(|v| v.random, 3),
            remote_nodes_local_first: over(|v| v.local_first, 3),
            kib_per_token_and_layer: rounded(local().sum::<f64>() / runs.len() as f64, 1),
            kib_range: [
                rounded(local().fold(f64::MAX, f64::min), 1),
                rounded(local().fold(0.0, f64::max), 1),
            ],
            even: over(|v| v.even, 4),
            split: over(|v| v.split, 4),
        }
    };
    InternodeDocument {
        header: Header::of(case),
        seeds,
        sampled_layers: LAYERS,
        co_activation: TOGETHER,
        kib_per_visit: rounded(kib, 2),
        policies: (0..count).map(policy).collect(),
    }
}

impl InternodeDocument {
    /// A table in Markdown; in brackets the lowest and the highest seed.
    #[must_use]
    pub fn table(&self) -> String {
        let mut lines = vec![
            format!(
                "{}, seeds {:?}; {} sampled layers, co-activation {}, {:.1} KiB per visit",
                self.header.words(),
                self.seeds,
                self.sampled_layers,
                self.co_activation,
                self.kib_per_visit
            ),
            String::new(),
            "| policy | remote nodes per token, random copy | near copies first | KiB per token and layer | even | split |".to_owned(),
            "|---|---|---|---|---|---|".to_owned(),
        ];
        lines.extend(self.policies.iter().map(|own| {
            let [low, high] = own.kib_range;
            format!(
                "| {} | {:.2} | {:.2} | {:.1} ({low:.1}–{high:.1}) | {:.3} | {:.3} |",
                own.name,
                own.remote_nodes_random,
                own.remote_nodes_local_first,
                own.kib_per_token_and_layer,
                own.even,
                own.split
            )
        }));
        lines.join("\n")
    }
}
