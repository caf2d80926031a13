//! Workers are added and taken away under load, and the operator dies in the middle of it.

use foregate_harness::cluster::{POD, ROLLOUT, awaited};
use serde_json::{Value, json};

use crate::coverage::Watcher;
use crate::load::{self, Load};
use crate::site::{SERVES, Site, record};
use crate::stage;

/// From two workers to four, then to three; the operator is killed on each way. No request fails, all tokens are those of
/// a run without scaling, and every expert is held by somebody at every state of the store.
#[test]
fn scaling_under_load_fails_no_request_and_changes_no_token() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    let site = Site::with_operator(cluster, "scaling", &json!({}));
    site.apply_tiny(|_| {});
    site.await_settled(2);
    let url = site.url();
    let reference = load::reference(cluster, &url);
    let watcher = Watcher::start(&site);
    let load = Load::start(cluster, &url);
    load.await_more(6);

    let since = std::time::Instant::now();
    scale(&site, 4);
    awaited("the first pod of the new ranks", POD, || {
        let pods = site.pods("worker").len();
        (pods > 2)
            .then_some(())
            .ok_or_else(|| format!("{pods} pods"))
    });
    kill_operator(&site);
    site.await_settled(4);
    let up = since.elapsed();
    load.await_more(6);

    let since = std::time::Instant::now();
    let before = epoch(&site);
    scale(&site, 3);
    awaited("a placement for the way down", SERVES, || {
        let now = epoch(&site);
        (now > before)
            .then_some(())
            .ok_or_else(|| format!("epoch {now}, {}", site.moe()["status"]))
    });
    kill_operator(&site);
    site.await_settled(3);
    let down = since.elapsed();
    load.await_more(6);

    let (outcome, seen) = (load.stop(), watcher.stop());
    outcome.assert_as(&reference);
    assert!(seen.bare.is_empty(), "{:#?}", seen.bare);
    let figures = json!({
        "two_to_four_s": up.as_secs_f64(), "four_to_three_s": down.as_secs_f64(),
        "load": outcome.summary(), "epochs": seen.epochs, "states_of_the_store": seen.states,
    });
    record("scaling.json", &format!("{figures:#}\n"));
}

fn scale(site: &Site, workers: u32) {
    let replicas = format!("--replicas={workers}");
    let _printed = site.namespace.kubectl(&["scale", "moe/tiny", &replicas]);
}

fn epoch(site: &Site) -> u64 {
    let moe = site.moe();
    moe.pointer("/status/epoch")
        .and_then(Value::as_u64)
        .unwrap_or_default()
}

/// Without time to say goodbye: its lease has to run out.
fn kill_operator(site: &Site) {
    let selector = "app.kubernetes.io/component=operator";
    let name = site
        .namespace
        .kubectl(&["get", "pods", "-l", selector, "-o", "name"]);
    let _printed =
        site.namespace
            .kubectl(&["delete", name.trim(), "--grace-period=0", "--force"]);
    awaited("another operator", ROLLOUT, || {
        let names = site
            .namespace
            .kubectl(&["get", "pods", "-l", selector, "-o", "name"]);
        let another = !names.trim().is_empty() && !names.contains(name.trim());
        another.then_some(()).ok_or(names)
    });
}
