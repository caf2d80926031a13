//! The cluster itself: nodes, pods, the restricted profile, services, the loss of a node.

use foregate_harness::client::Client;
use foregate_harness::cluster::{Cluster, Image, Namespace, POD, ROLLOUT, awaited};
use serde_json::{Value, json};

use crate::site::is;
use crate::stage;

/// A pod of the image under the restricted profile.
fn pod(name: &str, image: &Image, arguments: &[&str]) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 5,
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "foregate", "image": image.reference, "imagePullPolicy": image.pull_policy,
                "args": arguments,
                "securityContext": {
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                    "capabilities": {"drop": ["ALL"]},
                },
            }],
        },
    })
}

fn node_ready(cluster: &Cluster, node: &str) -> bool {
    let text = cluster.kubectl(&["get", "node", node, "-o", "json"]);
    is(&serde_json::from_str(&text).unwrap(), "Ready")
}

fn await_pod_ready(namespace: &Namespace<'_>, name: &str) {
    awaited(&format!("pod {name} to be Ready"), POD, || {
        let pod = namespace.get("pod", name);
        is(&pod, "Ready")
            .then_some(())
            .ok_or_else(|| pod["status"].to_string())
    });
}

#[test]
fn every_node_runs_the_image_under_the_restricted_profile() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    let image = stage::foregate(cluster);
    let namespace = cluster.namespace("version");
    let nodes = cluster.kubectl(&["get", "nodes", "-o", "name"]);
    let nodes: Vec<_> = nodes
        .lines()
        .map(|line| line.trim_start_matches("node/"))
        .collect();
    if let Ok(made) = cluster.hermetic() {
        assert_eq!(nodes.len(), usize::try_from(made.nodes).unwrap());
    }
    for node in &nodes {
        assert!(node_ready(cluster, node), "{node}");
        let mut pod = pod(&format!("version-{node}"), image, &["--version"]);
        pod["spec"]["nodeName"] = json!(node);
        namespace.apply(&pod.to_string());
    }
    for node in &nodes {
        let name = format!("version-{node}");
        let _pod = namespace.pod_in_phase(&name, "Succeeded");
        let expected = format!("foregate {}\n", env!("CARGO_PKG_VERSION"));
        assert_eq!(namespace.kubectl(&["logs", &name]), expected);
    }
}

#[test]
fn the_namespace_refuses_a_pod_that_is_not_restricted() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    let namespace = cluster.namespace("refused");
    let image = Image {
        reference: "localhost/foregate:e2e".to_owned(),
        pull_policy: "Never",
    };
    let mut pod = pod("root", &image, &["--version"]);
    pod["spec"]["containers"][0]["securityContext"]["capabilities"] =
        json!({"add": ["NET_ADMIN"]});
    let arguments = ["-n", &namespace.name, "apply", "-f", "-"];
    let output = cluster.try_kubectl(&arguments, &pod.to_string());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(stderr.contains("violates PodSecurity"), "{stderr}");
}

#[test]
fn a_pod_serves_tokens_through_a_service() {
    let Some((cluster, made, _turn)) = stage::made() else {
        return;
    };
    let image = stage::foregate(cluster);
    let namespace = cluster.namespace("serve");
    let up = [
        "up",
        "--model",
        "/e2e/models/demo",
        "--workers",
        "2",
        "--host",
        "0.0.0.0",
        "--port",
        "8000",
    ];
    let mut pod = pod("serve", image, &up);
    pod["spec"]["containers"][0]["readinessProbe"] =
        json!({"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 1});
    namespace.apply(&pod.to_string());
    namespace.apply(
        "{apiVersion: v1, kind: Service, metadata: {name: serve}, \
          spec: {selector: {app: serve}, ports: [{port: 80, targetPort: 8000}]}}",
    );
    await_pod_ready(&namespace, "serve");
    let address = namespace.get("service", "serve")["spec"]["clusterIP"].clone();
    let url = format!("http://{}", address.as_str().unwrap());
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "return_token_ids": true});
    let answer = made.in_network(|| {
        // A pod is ready a moment before the nodes know that its service leads to it.
        let place = format!("{}:80", address.as_str().unwrap());
        awaited("the service to lead to its pod", ROLLOUT, || {
            let connected = std::net::TcpStream::connect(&place);
            connected.map(drop).map_err(|error| error.to_string())
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime
            .unwrap()
            .block_on(async { Client::new(&url).ok("/v1/completions", &body).await })
    });
    let tokens = answer["choices"][0]["token_ids"].as_array();
    assert_eq!(tokens.map(Vec::len), Some(4), "{answer}");
}

#[test]
fn a_killed_node_is_noticed_and_comes_back() {
    let Some((cluster, made, _turn)) = stage::made() else {
        return;
    };
    let node = format!("n{}", made.nodes);
    made.kill(&node);
    let look = |ready: bool| {
        let seen = node_ready(cluster, &node);
        (seen == ready)
            .then_some(())
            .ok_or_else(|| format!("Ready is {seen}"))
    };
    awaited("the node to count as lost", ROLLOUT, || look(false));
    made.restart(&node);
    awaited("the node to be Ready again", ROLLOUT, || look(true));
    // Ready is what its kubelet says; a pod that runs there shows it.
    let namespace = cluster.namespace("back");
    let mut pod = pod("back", stage::foregate(cluster), &["--version"]);
    pod["spec"]["nodeName"] = json!(node);
    namespace.apply(&pod.to_string());
    let _pod = namespace.pod_in_phase("back", "Succeeded");
}
