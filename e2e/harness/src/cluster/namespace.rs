//! A namespace of one test, under the restricted profile of pod security.

use serde_json::Value;

use super::{Cluster, POD, awaited};

/// A namespace that is deleted with its owner.
#[derive(Debug)]
pub struct Namespace<'a> {
    cluster: &'a Cluster,
    /// Its name.
    pub name: String,
}

impl<'a> Namespace<'a> {
    pub(super) fn restricted(cluster: &'a Cluster, name: &str) -> Self {
        // The prefix keeps runs apart on a cluster that several people use.
        let name = format!("foregate-e2e-{}-{name}", std::process::id());
        let made = Self { cluster, name };
        cluster.apply(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {}, labels: {{\
             pod-security.kubernetes.io/enforce: restricted}}}}}}",
            made.name
        ));
        awaited("the namespace's service account", POD, || {
            let output = cluster
                .try_kubectl(&["-n", &made.name, "get", "serviceaccount", "default"], "");
            if output.status.success() {
                return Ok(());
            }
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        });
        made
    }

    /// Runs kubectl in this namespace and returns what it printed.
    ///
    /// # Panics
    /// With its stderr if it fails.
    #[must_use]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        let mut all = vec!["-n", &self.name];
        all.extend(arguments);
        self.cluster.kubectl(&all)
    }

    /// Applies objects that name no namespace here.
    ///
    /// # Panics
    /// With the API server's words if it refuses.
    pub fn apply(&self, yaml: &str) {
        let output = self
            .cluster
            .try_kubectl(&["-n", &self.name, "apply", "-f", "-"], yaml);
        let _printed = super::succeeded(&format!("kubectl apply of\n{yaml}"), output);
    }

    /// Waits until a pod is in this phase, and returns it.
    ///
    /// # Panics
    /// At the deadline of one pod, with its last status.
    #[must_use]
    pub fn pod_in_phase(&self, name: &str, phase: &str) -> Value {
        awaited(&format!("pod {name} in phase {phase}"), POD, || {
            let pod = self.get("pod", name);
            if pod["status"]["phase"] == phase {
                return Ok(pod);
            }
            Err(pod["status"].to_string())
        })
    }

    /// An object as JSON.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn get(&self, kind: &str, name: &str) -> Value {
        let text = self.kubectl(&["get", kind, name, "-o", "json"]);
        serde_json::from_str(&text).expect("kubectl prints JSON")
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        // Nobody waits: a made cluster goes with it, a given one deletes it by itself.
        let arguments = [
            "delete",
            "namespace",
            &self.name,
            "--wait=false",
            "--ignore-not-found",
        ];
        let output = self.cluster.try_kubectl(&arguments, "");
        if !output.status.success() {
            println!(
                "{} is left: {}",
                self.name,
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
}
