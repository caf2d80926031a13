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
