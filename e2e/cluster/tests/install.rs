//! From nothing to the first token with helm and one manifest; an upgrade under load; and nothing is left in the end.

use std::time::{Duration, Instant};

use foregate_harness::client::Client;
use foregate_harness::cluster::{Cluster, ROLLOUT, awaited};
use foregate_harness::repository;
use serde_json::{Value, json};

use crate::load::{self, Load};
use crate::site::{SERVES, Site, install_resources, is, record};
use crate::stage;

/// What the first token may take here, with the images on the nodes.
const FIRST_TOKEN: Duration = Duration::from_secs(60);

#[test]
fn helm_brings_a_cluster_upgrades_it_under_load_and_leaves_nothing() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    let site = Site::empty(cluster, "install");
    let values = site.values();
    without_resources(cluster);
    let before = everything(cluster);

    let timeline = first_token(&site, &values);
    record("first-token.txt", &timeline.text());
    let total = timeline.total();
    assert!(
        total <= FIRST_TOKEN,
        "{total:?} to the first token:\n{}",
        timeline.text()
    );

    let asked = cluster.helm(&[
        "test",
        "foregate",
        "-n",
        &site.namespace.name,
        "--timeout=60s",
    ]);
    assert!(asked.contains("Succeeded"), "{asked}");
    show(&site);
    upgrade(&site, values);
    uninstall(&site);
    let mut left = everything(cluster);
    left.retain(|name| !before.contains(name));
    if cluster.hermetic().is_err() {
        // Others may work on a given cluster.
        left.retain(|name| name.contains("foregate"));
    }
    assert!(left.is_empty(), "helm uninstall left {left:#?}");
}

/// What happened when.
#[derive(Debug)]
struct Timeline {
    since: Instant,
    steps: Vec<(Duration, &'static str)>,
}

impl Timeline {
    fn mark(&mut self, what: &'static str) {
        self.steps.push((self.since.elapsed(), what));
    }

    fn total(&self) -> Duration {
        self.steps.last().map_or(Duration::ZERO, |(at, _)| *at)
    }

    /// A line per step: when it was done, what it took, what it was.
    fn text(&self) -> String {
        let mut before = Duration::ZERO;
        let mut text = String::from("  at s  took s  step\n");
        for (at, what) in &self.steps {
            let took = at.saturating_sub(before).as_secs_f64();
            text.push_str(&format!("{:6.1}  {took:6.1}  {what}\n", at.as_secs_f64()));
            before = *at;
        }
        text
    }
}

/// From the first command to the first token that a client reads.
fn first_token(site: &Site, values: &Value) -> Timeline {
    let mut timeline = Timeline {
        since: Instant::now(),
        steps: Vec::new(),
    };
    install_resources(site.cluster);
    timeline.mark("helm install foregate-crds; the resources are served");
    let mut values = values.clone();
    values["test"] = json!({"cluster": "tiny"});
    site.helm("install", &values);
    timeline.mark("helm install foregate --wait; operator and etcd are ready");
    let manifest = repository("charts/examples/tiny.yaml");
    let _printed = site
        .namespace
        .kubectl(&["apply", "-f", manifest.to_str().unwrap()]);
    timeline.mark("kubectl apply -f charts/examples/tiny.yaml");
    step(site, &mut timeline, "the model's sizes are known", |moe| {
        moe.pointer("/status/model").is_some()
    });
    awaited("pods of two workers", SERVES, || {
        let pods = site.pods("worker");
        (pods.len() == 2)
            .then_some(())
            .ok_or_else(|| format!("{} pods", pods.len()))
    });
    timeline.mark("the workers' pods are made");
    step(site, &mut timeline, "two ranks have registered", |moe| {
        is(moe, "WeightsLoaded")
    });
    step(
        site,
        &mut timeline,
        "every expert has a verified copy",
        |moe| is(moe, "ExpertsCovered"),
    );
    step(site, &mut timeline, "a gateway is available", |moe| {
        is(moe, "RouterReady")
    });
    stream(site);
    timeline.mark("a client read the first token of a stream");
    let total = timeline.total();
    step(
        site,
        &mut timeline,
        "Ready: the operator's own token came",
        |moe| is(moe, "Ready"),
    );
    // Ready may come later than a client's token, and is not part of its way.
    let ready = timeline.steps.pop().unwrap();
    println!("{ready:?}, first token {total:?}");
    timeline
}

fn step(
    site: &Site,
    timeline: &mut Timeline,
    what: &'static str,
    done: impl Fn(&Value) -> bool,
) {
    awaited(what, SERVES, || {
        let moe = site.moe();
        done(&moe)
            .then_some(())
            .ok_or_else(|| moe["status"].to_string())
    });
    timeline.mark(what);
}

fn stream(site: &Site) {
    let body = json!({
        "model": "demo", "prompt": "Once", "max_tokens": 4, "temperature": 0, "stream": true,
    });
    let url = site.url();
    let address = url.trim_start_matches("http://").to_owned();
    let events = site.cluster.in_network(|| {
        // A gateway is available a moment before its service leads there.
        awaited("the service to lead to a gateway", ROLLOUT, || {
            let connected = std::net::TcpStream::connect(&address);
            connected.map(drop).map_err(|error| error.to_string())
        });
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build().unwrap();
        runtime.block_on(async { Client::new(&url).stream("/v1/completions", &body).await })
    });
    assert!(!events.is_empty());
}

/// What kubectl prints of a cluster that serves.
fn show(site: &Site) {
    site.await_settled(2);
    for (name, looks) in [
        (
            "get.txt",
            &["get moe", "get moe -o wide", "get moep", "get pods"][..],
        ),
        ("describe.txt", &["describe moe tiny"]),
    ] {
        let mut text = String::new();
        for look in looks {
            let words: Vec<_> = look.split(' ').collect();
            let printed = site.namespace.kubectl(&words);
            text.push_str(&format!("$ kubectl {look}\n{printed}\n"));
        }
        record(name, &text.replace(&site.namespace.name, "default"));
    }
}

/// Other values: the operator is replaced, and so is the only member of its store. Clients notice nothing.
fn upgrade(site: &Site, mut values: Value) {
    let url = site.url();
    let reference = load::reference(site.cluster, &url);
    let workers = site.lives("worker");
    let load = Load::start(site.cluster, &url);
    load.await_more(6);
    values["test"] = json!({"cluster": "tiny"});
    values["replicaCount"] = json!(2);
    values["extraEnv"] = json!([{"name": "RUST_LOG", "value": "info"}]);
    values["etcd"]["resources"] = json!({"requests": {"cpu": "60m", "memory": "128Mi"}});
    site.helm("upgrade", &values);
    load.await_more(6);
    site.await_settled(2);
    load.await_more(6);
    let outcome = load.stop();
    outcome.assert_as(&reference);
    assert_eq!(site.lives("worker"), workers, "a worker was started anew");
    record("upgrade.json", &format!("{:#}\n", outcome.summary()));
}

fn uninstall(site: &Site) {
    let namespace = &site.namespace;
    let _printed = namespace.kubectl(&["delete", "moe/tiny", "--timeout=60s"]);
    let released = [
        "uninstall",
        "foregate",
        "-n",
        &namespace.name,
        "--wait",
        "--timeout=120s",
    ];
    let _printed = site.cluster.helm(&released);
    without_resources(site.cluster);
    awaited("pods and the rest to be gone", ROLLOUT, || {
        let left = within(site.cluster, &namespace.name);
        left.is_empty().then_some(()).ok_or_else(|| left.join("\n"))
    });
}

/// The chart with the resources goes, and with it what other tests may have left of them.
fn without_resources(cluster: &Cluster) {
    if !cluster.resources_are_ours() {
        return;
    }
    let gone = [
        "uninstall",
        "foregate-crds",
        "-n",
        "default",
        "--ignore-not-found",
        "--wait",
        "--timeout=60s",
    ];
    let _printed = cluster.helm(&gone);
}

/// Objects of a namespace that a fresh one does not have.
fn within(cluster: &Cluster, namespace: &str) -> Vec<String> {
    let kinds = kinds(cluster, "true");
    let text = cluster.kubectl(&[
        "-n",
        namespace,
        "get",
        &kinds,
        "-o",
        "name",
        "--ignore-not-found",
    ]);
    let fresh = ["configmap/kube-root-ca.crt", "serviceaccount/default"];
    let names = text.lines().filter(|name| !fresh.contains(name));
    names.map(str::to_owned).collect()
}

/// What of the cluster as a whole a chart might leave: roles, resources, classes, whatever the API has.
fn everything(cluster: &Cluster) -> Vec<String> {
    let kinds = kinds(cluster, "false");
    let text = cluster.kubectl(&["get", &kinds, "-o", "name"]);
    let passing =
        |name: &&str| !name.starts_with("namespace/") && !name.starts_with("componentstatus");
    let mut names: Vec<_> = text.lines().filter(passing).map(str::to_owned).collect();
    names.sort();
    names
}

/// Everything that can be listed, but for what is written beside everything: events.
fn kinds(cluster: &Cluster, namespaced: &str) -> String {
    let scope = format!("--namespaced={namespaced}");
    let text = cluster.kubectl(&["api-resources", "--verbs=list", &scope, "-o", "name"]);
    let kinds: Vec<_> = text
        .lines()
        .filter(|kind| !kind.starts_with("events"))
        .collect();
    kinds.join(",")
}
