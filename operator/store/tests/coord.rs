//! The cluster's words over a store in memory, in simulated time; and one outage of a real etcd.
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
use foregate_api::forecast::Forecast;
use foregate_api::ids::{Epoch, ExpertId, Rank};
use foregate_api::load::{EngineLoad, LoadWindow};
use foregate_api::member::{Ack, Member, Phase};
use foregate_api::model::{Family, ModelSpec};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_api::weights::{WeightFormat, WeightFormats};
use foregate_store::coord::GATEWAYS;
use foregate_store::{ClusterState, Coord, EtcdStore, MemoryStore, OwnEtcd, Store, StoreError};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Shorter than the outage of a real etcd below, and long enough for a test that is not scheduled for seconds.
const TTL: Duration = Duration::from_secs(8);

fn member(rank: u32, incarnation: u64) -> Member {
    Member {
        rank: Rank(rank),
        incarnation,
        rpc: "127.0.0.1:1".into(),
        exchange: "local:0".into(),
        domain: String::new(),
        slots: 2,
        phase: Phase::Ready,
        model: ModelSpec {
            family: Family::Mixtral,
            formats: WeightFormats::all(WeightFormat::Float32),
            vocab: 4,
            hidden: 4,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 4,
            max_positions: 8,
            rope_theta: 1e4,
            norm_eps: 1e-5,
            qkv_bias: false,
            clip_qkv: None,
            tied_embeddings: false,
            dense_inner: 4,
            moe_blocks: vec![true],
            experts: 2,
            top_k: 1,
            expert_inner: 4,
            norm_top_k: true,
            shared_inner: None,
            eos: vec![],
            bos: None,
        },
        cpu_path: "none".into(),
        kv_pages: 1,
        page_tokens: 16,
    }
}

fn ack(epoch: u64) -> Ack {
    Ack {
        prepared: Epoch(epoch),
        serving: Epoch(epoch),
        drained: Epoch(0),
    }
}

fn window(rank: u32, sequence: u64) -> LoadWindow {
    LoadWindow {
        rank: Rank(rank),
        epoch: Epoch(1),
        sequence,
        span_ms: 1000,
        gate: vec![vec![sequence, 2]],
        served: vec![3],
        engine: EngineLoad::default(),
    }
}

fn plan(epoch: u64) -> Placement {
    let ranks = vec![Rank(0), Rank(1)];
    let slots = vec![vec![ExpertId(0)], vec![ExpertId(1)]];
    Placement {
        epoch: Epoch(epoch),
        parent: Epoch(epoch - 1),
        reason: Reason::Move,
        layers: vec![LayerPlacement::from_slots(&ranks, slots, 2)],
        ranks,
        balance_before: 0.5,
        balance_after: 1.0,
    }
}

fn memory() -> (MemoryStore, Coord, watch::Receiver<Arc<ClusterState>>) {
    let store = MemoryStore::new();
    let coord = Coord::new(Arc::new(store.clone()), "c");
    let states = coord.watch_cluster(CancellationToken::new());
    (store, coord, states)
}

async fn until(
    states: &mut watch::Receiver<Arc<ClusterState>>,
    what: &str,
    condition: impl Fn(&ClusterState) -> bool,
) -> Arc<ClusterState> {
    let last = Arc::clone(&states.borrow());
    let found = states.wait_for(|state| condition(state));
    match timeout(Duration::from_secs(60), found).await {
        Ok(state) => Arc::clone(&state.unwrap()),
        Err(_) => panic!("never: {what}; at first it was {last:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_forecast_lives_as_long_as_its_gateway_and_there_are_not_too_many() {
    let (store, coord, mut states) = memory();
    let forecast = |sequence| {
        let mut made = Forecast::of(2000, 40.0, 0.5, &[vec![1.0, 3.0]]);
        made.sequence = sequence;
        made
    };
    let mut leases = Vec::new();
    for number in 0..GATEWAYS + 2 {
        let lease = coord.store().lease(TTL).await.unwrap();
        coord
            .publish_forecast(&forecast(number as u64), lease.as_ref())
            .await
            .unwrap();
        leases.push(lease);
    }
    let state = until(&mut states, "as many as may be", |s| {
        s.forecasts.len() == GATEWAYS
    })
    .await;
    let first = leases[0].id();
    assert_eq!(*state.forecasts[&first], forecast(0));
    // One that is there is replaced, though there is no room for another.
    coord
        .publish_forecast(&forecast(999), leases[0].as_ref())
        .await
        .unwrap();
    let newest = |s: &ClusterState| s.forecasts.get(&first).is_some_and(|f| f.sequence == 999);
    until(&mut states, "the newest", newest).await;
    store.expire(first);
    until(&mut states, "its end", |s| {
        !s.forecasts.contains_key(&first)
    })
    .await;
}

/// Who has served says what the cluster is; before that, the lowest rank.
#[test]
fn a_newcomer_does_not_change_the_cluster() {
    let state = |members: &[(u32, Phase)]| {
        let members = members.iter().map(|(rank, phase)| {
            let mut member = member(*rank, 1);
            member.phase = *phase;
            (Rank(*rank), Arc::new(member))
        });
        ClusterState {
            members: members.collect(),
            ..ClusterState::default()
        }
    };
    let exemplar = |members: &[_]| state(members).exemplar().map(|member| member.rank.0);
    assert_eq!(exemplar(&[]), None);
    assert_eq!(
        exemplar(&[(1, Phase::Joining), (2, Phase::Joining)]),
        Some(1)
    );
    assert_eq!(exemplar(&[(0, Phase::Joining), (2, Phase::Ready)]), Some(2));
    assert_eq!(
        exemplar(&[(0, Phase::Joining), (2, Phase::Draining)]),
        Some(2)
    );
}

#[test]
fn kin_have_one_model_and_one_arithmetic() {
    let with = |path: &str, vocab: usize| {
        let mut member = member(0, 1);
        path.clone_into(&mut member.cpu_path);
        member.model.vocab = vocab;
        member
    };
    let one = with("avx2", 4);
    assert!(one.is_kin(&with("neon", 4)));
    assert!(!one.is_kin(&with("neon", 5)));
    assert!(!one.is_kin(&with("amx", 4)));
    assert!(with("amx", 4).is_kin(&with("amx", 4)));
}

#[tokio::test(start_paused = true)]
async fn every_verb_is_seen_by_a_watcher() {
    let (_store, coord, mut states) = memory();
    let lease = coord.store().lease(TTL).await.unwrap();
    coord.register(&member(0, 1), lease.as_ref()).await.unwrap();
    coord
        .publish_load(&window(0, 5), lease.as_ref())
        .await
        .unwrap();
    coord
        .acknowledge(Rank(0), ack(1), lease.as_ref())
        .await
        .unwrap();
    assert!(coord.propose(&plan(1), None).await.unwrap());
    assert!(coord.activate(&plan(1), None).await.unwrap());
    assert!(coord.lead("me", lease.as_ref()).await.unwrap());
    let state = until(&mut states, "everything", |s| s.leader.is_some()).await;
    assert!(state.connected);
    assert_eq!(*state.members[&Rank(0)], member(0, 1));
    assert_eq!(*state.loads[&Rank(0)], window(0, 5));
    assert_eq!(state.acks[&Rank(0)], ack(1));
    assert_eq!(*state.target.as_ref().unwrap().0, plan(1));
    assert_eq!(*state.active.as_ref().unwrap().0, plan(1));
    assert_eq!(state.leader.as_deref(), Some("me"));
    lease.revoke().await.unwrap();
    let state = until(&mut states, "its keys go", |s| s.leader.is_none()).await;
    let state = if state.members.is_empty() {
        state
    } else {
        until(&mut states, "member too", |s| s.members.is_empty()).await
    };
    assert!(
        state.target.is_some() && state.active.is_some(),
        "placements stay"
    );
}

#[tokio::test(start_paused = true)]
async fn a_value_that_changes_nothing_wakes_nobody() {
    let (_store, coord, mut states) = memory();
    let lease = coord.store().lease(TTL).await.unwrap();
    coord
        .acknowledge(Rank(0), ack(1), lease.as_ref())
        .await
        .unwrap();
    until(&mut states, "the ack", |s| s.acks.len() == 1).await;
    states.mark_unchanged();
    coord
        .acknowledge(Rank(0), ack(1), lease.as_ref())
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!states.has_changed().unwrap());
    coord
        .acknowledge(Rank(0), ack(2), lease.as_ref())
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(states.has_changed().unwrap());
}

#[tokio::test(start_paused = true)]
async fn proposals_and_activations_compare() {
    let (_store, coord, mut states) = memory();
    assert!(
        !coord.activate(&plan(1), None).await.unwrap(),
        "nothing is proposed"
    );
    assert!(coord.propose(&plan(1), None).await.unwrap());
    assert!(
        !coord.propose(&plan(2), None).await.unwrap(),
        "a target is there"
    );
    let state = until(&mut states, "a target", |s| s.target.is_some()).await;
    let first = state.target.as_ref().unwrap().1;
    assert!(coord.propose(&plan(2), Some(first)).await.unwrap());
    assert!(
        !coord.activate(&plan(1), None).await.unwrap(),
        "it is not the target any more"
    );
    assert!(coord.activate(&plan(2), None).await.unwrap());
    assert!(
        !coord.activate(&plan(2), None).await.unwrap(),
        "an active one is there"
    );
    let state = until(&mut states, "active", |s| s.active.is_some()).await;
    assert_eq!(state.active.as_ref().unwrap().0.epoch, Epoch(2));
}

#[tokio::test(start_paused = true)]
async fn one_leads_also_among_equals() {
    let (store, coord, _states) = memory();
    let (a, b) = (
        store.lease(TTL).await.unwrap(),
        store.lease(TTL).await.unwrap(),
    );
    assert!(coord.lead("x", a.as_ref()).await.unwrap());
    assert!(coord.lead("x", a.as_ref()).await.unwrap(), "again is still");
    assert!(!coord.lead("y", b.as_ref()).await.unwrap());
    assert!(
        !coord.lead("x", b.as_ref()).await.unwrap(),
        "another process of that name"
    );
    drop(a);
    tokio::time::sleep(TTL + Duration::from_millis(10)).await;
    assert!(coord.lead("x", b.as_ref()).await.unwrap());
    store.expire(b.id());
    let over = coord.lead("x", b.as_ref()).await;
    assert!(matches!(over, Err(StoreError::LeaseEnded)), "{over:?}");
}

#[tokio::test(start_paused = true)]
async fn a_new_process_of_a_rank_starts_without_the_words_of_the_old() {
    let (store, coord, mut states) = memory();
    let old = store.lease(Duration::from_secs(600)).await.unwrap();
    coord.register(&member(0, 1), old.as_ref()).await.unwrap();
    coord
        .acknowledge(Rank(0), ack(4), old.as_ref())
        .await
        .unwrap();
    coord
        .publish_load(&window(0, 1), old.as_ref())
        .await
        .unwrap();
    let mut ready = member(0, 1);
    ready.phase = Phase::Draining;
    coord.register(&ready, old.as_ref()).await.unwrap();
    let state = until(&mut states, "draining", |s| {
        s.members
            .get(&Rank(0))
            .is_some_and(|m| m.phase == Phase::Draining)
    })
    .await;
    assert_eq!(state.acks.len(), 1, "the same process keeps its word");
    // The old process is dead and its lease has not ended yet.
    let new = store.lease(TTL).await.unwrap();
    coord.register(&member(0, 2), new.as_ref()).await.unwrap();
    let state = until(&mut states, "the new one", |s| {
        s.members.get(&Rank(0)).is_some_and(|m| m.incarnation == 2)
    })
    .await;
    assert!(state.acks.is_empty() && state.loads.is_empty());
    // When the old lease ends, the new registration stays.
    store.expire(old.id());
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(states.borrow().members.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn members_missing_after_a_gap_stay_for_the_grace() {
    let (store, coord, mut states) = memory();
    let leases = [
        store.lease(TTL).await.unwrap(),
        store.lease(TTL).await.unwrap(),
    ];
    for (rank, lease) in (0..).zip(&leases) {
        coord
            .register(&member(rank, 1), lease.as_ref())
            .await
            .unwrap();
        coord
            .acknowledge(Rank(rank), ack(3), lease.as_ref())
            .await
            .unwrap();
    }
    until(&mut states, "both", |s| s.acks.len() == 2).await;
    store.interrupt();
    let state = until(&mut states, "the gap is seen", |s| !s.connected).await;
    assert_eq!(state.members.len(), 2);
    // Both leases end while nobody can see it; one member comes back as the same process, one as another.
    for lease in &leases {
        store.expire(lease.id());
    }
    store.resume();
    let state = until(&mut states, "connected", |s| s.connected).await;
    assert_eq!(
        (state.members.len(), state.acks.len()),
        (2, 2),
        "kept for the grace"
    );
    let again = store.lease(TTL).await.unwrap();
    coord.register(&member(0, 1), again.as_ref()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(states.borrow().acks.len(), 2);
    coord.register(&member(1, 2), again.as_ref()).await.unwrap();
    let state = until(&mut states, "another process", |s| {
        s.members.get(&Rank(1)).is_some_and(|m| m.incarnation == 2)
    })
    .await;
    assert!(
        !state.acks.contains_key(&Rank(1)),
        "the old one's word is gone with it"
    );
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(states.borrow().members.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn members_that_do_not_come_back_are_given_up_after_the_grace() {
    let (store, coord, mut states) = memory();
    let lease = store.lease(TTL).await.unwrap();
    coord.register(&member(0, 1), lease.as_ref()).await.unwrap();
    coord
        .acknowledge(Rank(0), ack(3), lease.as_ref())
        .await
        .unwrap();
    until(&mut states, "there", |s| s.acks.len() == 1).await;
    store.interrupt();
    store.expire(lease.id());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(
        states.borrow().members.len(),
        1,
        "an outage empties nothing"
    );
    store.resume();
    tokio::time::sleep(Duration::from_millis(4900)).await;
    assert_eq!(states.borrow().members.len(), 1);
    // A second gap does not begin the grace anew.
    store.interrupt();
    store.resume();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(states.borrow().members.is_empty() && states.borrow().acks.is_empty());
}

#[tokio::test(start_paused = true)]
async fn values_that_cannot_be_read_are_skipped() {
    let (store, coord, mut states) = memory();
    assert!(coord.propose(&plan(1), None).await.unwrap());
    until(&mut states, "a target", |s| s.target.is_some()).await;
    for (key, value) in [
        ("/foregate/c/placement/target", &b"{"[..]),
        ("/foregate/c/member/3", b"\xff\xfe"),
        ("/foregate/c/load/3", br#"{"format":99,"value":1}"#),
        ("/foregate/c/placement/ack/3", br#"{"format":2,"value":[]}"#),
        ("/foregate/c/operator/leader", b""),
        ("/foregate/c/nobody/knows", b"x"),
    ] {
        store
            .put(key, Bytes::from_static(value), None)
            .await
            .unwrap();
    }
    let lease = store.lease(TTL).await.unwrap();
    let misplaced = foregate_store::codec::encode(&member(5, 1)).unwrap();
    store
        .put("/foregate/c/member/4", misplaced, None)
        .await
        .unwrap();
    coord.register(&member(0, 1), lease.as_ref()).await.unwrap();
    let state = until(&mut states, "a good one", |s| !s.members.is_empty()).await;
    assert_eq!(state.members.len(), 1);
    assert_eq!(
        state.target.as_ref().unwrap().0.epoch,
        Epoch(1),
        "the last good one stays"
    );
    assert!(state.loads.is_empty() && state.acks.is_empty() && state.leader.is_none());
}

/// Ten seconds without etcd: what was known stays known, registrations survive on their leases.
#[tokio::test]
async fn ten_seconds_without_etcd_empty_nothing() {
    let Some(mut etcd) = real_etcd::found(OwnEtcd::start().await) else {
        return;
    };
    let store = EtcdStore::connect(&etcd.endpoints()).await.unwrap();
    let coord = Coord::new(Arc::new(store), "c");
    let mut states = coord.watch_cluster(CancellationToken::new());
    let lease = coord.store().lease(TTL).await.unwrap();
    coord.register(&member(0, 1), lease.as_ref()).await.unwrap();
    coord
        .acknowledge(Rank(0), ack(1), lease.as_ref())
        .await
        .unwrap();
    assert!(coord.propose(&plan(1), None).await.unwrap());
    assert!(coord.activate(&plan(1), None).await.unwrap());
    until(&mut states, "all is there", |s| {
        s.active.is_some() && s.acks.len() == 1
    })
    .await;
    etcd.stop_keeping_data().await.unwrap();
    until(&mut states, "the outage is seen", |s| !s.connected).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let during = Arc::clone(&states.borrow());
    assert!(during.active.is_some() && during.members.len() == 1);
    etcd.restart().await.unwrap();
    let after = until(&mut states, "it is back", |s| s.connected).await;
    assert_eq!(after.members, during.members);
    assert_eq!(after.active, during.active);
    tokio::time::sleep(TTL + Duration::from_secs(2)).await;
    assert_eq!(
        states.borrow().members.len(),
        1,
        "neither the grace nor etcd's restart but the holder keeps it"
    );
    coord
        .acknowledge(Rank(0), ack(2), lease.as_ref())
        .await
        .unwrap();
    until(&mut states, "life goes on", |s| {
        s.acks.get(&Rank(0)) == Some(&ack(2))
    })
    .await;
    etcd.stop().await.unwrap();
}
