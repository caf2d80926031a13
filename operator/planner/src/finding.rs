//! What the linter says about a placement.

use std::fmt;

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use serde::Serialize;

/// Whether a placement with a finding may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Usable, but somebody should know.
    Report,
    /// Must not be proposed.
    Refuse,
}

/// One thing that is wrong with a placement, or worth knowing about it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "finding", rename_all = "snake_case")]
pub enum Finding {
    /// The ranks are not the problem's ranks with slots, ascending.
    Ranks {
        /// What the placement says.
        found: Vec<Rank>,
    },
    /// The number of layers, or a layer's lists, have the wrong length.
    Shape {
        /// The layer, or the number of layers.
        layer: LayerId,
    },
    /// An expert is nowhere.
    NoCopy {
        /// Layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
    },
    /// A slot holds an expert that the model has not.
    UnknownExpert {
        /// Layer.
        layer: LayerId,
        /// Rank.
        rank: Rank,
        /// What the slot holds.
        expert: ExpertId,
    },
    /// A rank is given more than it has room for.
    TooManySlots {
        /// Layer.
        layer: LayerId,
        /// Rank.
        rank: Rank,
        /// Slots used.
        used: usize,
        /// Slots it has.
        slots: usize,
    },
    /// The list of copies does not say what the slots say.
    CopiesDiffer {
        /// Layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
    },
    /// Shares are negative or do not sum to one within 1e-6.
    Shares {
        /// Layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// What they sum to.
        sum: f64,
    },
    /// The placement was made from another one than the one in force, or its number is not above it.
    Parent {
        /// The placement's number.
        epoch: Epoch,
        /// What it says it was made from.
        parent: Epoch,
        /// What is in force.
        in_force: Epoch,
    },
    /// A rank holds an expert twice; the second copy is wasted.
    Double {
        /// Layer.
        layer: LayerId,
        /// Rank.
        rank: Rank,
        /// Expert.
        expert: ExpertId,
    },
    /// Ranks hang together less than they could.
    Components {
        /// Layer.
        layer: LayerId,
        /// Components of ranks.
        found: usize,
        /// The least that these copies allow.
        least: usize,
    },
    /// There are too few redundant copies to link all ranks.
    FewCopies {
        /// Copies per layer.
        copies: usize,
        /// Copies that would link all ranks.
        needed: usize,
    },
    /// Experts have copies in one failure domain only, against the cover asked for.
    Uncovered {
        /// Layer.
        layer: LayerId,
        /// How many.
        experts: usize,
        /// Their part of the predicted rows, in [0, 1].
        rows: f64,
        /// How many more than in the placement in force, over the same ranks.
        more: usize,
    },
    /// The prediction says that this placement is worse than its parent.
    WorseThanParent {
        /// Predicted balance of the parent.
        before: f64,
        /// Predicted balance of this placement.
        after: f64,
    },
}

impl Finding {
    /// Whether the placement may be used nevertheless.
    #[must_use]
    pub const fn severity(&self) -> Severity {
        match self {
            Self::Ranks { .. }
            | Self::Shape { .. }
            | Self::NoCopy { .. }
            | Self::UnknownExpert { .. }
            | Self::TooManySlots { .. }
            | Self::CopiesDiffer { .. }
            | Self::Shares { .. }
            | Self::Parent { .. } => Severity::Refuse,
            // A plan may find gaps, but not open them.
            Self::Uncovered { more, .. } if *more > 0 => Severity::Refuse,
            Self::Double { .. }
            | Self::Components { .. }
            | Self::FewCopies { .. }
            | Self::Uncovered { .. }
            | Self::WorseThanParent { .. } => Severity::Report,
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ranks { found } => write!(f, "ranks {found:?} are not the cluster's"),
            Self::Shape { layer } => write!(f, "layer {layer} has the wrong shape"),
            Self::NoCopy { layer, expert } => {
                write!(f, "layer {layer}: expert {expert} has no copy")
            }
            Self::UnknownExpert {
                layer,
                rank,
                expert,
            } => {
                write!(
                    f,
                    "layer {layer}: rank {rank} holds expert {expert}, which does not exist"
                )
            }
            Self::TooManySlots {
                layer,
                rank,
                used,
                slots,
            } => {
                write!(
                    f,
                    "layer {layer}: rank {rank} holds {used} experts in {slots} slots"
                )
            }
            Self::CopiesDiffer { layer, expert } => {
                write!(
                    f,
                    "layer {layer}: copies of expert {expert} are not those of the slots"
                )
            }
            Self::Shares { layer, expert, sum } => {
                write!(f, "layer {layer}: shares of expert {expert} sum to {sum}")
            }
            Self::Parent {
                epoch,
                parent,
                in_force,
            } => {
                write!(
                    f,
                    "placement {epoch} was made from {parent}, in force is {in_force}"
                )
            }
            Self::Double {
                layer,
                rank,
                expert,
            } => {
                write!(f, "layer {layer}: rank {rank} holds expert {expert} twice")
            }
            Self::Components {
                layer,
                found,
                least,
            } => {
                write!(
                    f,
                    "layer {layer}: ranks form {found} components, {least} possible"
                )
            }
            Self::FewCopies { copies, needed } => {
                write!(
                    f,
                    "{copies} copies per layer do not link all ranks, {needed} would"
                )
            }
            Self::Uncovered {
                layer,
                experts,
                rows,
                more,
            } => {
                write!(
                    f,
                    "layer {layer}: {experts} experts with {:.1} % of the rows are in one failure domain only",
                    rows * 100.0
                )?;
                if *more > 0 {
                    write!(f, ", {more} more than before")?;
                }
                Ok(())
            }
            Self::WorseThanParent { before, after } => {
                write!(f, "predicted balance falls from {before:.3} to {after:.3}")
            }
        }
    }
}
