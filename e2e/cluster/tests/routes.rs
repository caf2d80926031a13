//! Where the resources of the Gateway API and its inference extension are installed, the chart renders objects of
//! theirs and the API server takes them. The resources are those that the projects publish, at the versions of
//! `e2e/cluster/tools/crds/modules`.

use serde_json::{Value, json};

use crate::resources::{Resources, built};
use crate::site::Site;
use crate::stage;

#[test]
fn routes_and_pools_are_taken_where_their_resources_are() {
    let Some((cluster, _made, _turn)) = stage::made() else {
        return;
    };
    let _resources = Resources::install(cluster, &built("crds"));
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
