//! Writes records to the archive, and removes the oldest.

use std::collections::{BTreeMap, BTreeSet};

use foregate_api::ids::Epoch;
use foregate_api::placement::Placement;
use foregate_explain::{Past, Record};
use foregate_store::past::Item;
use foregate_store::{Archive, StoreError};
use tokio::sync::mpsc;

use super::KEPT;
use crate::memory::Memory;

/// Models whose load is remembered.
const MODELS: usize = 4;
/// Writes that may wait for the store; more are dropped by who sends them.
const QUEUE: usize = 64;

/// What is to be written.
#[derive(Debug)]
pub(super) enum Write {
    /// A decision that led to a placement, by its epoch.
    Decision(Box<Record>),
    /// The newest decision of any kind.
    Latest(Box<Record>),
    /// A placement, unless it is there.
    Placement(Box<Placement>),
    /// What is remembered of a model's load, by the model's name.
    Load(String, Memory),
}

/// The writer. What the store refuses is logged and dropped.
#[derive(Debug)]
pub(crate) struct Keeper {
    archive: Archive,
    writes: mpsc::Receiver<Write>,
    /// Epochs of decisions and of placements in the archive; `None` until it was looked at.
    there: Option<There>,
}

#[derive(Debug, Default)]
struct There {
    /// With the first placement that each needs: its parent, or its own if it has none.
    decisions: BTreeMap<Epoch, Epoch>,
    placements: BTreeSet<Epoch>,
    loads: BTreeSet<String>,
}

impl Keeper {
    pub(super) fn new(archive: Archive) -> (mpsc::Sender<Write>, Self) {
        let (sender, writes) = mpsc::channel(QUEUE);
        let keeper = Self {
            archive,
            writes,
            there: None,
        };
        (sender, keeper)
    }

    /// Writes until nobody sends any more.
    pub(crate) async fn run(mut self) {
        while let Some(write) = self.writes.recv().await {
            if let Err(error) = self.write(write).await {
                tracing::warn!(%error, "a record of a decision was not kept");
            }
        }
    }

    async fn write(&mut self, write: Write) -> Result<(), StoreError> {
        if self.there.is_none() {
            self.there = Some(self.look().await?);
        }
        let there = self.there.get_or_insert_default();
        match write {
            Write::Latest(record) => self.archive.keep(&Item::Latest, &record).await,
            Write::Placement(plan) => {
                if there.placements.insert(plan.epoch) {
                    self.archive.keep_placement(&plan).await?;
                }
                Ok(())
            }
            Write::Load(model, memory) => {
                let another = there.loads.iter().find(|known| **known != model).cloned();
                if let Some(another) = another
                    .filter(|_| there.loads.len() >= MODELS && !there.loads.contains(&model))
                {
                    self.archive.remove(&Item::Load(another.clone())).await?;
                    there.loads.remove(&another);
                }
                self.archive
                    .keep(&Item::Load(model.clone()), &memory)
                    .await?;
                there.loads.insert(model);
                Ok(())
            }
            Write::Decision(record) => {
                let item = Item::Decision(record.epoch);
                self.archive.keep(&item, &record).await?;
                there.decisions.insert(record.epoch, needed(&record));
                self.trim().await
            }
        }
    }

    /// What an earlier leader left. What it did not finish measuring, nobody will.
    async fn look(&self) -> Result<There, StoreError> {
        let all = self.archive.all().await?;
        let past = Past::read(
            all.iter()
                .map(|(name, value)| (name.as_str(), value.as_ref())),
        );
        let mut there = There::default();
        for (epoch, mut record) in past.records {
            there.decisions.insert(epoch, needed(&record));
            if !record.measured.closed {
                record.measured.closed = true;
                self.archive.keep(&Item::Decision(epoch), &record).await?;
            }
        }
        // By their names, so that what cannot be read is removed in its turn too.
        for name in all.keys() {
            match Item::of(name) {
                Some(Item::Decision(epoch)) => {
                    there.decisions.entry(epoch).or_insert(epoch);
                }
                Some(Item::Placement(epoch)) => {
                    there.placements.insert(epoch);
                }
                Some(Item::Load(model)) => {
                    there.loads.insert(model);
                }
                Some(Item::Latest) | None => {}
            }
        }
        Ok(there)
    }

    /// Keeps the newest decisions and the placements that they need.
    async fn trim(&mut self) -> Result<(), StoreError> {
        let Some(there) = &mut self.there else {
            return Ok(());
        };
        while there.decisions.len() > KEPT
            && let Some((oldest, _)) = there.decisions.pop_first()
        {
            self.archive.remove(&Item::Decision(oldest)).await?;
        }
        let Some(first) = there.decisions.values().min().copied() else {
            return Ok(());
        };
        while let Some(oldest) = there
            .placements
            .first()
            .copied()
            .filter(|epoch| *epoch < first)
        {
            there.placements.remove(&oldest);
            self.archive.remove(&Item::Placement(oldest)).await?;
        }
        Ok(())
    }
}

fn needed(record: &Record) -> Epoch {
    match record.parent {
        Epoch(0) => record.epoch,
        parent => parent,
    }
}
