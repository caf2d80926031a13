//! How the ranks of an epoch find each other: one of them makes an id, and tells it once.
//!
//! In: the ranks of an epoch and, from its lowest rank, an id. Out: the same id at every rank, or an error by a deadline.
//! What the id is, only the fabric knows that wants it.
//!
//! Invariants: an epoch has one group at a time. What was written is replaced only by its founder, with a higher
//! generation, after that group was lost: ranks that read it are already waiting for it. The key lives on its founder's lease.

use std::time::Duration;

use bytes::Bytes;
use foregate_api::ids::{Epoch, Rank};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use crate::codec;
use crate::coord::Coord;
use crate::kv::{Expect, Lease, StoreError, WatchEvent};

/// Longest id that is taken: eight times that of NCCL.
const MAX_ID: usize = 1024;

/// The ranks that step together, and what they find each other by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// The epoch that it was founded for.
    pub epoch: Epoch,
    /// Its number among the groups of the epoch: one more for each that was lost.
    pub generation: u32,
    /// Its ranks, ascending; the first one founds.
    pub ranks: Vec<Rank>,
    /// The id, as hexadecimal digits.
    #[serde(with = "hexadecimal")]
    pub id: Vec<u8>,
}

impl Group {
    /// Who founds a group of these ranks.
    #[must_use]
    pub fn founder(ranks: &[Rank]) -> Option<Rank> {
        ranks.iter().min().copied()
    }

    /// The number that `rank` has within the group: communicators count from zero without gaps.
    #[must_use]
    pub fn place(&self, rank: Rank) -> Option<usize> {
        self.ranks.binary_search(&rank).ok()
    }

    fn check(&self, key: &str, epoch: Epoch) -> Result<(), StoreError> {
        let ascending = self.ranks.is_sorted_by(|a, b| a < b);
        let what = if self.epoch != epoch {
            format!("it is of epoch {}", self.epoch)
        } else if self.ranks.is_empty() || !ascending {
            "its ranks are not ascending".to_owned()
        } else if self.id.is_empty() || self.id.len() > MAX_ID {
            format!("an id of {} bytes", self.id.len())
        } else {
            return Ok(());
        };
        Err(StoreError::Corrupt {
            key: key.to_owned(),
            what,
        })
    }
}

/// Why a rank has no group.
#[derive(Debug, thiserror::Error)]
pub enum RendezvousError {
    /// The store's.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nobody founded it in time.
    #[error("rank {founder} founded no group of epoch {epoch} within {waited:?}")]
    Late {
        /// Of this epoch.
        epoch: Epoch,
        /// Who was to.
        founder: Rank,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The epoch has a group of this generation already, or of a later one.
    #[error("epoch {epoch} has a group of generation {generation} already")]
    Founded {
        /// The epoch.
        epoch: Epoch,
        /// What is there.
        generation: u32,
    },
    /// The group is of other ranks than the reader's placement.
    #[error("the group of epoch {epoch} is of ranks {found:?}, not {wanted:?}")]
    OtherRanks {
        /// Of this epoch.
        epoch: Epoch,
        /// The group's.
        found: Vec<Rank>,
        /// The reader's.
        wanted: Vec<Rank>,
    },
}

impl Coord {
    /// Founds a group of an epoch: writes it once, under the founder's lease, over one of a lower generation. Groups of
    /// earlier epochs are removed: who is in one has joined it, and who is not will not any more.
    ///
    /// # Errors
    /// [`RendezvousError::Founded`], or the store's. A value that cannot be read is not replaced.
    pub async fn found_group(
        &self,
        group: &Group,
        lease: &dyn Lease,
    ) -> Result<(), RendezvousError> {
        let key = self.keys().group(group.epoch);
        group.check(&key, group.epoch)?;
        let value = codec::encode(group)?;
        let epoch = group.epoch;
        let expect = match self.store().get(&key).await? {
            None => Expect::Absent,
            Some(found) => {
                let there: Group = codec::decode(&key, &found.value)?;
                let generation = there.generation;
                if generation >= group.generation {
                    return Err(RendezvousError::Founded { epoch, generation });
                }
                Expect::Revision(found.revision)
            }
        };
        let written = self
            .store()
            .compare_and_put(&key, expect, value, Some(lease))
            .await?;
        if written.is_none() {
            // Another process of the founder's rank was faster, so this one is not the last of them.
            let generation = group.generation;
            return Err(RendezvousError::Founded { epoch, generation });
        }
        for earlier in self.store().list(&self.keys().groups()).await?.keys() {
            if self
                .keys()
                .group_epoch(earlier)
                .is_some_and(|epoch| epoch < group.epoch)
            {
                self.store().delete(earlier).await?;
            }
        }
        Ok(())
    }

    /// The group of an epoch, which its founder may still have to write: one of a higher generation than `after`, if some
    /// were lost.
    ///
    /// # Errors
    /// [`RendezvousError::Late`] after `patience`; a value that cannot be read, or is of other ranks than `ranks`, at once.
    pub async fn meet(
        &self,
        epoch: Epoch,
        ranks: &[Rank],
        after: Option<u32>,
        patience: Duration,
    ) -> Result<Group, RendezvousError> {
        let key = self.keys().group(epoch);
        let mut events = self.store().watch(&key);
        let deadline = Instant::now() + patience;
        loop {
            // The store's watch never ends by itself; if it does, nothing will come.
            let event = timeout_at(deadline, events.recv()).await.ok().flatten();
            let Some(event) = event else {
                return Err(RendezvousError::Late {
                    epoch,
                    founder: Group::founder(ranks).unwrap_or_default(),
                    waited: patience,
                });
            };
            let Some(value) = value(event, &key) else {
                continue;
            };
            let group: Group = codec::decode(&key, &value)?;
            group.check(&key, epoch)?;
            if after.is_some_and(|lost| group.generation <= lost) {
                continue;
            }
            let mut wanted = ranks.to_vec();
            wanted.sort_unstable();
            if group.ranks != wanted {
                let found = group.ranks;
                return Err(RendezvousError::OtherRanks {
                    epoch,
                    found,
                    wanted,
                });
            }
            return Ok(group);
        }
    }
}

/// What an event says of exactly this key: the watch is of a prefix, which other epochs' keys may have too.
fn value(event: WatchEvent, key: &str) -> Option<Bytes> {
    match event {
        WatchEvent::Snapshot(entries) => entries.get(key).map(|entry| entry.value.clone()),
        WatchEvent::Put(changed, entry) => (changed == key).then_some(entry.value),
        WatchEvent::Delete(_) | WatchEvent::Disconnected => None,
    }
}

/// Bytes as digits: JSON has no bytes.
mod hexadecimal {
    use std::fmt::Write as _;

    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(2 * bytes.len());
        for byte in bytes {
            write!(text, "{byte:02x}").map_err(serde::ser::Error::custom)?;
        }
        to.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if !rest.is_empty() || text.len() > 4 * super::MAX_ID {
            return Err(D::Error::custom("not the digits of an id"));
        }
        let byte = |[high, low]: &[u8; 2]| {
            let digit = |c: u8| char::from(c).to_digit(16);
            u8::try_from(digit(*high)? * 16 + digit(*low)?).ok()
        };
        let bytes: Option<Vec<u8>> = pairs.iter().map(byte).collect();
        bytes.ok_or_else(|| D::Error::custom("not hexadecimal"))
    }
}
