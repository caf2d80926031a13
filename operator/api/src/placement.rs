//! Which slot of which rank holds which expert, with the share of each copy.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, ExpertId, LayerId, Rank};

/// One copy of an expert: the rank that holds it and its share of the expert's rows when no per-batch
/// split is solved. Shares of an expert's copies sum to one within 1e-6.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Copy {
    /// The holder.
    pub rank: Rank,
    /// Fraction of rows in [0, 1].
    pub share: f32,
}

/// One layer of a placement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerPlacement {
    /// `slots[i][s]`: the expert in slot `s` of the i-th rank of [`Placement::ranks`]. Ascending within a rank.
    pub slots: Vec<Vec<ExpertId>>,
    /// `copies[e]`: the copies of expert `e`, ascending by rank. Derived from `slots` plus shares.
    pub copies: Vec<Vec<Copy>>,
}

/// What copies are asked to span: what the loss of a failure domain may cost.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Cover {
    /// Nothing.
    None,
    /// Experts that have several copies have them in at least two failure domains. No copy is added for it.
    #[default]
    Spread,
    /// Every expert has copies in at least two failure domains.
    All,
}

impl Cover {
    /// All, the least demanding first.
    pub const ALL: [Self; 3] = [Self::None, Self::Spread, Self::All];

    /// As manifests and command lines have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Spread => "spread",
            Self::All => "all",
        }
    }
}

/// Why a placement was made; a machine-readable reason that condition, log line and metric share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The first plan of a cluster.
    Initial,
    /// Shares solved anew, copies stay.
    Reweigh,
    /// Copies moved to follow the load.
    Move,
    /// Experts of lost ranks placed again.
    Repair,
    /// Ranks joined or left by intent.
    Resize,
}

impl Reason {
    /// As reports, log lines and metric labels have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Initial => "initial",
            Self::Reweigh => "reweigh",
            Self::Move => "move",
            Self::Repair => "repair",
            Self::Resize => "resize",
        }
    }
}

/// An immutable, numbered plan over a fixed set of ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// This plan's number.
    pub epoch: Epoch,
    /// The plan it was made from; `Epoch(0)` for the first.
    pub parent: Epoch,
    /// Why it was made.
    pub reason: Reason,
    /// The ranks with expert slots, ascending.
    pub ranks: Vec<Rank>,
    /// One entry per MoE layer.
    pub layers: Vec<LayerPlacement>,
    /// Predicted balance (mean over maximum load, mean over layers) of the parent under the demand planned for.
    pub balance_before: f64,
    /// The same for this plan.
    pub balance_after: f64,
}

/// What a rank has to load and may release to go from one placement to another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RankDiff {
    /// Experts the new placement gives the rank and the old did not.
    pub load: Vec<(LayerId, ExpertId)>,
    /// Experts the old placement gave the rank and the new does not.
    pub release: Vec<(LayerId, ExpertId)>,
}

impl LayerPlacement {
    /// Builds the canonical form from slots: ranks' slots sorted, copies with even shares.
    #[must_use]
    pub fn from_slots(ranks: &[Rank], mut slots: Vec<Vec<ExpertId>>, experts: usize) -> Self {
        let mut copies = vec![Vec::new(); experts];
        for (rank, held) in ranks.iter().zip(&mut slots) {
            held.sort_unstable();
            for expert in held.iter() {
                if let Some(list) = copies.get_mut(expert.index()) {
                    list.push(Copy {
                        rank: *rank,
                        share: 0.0,
                    });
                }
            }
        }
        for list in &mut copies {
            list.sort_by_key(|copy: &Copy| copy.rank);
            list.dedup_by_key(|copy| copy.rank);
            let share = 1.0 / list.len().max(1) as f32;
            for copy in list.iter_mut() {
                copy.share = share;
            }
        }
        Self { slots, copies }
    }
}

impl Placement {
    /// The experts `rank` holds, over all layers, ascending. Empty for a rank outside the placement.
    #[must_use]
    pub fn held_by(&self, rank: Rank) -> BTreeSet<(LayerId, ExpertId)> {
        let Ok(at) = self.ranks.binary_search(&rank) else {
            return BTreeSet::new();
        };
        let mut held = BTreeSet::new();
        for (l, layer) in self.layers.iter().enumerate() {
            for expert in &layer.slots[at] {
                held.insert((LayerId(l as u32), *expert));
            }
        }
        held
    }

    /// What `rank` loads and releases when this placement follows `old` (`None`: it starts empty).
    #[must_use]
    pub fn diff(&self, old: Option<&Self>, rank: Rank) -> RankDiff {
        let new = self.held_by(rank);
        let old = old.map(|p| p.held_by(rank)).unwrap_or_default();
        RankDiff {
            load: new.difference(&old).copied().collect(),
            release: old.difference(&new).copied().collect(),
        }
    }

    /// Copies that must be loaded over all ranks to go from `old` to this placement.
    #[must_use]
    pub fn copies_moved(&self, old: Option<&Self>) -> usize {
        self.ranks
            .iter()
            .map(|rank| self.diff(old, *rank).load.len())
            .sum()
    }
}
