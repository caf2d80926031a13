//! Resources that other projects publish, at the versions of `e2e/cluster/tools`.

use std::path::{Path, PathBuf};
use std::process::Command;

use foregate_harness::cluster::{Cluster, ROLLOUT, awaited};
use foregate_harness::repository;
use serde_json::Value;

use crate::site::is;

/// The folder of a part of the cluster that only some tests need, which is built if the cache lacks it.
pub(crate) fn built(part: &str) -> PathBuf {
    let built = Command::new(repository("e2e/cluster/build"))
        .arg(part)
        .output()
        .unwrap();
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let folder = PathBuf::from(String::from_utf8(built.stdout).unwrap().trim());
    assert!(folder.is_dir(), "{}", folder.display());
    folder
}

/// The resources of a folder, for as long as it lives.
pub(crate) struct Resources {
    cluster: &'static Cluster,
    folder: String,
}

impl Resources {
    pub(crate) fn install(cluster: &'static Cluster, folder: &Path) -> Self {
        let folder = folder.to_str().unwrap().to_owned();
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
