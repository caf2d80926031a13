//! One suite for every store: in memory, and a real etcd started by the test.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "part of a test; the environment says whether a missing etcd is a failure"
)]

mod real_etcd;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foregate_store::kv::WATCH_QUEUE;
use foregate_store::{EtcdStore, Expect, MemoryStore, OwnEtcd, Store, StoreError, WatchEvent};
use tokio::net::TcpSocket;
use tokio::sync::mpsc;
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(60);
/// A lease outlives two thirds of it without a beat, so that a test that is not scheduled for seconds keeps its leases.
const TTL: Duration = Duration::from_secs(9);

/// A store to test, and how to do to it what happens to stores.
struct Subject {
    store: Arc<dyn Store>,
    fault: Fault,
}

enum Fault {
    Memory(MemoryStore),
    Etcd(Box<OwnEtcd>),
}

impl Subject {
    fn memory() -> Self {
        let store = MemoryStore::new();
        Self {
            store: Arc::new(store.clone()),
            fault: Fault::Memory(store),
        }
    }

    /// `None`: there is no etcd binary and none is required.
    async fn etcd() -> Option<Self> {
        let etcd = real_etcd::found(OwnEtcd::start().await)?;
        let store = EtcdStore::connect(&etcd.endpoints()).await.unwrap();
        Some(Self {
            store: Arc::new(store),
            fault: Fault::Etcd(Box::new(etcd)),
        })
    }

    async fn go_away(&mut self) {
        match &mut self.fault {
            Fault::Memory(store) => store.interrupt(),
            Fault::Etcd(etcd) => etcd.stop_keeping_data().await.unwrap(),
        }
    }

    async fn come_back(&mut self) {
        match &mut self.fault {
            Fault::Memory(store) => store.resume(),
            Fault::Etcd(etcd) => etcd.restart().await.unwrap(),
        }
    }
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

async fn next(events: &mut mpsc::Receiver<WatchEvent>) -> WatchEvent {
    timeout(LONG, events.recv())
        .await
        .expect("an event in time")
        .expect("a watch never ends by itself")
}

async fn snapshot_keys(events: &mut mpsc::Receiver<WatchEvent>) -> Vec<String> {
    match next(events).await {
        WatchEvent::Snapshot(entries) => entries.into_keys().collect(),
        other => panic!("expected a snapshot, got {other:?}"),
    }
}

/// Values, conditions and lists.
async fn values(subject: &Subject) {
    let s = &subject.store;
    assert_eq!(s.get("/v/a").await.unwrap(), None);
    let first = s.put("/v/a", bytes("1"), None).await.unwrap();
    let second = s.put("/v/a", bytes("2"), None).await.unwrap();
    assert!(second > first);
    let entry = s.get("/v/a").await.unwrap().unwrap();
    assert_eq!((entry.value, entry.revision), (bytes("2"), second));

    let cas = |key: &'static str, expect, value: &str| {
        s.compare_and_put(key, expect, bytes(value), None)
    };
    assert_eq!(cas("/v/a", Expect::Absent, "x").await.unwrap(), None);
    assert_eq!(
        cas("/v/a", Expect::Revision(first), "x").await.unwrap(),
        None
    );
    assert_eq!(
        cas("/v/a", Expect::Revision(u64::MAX), "x").await.unwrap(),
        None
    );
    assert_eq!(cas("/v/n", Expect::Revision(1), "x").await.unwrap(), None);
    assert_eq!(s.get("/v/a").await.unwrap().unwrap().value, bytes("2"));
    let third = cas("/v/a", Expect::Revision(second), "3")
        .await
        .unwrap()
        .unwrap();
    assert_eq!(s.get("/v/a").await.unwrap().unwrap().revision, third);
    assert!(cas("/v/b", Expect::Absent, "b").await.unwrap().is_some());

    // Conditions on other keys hold in the same transaction.
    let both = [("/v/a", Expect::Revision(third)), ("/v/c", Expect::Absent)];
    let put = |both| async move { s.put_if(both, "/v/c", bytes("c"), None).await.unwrap() };
    assert!(put(&both).await.is_some());
    assert!(put(&both).await.is_none(), "the second condition is over");

    let listed: Vec<String> = s.list("/v/").await.unwrap().into_keys().collect();
    assert_eq!(listed, ["/v/a", "/v/b", "/v/c"]);
    s.delete("/v/b").await.unwrap();
    s.delete("/v/b").await.unwrap();
    assert_eq!(s.list("/v/").await.unwrap().len(), 2);

    // More keys than a page has, and a neighbour that is not under the prefix.
    for i in 0..75 {
        s.put(&format!("/many/{i}"), bytes("m"), None)
            .await
            .unwrap();
    }
    s.put("/many0", bytes("m"), None).await.unwrap();
    assert_eq!(s.list("/many/").await.unwrap().len(), 75);
}

/// A watch begins with a snapshot and goes on with each change, in order.
async fn watching(subject: &Subject) {
    let s = &subject.store;
    s.put("/w/a", bytes("1"), None).await.unwrap();
    let mut events = s.watch("/w/");
    assert_eq!(snapshot_keys(&mut events).await, ["/w/a"]);
    s.put("/other", bytes("x"), None).await.unwrap();
    let at = s.put("/w/b", bytes("2"), None).await.unwrap();
    s.delete("/w/a").await.unwrap();
    match next(&mut events).await {
        WatchEvent::Put(key, entry) => {
            assert_eq!((key.as_str(), entry.revision), ("/w/b", at));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(next(&mut events).await, WatchEvent::Delete("/w/a".into()));
}

/// A reader that sleeps through more events than its queue holds finds a snapshot behind the old ones.
async fn slow_reader(subject: &Subject) {
    let s = &subject.store;
    let mut events = s.watch("/s/");
    assert!(snapshot_keys(&mut events).await.is_empty());
    let write = async |numbers: std::ops::Range<usize>| {
        for i in numbers {
            s.put("/s/k", bytes(&i.to_string()), None).await.unwrap();
        }
    };
    write(0..WATCH_QUEUE).await;
    let full = async {
        while events.len() < WATCH_QUEUE {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, full).await.expect("all were told");
    write(WATCH_QUEUE..1500).await;
    for i in 0..WATCH_QUEUE {
        assert!(
            matches!(next(&mut events).await, WatchEvent::Put(_, e) if e.value == i.to_string())
        );
    }
    match next(&mut events).await {
        WatchEvent::Snapshot(entries) => assert_eq!(entries["/s/k"].value, "1499"),
        other => panic!("{other:?}"),
    }
    s.put("/s/k", bytes("end"), None).await.unwrap();
    assert!(matches!(next(&mut events).await, WatchEvent::Put(_, e) if e.value == "end"));
}

/// Keys live as long as their lease: it keeps itself, ends by revocation, and after a time to live by drop.
async fn leases(subject: &Subject) {
    let s = &subject.store;
    let mut events = s.watch("/l/");
    assert!(snapshot_keys(&mut events).await.is_empty());
    let kept = s.lease(TTL).await.unwrap();
    s.put("/l/kept", bytes("k"), Some(kept.as_ref()))
        .await
        .unwrap();
    let revoked = s.lease(TTL).await.unwrap();
    s.put("/l/revoked", bytes("r"), Some(revoked.as_ref()))
        .await
        .unwrap();
    let dropped = s.lease(TTL).await.unwrap();
    s.compare_and_put(
        "/l/dropped",
        Expect::Absent,
        bytes("d"),
        Some(dropped.as_ref()),
    )
    .await
    .unwrap()
    .unwrap();
    for _ in 0..3 {
        assert!(matches!(next(&mut events).await, WatchEvent::Put(..)));
    }
    revoked.revoke().await.unwrap();
    assert_eq!(
        next(&mut events).await,
        WatchEvent::Delete("/l/revoked".into())
    );
    assert!(
        timeout(Duration::from_millis(50), revoked.lost())
            .await
            .is_err(),
        "revoked is not lost"
    );
    let put = s.put("/l/late", bytes("l"), Some(revoked.as_ref())).await;
    assert!(matches!(put, Err(StoreError::LeaseEnded)), "{put:?}");
    drop(dropped);
    assert_eq!(
        next(&mut events).await,
        WatchEvent::Delete("/l/dropped".into())
    );
    // By then the kept one, which is older, has outlived its first time to live.
    assert!(s.get("/l/kept").await.unwrap().is_some());
    kept.revoke().await.unwrap();
}

/// An outage longer than a time to live: readers hear of it and then get a snapshot; the lease survives it.
async fn outage(subject: &mut Subject) {
    let s = Arc::clone(&subject.store);
    let lease = s.lease(TTL).await.unwrap();
    s.put("/o/leased", bytes("1"), Some(lease.as_ref()))
        .await
        .unwrap();
    s.put("/o/kept", bytes("1"), None).await.unwrap();
    let mut events = s.watch("/o/");
    assert_eq!(snapshot_keys(&mut events).await.len(), 2);

    subject.go_away().await;
    assert_eq!(next(&mut events).await, WatchEvent::Disconnected);
    let call = timeout(LONG, s.get("/o/kept"))
        .await
        .expect("calls have a deadline");
    assert!(matches!(&call, Err(StoreError::Unavailable(_))), "{call:?}");
    assert!(call.unwrap_err().is_retryable());
    tokio::time::sleep(TTL + Duration::from_secs(1)).await;
    subject.come_back().await;

    assert_eq!(
        snapshot_keys(&mut events).await,
        ["/o/kept", "/o/leased"],
        "exactly one gap"
    );
    // A restarted etcd gives every lease its time to live again, and a second.
    tokio::time::sleep(TTL + Duration::from_secs(2)).await;
    s.put("/o/again", bytes("2"), Some(lease.as_ref()))
        .await
        .unwrap();
    assert!(matches!(next(&mut events).await, WatchEvent::Put(key, _) if key == "/o/again"));
    lease.revoke().await.unwrap();
}

/// A lease that the store ended is known to be lost.
async fn lost_lease(store: &dyn Store, end: impl AsyncFnOnce(i64)) {
    let lease = store.lease(TTL).await.unwrap();
    store
        .put("/x", bytes("x"), Some(lease.as_ref()))
        .await
        .unwrap();
    end(lease.id()).await;
    timeout(LONG, lease.lost()).await.expect("loss is noticed");
    assert_eq!(store.get("/x").await.unwrap(), None);
    let put = store.put("/x", bytes("x"), Some(lease.as_ref())).await;
    assert!(matches!(put, Err(StoreError::LeaseEnded)), "{put:?}");
}

async fn whole_suite(mut subject: Subject) {
    values(&subject).await;
    watching(&subject).await;
    slow_reader(&subject).await;
    leases(&subject).await;
    outage(&mut subject).await;
}

#[tokio::test(start_paused = true)]
async fn memory() {
    whole_suite(Subject::memory()).await;
}

#[tokio::test(start_paused = true)]
async fn memory_knows_a_lost_lease() {
    let store = MemoryStore::new();
    let other = store.clone();
    lost_lease(&store, async |id| other.expire(id)).await;
}

#[tokio::test]
async fn etcd() {
    if let Some(subject) = Subject::etcd().await {
        whole_suite(subject).await;
    }
}

/// Runs `etcdctl`-like calls with a client of its own: what another process may do to the store.
async fn raw(etcd: &OwnEtcd) -> etcd_client::Client {
    etcd_client::Client::connect(etcd.endpoints(), None)
        .await
        .unwrap()
}

#[tokio::test]
async fn etcd_knows_a_lost_lease_and_compaction_does_not_stop_a_watch() {
    let Some(mut subject) = Subject::etcd().await else {
        return;
    };
    let Fault::Etcd(etcd) = &subject.fault else {
        panic!("etcd was asked for");
    };
    let mut client = raw(etcd).await;
    lost_lease(subject.store.as_ref(), async |id| {
        client.lease_revoke(id).await.unwrap();
    })
    .await;

    // While the reader is cut off, history is written and compacted away: what it missed cannot be replayed.
    let mut events = subject.store.watch("/c/");
    assert!(snapshot_keys(&mut events).await.is_empty());
    subject.go_away().await;
    assert_eq!(next(&mut events).await, WatchEvent::Disconnected);
    subject.come_back().await;
    let mut at = 0;
    for i in 0..50 {
        let put = client.put("/c/k", i.to_string(), None).await.unwrap();
        at = put.header().unwrap().revision();
    }
    client.compact(at, None).await.unwrap();
    loop {
        let value = match next(&mut events).await {
            WatchEvent::Snapshot(entries) => {
                entries.get("/c/k").map(|entry| entry.value.clone())
            }
            WatchEvent::Put(_, entry) => Some(entry.value),
            WatchEvent::Disconnected => None,
            WatchEvent::Delete(key) => panic!("{key} was deleted"),
        };
        if value == Some(bytes("49")) {
            break;
        }
    }
}

#[tokio::test]
async fn nobody_at_the_endpoint_is_an_error_in_time() {
    // Held and not listened on: nobody else can answer there.
    let held = TcpSocket::new_v4().unwrap();
    held.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let endpoint = format!("http://{}", held.local_addr().unwrap());
    let endpoints = [&endpoint];
    let tried = EtcdStore::connect_within(&endpoints, Duration::from_millis(500));
    let error = timeout(LONG, tried).await.unwrap().unwrap_err();
    assert!(error.to_string().contains(&endpoint), "{error}");
    assert!(error.is_retryable());
}

/// An etcd that hangs is as bad as none, and is told apart from a quiet one: by deadlines and pings.
#[tokio::test]
async fn a_hanging_etcd_is_noticed_and_its_return_too() {
    let Some(subject) = Subject::etcd().await else {
        return;
    };
    let Fault::Etcd(etcd) = &subject.fault else {
        panic!("etcd was asked for");
    };
    let pid = etcd.pid().unwrap().to_string();
    let signal = async |name: &str| {
        let sent = tokio::process::Command::new("kill")
            .args([name, &pid])
            .status()
            .await;
        assert!(sent.unwrap().success());
    };
    let mut events = subject.store.watch("/h/");
    assert!(snapshot_keys(&mut events).await.is_empty());
    signal("-STOP").await;
    // Its threads stop one by one, a while after the signal was sent.
    let unanswered = async {
        loop {
            if let Err(error) = subject.store.get("/h/a").await {
                return error;
            }
        }
    };
    let error = timeout(LONG, unanswered).await;
    let error = error.expect("calls have a deadline");
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert_eq!(next(&mut events).await, WatchEvent::Disconnected);
    signal("-CONT").await;
    assert!(snapshot_keys(&mut events).await.is_empty());
    subject.store.put("/h/a", bytes("1"), None).await.unwrap();
    assert!(matches!(next(&mut events).await, WatchEvent::Put(..)));
}
