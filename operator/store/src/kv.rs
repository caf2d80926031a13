//! The store as a trait: get, put, compare-and-put, delete, list, watch, lease.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::mpsc;

/// A value with the revision that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The bytes.
    pub value: Bytes,
    /// Revision of the write; grows with every write to the store.
    pub revision: u64,
}

/// A change under a watched prefix. Readers replace state by a snapshot, they never patch a guess.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// Everything under the prefix. First event of a watch, and again after every gap.
    Snapshot(BTreeMap<String, Entry>),
    /// One key was written.
    Put(String, Entry),
    /// One key was deleted or its lease ended.
    Delete(String),
    /// The connection is lost; what is known may be old. A snapshot follows once it is back.
    Disconnected,
}

/// Why a store call failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store did not answer in time or the connection is down. Worth a retry.
    #[error("the store is not reachable: {0}")]
    Unavailable(String),
    /// The lease ended (the store was away for longer than its time to live). Register anew.
    #[error("the lease has ended")]
    LeaseEnded,
    /// A value under a key is not what its codec expects.
    #[error("the value under {key} cannot be read: {what}")]
    Corrupt {
        /// The key.
        key: String,
        /// What is wrong.
        what: String,
    },
    /// The store refused the request for another reason.
    #[error("the store refused the request: {0}")]
    Refused(String),
}

impl StoreError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::LeaseEnded)
    }
}

/// What a compare-and-put expects to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// No value under the key.
    Absent,
    /// The value written at this revision.
    Revision(u64),
}

/// A lease that keeps itself alive until it is dropped, revoked or lost.
pub trait Lease: Send + Sync + std::fmt::Debug {
    /// The store's number of this lease.
    fn id(&self) -> i64;
    /// Resolves when the lease has ended though [`Self::revoke`] was not called. Keys under it are gone then.
    fn lost(&self) -> BoxFuture<'_, ()>;
    /// Ends the lease and deletes its keys.
    fn revoke(&self) -> BoxFuture<'_, Result<(), StoreError>>;
}

/// Deadline of every store call.
pub const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// Events that a watch keeps for a slow reader before it falls back to a snapshot.
pub const WATCH_QUEUE: usize = 1024;

/// A key-value store. Every call has a deadline of its own (five seconds) and fails with
/// [`StoreError::Unavailable`] after it.
pub trait Store: Send + Sync + std::fmt::Debug {
    /// Reads one key.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>>;
    /// Writes one key, under a lease or forever. Returns the revision.
    fn put<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        lease: Option<&'a dyn Lease>,
    ) -> BoxFuture<'a, Result<u64, StoreError>>;
    /// Writes `key` if every condition holds, in one transaction. `None`: one did not hold and nothing was
    /// written. Conditions may name other keys.
    fn put_if<'a>(
        &'a self,
        conditions: &'a [(&'a str, Expect)],
        key: &'a str,
        value: Bytes,
        lease: Option<&'a dyn Lease>,
    ) -> BoxFuture<'a, Result<Option<u64>, StoreError>>;
    /// Writes if `expect` holds. `None`: it did not hold and nothing was written.
    fn compare_and_put<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
        value: Bytes,
        lease: Option<&'a dyn Lease>,
    ) -> BoxFuture<'a, Result<Option<u64>, StoreError>> {
        Box::pin(async move {
            let conditions = [(key, expect)];
            self.put_if(&conditions, key, value, lease).await
        })
    }
    /// Deletes one key; absent keys are no error.
    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), StoreError>>;
    /// Everything under a prefix.
    fn list<'a>(
        &'a self,
        prefix: &'a str,
    ) -> BoxFuture<'a, Result<BTreeMap<String, Entry>, StoreError>>;
    /// Watches a prefix until the receiver is dropped. Never ends by itself: it reconnects.
    /// The channel is bounded (1024); a slow reader loses events and gets a fresh snapshot instead.
    fn watch(&self, prefix: &str) -> mpsc::Receiver<WatchEvent>;
    /// Grants a lease that is kept alive in the background.
    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<Arc<dyn Lease>, StoreError>>;
}
