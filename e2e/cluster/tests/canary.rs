//! `Ready` is a token that came through a gateway within the last interval, not what pods say of themselves.

use foregate_harness::cluster::{ROLLOUT, awaited};
use serde_json::json;

use crate::site::{Site, condition_of, is, record};
use crate::stage;

/// The gateways' port.
const PORT: u16 = 8000;

#[test]
fn without_a_way_through_the_gateway_a_cluster_is_not_ready() {
    let Some((cluster, made, _turn)) = stage::made() else {
        return;
    };
    let site = Site::with_operator(cluster, "canary", &json!({}));
    site.apply_tiny(|_| {});
    site.await_settled(2);

    let cut = made.cut(PORT);
    let said = awaited("Ready to be False for want of a token", ROLLOUT, || {
        let moe = site.moe();
        let said = condition_of(&moe, "Ready").cloned().unwrap_or_default();
        (said["status"] == "False")
            .then_some(said)
            .ok_or_else(|| moe["status"].to_string())
    });
    record("no-token.json", &format!("{said:#}\n"));
    assert_eq!(said["reason"], "CanaryFailed", "{said}");
    for pod in site.pods("worker").iter().chain(&site.pods("gateway")) {
        assert!(is(pod, "Ready"), "only the way was cut: {}", pod["status"]);
    }
    drop(cut);
    site.await_settled(2);
}
