//! A namespace under the restricted profile with the charts installed and the example's `MoeCluster`: where a test works.

use std::cell::RefCell;
use std::process::Output;
use std::time::Duration;

use foregate_harness::cluster::{Cluster, Forward, Image, Namespace, ROLLOUT, awaited};
use foregate_harness::repository;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::stage;

/// Longest wait for a cluster of several pods on a busy machine.
pub(crate) const SERVES: Duration = Duration::from_secs(180);
/// Lines of each log that a failure shows.
const TAIL: &str = "--tail=30";

/// The namespace of one test. Everything in it goes with it.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) cluster: &'static Cluster,
    pub(crate) namespace: Namespace<'static>,
    files: TempDir,
    ways: RefCell<Vec<Forward>>,
}

impl Site {
    /// A namespace with nothing in it.
    pub(crate) fn empty(cluster: &'static Cluster, name: &str) -> Self {
        Self {
            cluster,
            namespace: cluster.namespace(name),
            files: TempDir::new().unwrap(),
            ways: RefCell::default(),
        }
    }

    /// A namespace with its own operator and store, which see nothing else; `more` are values of the chart.
    pub(crate) fn with_operator(cluster: &'static Cluster, name: &str, more: &Value) -> Self {
        let site = Self::empty(cluster, name);
        install_resources(cluster);
        let mut values = site.values();
        values["namespaced"] = json!(true);
        merge(&mut values, more);
        site.helm("install", &values);
        site
    }

    /// Values of the chart that any test needs: images that the nodes have, a store that asks for no disk.
    pub(crate) fn values(&self) -> Value {
        let image = |image: &Image| {
            let (repository, tag) = image.reference.rsplit_once(':').unwrap();
            json!({"repository": repository, "tag": tag, "pullPolicy": image.pull_policy})
        };
        let mut values = json!({
            "image": image(stage::foregate(self.cluster)),
            "etcd": {"persistence": {"enabled": false}},
        });
        if let Some(etcd) = stage::etcd(self.cluster) {
            values["etcd"]["image"] = image(etcd);
        }
        values
    }

    /// `helm install` or `helm upgrade` of the operator's chart, until everything of it is there.
    pub(crate) fn helm(&self, what: &str, values: &Value) {
        let output = self.try_helm(what, values);
        assert!(
            output.status.success(),
            "helm {what}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// What helm says where it refuses an upgrade to these values.
    pub(crate) fn refused_upgrade(&self, values: &Value) -> String {
        let output = self.try_helm("upgrade", values);
        assert!(!output.status.success(), "helm took {values}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn try_helm(&self, what: &str, values: &Value) -> Output {
        let file = self.files.path().join("values.json");
        std::fs::write(&file, values.to_string()).unwrap();
        let chart = repository("charts/foregate");
        self.cluster.try_helm(&[
            what,
            "foregate",
            chart.to_str().unwrap(),
            "-n",
            &self.namespace.name,
            "-f",
            file.to_str().unwrap(),
            "--wait",
            "--timeout=120s",
        ])
    }

    /// Applies `charts/examples/tiny.yaml`, changed.
    pub(crate) fn apply_tiny(&self, change: impl FnOnce(&mut Value)) {
        let text = std::fs::read_to_string(repository("charts/examples/tiny.yaml")).unwrap();
        let mut object: Value = serde_yaml_ng::from_str(&text).unwrap();
        change(&mut object);
        self.namespace.apply(&object.to_string());
    }

    pub(crate) fn moe(&self) -> Value {
        self.namespace.get("moe", "tiny")
    }

    /// Waits for `Ready` with `workers` ranks and nothing under way.
    pub(crate) fn await_settled(&self, workers: u64) {
        let what = format!("tiny to be Ready with {workers} workers");
        awaited(&what, SERVES, || {
            let moe = self.moe();
            let settled = is(&moe, "Ready")
                && !is(&moe, "Progressing")
                && moe["status"]["readyReplicas"] == workers
                && moe["status"]["replicas"] == workers
                && moe["status"]["observedGeneration"] == moe["metadata"]["generation"];
            settled
                .then_some(())
                .ok_or_else(|| moe["status"].to_string())
        });
    }

    /// The gateways' address, for jobs in the cluster's network.
    pub(crate) fn url(&self) -> String {
        self.way("service/tiny", 8000)
    }

    /// The store's address, for jobs in the cluster's network.
    pub(crate) fn store(&self) -> String {
        self.way("pod/foregate-etcd-0", 2379)
    }

    fn way(&self, what: &str, port: u16) -> String {
        let way = self.cluster.forward(&self.namespace.name, what, port);
        let url = format!("http://{}", way.address);
        self.ways.borrow_mut().push(way);
        url
    }

    /// The cluster's name in the store.
    pub(crate) fn store_name(&self) -> String {
        let moe = self.moe();
        let uid: String = moe["metadata"]["uid"]
            .as_str()
            .unwrap()
            .chars()
            .take(8)
            .collect();
        format!("{}.tiny.{uid}", self.namespace.name)
    }

    /// Pods of a role: `worker` or `gateway`.
    pub(crate) fn pods(&self, role: &str) -> Vec<Value> {
        let selector = format!("-lforegate.dev/role={role}");
        let text = self
            .namespace
            .kubectl(&["get", "pods", &selector, "-o", "json"]);
        let mut list: Value = serde_json::from_str(&text).unwrap();
        serde_json::from_value(list["items"].take()).unwrap()
    }

    /// What tells each pod of a role from the one before it: name → (uid, starts of its container).
    pub(crate) fn lives(&self, role: &str) -> Vec<(String, (String, u64))> {
        let life = |pod: &Value| {
            let text = |path: &str| {
                pod.pointer(path)
                    .and_then(Value::as_str)
                    .unwrap()
                    .to_owned()
            };
            let starts = pod.pointer("/status/containerStatuses/0/restartCount");
            let starts = starts.and_then(Value::as_u64).unwrap_or_default();
            (text("/metadata/name"), (text("/metadata/uid"), starts))
        };
        self.pods(role).iter().map(life).collect()
    }

    /// Everything that a person would look at first.
    fn tell(&self) {
        let looks: [&[&str]; 4] = [
            &[
                "get",
                "moe,moep,pods,deployments,statefulsets",
                "-o",
                "wide",
            ],
            &["describe", "moe"],
            &[
                "get",
                "events.events.k8s.io",
                "--sort-by=.metadata.creationTimestamp",
            ],
            &["get", "pods", "-o", "name"],
        ];
        for look in looks {
            println!("--- kubectl {}\n{}", look.join(" "), self.see(look));
        }
        for pod in self.see(looks[3]).lines() {
            for previous in ["--previous=false", "--previous=true"] {
                let log = self.see(&["logs", pod, TAIL, "--all-containers", previous]);
                println!("--- {pod} {previous}\n{log}");
            }
        }
    }

    fn see(&self, arguments: &[&str]) -> String {
        let all = [&["-n", &self.namespace.name], arguments].concat();
        let output = self.cluster.try_kubectl(&all, "");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell();
        }
    }
}

/// The chart with the resources, once for all namespaces.
pub(crate) fn install_resources(cluster: &Cluster) {
    let chart = repository("charts/foregate-crds");
    let _printed = cluster.helm(&[
        "upgrade",
        "--install",
        "foregate-crds",
        chart.to_str().unwrap(),
        "-n",
        "default",
        "--wait",
        "--timeout=60s",
    ]);
    let established =
        ["moeclusters", "expertplacements"].map(|name| format!("crd/{name}.foregate.dev"));
    for name in &established {
        awaited(&format!("{name} to be served"), ROLLOUT, || {
            let crd: Value =
                serde_json::from_str(&cluster.kubectl(&["get", name, "-o", "json"])).unwrap();
            is(&crd, "Established")
                .then_some(())
                .ok_or_else(|| crd["status"].to_string())
        });
    }
    // The list of what is served follows a moment later, and what its fields mean another.
    let asked: [&[&str]; 3] = [
        &["get", "moe,moep", "-A"],
        &["explain", "moe"],
        &["explain", "moep"],
    ];
    awaited("kubectl to know the resources", ROLLOUT, || {
        for arguments in asked {
            let output = cluster.try_kubectl(arguments, "");
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).into_owned());
            }
        }
        Ok(())
    });
}

/// Whether an object's condition is true.
pub(crate) fn is(object: &Value, condition: &str) -> bool {
    condition_of(object, condition).is_some_and(|found| found["status"] == "True")
}

/// An object's condition.
pub(crate) fn condition_of<'a>(object: &'a Value, about: &str) -> Option<&'a Value> {
    let all = object["status"]["conditions"].as_array()?;
    all.iter().find(|condition| condition["type"] == about)
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

/// Writes what the docs show, where `FOREGATE_E2E_RECORD` asks for it.
pub(crate) fn record(name: &str, text: &str) {
    println!("{name}:\n{text}");
    if let Some(folder) = std::env::var_os("FOREGATE_E2E_RECORD") {
        std::fs::write(std::path::Path::new(&folder).join(name), text).unwrap();
    }
}
