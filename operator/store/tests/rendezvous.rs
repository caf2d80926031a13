//! Ranks of an epoch find each other: in the memory store, and in a real etcd started by the test.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "part of a test; the environment says whether a missing etcd is a failure"
)]

mod real_etcd;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foregate_api::ids::{Epoch, Rank};
use foregate_store::{
    Coord, EtcdStore, Group, Lease, MemoryStore, OwnEtcd, RendezvousError, Store, StoreError,
};
use tokio::time::Instant;

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);
const TTL: Duration = Duration::from_secs(9);

struct Subject {
    store: Arc<dyn Store>,
    _etcd: Option<OwnEtcd>,
}

impl Subject {
    fn memory() -> Self {
        Self {
            store: Arc::new(MemoryStore::new()),
            _etcd: None,
        }
    }

    async fn etcd() -> Option<Self> {
        let etcd = real_etcd::found(OwnEtcd::start().await)?;
        let store = EtcdStore::connect(&etcd.endpoints()).await.unwrap();
        Some(Self {
            store: Arc::new(store),
            _etcd: Some(etcd),
        })
    }

    /// As a process of its own has it.
    fn coord(&self) -> Coord {
        Coord::new(Arc::clone(&self.store), "c")
    }

    async fn lease(&self) -> Arc<dyn Lease> {
        self.store.lease(TTL).await.unwrap()
    }
}

fn ranks() -> Vec<Rank> {
    [0, 2, 5].map(Rank).to_vec()
}

fn group(epoch: u64) -> Group {
    Group {
        epoch: Epoch(epoch),
        generation: 0,
        ranks: ranks(),
        id: (0..128).map(|byte: u8| byte.wrapping_mul(31)).collect(),
    }
}

macro_rules! both {
    ($($name:ident),* $(,)?) => {
        mod memory {
            $(#[tokio::test] async fn $name() { super::$name(super::Subject::memory()).await; })*
        }
        mod etcd {
            $(#[tokio::test] async fn $name() {
                if let Some(subject) = super::Subject::etcd().await {
                    super::$name(subject).await;
                }
            })*
        }
    };
}

both!(
    who_waits_and_who_comes_late_read_the_same,
    an_epoch_is_founded_once,
    a_lost_group_is_followed_by_another,
    nobody_waits_past_the_deadline,
    what_is_no_group_is_refused_at_once,
    a_group_ends_with_its_founder_or_with_a_later_one,
);

async fn who_waits_and_who_comes_late_read_the_same(subject: Subject) {
    let early = [subject.coord(), subject.coord()];
    let waits = early.map(|coord| {
        tokio::spawn(async move { coord.meet(Epoch(7), &ranks(), None, LONG).await })
    });
    // An epoch whose number begins with the same digit is another one.
    let lease = subject.lease().await;
    let found = subject.coord();
    found.found_group(&group(7), lease.as_ref()).await.unwrap();
    for wait in waits {
        assert_eq!(wait.await.unwrap().unwrap(), group(7));
    }
    let late = subject
        .coord()
        .meet(Epoch(7), &[Rank(5), Rank(0), Rank(2)], None, SHORT)
        .await;
    let late = late.unwrap();
    assert_eq!(late, group(7));
    assert_eq!((late.place(Rank(5)), late.place(Rank(1))), (Some(2), None));
    assert_eq!(Group::founder(&late.ranks), Some(Rank(0)));
}

async fn an_epoch_is_founded_once(subject: Subject) {
    let lease = subject.lease().await;
    let coord = subject.coord();
    coord.found_group(&group(1), lease.as_ref()).await.unwrap();
    let mut second = group(1);
    second.id = vec![1];
    let again = coord.found_group(&second, lease.as_ref()).await;
    let again = again.unwrap_err();
    assert!(
        matches!(again, RendezvousError::Founded { generation: 0, .. }),
        "{again}"
    );
    let read = coord.meet(Epoch(1), &ranks(), None, LONG).await.unwrap();
    assert_eq!(read, group(1), "the first one stays");
}

async fn a_lost_group_is_followed_by_another(subject: Subject) {
    let lease = subject.lease().await;
    let coord = subject.coord();
    coord.found_group(&group(1), lease.as_ref()).await.unwrap();
    let waits = tokio::spawn({
        let coord = subject.coord();
        async move { coord.meet(Epoch(1), &ranks(), Some(0), LONG).await }
    });
    let late = coord.meet(Epoch(1), &ranks(), Some(0), SHORT).await;
    assert!(
        matches!(late, Err(RendezvousError::Late { .. })),
        "the lost one is not met"
    );
    let next = Group {
        generation: 1,
        id: vec![9],
        ..group(1)
    };
    coord.found_group(&next, lease.as_ref()).await.unwrap();
    assert_eq!(waits.await.unwrap().unwrap(), next);
    let older = coord.found_group(&group(1), lease.as_ref()).await;
    assert!(
        matches!(older, Err(RendezvousError::Founded { generation: 1, .. })),
        "{older:?}"
    );
}

async fn nobody_waits_past_the_deadline(subject: Subject) {
    let lease = subject.lease().await;
    subject
        .coord()
        .found_group(&group(70), lease.as_ref())
        .await
        .unwrap();
    let begun = Instant::now();
    let late = subject
        .coord()
        .meet(Epoch(7), &ranks(), None, SHORT)
        .await
        .unwrap_err();
    assert!(begun.elapsed() >= SHORT && begun.elapsed() < LONG);
    assert!(
        matches!(
            late,
            RendezvousError::Late {
                founder: Rank(0),
                epoch: Epoch(7),
                ..
            }
        ),
        "{late}"
    );
}

async fn what_is_no_group_is_refused_at_once(subject: Subject) {
    let coord = subject.coord();
    let lease = subject.lease().await;
    let other = coord.found_group(&group(1), lease.as_ref()).await;
    other.unwrap();
    let met = coord
        .meet(Epoch(1), &[Rank(0), Rank(1)], None, LONG)
        .await
        .unwrap_err();
    assert!(matches!(met, RendezvousError::OtherRanks { .. }), "{met}");
    let texts: [&'static [u8]; 5] = [
        b"nonsense",
        br#"{"format":99,"value":{}}"#,
        br#"{"format":2,"value":{"epoch":3,"generation":0,"ranks":[0,2,5],"id":"zz"}}"#,
        br#"{"format":2,"value":{"epoch":4,"generation":0,"ranks":[0,2,5],"id":"00"}}"#,
        br#"{"format":2,"value":{"epoch":3,"generation":0,"ranks":[2,0],"id":"00"}}"#,
    ];
    for text in texts {
        let key = coord.keys().group(Epoch(3));
        subject
            .store
            .put(&key, Bytes::from_static(text), None)
            .await
            .unwrap();
        let met = coord
            .meet(Epoch(3), &ranks(), None, LONG)
            .await
            .unwrap_err();
        let corrupt = matches!(met, RendezvousError::Store(StoreError::Corrupt { .. }));
        assert!(corrupt, "{}: {met}", String::from_utf8_lossy(text));
    }
    for broken in [
        Group {
            ranks: vec![Rank(1), Rank(1)],
            ..group(9)
        },
        Group {
            ranks: Vec::new(),
            ..group(9)
        },
        Group {
            id: vec![0; 5000],
            ..group(9)
        },
    ] {
        assert!(coord.found_group(&broken, lease.as_ref()).await.is_err());
    }
}

async fn a_group_ends_with_its_founder_or_with_a_later_one(subject: Subject) {
    let coord = subject.coord();
    let (first, second) = (subject.lease().await, subject.lease().await);
    coord.found_group(&group(1), first.as_ref()).await.unwrap();
    coord.found_group(&group(2), first.as_ref()).await.unwrap();
    assert!(
        coord.meet(Epoch(1), &ranks(), None, SHORT).await.is_err(),
        "removed"
    );
    coord
        .found_group(&group(10), second.as_ref())
        .await
        .unwrap();
    second.revoke().await.unwrap();
    assert!(
        coord.meet(Epoch(10), &ranks(), None, SHORT).await.is_err(),
        "gone with its founder"
    );
}
