//! Where the resources of the Gateway API and its inference extension are installed, the chart renders objects of
//! theirs and the API server takes them. The resources are those that the projects publish, at the versions of
//! `e2e/cluster/tools/crds/modules`.

use std::path::Path;
use std::process::Command;

use foregate_harness::cluster::{Cluster, ROLLOUT, awaited};
use foregate_harness::repository;
use serde_json::{Value, json};

use crate::site::{Site, is};
use crate::stage;

#[test]
fn routes_and_pools_are_taken_where_their_resources_are() {
    let Some((cluster, _made, _turn)) = stage::made() else {
        return;
    };
    let _resources = Resources::install(cluster);
    let site = Site::with_operator(
        cluster,
        "routes",
        &json!({
            "gateway": {
                "create": true, "className": "any",
                "routes": [{"cluster": "tiny", "hostnames": ["tiny.example.org"]}],
            },
            "inferencePool": {"clusters": ["tiny"], "endpointPicker": {"name": "picker"}},
        }),
    );
    site.apply_tiny(|_| {});
    site.await_settled(2);
    let gateway = site
        .namespace
        .get("gateways.gateway.networking.k8s.io", "foregate");
    assert_eq!(gateway["spec"]["gatewayClassName"], "any");
    let route = site.namespace.get("httproute", "foregate-tiny");
    assert_eq!(route["spec"]["parentRefs"][0]["name"], "foregate");
    let backend = &route["spec"]["rules"][0]["backendRefs"][0];
    let service = site
        .namespace
        .get("service", backend["name"].as_str().unwrap());
    assert_eq!(
        service["spec"]["ports"][0]["port"], backend["port"],
        "{route}"
    );
    let pool = site.namespace.get("inferencepool", "foregate-tiny");
    assert_eq!(
        selected(&site, &pool),
        names(&site.pods("gateway")),
        "{pool}"
    );
    let picker = &pool["spec"]["endpointPickerRef"];
    assert_eq!(
        (&picker["name"], &picker["port"]["number"]),
        (&json!("picker"), &json!(9002))
    );
}

/// Pods that a pool selects.
fn selected(site: &Site, pool: &Value) -> Vec<String> {
    let labels = pool["spec"]["selector"]["matchLabels"].as_object().unwrap();
    let pairs: Vec<_> = labels
        .iter()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap()))
        .collect();
    let text = site
        .namespace
        .kubectl(&["get", "pods", "-l", &pairs.join(","), "-o", "json"]);
    let list: Value = serde_json::from_str(&text).unwrap();
    names(list["items"].as_array().unwrap())
}

fn names(pods: &[Value]) -> Vec<String> {
    pods.iter()
        .map(|pod| pod["metadata"]["name"].to_string())
        .collect()
}

/// The published resources, for as long as it lives.
struct Resources {
    cluster: &'static Cluster,
    folder: String,
}

impl Resources {
    fn install(cluster: &'static Cluster) -> Self {
        let built = Command::new(repository("e2e/cluster/build"))
            .arg("crds")
            .output()
            .unwrap();
        assert!(
            built.status.success(),
            "{}",
            String::from_utf8_lossy(&built.stderr)
        );
        let folder = String::from_utf8(built.stdout).unwrap().trim().to_owned();
        assert!(Path::new(&folder).is_dir(), "{folder}");
        // Too large for the annotation that a client's own apply leaves.
        let _printed = cluster.kubectl(&["apply", "--server-side", "-f", &folder]);
        let installed = Self { cluster, folder };
        let printed = cluster.kubectl(&["get", "-f", &installed.folder, "-o", "name"]);
        for name in printed.lines() {
            awaited(&format!("{name} to be served"), ROLLOUT, || {
                let text = cluster.kubectl(&["get", name, "-o", "json"]);
                let crd: Value = serde_json::from_str(&text).unwrap();
                is(&crd, "Established")
                    .then_some(())
                    .ok_or_else(|| crd["status"].to_string())
            });
        }
        installed
    }
}

impl Drop for Resources {
    fn drop(&mut self) {
        let output = self
            .cluster
            .try_kubectl(&["delete", "-f", &self.folder, "--wait=false"], "");
        if !output.status.success() {
            println!("left: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
}
