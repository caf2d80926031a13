//! Why this plan: what was seen, what each step did, what it costs. Condition, log line, metric and golden file
//! print the same report.

use std::collections::BTreeSet;
use std::fmt;

use foregate_api::ids::{Epoch, LayerId, Rank};
use foregate_api::placement::Reason;
use serde::Serialize;

use crate::finding::Finding;
use crate::layer::Layer;
use crate::problem::Room;
use crate::trigger::{Because, Verdict};

/// What one step of the planner did to a layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// Counts and pack, from nothing.
    Pack {
        /// Copies of the hottest expert.
        most_copies: usize,
        /// Copies that no rank could take and whose slots went to others.
        deferred: usize,
    },
    /// Experts without a copy were placed.
    Repair {
        /// How many.
        orphans: usize,
        /// Copies given up because a rank has fewer slots.
        dropped: usize,
    },
    /// Free slots were filled.
    Fill {
        /// Copies added.
        copies: usize,
    },
    /// Local search.
    Improve {
        /// Copies that differ from before.
        copies: usize,
    },
    /// Experts that lacked a failure domain were given one.
    Cover {
        /// Copies moved for it.
        copies: usize,
        /// Experts that still lack one.
        open: usize,
    },
    /// Islands were joined.
    Connect {
        /// Swaps made, two copies each.
        swaps: usize,
        /// Components before.
        before: usize,
        /// Components after.
        after: usize,
    },
    /// Columns were renamed so that copies stay.
    Relabel {
        /// Copies that stay.
        kept: usize,
    },
    /// Shares were solved.
    Split {
        /// Sweeps made.
        sweeps: usize,
        /// Highest load over the certificate, less one: 0 is optimal.
        gap: f64,
    },
}

/// The rank that sets the pace, and why: the answer to "why is this rank slow".
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Heaviest {
    /// The most loaded rank.
    pub rank: Rank,
    /// Its load over the mean.
    pub over_mean: f64,
    /// Ranks whose experts have copies nowhere else; their mean load bounds every split from below.
    pub set: Vec<Rank>,
}

/// One layer's part of the story.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// Layer.
    pub layer: LayerId,
    /// What was done.
    pub verdict: Verdict,
    /// Why nothing moved, or that it did.
    pub because: Because,
    /// Predicted balance with the homes and shares in force (0 without any).
    pub before: f64,
    /// The best that a split of the homes in force gives.
    pub best: f64,
    /// Predicted balance afterwards.
    pub after: f64,
    /// Balance expected of a batch's best split: the best before. That of the prediction if batches are not known.
    pub expected_before: f64,
    /// The same afterwards.
    pub expected_after: f64,
    /// Seconds that the move saves before drift has eaten its advantage, and that it costs. 0 if that was not weighed.
    pub saves_s: f64,
    /// See `saves_s`.
    pub costs_s: f64,
    /// The best that any placement of as many copies could give.
    pub bound: f64,
    /// Overload (maximum over mean load, less one) that sampling alone explains; new shares must gain more. 0 if
    /// copies move.
    pub doubt: f64,
    /// Copies to load.
    pub copies_moved: usize,
    /// Components of linked ranks afterwards.
    pub components: usize,
    /// The least that these copies allow.
    pub components_least: usize,
    /// Experts without a copy before, and their part of the rows.
    pub orphans: usize,
    /// See `orphans`; in [0, 1].
    pub orphaned_rows: f64,
    /// Who sets the pace afterwards.
    pub heaviest: Heaviest,
    /// The steps, in order.
    pub steps: Vec<Step>,
}

/// Traffic that would lose its only copy with a failure domain.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DomainRisk {
    /// The domain.
    pub domain: String,
    /// Part of the rows whose experts live in this domain only, mean over layers, in [0, 1].
    pub rows: f64,
}

/// The report of one call of the planner.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The strongest verdict of all layers.
    pub verdict: Verdict,
    /// The reason of the new placement; `None` for "keep".
    pub reason: Option<Reason>,
    /// The placement planned from.
    pub parent: Epoch,
    /// The new placement's number; the parent's for "keep".
    pub epoch: Epoch,
    /// Mean over layers of the predicted balance in force (0 without a parent).
    pub balance_before: f64,
    /// Mean over layers of the predicted balance afterwards.
    pub balance_after: f64,
    /// Copies to load, over all layers and ranks.
    pub copies_moved: usize,
    /// Their bytes; 0 if an expert's are not known.
    pub bytes_moved: u64,
    /// Seconds that the moves save before drift has eaten their advantage, and that they cost. 0 if not weighed.
    pub saves_s: f64,
    /// See `saves_s`.
    pub costs_s: f64,
    /// Most copies that one rank has to load: it sets the duration of the rollover.
    pub most_to_one_rank: usize,
    /// Ranks of the parent that are gone.
    pub lost: Vec<Rank>,
    /// Ranks that the parent did not have.
    pub joined: Vec<Rank>,
    /// What each failure domain's loss would orphan.
    pub at_risk: Vec<DomainRisk>,
    /// The linter's findings about the new placement, none of them forbidding.
    pub findings: Vec<Finding>,
    /// Layer by layer.
    pub layers: Vec<LayerReport>,
}

impl Report {
    /// Layers with this verdict.
    #[must_use]
    pub fn count(&self, verdict: Verdict) -> usize {
        self.layers.iter().filter(|l| l.verdict == verdict).count()
    }
}

/// One line: `move (repair) 3 -> 4: balance 0.512 -> 0.981, 12 copies (at most 5 to one rank), …`.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Keep => "keep",
            Verdict::Reweigh => "reweigh",
            Verdict::Move => "move",
        };
        write!(f, "{verdict}")?;
        if let Some(reason) = self.reason.map(Reason::name) {
            write!(f, " ({reason})")?;
        }
        write!(
            f,
            " {} -> {}: balance {:.3} -> {:.3}, {} copies (at most {} to one rank); layers kept {}, reweighed {}, \
             moved {}",
            self.parent,
            self.epoch,
            self.balance_before,
            self.balance_after,
            self.copies_moved,
            self.most_to_one_rank,
            self.count(Verdict::Keep),
            self.count(Verdict::Reweigh),
            self.count(Verdict::Move),
        )?;
        list(f, "lost", &self.lost)?;
        list(f, "joined", &self.joined)
    }
}

fn list(f: &mut fmt::Formatter<'_>, name: &str, ranks: &[Rank]) -> fmt::Result {
    if ranks.is_empty() {
        return Ok(());
    }
    let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
    write!(f, "; {name} {}", ranks.join(", "))
}

/// Part of each domain's exclusive rows, mean over layers. Ranks without a domain are nobody's neighbours.
pub(crate) fn at_risk(layers: &[&Layer], demand: &[Vec<f64>], room: &Room) -> Vec<DomainRisk> {
    let domains: BTreeSet<&String> = room.names.iter().filter(|d| !d.is_empty()).collect();
    let exclusive = |layer: &Layer, w: &[f64], domain: &String| {
        let total: f64 = w.iter().sum();
        let inside = |e: &usize| layer.hosts(*e).iter().all(|g| room.names[*g] == *domain);
        // From 0.0 by hand: the empty sum of floats is -0.0.
        (0..w.len()).filter(inside).fold(0.0, |sum, e| sum + w[e]) / total
    };
    domains
        .into_iter()
        .map(|domain| {
            let sum: f64 = layers
                .iter()
                .zip(demand)
                .map(|(l, w)| exclusive(l, w, domain))
                .sum();
            DomainRisk {
                domain: domain.clone(),
                rows: sum / layers.len().max(1) as f64,
            }
        })
        .collect()
}
