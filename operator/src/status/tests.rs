use std::sync::Arc;

use foregate_api::ids::{Epoch, ExpertId, Rank};
use foregate_api::member::{Ack, Member};
use foregate_api::placement::{LayerPlacement, Reason as Why};
use k8s_openapi::jiff::Timestamp;

use super::*;

fn time(second: i64) -> Time {
    Time(Timestamp::from_second(second).unwrap())
}

/// Two ranks that serve epoch 3.
fn state() -> ClusterState {
    let ranks = [Rank(0), Rank(1)];
    let slots = vec![
        vec![ExpertId(0), ExpertId(1)],
        vec![ExpertId(2), ExpertId(3)],
    ];
    let plan = Arc::new(Placement {
        epoch: Epoch(3),
        parent: Epoch(2),
        reason: Why::Move,
        ranks: ranks.to_vec(),
        layers: vec![LayerPlacement::from_slots(&ranks, slots, 4)],
        balance_before: 0.8,
        balance_after: 0.98,
    });
    let mut state = ClusterState {
        connected: true,
        target: Some((Arc::clone(&plan), 1)),
        active: Some((plan, 1)),
        ..ClusterState::default()
    };
    for rank in ranks {
        let member = Member {
            rank,
            incarnation: 1,
            rpc: String::new(),
            exchange: String::new(),
            domain: String::new(),
            slots: 2,
            phase: Phase::Ready,
            model: crate::testing::model(4),
            cpu_path: "avx2".to_owned(),
            kv_pages: 1,
            page_tokens: 16,
        };
        let ack = Ack {
            prepared: Epoch(3),
            serving: Epoch(3),
            drained: Epoch(2),
        };
        state.members.insert(rank, Arc::new(member));
        state.acks.insert(rank, ack);
    }
    state
}

fn facts(state: &ClusterState) -> Facts<'_> {
    Facts {
        generation: Some(7),
        stage: &Stage::Applied,
        workers: 2,
        pods: 2,
        ready: 2,
        trouble: None,
        doing: Doing::Settled,
        selector: "a=b".to_owned(),
        gateways_wanted: 1,
        gateways: 1,
        gateways_change: None,
        keyless: None,
        url: Some("http://tiny.default.svc:8000".to_owned()),
        state: Some(state),
        threshold: 0.95,
        cover: Cover::Spread,
        verdict: Verdict::Answered,
        model: None,
        memory: None,
        notes: Vec::new(),
    }
}

/// Status and reason of every condition, in words.
fn said(status: &MoeClusterStatus) -> Vec<String> {
    let conditions = status.conditions.iter();
    conditions
        .map(|c| format!("{} {} {}", c.type_, c.status, c.reason))
        .collect()
}

#[test]
fn a_cluster_that_serves_is_ready() {
    let state = state();
    let status = status(&facts(&state), None, &time(0));
    assert_eq!(
        said(&status),
        [
            "Ready True CanaryAnswered",
            "Available True CanaryAnswered",
            "Progressing False AsWanted",
            "Degraded False Healthy",
            "WeightsLoaded True RanksRegistered",
            "ExpertsCovered True AllCovered",
            "Balanced True WithinThreshold",
            "FabricReady True OneEpoch",
            "RouterReady True GatewayAvailable",
        ]
    );
    assert!(
        status
            .conditions
            .iter()
            .all(|c| c.observed_generation == Some(7))
    );
    let parallelism = status.parallelism.unwrap();
    assert_eq!(
        (parallelism.attention_ranks, parallelism.expert_ranks),
        (2, 2)
    );
    assert_eq!(parallelism.cpu_paths, ["avx2"]);
    assert_eq!(status.epoch, 3);
}

/// Ready is what a token showed, not what pods say.
#[test]
fn without_a_token_it_is_not_ready() {
    let state = state();
    for (verdict, reason) in [
        (Verdict::Pending, "CanaryPending"),
        (Verdict::Failed("503".to_owned()), "CanaryFailed"),
    ] {
        let facts = Facts {
            verdict,
            ..facts(&state)
        };
        let status = status(&facts, None, &time(0));
        assert_eq!(said(&status)[0], format!("Ready False {reason}"));
    }
}

#[test]
fn what_is_wrong_says_so_with_its_reason() {
    let mut lost = state();
    lost.members.remove(&Rank(1));
    let mut bare = state();
    bare.acks.get_mut(&Rank(1)).unwrap().prepared = Epoch(2);
    let fine = state();
    let stage = |stage: &'static Stage| Facts {
        stage,
        state: None,
        ..facts(&fine)
    };
    static INVALID: Stage = Stage::Invalid(String::new());
    static UNFIT: Stage = Stage::Unfit(String::new());
    static REFUSED: Stage = Stage::Refused(String::new());
    let trouble = |reason| Facts {
        trouble: Some((reason, "worker-1: why".to_owned())),
        verdict: Verdict::Pending,
        ready: 1,
        ..facts(&fine)
    };
    let rolling = Facts {
        gateways_change: Some("0 of 1".to_owned()),
        ..facts(&fine)
    };
    let keyless = Facts {
        keyless: Some("clients".to_owned()),
        ..facts(&fine)
    };
    for (facts, line, is) in [
        (rolling.clone(), 2, "Progressing True RollingOut"),
        (rolling, 0, "Ready True CanaryAnswered"),
        (keyless.clone(), 3, "Degraded True KeysMissing"),
        (keyless, 0, "Ready False KeysMissing"),
        (facts(&lost), 3, "Degraded True RankLost"),
        (facts(&lost), 0, "Ready False RankLost"),
        (facts(&lost), 4, "WeightsLoaded False RanksMissing"),
        (facts(&bare), 5, "ExpertsCovered False ExpertsMissing"),
        (stage(&INVALID), 0, "Ready False InvalidManifest"),
        (stage(&UNFIT), 3, "Degraded True DoesNotFit"),
        (stage(&REFUSED), 3, "Degraded True ApplyFailed"),
        (
            stage(&INVALID),
            5,
            "ExpertsCovered Unknown StoreUnreachable",
        ),
        (trouble(Reason::PodFailing), 3, "Degraded True PodFailing"),
        (
            trouble(Reason::PodsUnschedulable),
            2,
            "Progressing True PodsUnschedulable",
        ),
        (
            trouble(Reason::PodsUnschedulable),
            0,
            "Ready False PodsUnschedulable",
        ),
    ] {
        let status = status(&facts, None, &time(0));
        assert_eq!(said(&status)[line], is, "{:#?}", status.conditions);
    }
}

/// A cluster serves as well as any while no failure domain is lost; a person who asked for cover is told all the same.
#[test]
fn cover_that_was_asked_for_and_is_not_there_is_told() {
    let each = |slots: [Vec<ExpertId>; 2], domains: [&str; 2]| {
        let mut state = state();
        let (plan, at) = state.active.clone().unwrap();
        let layer = LayerPlacement::from_slots(&plan.ranks, slots.to_vec(), 4);
        let plan = Placement {
            layers: vec![layer],
            ..Placement::clone(&plan)
        };
        state.active = Some((Arc::new(plan), at));
        for (member, domain) in state.members.values_mut().zip(domains) {
            Arc::make_mut(member).domain = domain.to_owned();
        }
        state
    };
    let four = || (0..4).map(ExpertId).collect::<Vec<_>>();
    let three = || (0..3).map(ExpertId).collect::<Vec<_>>();
    for (state, cover, is) in [
        (
            each([four(), four()], ["a", "b"]),
            Cover::All,
            "False Healthy",
        ),
        (
            each([four(), four()], ["", ""]),
            Cover::All,
            "False Healthy",
        ),
        (
            each([four(), four()], ["a", "a"]),
            Cover::All,
            "True CoverReduced",
        ),
        (
            each([four(), three()], ["a", "b"]),
            Cover::All,
            "True CoverReduced",
        ),
        (
            each([four(), three()], ["a", "b"]),
            Cover::Spread,
            "False Healthy",
        ),
    ] {
        let facts = Facts {
            cover,
            ..facts(&state)
        };
        let status = status(&facts, None, &time(0));
        let lines = said(&status);
        assert_eq!(
            lines[3],
            format!("Degraded {is}"),
            "{:#?}",
            status.conditions
        );
        assert_eq!(lines[0], "Ready True CanaryAnswered");
    }
}

#[test]
fn a_condition_keeps_its_time_until_it_changes() {
    let state = state();
    let before = status(&facts(&state), None, &time(1));
    let same = status(&facts(&state), Some(&before), &time(2));
    assert_eq!(before, same, "nothing to write");
    let failed = Facts {
        verdict: Verdict::Failed("503".to_owned()),
        ..facts(&state)
    };
    let after = status(&failed, Some(&before), &time(3));
    let at = |about: &str| {
        let found = after.conditions.iter().find(|c| c.type_ == about);
        found.unwrap().last_transition_time.clone()
    };
    assert_eq!(at("Ready"), time(3));
    assert_eq!(at("Balanced"), time(1));
}
