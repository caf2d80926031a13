//! The store over a real etcd (3.4 or later), by its KV, Watch, Lease and Txn calls only.
//!
//! A watch is a list at a revision, then a stream from the revision after it. Whatever ends the stream (an
//! error, a cancelled or compacted watch, a lost connection) ends in `Disconnected` and, once a list succeeds
//! again, in a new snapshot; nothing is resumed at an old revision.

mod dial;
mod lease;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, GetOptions, KvClient, LeaseClient, PutOptions,
    Txn, TxnOp, TxnOpResponse, WatchClient,
};
use foregate_tls::StoreKeys;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::kv::{
    CALL_DEADLINE, Entry, Expect, Lease, Store, StoreError, WATCH_QUEUE, WatchEvent,
};

/// How long [`EtcdStore::connect`] keeps trying.
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);
/// Pause between two attempts to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(200);
/// Deadline of one attempt to connect.
const CONNECT_ATTEMPT: Duration = Duration::from_secs(3);
/// Pings on a silent connection. etcd closes connections that ping more often than every five seconds.
const PING_INTERVAL: Duration = Duration::from_secs(6);
/// How long a ping may go unanswered before the connection counts as lost.
const PING_TIMEOUT: Duration = Duration::from_secs(4);
/// Most bytes of one answer. A page of [`PAGE_KEYS`] values of etcd's default limit (1.5 MiB) fits.
const MAX_ANSWER: usize = 64 << 20;
/// Keys per page of a list.
const PAGE_KEYS: i64 = 32;

/// A store in etcd. Clones share the connection.
#[derive(Clone)]
pub struct EtcdStore {
    kv: KvClient,
    watch: WatchClient,
    lease: LeaseClient,
    tasks: TaskTracker,
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdStore").finish_non_exhaustive()
    }
}

impl EtcdStore {
    /// Connects and makes sure that etcd answers; tries for fifteen seconds.
    ///
    /// # Errors
    /// [`StoreError::Refused`] for endpoints that are no `http://host:port`, [`StoreError::Unavailable`] if
    /// nobody answers in time.
    pub async fn connect<E: AsRef<str>>(endpoints: &[E]) -> Result<Self, StoreError> {
        Self::connect_within(endpoints, CONNECT_DEADLINE).await
    }

    /// [`Self::connect`] with another deadline.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_within<E: AsRef<str>>(
        endpoints: &[E],
        deadline: Duration,
    ) -> Result<Self, StoreError> {
        Self::connect_proven(endpoints, None, deadline).await
    }

    /// With `keys` the endpoints are `https://host:port`, and each has to prove that it is certified for its host.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_proven<E: AsRef<str>>(
        endpoints: &[E],
        keys: Option<&StoreKeys>,
        deadline: Duration,
    ) -> Result<Self, StoreError> {
        let endpoints: Vec<&str> = endpoints.iter().map(AsRef::as_ref).collect();
        let members = members(&endpoints, keys.is_some())?;
        let until = Instant::now() + deadline;
        let store = Self::open(&endpoints, members, keys).await?;
        loop {
            let error = match store.answers().await {
                Ok(()) => return Ok(store),
                Err(error) => error,
            };
            if Instant::now() + CONNECT_PAUSE >= until {
                return Err(StoreError::Unavailable(format!(
                    "no etcd answers at {} within {} s: {error}",
                    endpoints.join(", "),
                    deadline.as_secs_f64()
                )));
            }
            tracing::debug!(%error, "etcd does not answer yet");
            tokio::time::sleep(CONNECT_PAUSE).await;
        }
    }

    async fn open(
        endpoints: &[&str],
        members: Vec<Member>,
        keys: Option<&StoreKeys>,
    ) -> Result<Self, StoreError> {
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_ATTEMPT)
            .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true);
        let client = match keys {
            None => bounded("connect", Client::connect(endpoints, Some(options))).await?,
            Some(keys) => {
                let channel = dial::channel(members, keys.clone())?;
                bounded("connect", Client::from_channel(channel, Some(options))).await?
            }
        };
        Ok(Self {
            kv: client.kv_client().max_decoding_message_size(MAX_ANSWER),
            watch: client.watch_client().max_decoding_message_size(MAX_ANSWER),
            lease: client.lease_client(),
            tasks: TaskTracker::new(),
        })
    }

    /// Asks for one key.
    async fn answers(&self) -> Result<(), StoreError> {
        let mut kv = self.kv.clone();
        let options = GetOptions::new().with_count_only();
        let asked = bounded("get", kv.get("/foregate", Some(options)));
        match tokio::time::timeout(CONNECT_ATTEMPT, asked).await {
            Ok(answer) => answer.map(|_| ()),
            Err(_) => Err(StoreError::Unavailable("no answer".into())),
        }
    }
}

/// Where a member of an etcd listens.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    /// Name or address, without brackets.
    host: String,
    port: u16,
}

impl Member {
    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// The members behind the endpoints; all are proven by keys, or none.
fn members(endpoints: &[&str], proven: bool) -> Result<Vec<Member>, StoreError> {
    let (scheme, remedy) = if proven {
        ("https://", "keys are given, so all of them are proven")
    } else {
        ("http://", "for https give the authorities too: ca_file")
    };
    if endpoints.is_empty() {
        return Err(StoreError::Refused(format!(
            "no etcd endpoint is given: name at least one {scheme}host:port"
        )));
    }
    let member = |endpoint: &&str| {
        let (host, port) = endpoint
            .strip_prefix(scheme)?
            .trim_end_matches('/')
            .rsplit_once(':')?;
        let host = host.trim_matches(['[', ']']);
        let port = port.parse().ok()?;
        (!host.is_empty()).then(|| Member {
            host: host.to_owned(),
            port,
        })
    };
    let checked = endpoints.iter().map(|endpoint| {
        member(endpoint).ok_or_else(|| {
            StoreError::Refused(format!(
                "etcd endpoint `{endpoint}` is not of the form {scheme}host:port ({remedy})"
            ))
        })
    });
    checked.collect()
}

/// Everything under `prefix` at one revision, and that revision.
async fn list_at(
    kv: &KvClient,
    prefix: &str,
) -> Result<(BTreeMap<String, Entry>, i64), StoreError> {
    let mut kv = kv.clone();
    let mut found = BTreeMap::new();
    let end = prefix_end(prefix);
    let (mut from, mut revision) = (prefix.as_bytes().to_vec(), 0);
    loop {
        let options = GetOptions::new()
            .with_range(end.clone())
            .with_limit(PAGE_KEYS)
            .with_revision(revision);
        let answer = bounded("list", kv.get(from, Some(options))).await?;
        if revision == 0 {
            revision = answer
                .header()
                .map_or(0, etcd_client::ResponseHeader::revision);
        }
        for pair in answer.kvs() {
            if let Some((key, entry)) = entry_of(pair) {
                found.insert(key, entry);
            }
        }
        match answer.kvs().last() {
            Some(last) if answer.more() => {
                // The smallest key after the last one.
                from = last.key().to_vec();
                from.push(0);
            }
            _ => return Ok((found, revision)),
        }
    }
}

/// The first key after all that begin with `prefix`; one zero byte, "no end", for the empty one.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.last_mut() {
        if let Some(next) = last.checked_add(1) {
            *last = next;
            return end;
        }
        end.pop();
    }
    vec![0]
}

/// A pair as ours; `None` (and a log line) if the key is not text, which none of ours is.
fn entry_of(pair: &etcd_client::KeyValue) -> Option<(String, Entry)> {
    let Ok(key) = pair.key_str() else {
        tracing::error!(key = ?pair.key(), "key skipped: it is not UTF-8");
        return None;
    };
    let entry = Entry {
        value: Bytes::copy_from_slice(pair.value()),
        revision: revision(pair.mod_revision()),
    };
    Some((key.to_owned(), entry))
}

/// etcd's revisions are positive.
fn revision(signed: i64) -> u64 {
    u64::try_from(signed).unwrap_or_default()
}

/// A call with the deadline of every call.
async fn bounded<T>(
    what: &str,
    call: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout(CALL_DEADLINE, call).await {
        Ok(answer) => answer.map_err(|error| translate(what, &error)),
        Err(_) => Err(StoreError::Unavailable(format!(
            "{what}: no answer within {} s",
            CALL_DEADLINE.as_secs()
        ))),
    }
}

fn translate(what: &str, error: &etcd_client::Error) -> StoreError {
    let text = format!("{what}: {error}");
    match error {
        etcd_client::Error::GRpcStatus(status) => {
            if status.message().contains("lease not found") {
                return StoreError::LeaseEnded;
            }
            // gRPC's codes: 1 cancelled, 2 unknown, 4 deadline, 8 exhausted, 10 aborted, 13 internal,
            // 14 unavailable are conditions of the moment; the others are about the request.
            match status.code() as i32 {
                8 if status.message().contains("database space exceeded") => {
                    StoreError::Refused(text)
                }
                1 | 2 | 4 | 8 | 10 | 13 | 14 => StoreError::Unavailable(text),
                _ => StoreError::Refused(text),
            }
        }
        etcd_client::Error::InvalidArgs(_) | etcd_client::Error::InvalidUri(_) => {
            StoreError::Refused(text)
        }
        _ => StoreError::Unavailable(text),
    }
}

fn put_options(lease: Option<&dyn Lease>) -> Option<PutOptions> {
    lease.map(|lease| PutOptions::new().with_lease(lease.id()))
}

impl Store for EtcdStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        Box::pin(async move {
            let mut kv = self.kv.clone();
            let answer = bounded("get", kv.get(key, None)).await?;
            Ok(answer
                .kvs()
                .first()
                .and_then(entry_of)
                .map(|(_, entry)| entry))
        })
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        lease: Option<&'a dyn Lease>,
    ) -> BoxFuture<'a, Result<u64, StoreError>> {
        Box::pin(async move {
            let mut kv = self.kv.clone();
            let answer = bounded("put", kv.put(key, value, put_options(lease))).await?;
            Ok(revision(
                answer
                    .header()
                    .map_or(0, etcd_client::ResponseHeader::revision),
            ))
        })
    }

    fn put_if<'a>(
        &'a self,
        conditions: &'a [(&'a str, Expect)],
        key: &'a str,
        value: Bytes,
        lease: Option<&'a dyn Lease>,
    ) -> BoxFuture<'a, Result<Option<u64>, StoreError>> {
        Box::pin(async move {
            let mut compares = Vec::with_capacity(conditions.len());
            for (key, expect) in conditions {
                compares.push(match expect {
                    Expect::Absent => Compare::version(*key, CompareOp::Equal, 0),
                    Expect::Revision(at) => {
                        let Ok(at) = i64::try_from(*at) else {
                            return Ok(None); // No value was ever written there.
                        };
                        Compare::mod_revision(*key, CompareOp::Equal, at)
                    }
                });
            }
            let put = TxnOp::put(key, value, put_options(lease));
            let mut kv = self.kv.clone();
            let answer =
                bounded("txn", kv.txn(Txn::new().when(compares).and_then([put]))).await?;
            if !answer.succeeded() {
                return Ok(None);
            }
            let at = answer.op_responses().first().and_then(|op| match op {
                TxnOpResponse::Put(put) => {
                    put.header().map(etcd_client::ResponseHeader::revision)
                }
                _ => None,
            });
            let at = at.or_else(|| answer.header().map(etcd_client::ResponseHeader::revision));
            Ok(Some(revision(at.unwrap_or_default())))
        })
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let mut kv = self.kv.clone();
            bounded("delete", kv.delete(key, None)).await.map(|_| ())
        })
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
    ) -> BoxFuture<'a, Result<BTreeMap<String, Entry>, StoreError>> {
        Box::pin(async move { Ok(list_at(&self.kv, prefix).await?.0) })
    }

    fn watch(&self, prefix: &str) -> mpsc::Receiver<WatchEvent> {
        let (events, receiver) = mpsc::channel(WATCH_QUEUE);
        let watching = watch::Watching {
            kv: self.kv.clone(),
            watch: self.watch.clone(),
            prefix: prefix.to_owned(),
            events,
        };
        self.tasks.spawn(watching.run());
        receiver
    }

    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<Arc<dyn Lease>, StoreError>> {
        Box::pin(async move {
            let lease = lease::grant(&self.lease, ttl, &self.tasks).await?;
            Ok(Arc::new(lease) as Arc<dyn Lease>)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_checked_before_anybody_waits() {
        let found = members(&["http://127.0.0.1:2379", "http://etcd:2379/"], false).unwrap();
        assert_eq!(found[1].authority(), "etcd:2379");
        let found = members(&["https://[::1]:2379"], true).unwrap();
        assert_eq!(
            (found[0].host.as_str(), found[0].authority()),
            ("::1", "[::1]:2379".to_owned())
        );
        for bad in [
            "etcd",
            "https://e:1",
            "http://e",
            "http://:1",
            "http://e:x",
            "",
        ] {
            let error = members(&[bad], false).unwrap_err().to_string();
            assert!(error.contains("http://host:port"), "{error}");
        }
        assert!(members(&[], false).is_err());
        for bad in ["http://e:1", "https://e", "etcd"] {
            let error = members(&["https://e:1", bad], true)
                .unwrap_err()
                .to_string();
            assert!(error.contains("https://host:port"), "{error}");
        }
    }

    #[test]
    fn the_end_of_a_prefix_is_the_next_key() {
        assert_eq!(prefix_end("/a/"), b"/a0");
        assert_eq!(prefix_end(""), [0]);
    }
}
