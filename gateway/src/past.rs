//! What is kept of the cluster's past, read when somebody asks.
//!
//! However many ask, the store is read once in [`FRESH`]: the values of a large model are megabytes.

use std::sync::Arc;
use std::time::Duration;

use foregate_store::{Archive, StoreError};
use serde_json::{Map, Value};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long what was read is shown again.
const FRESH: Duration = Duration::from_millis(500);

/// The archive, and what was read of it last.
#[derive(Debug)]
pub struct Past {
    archive: Archive,
    read: Mutex<Option<(Instant, Arc<Map<String, Value>>)>>,
}

impl Past {
    /// Nothing read yet.
    #[must_use]
    pub fn new(archive: Archive) -> Self {
        Self {
            archive,
            read: Mutex::new(None),
        }
    }

    /// Everything that is kept, by name, as stored. A value that is no JSON is left out.
    ///
    /// # Errors
    /// The store's.
    pub async fn entries(&self) -> Result<Arc<Map<String, Value>>, StoreError> {
        // Held while the store is read, so that who asks meanwhile gets the same.
        let mut read = self.read.lock().await;
        if let Some((at, entries)) = read.as_ref()
            && at.elapsed() < FRESH
        {
            return Ok(Arc::clone(entries));
        }
        let all = self.archive.all().await?;
        let parsed = all.into_iter().filter_map(|(name, value)| {
            let parsed = serde_json::from_slice(&value)
                .inspect_err(|error| tracing::warn!(%name, %error, "value skipped"));
            Some((name, parsed.ok()?))
        });
        let entries = Arc::new(parsed.collect());
        *read = Some((Instant::now(), Arc::clone(&entries)));
        Ok(entries)
    }
}
