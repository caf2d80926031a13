//! The etcd of `up --processes`: a given one, or one of our own.
//!
//! Our own runs under a small child process of this binary. The child sits in a process group of its own, so
//! ctrl-c on the terminal does not reach etcd before the roles have drained; it starts etcd again if etcd ends,
//! and stops it when its stdin ends, so that etcd does not outlive a parent that was killed.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use foregate_store::own_etcd::OwnEtcd;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::child_log::pass_on;
use crate::error::{CliError, print};
use crate::progress::Progress;
use crate::roles::watch_parent;

/// Longest wait for etcd to answer; its own starter gives up earlier.
const START: Duration = Duration::from_secs(60);
/// Longest wait for it to end.
const STOP: Duration = Duration::from_secs(10);
/// How often the child looks whether etcd still runs.
const LOOK: Duration = Duration::from_millis(500);

/// Where the roles meet, and what keeps it running.
#[derive(Debug)]
pub(super) struct Etcd {
    /// Client URLs.
    pub(super) endpoints: Vec<String>,
    own: Option<Own>,
}

/// The child that keeps our own etcd.
#[derive(Debug)]
struct Own {
    child: Child,
    stdin: Option<ChildStdin>,
    _log: JoinSet<()>,
}

impl Etcd {
    /// The etcd under this URL, or a new one.
    ///
    /// # Errors
    /// A URL that is none (exit code 2); an etcd that does not start.
    pub(super) async fn open(url: Option<&str>, progress: &Progress) -> Result<Self, CliError> {
        let Some(url) = url else {
            return Self::start(progress).await;
        };
        let fine = url.starts_with("http://") && url.len() > "http://".len();
        if !fine {
            return Err(CliError::Usage(format!(
                "--etcd {url:?}: give a client URL such as http://127.0.0.1:2379"
            )));
        }
        Ok(Self {
            endpoints: vec![url.to_owned()],
            own: None,
        })
    }

    async fn start(progress: &Progress) -> Result<Self, CliError> {
        let failed =
            |error: std::io::Error| CliError::runtime("etcd cannot be started", &error);
        let mut child = Command::new(std::env::current_exe().map_err(failed)?)
            .arg("own-etcd")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let stdin = child.stdin.take();
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            let mut stdout = BufReader::new(stdout);
            match timeout(START, stdout.read_line(&mut line)).await {
                Ok(read) => drop(read.map_err(failed)?),
                Err(_) => {
                    return Err(CliError::Runtime("etcd did not start in time".to_owned()));
                }
            }
        }
        let mut words = line.split_whitespace().map(str::to_owned);
        let Some(pid) = words.next() else {
            return Err(last_words(child).await);
        };
        progress.say(&format!("etcd runs as process {pid}"));
        let mut log = JoinSet::new();
        if let Some(stderr) = child.stderr.take() {
            log.spawn(pass_on(
                stderr,
                "etcd".to_owned(),
                progress.clone(),
                Arc::default(),
            ));
        }
        Ok(Self {
            endpoints: words.collect(),
            own: Some(Own {
                child,
                stdin,
                _log: log,
            }),
        })
    }

    /// Ends an etcd of our own.
    pub(super) async fn stop(self) {
        let Some(mut own) = self.own else {
            return;
        };
        drop(own.stdin.take());
        if timeout(STOP, own.child.wait()).await.is_err() {
            tracing::warn!("etcd did not end in {} s and is killed", STOP.as_secs());
        }
    }
}

/// Why the child ended without naming an endpoint.
async fn last_words(mut child: Child) -> CliError {
    let mut words = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        // What cannot be read stays unsaid.
        drop(timeout(STOP, stderr.read_to_string(&mut words)).await);
    }
    let words = words.trim();
    CliError::Runtime(words.strip_prefix("error: ").unwrap_or(words).to_owned())
}

/// The child's side: runs etcd until stdin or `drain` says otherwise.
///
/// # Errors
/// An etcd that cannot run.
pub(crate) async fn run_own(drain: CancellationToken) -> Result<(), CliError> {
    watch_parent(drain.clone())?;
    let failed = |error| CliError::runtime("etcd", &error);
    let mut etcd = OwnEtcd::start().await.map_err(failed)?;
    let pid = etcd.pid().unwrap_or_default();
    print(&format!("{pid} {}", etcd.endpoints().join(" ")));
    loop {
        tokio::select! {
            () = sleep(LOOK) => {}
            () = drain.cancelled() => return etcd.stop().await.map_err(failed),
        }
        if !etcd.is_running() {
            tracing::warn!("etcd ended; starting it again on its data");
            etcd.restart().await.map_err(failed)?;
        }
    }
}
