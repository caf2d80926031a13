//! A cluster of processes that the bench starts and ends, with its etcd.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use foregate_store::own_etcd::OwnEtcd;
use foregate_store::{ClusterState, Coord};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::error::CliError;
use crate::roles::connect_etcd;

/// The cluster's name in its manifest and in the store.
pub(super) const NAME: &str = "planners";
/// Longest wait for a cluster that serves.
const START: Duration = Duration::from_secs(300);
/// Longest wait for its processes to be gone.
const END: Duration = Duration::from_secs(60);

/// A running cluster.
#[derive(Debug)]
pub(super) struct Cluster {
    etcd: OwnEtcd,
    up: Child,
    url: String,
    coord: Coord,
    states: watch::Receiver<Arc<ClusterState>>,
    shutdown: CancellationToken,
    /// The manifest, and what the cluster said.
    _folder: TempDir,
}

impl Cluster {
    /// Starts what a manifest says, and waits until it serves.
    pub(super) async fn start(manifest: &str) -> Result<Self, CliError> {
        let etcd = OwnEtcd::start()
            .await
            .map_err(|error| CliError::runtime("etcd", &error))?;
        let failed = |error: std::io::Error| CliError::runtime("the cluster", &error);
        let folder = TempDir::new().map_err(failed)?;
        let (file, log) = (
            folder.path().join("manifest.yaml"),
            folder.path().join("log"),
        );
        std::fs::write(&file, manifest).map_err(failed)?;
        let endpoints = etcd.endpoints();
        let mut up = Command::new(std::env::current_exe().map_err(failed)?)
            .args(["up", "--processes", "--port", "0", "--etcd"])
            .args(&endpoints)
            .arg("-f")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).map_err(failed)?)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let Some(url) = ready(&mut up).await else {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            let last: Vec<&str> = said.lines().rev().take(5).collect();
            let last: Vec<&str> = last.into_iter().rev().collect();
            return Err(CliError::Runtime(format!(
                "the cluster did not start: {}",
                last.join("\n")
            )));
        };
        let coord = Coord::new(connect_etcd(&endpoints, None).await?, NAME);
        let shutdown = CancellationToken::new();
        Ok(Self {
            etcd,
            up,
            url,
            states: coord.watch_cluster(shutdown.clone()),
            coord,
            shutdown,
            _folder: folder,
        })
    }

    /// Where its gateway listens.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// How its store is spoken to.
    pub(super) const fn coord(&self) -> &Coord {
        &self.coord
    }

    /// What its store tells.
    pub(super) fn states(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.states.clone()
    }

    /// Ends it, and waits until its workers are gone.
    ///
    /// # Errors
    /// If they are not in time: the next cluster would share the machine with them.
    pub(super) async fn end(mut self) -> Result<(), CliError> {
        // Its processes drain when the one that started them is gone.
        self.up
            .kill()
            .await
            .map_err(|error| CliError::runtime("the cluster", &error))?;
        let gone = self.states.wait_for(|state| state.members.is_empty());
        let ended = timeout(END, gone).await.is_ok_and(|state| state.is_ok());
        self.shutdown.cancel();
        self.etcd
            .stop()
            .await
            .map_err(|error| CliError::runtime("etcd", &error))?;
        match ended {
            true => Ok(()),
            false => Err(CliError::Runtime(format!(
                "workers of a cluster that was ended are still there after {} s",
                END.as_secs()
            ))),
        }
    }
}

/// The URL in the line that says that the cluster serves; `None` if it ends or takes too long.
async fn ready(up: &mut Child) -> Option<String> {
    let mut lines = BufReader::new(up.stdout.take()?).lines();
    let found = async {
        while let Ok(Some(line)) = lines.next_line().await {
            let mut words = line.split_whitespace().map(str::to_owned);
            if let Some(url) = words.find(|word| word.starts_with("http://")) {
                return Some(url);
            }
        }
        None
    };
    timeout(START, found).await.ok().flatten()
}
