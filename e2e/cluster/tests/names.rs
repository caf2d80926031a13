//! What a cluster needs and others have: it is named, and never taken.

use foregate_harness::cluster::{ROLLOUT, awaited};
use serde_json::{Value, json};

use crate::site::{Site, condition_of, is};
use crate::stage;

#[test]
fn an_object_of_somebody_elses_is_named_and_left_alone() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    let site = Site::with_operator(cluster, "names", &json!({}));
    // No field of it is one of ours: a server-side apply would meet no conflict.
    let theirs = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "tiny-gateway" },
        "data": { "theirs": "yes" },
    });
    site.namespace.apply(&theirs.to_string());
    site.apply_tiny(|_| {});
    degraded(
        &site,
        "ApplyFailed",
        "ConfigMap tiny-gateway is there already",
    );
    let seen = site.namespace.get("configmap", "tiny-gateway");
    assert_eq!(seen["data"], theirs["data"]);
    assert_eq!(seen["metadata"]["ownerReferences"], Value::Null);
    let _printed = site
        .namespace
        .kubectl(&["delete", "configmap", "tiny-gateway"]);
    site.await_settled(2);

    // A cluster whose Service for its gateways has the name of the other's for its workers.
    let mut second = site.moe();
    second["metadata"] = json!({ "name": "tiny-workers" });
    site.namespace.apply(&second.to_string());
    awaited("tiny-workers to say what is in its way", ROLLOUT, || {
        let moe = site.namespace.get("moe", "tiny-workers");
        said(&moe, "ApplyFailed", "Service tiny-workers is there already")
    });
    let _printed = site.namespace.kubectl(&["delete", "moe", "tiny-workers"]);
    assert!(is(&site.moe(), "Ready"), "the first has lost nothing");
}

#[test]
fn gateways_that_wait_for_keys_are_told_of() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    let site = Site::with_operator(cluster, "keys", &json!({}));
    site.apply_tiny(|_| {});
    site.await_settled(2);
    site.apply_tiny(|moe| {
        moe["spec"]["security"] = json!({ "apiKeys": { "secretRef": { "name": "clients" } } });
    });
    degraded(&site, "KeysMissing", "the Secret clients is not there");
    awaited("the change of gateways to be told", ROLLOUT, || {
        let moe = site.moe();
        let progressing = condition_of(&moe, "Progressing")
            .cloned()
            .unwrap_or_default();
        let rolls = progressing["reason"] == "RollingOut";
        rolls.then_some(()).ok_or_else(|| progressing.to_string())
    });
    let secret = [
        "create",
        "secret",
        "generic",
        "clients",
        "--from-literal=alice=sk-1",
    ];
    let _printed = site.namespace.kubectl(&secret);
    site.await_settled(2);
}

fn degraded(site: &Site, reason: &str, words: &str) {
    awaited(words, ROLLOUT, || said(&site.moe(), reason, words));
}

/// Whether a cluster's `Degraded` has this reason and says this.
fn said(moe: &Value, reason: &str, words: &str) -> Result<(), String> {
    let degraded = condition_of(moe, "Degraded").cloned().unwrap_or_default();
    let message = degraded["message"].as_str().unwrap_or_default();
    let says = degraded["reason"] == reason && message.contains(words);
    says.then_some(()).ok_or_else(|| degraded.to_string())
}
