//! Stores: an etcd of one's own that speaks TLS and wants to see certificates, and one of three members that loses one.

use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use foregate_harness::cluster::{Cluster, ROLLOUT, awaited};
use foregate_tls::authority::{Authority, Issued, Validity};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::load::{self, Load};
use crate::site::{Site, install_resources, is};
use crate::stage;

/// Storage class of the volumes; nobody serves it.
const CLASS: &str = "e2e-local";
const DAY: Duration = Duration::from_secs(24 * 3600);

#[test]
fn an_etcd_of_ones_own_is_reached_over_tls_with_a_certificate() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    let Some(image) = stage::etcd(cluster) else {
        return foregate_harness::skip("a pod of one's own etcd takes an etcd on PATH");
    };
    let site = Site::empty(cluster, "tls-store");
    install_resources(cluster);
    let host = format!("own.{}.svc", site.namespace.name);
    site.namespace.apply(&keys(&host).to_string());
    site.namespace
        .apply(&etcd(&image.reference, image.pull_policy, &host).to_string());
    site.namespace.apply(&service().to_string());
    awaited("the store to listen", ROLLOUT, || {
        let pod = site.namespace.get("pod", "own");
        is(&pod, "Ready")
            .then_some(())
            .ok_or_else(|| pod["status"].to_string())
    });

    let mut values = site.values();
    values["namespaced"] = json!(true);
    values["etcd"] = json!({
        "external": [format!("https://{host}:2379")],
        "tls": {"secretName": "own-etcd"},
    });
    site.helm("install", &values);
    site.apply_tiny(|_| {});
    site.await_settled(2);
    assert!(!load::reference(cluster, &site.url()).is_empty());
    let sets = site
        .namespace
        .kubectl(&["get", "statefulsets", "-o", "name"]);
    assert_eq!(sets, "", "the chart installed an etcd all the same");
}

/// One of three members is lost under load: requests go on, and so does the plan.
#[test]
fn a_store_of_three_loses_a_member_and_nothing_else() {
    let Some((cluster, made, _turn)) = stage::made() else {
        return;
    };
    if made.nodes < 3 {
        return foregate_harness::skip("a member on each of three nodes takes three nodes");
    }
    let disks = Disks::on_each_node(cluster);
    let persistence = json!({"enabled": true, "size": "64Mi", "storageClassName": CLASS});
    let values = json!({"etcd": {"replicas": 3, "persistence": persistence}});
    let site = Site::with_operator(cluster, "three", &values);
    // One member without a volume cannot take the place of three.
    let said = site.refused_upgrade(&site.values());
    assert!(
        said.contains("etcd.replicas: foregate-etcd runs with 3"),
        "{said}"
    );
    site.apply_tiny(|_| {});
    site.await_settled(2);
    let url = site.url();
    let reference = load::reference(cluster, &url);
    let workers = site.lives("worker");
    let load = Load::start(cluster, &url);
    load.await_more(3);
    let before = member(&site);
    let _printed = site.namespace.kubectl(&[
        "delete",
        "pod/foregate-etcd-0",
        "--grace-period=0",
        "--force",
    ]);
    awaited("another member in its place", ROLLOUT, || {
        let now = member(&site);
        (now != before && now.1)
            .then_some(())
            .ok_or_else(|| format!("{now:?}"))
    });
    // The store takes writes: a worker more is placed.
    let _printed = site
        .namespace
        .kubectl(&["scale", "moe/tiny", "--replicas=3"]);
    site.await_settled(3);
    load.await_more(3);
    load.stop().assert_as(&reference);
    assert_eq!(
        site.lives("worker")[..2],
        workers,
        "a worker was started anew"
    );
    drop(site);
    drop(disks);
}

/// A directory of each node as a volume, since the cluster has nobody who makes volumes.
struct Disks {
    cluster: &'static Cluster,
    _directories: Vec<TempDir>,
}

impl Disks {
    fn on_each_node(cluster: &'static Cluster) -> Self {
        let directories: Vec<TempDir> = (1..=3)
            .map(|node| {
                let directory = TempDir::new_in("/var/tmp").unwrap();
                let path = directory.path().to_str().unwrap();
                let anybody = std::fs::Permissions::from_mode(0o777);
                std::fs::set_permissions(path, anybody).unwrap();
                let volume = json!({
                    "apiVersion": "v1", "kind": "PersistentVolume",
                    "metadata": {"name": format!("e2e-n{node}")},
                    "spec": {
                        "capacity": {"storage": "64Mi"}, "accessModes": ["ReadWriteOnce"],
                        "storageClassName": CLASS, "local": {"path": path},
                        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [{
                            "key": "kubernetes.io/hostname", "operator": "In",
                            "values": [format!("n{node}")],
                        }]}]}},
                    },
                });
                cluster.apply(&volume.to_string());
                directory
            })
            .collect();
        Self {
            cluster,
            _directories: directories,
        }
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        let names = ["delete", "pv", "e2e-n1", "e2e-n2", "e2e-n3", "--wait=false"];
        let _gone = self.cluster.try_kubectl(&names, "");
    }
}

/// The first member: its uid, and whether it is ready.
fn member(site: &Site) -> (String, bool) {
    let arguments = [
        "get",
        "pod/foregate-etcd-0",
        "-o",
        "json",
        "--ignore-not-found",
    ];
    let text = site.namespace.kubectl(&arguments);
    let pod: Value = serde_json::from_str(&text).unwrap_or_default();
    let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
    (uid.to_owned(), is(&pod, "Ready"))
}

/// The Secret with what the server and its clients show.
fn keys(host: &str) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let validity = Validity {
        from: (now - DAY).as_secs(),
        until: (now + DAY).as_secs(),
    };
    let root = Authority::create("own store", validity).unwrap();
    let authority = Authority::open(&root).unwrap();
    let names = [host.to_owned(), "127.0.0.1".to_owned()];
    let Issued { cert, key } = authority.issue(&names, validity).unwrap();
    json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "own-etcd"},
        "stringData": {"ca.crt": root.cert, "tls.crt": cert, "tls.key": key},
    })
}

fn etcd(image: &str, pull_policy: &str, host: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "own", "labels": {"app": "own-etcd"}},
        "spec": {
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 65532, "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [{
                "name": "etcd", "image": image, "imagePullPolicy": pull_policy,
                "command": ["etcd"],
                "args": [
                    "--data-dir=/data", "--listen-client-urls=https://0.0.0.0:2379",
                    format!("--advertise-client-urls=https://{host}:2379"),
                    "--client-cert-auth", "--trusted-ca-file=/keys/ca.crt",
                    "--cert-file=/keys/tls.crt", "--key-file=/keys/tls.key",
                ],
                "securityContext": {
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                    "capabilities": {"drop": ["ALL"]},
                },
                "readinessProbe": {"tcpSocket": {"port": 2379}, "periodSeconds": 1},
                "volumeMounts": [
                    {"name": "keys", "mountPath": "/keys"},
                    {"name": "data", "mountPath": "/data"},
                ],
            }],
            "volumes": [
                {"name": "keys", "secret": {"secretName": "own-etcd"}},
                {"name": "data", "emptyDir": {}},
            ],
        },
    })
}

fn service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "own"},
        "spec": {"selector": {"app": "own-etcd"}, "ports": [{"port": 2379}]},
    })
}
