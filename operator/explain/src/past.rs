//! The decisions and placements that are kept of a cluster.

use std::collections::BTreeMap;

use foregate_api::ids::Epoch;
use foregate_api::placement::Placement;
use foregate_store::codec;
use foregate_store::past::Item;

use crate::record::Record;

/// What is not there to answer from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// Nothing was decided yet, or all of it was forgotten.
    #[error("nothing is recorded yet: the first decision of the operator is")]
    Nothing,
    /// The placement that is asked about is not kept any more.
    #[error("the placement of epoch {0} is not recorded (only the newest ones are kept)")]
    Placement(Epoch),
    /// The decision that is asked about is not kept any more.
    #[error("the decision for epoch {0} is not recorded (only the newest ones are kept)")]
    Decision(Epoch),
    /// No such layer.
    #[error("there is no MoE layer {layer}: the model has {layers}, counted from 0")]
    Layer {
        /// What was asked for.
        layer: usize,
        /// How many there are.
        layers: usize,
    },
    /// No such expert.
    #[error("there is no expert {expert}: a layer has {experts}, counted from 0")]
    Expert {
        /// What was asked for.
        expert: usize,
        /// How many there are.
        experts: usize,
    },
    /// No such rank.
    #[error("rank {rank} holds no experts; those that do: {known}")]
    Rank {
        /// What was asked for.
        rank: u32,
        /// The ranks of the placement.
        known: String,
    },
    /// The record does not give what was decided.
    #[error("{0}")]
    Replay(String),
}

/// Everything that is kept.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Past {
    /// Decisions that led to a placement, by its epoch.
    pub records: BTreeMap<Epoch, Record>,
    /// Placements by epoch.
    pub placements: BTreeMap<Epoch, Placement>,
    /// The newest decision of any kind.
    pub latest: Option<Record>,
    /// What could not be read, and why.
    pub unreadable: Vec<String>,
}

impl Past {
    /// Reads values as stored, by their names in the archive. One that cannot be read is left out and told.
    pub fn read<'a>(entries: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        let mut past = Self::default();
        for (name, bytes) in entries {
            let done = match Item::of(name) {
                Some(Item::Decision(epoch)) => {
                    codec::decode(name, bytes).map(|it| drop(past.records.insert(epoch, it)))
                }
                Some(Item::Placement(epoch)) => codec::decode_placement(name, bytes)
                    .map(|it| drop(past.placements.insert(epoch, it))),
                Some(Item::Latest) => {
                    codec::decode(name, bytes).map(|it| past.latest = Some(it))
                }
                Some(Item::Load(_)) | None => Ok(()),
            };
            if let Err(error) = done {
                past.unreadable.push(error.to_string());
            }
        }
        past.records.retain(|epoch, record| record.epoch == *epoch);
        past.placements.retain(|epoch, plan| plan.epoch == *epoch);
        past
    }

    /// The newest decision of any kind.
    ///
    /// # Errors
    /// If there is none.
    pub fn newest(&self) -> Result<&Record, Missing> {
        let changed = self.records.values().next_back();
        let newest = [self.latest.as_ref(), changed];
        newest
            .into_iter()
            .flatten()
            .max_by_key(|record| (record.epoch, record.at_ms))
            .ok_or(Missing::Nothing)
    }

    /// A placement.
    ///
    /// # Errors
    /// If it is not kept.
    pub fn placement(&self, epoch: Epoch) -> Result<&Placement, Missing> {
        self.placements.get(&epoch).ok_or(Missing::Placement(epoch))
    }

    /// The placement that a decision was made on; `None` if there was none.
    ///
    /// # Errors
    /// If it is not kept.
    pub fn parent(&self, record: &Record) -> Result<Option<&Placement>, Missing> {
        match record.parent {
            Epoch(0) => Ok(None),
            epoch => self.placement(epoch).map(Some),
        }
    }
}
