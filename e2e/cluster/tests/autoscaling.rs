//! Gateways are as many as their autoscaler says, by what the metrics API saw.

use foregate_harness::cluster::{Cluster, awaited};
use foregate_harness::skip;
use serde_json::{Value, json};

use crate::load::{self, Load};
use crate::site::{self, SERVES, Site};
use crate::stage;

/// Under load the autoscaler starts a second gateway. The operator lets it: a change of the cluster afterwards leaves the
/// number alone. No request fails.
#[test]
fn the_autoscaler_has_the_last_word_on_gateways() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    if !serves_metrics(cluster) {
        return;
    }
    let site = Site::with_operator(cluster, "autoscaling", &json!({}));
    apply(&site, "10m");
    site.await_settled(2);
    let url = site.url();
    let reference = load::reference(cluster, &url);
    let load = Load::start(cluster, &url);

    await_gateways(&site, 2);
    let seen = autoscaler(&site);
    assert_eq!(
        site::condition_of(&seen, "ScalingActive").unwrap()["status"],
        "True",
        "{seen}"
    );

    // Every pod of the gateways is another one after this, but there are two of them.
    let before = site.lives("gateway");
    apply(&site, "11m");
    awaited("two gateways of the new settings", SERVES, || {
        let now = site.lives("gateway");
        let new = now.iter().filter(|life| !before.contains(life)).count();
        (new == 2 && now.len() == 2)
            .then_some(())
            .ok_or_else(|| format!("{before:?}, {now:?}"))
    });
    await_gateways(&site, 2);
    load.await_more(6);
    load.stop().assert_as(&reference);
}

/// A cluster that is given need not have the metrics API.
fn serves_metrics(cluster: &Cluster) -> bool {
    let asked =
        cluster.try_kubectl(&["get", "--raw", "/apis/metrics.k8s.io/v1beta1/nodes"], "");
    if !asked.status.success() {
        skip("this cluster has no metrics API");
    }
    asked.status.success()
}

/// One gateway or two, which ask for so little that a few streams are a load.
fn apply(site: &Site, cpu: &str) {
    site.apply_tiny(|moe| {
        moe["spec"]["gateway"]["autoscaling"] =
            json!({"minReplicas": 1, "maxReplicas": 2, "cpuPercent": 10});
        moe["spec"]["gateway"]["resources"] = json!({"requests": {"cpu": cpu}});
    });
}

fn autoscaler(site: &Site) -> Value {
    site.namespace.get("hpa", "tiny-gateway")
}

fn await_gateways(site: &Site, wanted: u64) {
    awaited(&format!("{wanted} gateways"), SERVES, || {
        let deployment = site.namespace.get("deployment", "tiny-gateway");
        let there = deployment["status"]["availableReplicas"] == wanted
            && deployment["spec"]["replicas"] == wanted;
        there
            .then_some(())
            .ok_or_else(|| format!("{}\n{}", deployment["status"], autoscaler(site)["status"]))
    });
}
