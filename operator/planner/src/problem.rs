//! What is to be planned: ranks with slots, the model's shape, and the predicted demand.

use foregate_api::ids::{Epoch, LayerId, Rank};
use foregate_api::placement::Placement;
use serde::{Deserialize, Serialize};

use crate::finding::Finding;
use crate::redundancy;
use crate::settings::Cover;

/// Rows added to every expert's demand, so that an expert nobody asked for is placed like any other.
pub(crate) const FLOOR: f64 = 1e-3;

/// One rank's room for experts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankSlots {
    /// The rank.
    pub rank: Rank,
    /// Expert slots per MoE layer. A rank with none is left out of the plan.
    pub slots: usize,
    /// Failure domain, empty if unknown. The report says what traffic each domain's loss would orphan.
    pub domain: String,
}

/// A planning problem. Layers are independent of each other. As a value it is kept beside what was decided on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// Ranks that may hold experts, ascending, each once.
    pub ranks: Vec<RankSlots>,
    /// MoE layers.
    pub layers: usize,
    /// Routed experts per layer.
    pub experts: usize,
    /// `demand[l][e]`: predicted rows of expert `e` in layer `l`, in any unit; all zero means "unknown".
    pub demand: Vec<Vec<f64>>,
    /// Independent rows that a layer's demand was counted from ([`crate::demand::Demand::evidence`]), whatever its
    /// unit: shares are solved anew only for a gain that their noise does not explain. Infinite if the demand is
    /// known and not sampled.
    #[serde(with = "finite_or_null")]
    pub evidence: f64,
    /// Rows of a layer in one batch, over all ranks: homes are judged on batches of this size as well, whose counts
    /// scatter around the demand. On the demand alone if that is not known (0), or fewer than 16 per expert.
    pub batch_rows: f64,
    /// Bytes of one expert in one layer; 0 if not known: then no bytes are counted.
    pub expert_bytes: u64,
    /// What copies shall span, over the ranks' failure domains.
    pub cover: Cover,
    /// Highest epoch known anywhere (proposed, active or acknowledged); the plan's number is above it and
    /// above its parent's. `Epoch(0)` if the parent is the highest.
    pub above: Epoch,
}

/// JSON has no infinity: it is written as `null`.
mod finite_or_null {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(super) fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        value.is_finite().then_some(*value).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(from)?.unwrap_or(f64::INFINITY))
    }
}

/// Why no plan was made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// Nobody can hold an expert.
    #[error("no rank has expert slots: start at least one worker (workers.count)")]
    NoRanks,
    /// The model has no experts to place.
    #[error("the model has {layers} MoE layers of {experts} experts: nothing to place")]
    NoExperts {
        /// MoE layers.
        layers: usize,
        /// Experts per layer.
        experts: usize,
    },
    /// Ranks are not strictly ascending.
    #[error("rank {rank} is listed twice or out of order: list each rank once, ascending")]
    RankOrder {
        /// The first rank that is not above its predecessor.
        rank: Rank,
    },
    /// Not every expert finds a slot.
    #[error(
        "{experts} experts per layer need as many slots, {ranks} ranks offer {slots}: {missing} are missing per \
         layer; raise workers.count or workers.redundantSlots in the manifest"
    )]
    TooFewSlots {
        /// Experts per layer.
        experts: usize,
        /// Ranks with slots.
        ranks: usize,
        /// Usable slots per layer (a rank's slots beyond the number of experts hold nothing).
        slots: usize,
        /// Slots missing.
        missing: usize,
    },
    /// The demand has not the model's shape.
    #[error(
        "demand of layer {layer} has {found} experts, expected {expected}, over {layers} layers"
    )]
    DemandShape {
        /// The first wrong layer.
        layer: usize,
        /// Entries found there.
        found: usize,
        /// Experts per layer.
        expected: usize,
        /// Layers of the problem.
        layers: usize,
    },
    /// A demand is negative, infinite or not a number.
    #[error(
        "demand of layer {layer}, expert {expert} is {value}: must be finite and not negative"
    )]
    DemandValue {
        /// Layer.
        layer: LayerId,
        /// Expert.
        expert: usize,
        /// What was found.
        value: f64,
    },
    /// The evidence is negative or not a number.
    #[error("demand rests on {value} rows: must not be negative")]
    Evidence {
        /// What was found.
        value: f64,
    },
    /// The rows of a batch are negative or not a number.
    #[error("a batch has {value} rows: must be finite and not negative")]
    BatchRows {
        /// What was found.
        value: f64,
    },
    /// Sampled tokens are not of this model.
    #[error("sampled tokens must be of {layers} layers, and of {experts} experts each")]
    Tokens {
        /// Layers of the problem.
        layers: usize,
        /// Experts per layer.
        experts: usize,
    },
    /// The previous placement belongs to another model.
    #[error(
        "placement {epoch} is for {found_layers} layers of {found_experts} experts, the model has {layers} of \
         {experts}: start the cluster under another name, or remove the old placement"
    )]
    OtherModel {
        /// The previous placement's number.
        epoch: Epoch,
        /// Its layers.
        found_layers: usize,
        /// Its experts (of the first layer that differs).
        found_experts: usize,
        /// Layers of the model.
        layers: usize,
        /// Experts of the model.
        experts: usize,
    },
    /// A setting is out of range.
    #[error("{field} is {value}: must be in {range}")]
    Setting {
        /// Name of the manifest field.
        field: &'static str,
        /// What was found.
        value: f64,
        /// What is allowed.
        range: &'static str,
    },
    /// The plan did not pass its own linter; a defect of the planner, and the plan is withheld.
    #[error("the plan was withheld by its linter: {}", .findings.first().map_or_else(String::new, ToString::to_string))]
    Refused {
        /// All findings.
        findings: Vec<Finding>,
    },
}

impl Problem {
    /// A problem whose demand is unknown: every expert counts the same.
    #[must_use]
    pub fn uniform(ranks: Vec<RankSlots>, layers: usize, experts: usize) -> Self {
        Self {
            ranks,
            layers,
            experts,
            demand: vec![vec![0.0; experts]; layers],
            evidence: f64::INFINITY,
            batch_rows: 0.0,
            expert_bytes: 0,
            cover: Cover::default(),
            above: Epoch(0),
        }
    }

    /// Copies that fit into one layer: a rank holds an expert at most once.
    #[must_use]
    pub fn usable_slots(&self) -> usize {
        self.ranks.iter().map(|r| r.slots.min(self.experts)).sum()
    }

    /// Checks everything that [`crate::plan`] relies on.
    ///
    /// # Errors
    /// The first thing that is wrong, with its remedy.
    pub fn validate(&self) -> Result<(), PlanError> {
        if self.layers == 0 || self.experts == 0 {
            return Err(PlanError::NoExperts {
                layers: self.layers,
                experts: self.experts,
            });
        }
        if let Some(pair) = self.ranks.windows(2).find(|p| p[0].rank >= p[1].rank) {
            return Err(PlanError::RankOrder { rank: pair[1].rank });
        }
        let ranks = self.ranks.iter().filter(|r| r.slots > 0).count();
        if ranks == 0 {
            return Err(PlanError::NoRanks);
        }
        let slots = self.usable_slots();
        if slots < self.experts {
            return Err(PlanError::TooFewSlots {
                experts: self.experts,
                ranks,
                slots,
                missing: self.experts - slots,
            });
        }
        self.validate_demand()
    }

    fn validate_demand(&self) -> Result<(), PlanError> {
        if self.evidence.is_nan() || self.evidence < 0.0 {
            return Err(PlanError::Evidence {
                value: self.evidence,
            });
        }
        if !self.batch_rows.is_finite() || self.batch_rows < 0.0 {
            return Err(PlanError::BatchRows {
                value: self.batch_rows,
            });
        }
        let wrong = (0..self.layers.max(self.demand.len()))
            .map(|l| (l, self.demand.get(l).map_or(0, Vec::len)))
            .find(|(l, found)| *l >= self.layers || *found != self.experts);
        if let Some((layer, found)) = wrong {
            return Err(PlanError::DemandShape {
                layer,
                found,
                expected: self.experts,
                layers: self.layers,
            });
        }
        for (l, row) in self.demand.iter().enumerate() {
            if let Some(expert) = row.iter().position(|x| !x.is_finite() || *x < 0.0) {
                return Err(PlanError::DemandValue {
                    layer: LayerId(l as u32),
                    expert,
                    value: row[expert],
                });
            }
        }
        Ok(())
    }

    pub(crate) fn validate_tokens(&self, tokens: &[Vec<Vec<usize>>]) -> Result<(), PlanError> {
        let beyond = |e: &&usize| **e >= self.experts;
        if tokens.len() == self.layers
            && tokens.iter().flatten().flatten().find(beyond).is_none()
        {
            return Ok(());
        }
        Err(PlanError::Tokens {
            layers: self.layers,
            experts: self.experts,
        })
    }

    pub(crate) fn validate_previous(&self, previous: &Placement) -> Result<(), PlanError> {
        let odd = previous
            .layers
            .iter()
            .map(|layer| layer.copies.len())
            .find(|found| *found != self.experts);
        if previous.layers.len() == self.layers && odd.is_none() {
            return Ok(());
        }
        Err(PlanError::OtherModel {
            epoch: previous.epoch,
            found_layers: previous.layers.len(),
            found_experts: odd.unwrap_or(self.experts),
            layers: self.layers,
            experts: self.experts,
        })
    }
}

/// The ranks that take part, by dense index: what the steps of the planner see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Room {
    /// Rank of each index, ascending.
    pub(crate) ranks: Vec<Rank>,
    /// Usable slots of each index, at least 1 and at most the number of experts.
    pub(crate) slots: Vec<usize>,
    /// Name of the failure domain of each index, empty if unknown.
    pub(crate) names: Vec<String>,
    /// Failure domain of each index as a number; a rank without a name is one of its own.
    pub(crate) domain: Vec<usize>,
    /// Number of failure domains.
    pub(crate) domains: usize,
    /// What copies are to span: what was asked for, or [`Cover::Spread`] if slots do not allow all.
    pub(crate) cover: Cover,
    /// Whether every copy stays in its failure domain.
    pub(crate) stay: bool,
}

impl Room {
    pub(crate) fn of(problem: &Problem) -> Self {
        let taking: Vec<&RankSlots> = problem.ranks.iter().filter(|r| r.slots > 0).collect();
        let names: Vec<String> = taking.iter().map(|r| r.domain.clone()).collect();
        let mut known: Vec<&String> = names.iter().filter(|name| !name.is_empty()).collect();
        known.sort_unstable();
        known.dedup();
        let mut domains = known.len();
        let mut number = |name: &String| {
            known.binary_search(&name).unwrap_or_else(|_| {
                domains += 1;
                domains - 1
            })
        };
        let domain: Vec<usize> = names.iter().map(&mut number).collect();
        let mut slots = vec![0; domains];
        for (rank, domain) in taking.iter().zip(&domain) {
            slots[*domain] += rank.slots.min(problem.experts);
        }
        let cover = match problem.cover {
            Cover::All if !redundancy::can_cover(problem.experts, &slots) => Cover::Spread,
            asked => asked,
        };
        Self {
            ranks: taking.iter().map(|r| r.rank).collect(),
            slots: taking
                .iter()
                .map(|r| r.slots.min(problem.experts))
                .collect(),
            domain,
            domains,
            names,
            cover,
            stay: false,
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.slots.iter().sum()
    }

    /// Ranks from 0 with these slots, each a domain of its own.
    #[cfg(test)]
    pub(crate) fn plain(slots: &[usize]) -> Self {
        Self {
            ranks: (0..slots.len() as u32).map(Rank).collect(),
            slots: slots.to_vec(),
            names: vec![String::new(); slots.len()],
            domain: (0..slots.len()).collect(),
            domains: slots.len(),
            cover: Cover::None,
            stay: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(slots: &[usize]) -> Vec<RankSlots> {
        slots
            .iter()
            .enumerate()
            .map(|(i, slots)| RankSlots {
                rank: Rank(i as u32),
                slots: *slots,
                domain: String::new(),
            })
            .collect()
    }

    #[test]
    fn missing_slots_are_counted_and_the_field_is_named() {
        let error = Problem::uniform(ranks(&[5, 2]), 1, 8)
            .validate()
            .unwrap_err();
        assert_eq!(
            error,
            PlanError::TooFewSlots {
                experts: 8,
                ranks: 2,
                slots: 7,
                missing: 1
            }
        );
        let text = error.to_string();
        assert!(text.contains("1 are missing") && text.contains("workers.redundantSlots"));
        // Of 40 slots eight are of use: a rank holds each expert once.
        assert_eq!(Problem::uniform(ranks(&[40]), 1, 8).usable_slots(), 8);
    }

    #[test]
    fn shape_and_values_of_the_demand_are_checked() {
        let mut p = Problem::uniform(ranks(&[4, 4]), 2, 4);
        p.demand[1][2] = -1.0;
        assert!(matches!(
            p.validate(),
            Err(PlanError::DemandValue {
                layer: LayerId(1),
                expert: 2,
                ..
            })
        ));
        p.demand[1] = vec![0.0; 3];
        assert!(matches!(
            p.validate(),
            Err(PlanError::DemandShape {
                layer: 1,
                found: 3,
                ..
            })
        ));
        p.demand[1] = vec![0.0; 4];
        p.demand.push(vec![0.0; 4]);
        assert!(matches!(
            p.validate(),
            Err(PlanError::DemandShape { layer: 2, .. })
        ));
    }

    #[test]
    fn ranks_are_listed_once_and_somebody_has_slots() {
        let mut p = Problem::uniform(ranks(&[4, 4]), 1, 4);
        p.ranks[1].rank = Rank(0);
        assert_eq!(p.validate(), Err(PlanError::RankOrder { rank: Rank(0) }));
        assert_eq!(
            Problem::uniform(ranks(&[0, 0]), 1, 4).validate(),
            Err(PlanError::NoRanks)
        );
    }
}
