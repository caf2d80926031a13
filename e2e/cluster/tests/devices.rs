//! Workers that ask for a device are placed one per device and spread; where there are too few, the status says so.
//! The devices are numbers in the nodes' status, and the workers compute on the processor: what is shown is placement.

use std::collections::BTreeMap;

use foregate_harness::cluster::{Cluster, ROLLOUT, awaited};
use serde_json::{Value, json};

use crate::site::{Site, condition_of, is, record};
use crate::stage;

const DEVICE: &str = "nvidia.com/gpu";

#[test]
fn workers_go_where_devices_are_and_say_when_there_are_too_few() {
    let Some((cluster, made, _turn)) = stage::made() else {
        return;
    };
    if made.nodes < 3 {
        return foregate_harness::skip("spreading takes three nodes");
    }
    let mut devices = Devices::default();
    for (node, count) in [("n1", 2), ("n2", 1), ("n3", 1)] {
        devices.give(cluster, node, count);
    }
    let site = Site::with_operator(cluster, "devices", &json!({}));
    site.apply_tiny(|tiny| {
        tiny["spec"]["workers"]["count"] = json!(3);
        tiny["spec"]["workers"]["resources"] = json!({"limits": {DEVICE: 1}});
    });
    site.await_settled(3);
    assert_eq!(
        workers_by_node(&site),
        at([("n1", 1), ("n2", 1), ("n3", 1)]),
        "not spread"
    );

    let _printed = site
        .namespace
        .kubectl(&["scale", "moe/tiny", "--replicas=5"]);
    let said = awaited("the status to say what is missing", ROLLOUT, || {
        let moe = site.moe();
        let said = condition_of(&moe, "Progressing")
            .cloned()
            .unwrap_or_default();
        let missing = said["message"]
            .as_str()
            .is_some_and(|text| text.contains(DEVICE));
        (said["reason"] == "PodsUnschedulable" && missing)
            .then_some(said)
            .ok_or_else(|| moe["status"].to_string())
    });
    record("too-few-devices.json", &format!("{said:#}\n"));
    assert_eq!(said["status"], "True", "{said}");
    let text = said["message"].as_str().unwrap();
    assert!(
        text.starts_with("1 of 5 worker pods have no node: tiny-worker-4: "),
        "{text}"
    );
    assert!(text.contains(&format!("Insufficient {DEVICE}")), "{text}");
    assert!(
        !is(&site.moe(), "Ready"),
        "ready without a rank that is wanted"
    );
    assert!(
        is(&site.moe(), "Available"),
        "those that are there serve no more"
    );

    devices.give(cluster, "n2", 2);
    site.await_settled(5);
    assert_eq!(
        workers_by_node(&site),
        at([("n1", 2), ("n2", 2), ("n3", 1)]),
        "two share one"
    );
}

fn at<const N: usize>(counts: [(&str, usize); N]) -> BTreeMap<String, usize> {
    counts.map(|(node, count)| (node.to_owned(), count)).into()
}

fn workers_by_node(site: &Site) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for pod in site.pods("worker") {
        let node = pod["spec"]["nodeName"].as_str().unwrap();
        *counts.entry(node.to_owned()).or_default() += 1;
    }
    counts
}

/// What nodes advertise beyond what they have; taken back in the end.
#[derive(Default)]
struct Devices(BTreeMap<String, &'static Cluster>);

impl Devices {
    fn give(&mut self, cluster: &'static Cluster, node: &str, count: u32) {
        let text = count.to_string();
        let patch = json!([{"op": "add", "path": path(), "value": text}]);
        let _printed = cluster.kubectl(&patching(node, &patch.to_string()));
        let _known = self.0.insert(node.to_owned(), cluster);
        awaited(
            &format!("{node} to offer {count} of {DEVICE}"),
            ROLLOUT,
            || {
                let node: Value = serde_json::from_str(
                    &cluster.kubectl(&["get", "node", node, "-o", "json"]),
                )
                .unwrap();
                let offered = &node["status"]["allocatable"][DEVICE];
                (*offered == text.as_str())
                    .then_some(())
                    .ok_or_else(|| offered.to_string())
            },
        );
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        for (node, cluster) in &self.0 {
            let patch = json!([{"op": "remove", "path": path()}]);
            let output = cluster.try_kubectl(&patching(node, &patch.to_string()), "");
            if !output.status.success() {
                println!(
                    "{node} keeps its devices: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
        }
    }
}

fn path() -> String {
    format!("/status/capacity/{}", DEVICE.replace('/', "~1"))
}

fn patching<'a>(node: &'a str, patch: &'a str) -> [&'a str; 7] {
    [
        "patch",
        "node",
        node,
        "--subresource=status",
        "--type=json",
        "-p",
        patch,
    ]
}
