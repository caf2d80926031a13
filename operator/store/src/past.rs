//! What is kept of the past: decisions, the placements they were made on and led to, and load histories.
//!
//! In: values with names. Out: the same. They lie beside the cluster's keys, not among them, so that a watch of the
//! cluster never carries them. Who writes keeps them few ([`Archive::remove`]); one value has a bound of its own.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use foregate_api::ids::Epoch;
use foregate_api::placement::Placement;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec;
use crate::keys::Keys;
use crate::kv::{Store, StoreError};

/// Longest value that is kept: etcd refuses requests of more than 1.5 MiB.
pub const LONGEST: usize = 1 << 20;

/// What a name in the archive is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Item {
    /// What was decided to come to this epoch, and on what.
    Decision(Epoch),
    /// The placement of this epoch.
    Placement(Epoch),
    /// The newest decision of any kind.
    Latest,
    /// The load history of a model, by the model's name in the archive.
    Load(String),
}

impl Item {
    /// Its key below the archive's prefix.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Decision(epoch) => format!("decision/{epoch}"),
            Self::Placement(epoch) => format!("placement/{epoch}"),
            Self::Latest => "latest".to_owned(),
            Self::Load(model) => format!("load/{model}"),
        }
    }

    /// What a key below the prefix is about; `None` for one that this version does not know.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        if name == "latest" {
            return Some(Self::Latest);
        }
        let (kind, of) = name.split_once('/')?;
        let epoch = || {
            let epoch: u64 = of.parse().ok()?;
            (epoch.to_string() == of).then_some(Epoch(epoch))
        };
        match kind {
            "decision" => epoch().map(Self::Decision),
            "placement" => epoch().map(Self::Placement),
            "load" => Some(Self::Load(of.to_owned())),
            _ => None,
        }
    }
}

/// The past of one cluster.
#[derive(Debug, Clone)]
pub struct Archive {
    store: Arc<dyn Store>,
    prefix: String,
}

impl Archive {
    /// The past of the cluster of this name.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, cluster: &str) -> Self {
        Self {
            store,
            prefix: Keys::new(cluster).past().to_owned(),
        }
    }

    /// Keeps a value, in place of what has its name.
    ///
    /// # Errors
    /// The store's; [`StoreError::Refused`] for a value longer than [`LONGEST`].
    pub async fn keep<T: Serialize + Sync>(
        &self,
        item: &Item,
        value: &T,
    ) -> Result<(), StoreError> {
        self.put(item, codec::encode(value)?).await
    }

    /// Keeps a placement under its epoch, in the form that placements have in the store.
    ///
    /// # Errors
    /// As [`Self::keep`].
    pub async fn keep_placement(&self, plan: &Placement) -> Result<(), StoreError> {
        let value = codec::encode_placement(plan)?;
        self.put(&Item::Placement(plan.epoch), value).await
    }

    async fn put(&self, item: &Item, value: Bytes) -> Result<(), StoreError> {
        let name = item.name();
        if value.len() > LONGEST {
            return Err(StoreError::Refused(format!(
                "{name} has {} bytes, {LONGEST} are the most",
                value.len()
            )));
        }
        let key = format!("{}{name}", self.prefix);
        self.store.put(&key, value, None).await.map(drop)
    }

    /// One value; `None` if there is none.
    ///
    /// # Errors
    /// The store's; [`StoreError::Corrupt`] if the value is not what it should be.
    pub async fn get<T: DeserializeOwned>(&self, item: &Item) -> Result<Option<T>, StoreError> {
        let key = format!("{}{}", self.prefix, item.name());
        match self.store.get(&key).await? {
            Some(entry) => codec::decode(&key, &entry.value).map(Some),
            None => Ok(None),
        }
    }

    /// The placement of an epoch; `None` if there is none.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn placement(&self, epoch: Epoch) -> Result<Option<Placement>, StoreError> {
        let key = format!("{}{}", self.prefix, Item::Placement(epoch).name());
        match self.store.get(&key).await? {
            Some(entry) => codec::decode_placement(&key, &entry.value).map(Some),
            None => Ok(None),
        }
    }

    /// Forgets a value; absent ones are no error.
    ///
    /// # Errors
    /// The store's.
    pub async fn remove(&self, item: &Item) -> Result<(), StoreError> {
        let key = format!("{}{}", self.prefix, item.name());
        self.store.delete(&key).await
    }

    /// Everything that is kept, as stored, by name ([`Item::name`]).
    ///
    /// # Errors
    /// The store's.
    pub async fn all(&self) -> Result<BTreeMap<String, Bytes>, StoreError> {
        let entries = self.store.list(&self.prefix).await?;
        let named = entries.into_iter().filter_map(|(key, entry)| {
            let name = key.strip_prefix(&self.prefix)?;
            Some((name.to_owned(), entry.value))
        });
        Ok(named.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryStore;

    #[test]
    fn every_name_is_found_again_and_no_other() {
        let items = [
            Item::Decision(Epoch(7)),
            Item::Placement(Epoch(12)),
            Item::Latest,
            Item::Load("a-b".to_owned()),
        ];
        for item in items {
            assert_eq!(Item::of(&item.name()), Some(item));
        }
        for other in ["decision/07", "decision/x", "placement/", "elsewhere/1", ""] {
            assert_eq!(Item::of(other), None, "{other}");
        }
    }

    #[tokio::test]
    async fn values_come_back_and_long_ones_are_refused() {
        let store = MemoryStore::new();
        let archive = Archive::new(Arc::new(store.clone()), "a");
        let other = Archive::new(Arc::new(store), "b");
        archive.keep(&Item::Latest, &vec![1, 2]).await.unwrap();
        assert_eq!(archive.get(&Item::Latest).await.unwrap(), Some(vec![1, 2]));
        assert!(other.all().await.unwrap().is_empty());
        let names: Vec<_> = archive.all().await.unwrap().into_keys().collect();
        assert_eq!(names, ["latest"]);
        archive.remove(&Item::Latest).await.unwrap();
        assert_eq!(archive.get::<Vec<u8>>(&Item::Latest).await.unwrap(), None);
        let long = "x".repeat(LONGEST);
        let refused = archive.keep(&Item::Latest, &long).await;
        assert!(matches!(refused, Err(StoreError::Refused(_))));
    }
}
