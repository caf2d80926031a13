//! A worker's pod is deleted, a node is lost. The rank comes back alone; the others never start anew.

use std::time::{Duration, Instant};

use foregate_harness::cluster::{Cluster, ROLLOUT, awaited};
use serde_json::{Value, json};

use crate::load::{self, Load};
use crate::site::{SERVES, Site, is, record};
use crate::stage;

/// The node of the operator and its store; the tests kill others.
const SAFE: &str = "n1";

/// Three workers, and an operator on the safe node.
fn three_workers(cluster: &'static Cluster, name: &str) -> Site {
    let there = json!({"kubernetes.io/hostname": SAFE});
    let values = match cluster.hermetic() {
        Ok(_) => json!({"nodeSelector": there, "etcd": {"nodeSelector": there}}),
        Err(_) => json!({}),
    };
    let site = Site::with_operator(cluster, name, &values);
    site.apply_tiny(|tiny| tiny["spec"]["workers"]["count"] = json!(3));
    site.await_settled(3);
    site
}

#[test]
fn a_deleted_worker_comes_back_alone() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    let site = three_workers(cluster, "deleted");
    let url = site.url();
    let reference = load::reference(cluster, &url);
    let (workers, gateways) = (site.lives("worker"), site.lives("gateway"));
    let load = Load::start(cluster, &url);
    load.await_more(6);
    let mut figures = json!({});
    for (how, flags) in [
        ("with_time_to_leave", ["--wait=false", "--grace-period=45"]),
        ("at_once", ["--force", "--grace-period=0"]),
    ] {
        let before = life(&site.lives("worker"), "tiny-worker-1");
        let since = Instant::now();
        let _printed =
            site.namespace
                .kubectl(&["delete", "pod", "tiny-worker-1", flags[0], flags[1]]);
        let back = await_back(&site, "tiny-worker-1", &before, since);
        site.await_settled(3);
        figures[how] = json!({"pod_ready_again_s": back.as_secs_f64(), "settled_s": since.elapsed().as_secs_f64()});
        load.await_more(6);
    }
    let outcome = load.stop();
    others_lived_on(&workers, &site.lives("worker"), "tiny-worker-1");
    assert_eq!(
        gateways,
        site.lives("gateway"),
        "a gateway was started anew"
    );
    outcome.assert_as(&reference);
    figures["load"] = outcome.summary();
    record("worker-deleted.json", &format!("{figures:#}\n"));
}

#[test]
fn the_rank_of_a_lost_node_comes_back_alone() {
    let Some((cluster, made, _turn)) = stage::made() else {
        return;
    };
    if made.nodes < 3 {
        return foregate_harness::skip("losing a node takes three of them");
    }
    let site = three_workers(cluster, "lost");
    let url = site.url();
    let reference = load::reference(cluster, &url);
    let (node, rank) = victim(&site);
    let (workers, gateways) = (site.lives("worker"), site.lives("gateway"));
    let load = Load::start(cluster, &url);
    load.await_more(6);

    let since = Instant::now();
    made.kill(&node);
    awaited(
        "experts to be without a holder, or somebody to take over",
        ROLLOUT,
        || {
            let moe = site.moe();
            (!is(&moe, "WeightsLoaded"))
                .then_some(())
                .ok_or_else(|| moe["status"].to_string())
        },
    );
    let noticed = since.elapsed();
    awaited("every expert to have a verified copy again", SERVES, || {
        let moe = site.moe();
        is(&moe, "ExpertsCovered")
            .then_some(())
            .ok_or_else(|| moe["status"].to_string())
    });
    let covered = since.elapsed();
    let before = life(&workers, &rank);
    let back = await_back(&site, &rank, &before, since);
    site.await_settled(3);
    let settled = since.elapsed();
    load.await_more(6);
    let outcome = load.stop();
    made.restart(&node);

    others_lived_on(&workers, &site.lives("worker"), &rank);
    assert_eq!(
        gateways,
        site.lives("gateway"),
        "a gateway was started anew"
    );
    outcome.assert_as(&reference);
    let figures = json!({
        "loss_noticed_s": noticed.as_secs_f64(), "experts_covered_s": covered.as_secs_f64(),
        "pod_ready_on_another_node_s": back.as_secs_f64(), "settled_s": settled.as_secs_f64(),
        "load": outcome.summary(),
    });
    record("node-lost.json", &format!("{figures:#}\n"));
    awaited("the node to be Ready again", ROLLOUT, || {
        let text = cluster.kubectl(&["get", "node", &node, "-o", "json"]);
        let found: Value = serde_json::from_str(&text).unwrap();
        is(&found, "Ready")
            .then_some(())
            .ok_or_else(|| found["status"]["conditions"].to_string())
    });
}

/// A node with a worker and without a gateway: its loss is one of a rank only. And that worker.
fn victim(site: &Site) -> (String, String) {
    let node = |pod: &Value| pod["spec"]["nodeName"].as_str().unwrap().to_owned();
    let spared: Vec<_> = site
        .pods("gateway")
        .iter()
        .map(node)
        .chain([SAFE.to_owned()])
        .collect();
    let workers = site.pods("worker");
    let found = workers.iter().find(|pod| !spared.contains(&node(pod)));
    let found = found.unwrap_or_else(|| panic!("no worker is apart from {spared:?}"));
    (
        node(found),
        found["metadata"]["name"].as_str().unwrap().to_owned(),
    )
}

type Life = (String, u64);

fn life(of: &[(String, Life)], pod: &str) -> Life {
    let found = of.iter().find(|(name, _)| name == pod);
    found
        .unwrap_or_else(|| panic!("no {pod} in {of:?}"))
        .1
        .clone()
}

/// How long after `since` another pod of the name was Ready.
fn await_back(site: &Site, pod: &str, before: &Life, since: Instant) -> Duration {
    awaited(&format!("another {pod} to be Ready"), SERVES, || {
        let pods = site.pods("worker");
        let found = pods.iter().find(|found| found["metadata"]["name"] == pod);
        let found = found.ok_or("no such pod")?;
        let another = found["metadata"]["uid"] != before.0.as_str();
        (another && is(found, "Ready"))
            .then_some(())
            .ok_or_else(|| found["status"].to_string())
    });
    since.elapsed()
}

fn others_lived_on(before: &[(String, Life)], after: &[(String, Life)], but: &str) {
    let others = |of: &[(String, Life)]| {
        let others = of.iter().filter(|(name, _)| name != but);
        others.cloned().collect::<Vec<_>>()
    };
    assert_eq!(
        others(before),
        others(after),
        "a worker was started anew beside {but}"
    );
}
