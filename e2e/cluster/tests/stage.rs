//! What all tests stand on: the cluster, for one test at a time, and the images on its nodes.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use foregate_harness::cluster::{Cluster, Hermetic, Image};
use foregate_harness::{repository, skip};
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_foregate");
/// Where the examples of the charts look for the demonstration model in an image.
const MODEL: &str = "/e2e/models/demo";

/// The right to use the cluster.
pub(crate) type Turn = MutexGuard<'static, ()>;

/// The cluster, for one test at a time: some kill nodes, and two cores do not serve several tests.
pub(crate) fn cluster() -> Option<(&'static Cluster, Turn)> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    match Cluster::shared() {
        Ok(cluster) => Some((cluster, turn)),
        Err(reason) => {
            skip(reason);
            None
        }
    }
}

/// Likewise for tests that need what only a made cluster has: its nodes' lives, its wires, its log.
pub(crate) fn made() -> Option<(&'static Cluster, &'static Hermetic, Turn)> {
    let (cluster, turn) = cluster()?;
    match cluster.hermetic() {
        Ok(made) => Some((cluster, made, turn)),
        Err(reason) => {
            skip(reason);
            None
        }
    }
}

/// The image of the binary under test with the demonstration model, on every node.
pub(crate) fn foregate(cluster: &Cluster) -> &'static Image {
    static LOADED: OnceLock<Image> = OnceLock::new();
    LOADED.get_or_init(|| {
        let model = format!("{}={MODEL}", repository("e2e/models/demo").display());
        load(
            cluster,
            Path::new(BINARY),
            "localhost/foregate:e2e",
            &[&model],
        )
    })
}

/// An image of an etcd: the made cluster's own, or the machine's; without either the charts' default will do.
pub(crate) fn etcd(cluster: &Cluster) -> Option<&'static Image> {
    static LOADED: OnceLock<Option<Image>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        let program = cluster.program("etcd")?;
        Some(load(cluster, &program, "localhost/etcd:e2e", &[]))
    });
    loaded.as_ref()
}

fn load(cluster: &Cluster, program: &Path, name: &str, files: &[&str]) -> Image {
    let directory = TempDir::new().unwrap();
    let tar = directory.path().join("image.tar");
    let output = Command::new(repository(".ci/image/build"))
        .arg(program)
        .arg(name)
        .arg(&tar)
        .args(files)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{stderr}", output.status);
    cluster.load(&tar, name)
}
