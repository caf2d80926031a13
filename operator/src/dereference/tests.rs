use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::*;

fn now() -> Time {
    Time(Timestamp::from_second(1000).unwrap())
}

fn owner() -> Owner {
    Owner {
        name: "tiny".to_owned(),
        namespace: "default".to_owned(),
        uid: "u-1".to_owned(),
    }
}

fn pod(component: &str, change: impl FnOnce(&mut Value)) -> Pod {
    let mut pod = json!({
        "metadata": {
            "name": format!("tiny-{component}-1"),
            "labels": { "app.kubernetes.io/component": component, RANK: "1" },
            "annotations": { CONFIG: "c", SLOTS: "18", SOURCE: "s" },
            "ownerReferences": [{ "apiVersion": "foregate.dev/v1alpha1", "kind": "MoeCluster", "name": "tiny", "uid": "u-1" }],
        },
        "status": {},
    });
    change(&mut pod);
    serde_json::from_value(pod).unwrap()
}

fn found(pod: Pod) -> Found {
    let mut found = Found::default();
    found.take(&owner(), pod);
    found
}

#[test]
fn a_pod_of_an_earlier_cluster_is_nobodys() {
    let other = pod("worker", |pod| {
        pod["metadata"]["ownerReferences"][0]["uid"] = "u-0".into()
    });
    assert!(found(other).workers.is_empty());
}

#[test]
fn lives_of_pods() {
    let life =
        |change: fn(&mut Value)| found(pod("worker", change)).seen(&now())[&Rank(1)].life;
    assert_eq!(life(|_| {}), Life::Lives);
    assert_eq!(
        life(|pod| pod["status"]["phase"] = "Failed".into()),
        Life::Ended
    );
    assert_eq!(
        life(|pod| pod["metadata"]["deletionTimestamp"] = "1970-01-01T00:16:45Z".into()),
        Life::Ending
    );
    assert_eq!(
        life(|pod| pod["metadata"]["deletionTimestamp"] = "1970-01-01T00:16:20Z".into()),
        Life::Overdue
    );
    assert_eq!(
        life(|pod| {
            pod["metadata"]["deletionTimestamp"] = "1970-01-01T00:16:45Z".into();
            pod["status"]["conditions"] = json!([{
                "type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager",
            }]);
        }),
        Life::Cut
    );
    let seen = found(pod("worker", |pod| {
        pod["status"]["conditions"] = json!([{ "type": "Ready", "status": "True" }]);
    }))
    .seen(&now());
    assert!(seen[&Rank(1)].ready);
    assert_eq!(
        (seen[&Rank(1)].config.as_str(), seen[&Rank(1)].slots),
        ("c", 18)
    );
}

#[test]
fn the_schedulers_and_the_kubelets_sentences_are_passed_on() {
    let waits = found(pod("worker", |pod| {
        pod["status"]["conditions"] = json!([{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        }]);
    }));
    let (reason, what) = waits.trouble().unwrap();
    assert_eq!(reason, Reason::PodsUnschedulable);
    assert!(
        what.contains("1 of 1 worker pods have no node: tiny-worker-1: 0/3 nodes"),
        "{what}"
    );
    let fails = found(pod("worker", |pod| {
        pod["status"]["containerStatuses"] = json!([{
            "name": "worker", "image": "", "imageID": "", "ready": false, "restartCount": 3,
            "state": { "waiting": { "reason": "CrashLoopBackOff", "message": "back-off" } },
            "lastState": { "terminated": { "exitCode": 1, "message": "error: no config.json\n" } },
        }]);
    }));
    let (reason, what) = fails.trouble().unwrap();
    assert_eq!(reason, Reason::PodFailing);
    assert!(
        what.contains("CrashLoopBackOff: error: no config.json"),
        "{what}"
    );
    assert_eq!(found(pod("worker", |_| {})).trouble(), None);
}

/// Old gateways serve until new ones can: what keeps those from it would be seen nowhere else.
#[test]
fn a_change_of_gateways_that_does_not_go_through_is_seen() {
    let rollout = |status: Value| {
        let gateways = json!({ "metadata": { "generation": 2 }, "spec": { "replicas": 2 }, "status": status });
        let gateways = serde_json::from_value(gateways).unwrap();
        Found {
            gateways: Some(gateways),
            ..Found::default()
        }
        .gateways_change()
    };
    let through = json!({ "observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2 });
    assert_eq!(rollout(through), None);
    let unseen =
        rollout(json!({ "observedGeneration": 1, "replicas": 2, "updatedReplicas": 2 }));
    assert!(unseen.unwrap().contains("not been looked at"));
    let stuck = rollout(
        json!({ "observedGeneration": 2, "replicas": 3, "updatedReplicas": 1, "availableReplicas": 2 }),
    );
    assert_eq!(
        stuck.unwrap(),
        "1 of 2 gateways are as wanted now, 2 are as they were before"
    );
    let old = rollout(
        json!({ "observedGeneration": 2, "replicas": 3, "updatedReplicas": 2, "availableReplicas": 3 }),
    );
    assert_eq!(
        old.unwrap(),
        "2 of 2 gateways are as wanted now, 1 are as they were before"
    );

    let fails = |change: fn(&mut Value)| {
        found(pod("gateway", move |pod| {
        pod["metadata"]["ownerReferences"] = json!([{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "r" }]);
        pod["status"]["containerStatuses"] = json!([{
            "name": "gateway", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "waiting": { "reason": "ImagePullBackOff", "message": "no such tag" } },
        }]);
        change(pod);
    })).trouble()
    };
    let (reason, what) = fails(|_| {}).unwrap();
    assert_eq!(reason, Reason::PodFailing);
    assert!(
        what.contains("tiny-gateway-1: container gateway: ImagePullBackOff: no such tag"),
        "{what}"
    );
    let ending =
        fails(|pod| pod["metadata"]["deletionTimestamp"] = "1970-01-01T00:16:45Z".into());
    assert_eq!(ending, None, "its end is under way");
    let waits = found(pod("gateway", |pod| {
        pod["status"]["conditions"] =
            json!([{ "type": "PodScheduled", "status": "False", "message": "0/3 nodes" }]);
    }));
    assert_eq!(
        waits.trouble().unwrap().1,
        "1 of 1 gateway pods have no node: tiny-gateway-1: 0/3 nodes"
    );
}

#[test]
fn an_inspector_says_sizes_or_why_not() {
    let ended = |code: i32, message: &str| {
        let message = message.to_owned();
        found(pod("inspector", move |pod| {
            pod["status"]["containerStatuses"] = json!([{
                "name": "inspect", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "terminated": { "exitCode": code, "message": message } },
            }]);
        }))
    };
    let facts = r#"{"experts":32,"maxPositions":1024,"kvBytesPerToken":4096,"slotBytes":100,"denseBytes":7}"#;
    let Some(Inspection::Done(done)) = ended(0, facts).inspection("s") else {
        panic!("it is done");
    };
    assert_eq!((done.experts, done.dense_bytes), (32, 7));
    assert!(matches!(
        ended(0, "what?").inspection("s"),
        Some(Inspection::Failed(_))
    ));
    let Some(Inspection::Failed(why)) = ended(1, "no config.json").inspection("s") else {
        panic!("it failed");
    };
    assert!(why.contains("code 1: no config.json"), "{why}");
    assert_eq!(
        ended(0, facts).inspection("other"),
        Some(Inspection::Outdated)
    );
    assert_eq!(
        found(pod("inspector", |_| {})).inspection("s"),
        Some(Inspection::Working(None))
    );
    assert_eq!(Found::default().inspection("s"), None);
}
