//! The instances as child processes: a real etcd, the TCP fabric.
//!
//! Each child reads its node file from stdin, and drains when its stdin ends, so none outlives this process and
//! nothing is left on disk. A child that dies is started again after a pause.
//!
//! The port of the HTTP API is bound here, once, and handed to each gateway as its stdout. So nobody can take it
//! between two gateways, and a client that connects in the pause between them waits instead of being refused.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use foregate_api::node::RoleConfig;
use foregate_operator::launch::{Form, Instance};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::child_log::{LastWords, pass_on};
use super::etcd::Etcd;
use super::launch::{Launch, Prepared, drain_order};
use super::ready;
use crate::error::CliError;
use crate::progress::Progress;
use crate::roles;

/// Longest wait for one child to drain; then it is killed.
const DRAIN: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A child that lived this long has recovered; its next pause is short again.
const HEALTHY: Duration = Duration::from_secs(30);
/// Deaths in a row before the cluster was ever ready that end the attempt.
const HOPELESS: u32 = 3;

/// Runs the cluster to its end.
///
/// # Errors
/// A wrong manifest or model, no etcd, a child that cannot start.
pub(crate) async fn run(
    url: Option<&str>,
    prepared: Prepared,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    let etcd = Etcd::open(url, progress).await?;
    let form = Form::Processes {
        etcd: etcd.endpoints.clone(),
    };
    let launch = Launch::plan(prepared, form, progress).await?;
    let store = roles::connect_etcd(&etcd.endpoints, None).await?;
    let mut listener = Some(handed_over(launch.listener)?);
    let mut children = Children::new(progress)?;
    for instance in launch.instances {
        let listener = match instance.node.role {
            RoleConfig::Gateway(_) => listener.take(),
            RoleConfig::Operator(_) | RoleConfig::Worker(_) => None,
        };
        children.start(instance, listener)?;
    }
    let end = tokio::select! {
        error = children.first_end() => Err(error),
        end = ready::ready(&launch.awaited, store, progress) => end,
        () = drain.cancelled() => Ok(()),
    };
    children.was_ready.cancel();
    let end = match end {
        Ok(()) => tokio::select! {
            error = children.first_end() => Err(error),
            () = drain.cancelled() => Ok(()),
        },
        error => error,
    };
    if end.is_ok() {
        progress.say("draining; press ctrl-c again to stop at once");
    }
    children.drain().await;
    etcd.stop().await;
    end
}

/// The listener without this process's event loop.
fn handed_over(listener: tokio::net::TcpListener) -> Result<TcpListener, CliError> {
    listener
        .into_std()
        .map_err(|error| CliError::runtime("the port of the HTTP API", &error))
}

/// The children by their order of draining.
struct Children {
    executable: PathBuf,
    progress: Progress,
    was_ready: CancellationToken,
    tokens: [CancellationToken; 3],
    keepers: [JoinSet<Option<CliError>>; 3],
}

impl Children {
    fn new(progress: &Progress) -> Result<Self, CliError> {
        Ok(Self {
            executable: std::env::current_exe()
                .map_err(|error| CliError::runtime("this binary cannot be found", &error))?,
            progress: progress.clone(),
            was_ready: CancellationToken::new(),
            tokens: Default::default(),
            keepers: Default::default(),
        })
    }

    fn start(
        &mut self,
        instance: Instance,
        listener: Option<TcpListener>,
    ) -> Result<(), CliError> {
        let order = drain_order(&instance.node);
        let mut node_file = serde_json::to_vec(&instance.node)
            .map_err(|error| CliError::runtime("node file", &error))?;
        node_file.push(b'\n');
        let keeper = Keeper {
            name: instance.name,
            role: match instance.node.role {
                RoleConfig::Operator(_) => "operator",
                RoleConfig::Gateway(_) => "gateway",
                RoleConfig::Worker(_) => "worker",
            },
            node_file,
            listener,
            executable: self.executable.clone(),
            progress: self.progress.clone(),
            was_ready: self.was_ready.clone(),
            shutdown: self.tokens[order].clone(),
        };
        self.keepers[order].spawn(keeper.run());
        Ok(())
    }

    /// Resolves when a child is given up.
    async fn first_end(&mut self) -> CliError {
        let [first, second, third] = &mut self.keepers;
        let end = tokio::select! {
            Some(end) = first.join_next() => end,
            Some(end) = second.join_next() => end,
            Some(end) = third.join_next() => end,
            else => Ok(None),
        };
        match end {
            Ok(Some(error)) => error,
            Ok(None) => CliError::Runtime("a child ended by itself".to_owned()),
            Err(error) => CliError::runtime("a child's keeper failed", &error),
        }
    }

    async fn drain(&mut self) {
        for (token, keepers) in self.tokens.iter().zip(&mut self.keepers) {
            token.cancel();
            // Each keeper bounds its own wait.
            while keepers.join_next().await.is_some() {}
        }
    }
}

/// Keeps one child running.
struct Keeper {
    name: String,
    role: &'static str,
    /// One line of JSON.
    node_file: Vec<u8>,
    listener: Option<TcpListener>,
    executable: PathBuf,
    progress: Progress,
    was_ready: CancellationToken,
    shutdown: CancellationToken,
}

impl Keeper {
    /// `None` after a drain; an error when the child is given up.
    async fn run(mut self) -> Option<CliError> {
        let mut pause = FIRST_PAUSE;
        let mut deaths = 0;
        let words = Arc::new(LastWords::default());
        loop {
            let born = Instant::now();
            let (mut child, stdin, _output) = match self.spawn(&words).await {
                Ok(spawned) => spawned,
                Err(error) => return Some(error),
            };
            let status = tokio::select! {
                status = child.wait() => status,
                () = self.shutdown.cancelled() => {
                    // With the child's own copy the port closes, so that clients are refused, not kept waiting.
                    self.listener = None;
                    // The end of stdin asks the child to drain.
                    drop(stdin);
                    self.stop(child).await;
                    return None;
                }
            };
            let how = describe(status);
            deaths += 1;
            if !self.was_ready.is_cancelled() && deaths >= HOPELESS {
                return Some(CliError::Runtime(format!(
                    "{} {how}, {deaths} times before the cluster was ready; its last words: {}",
                    self.name,
                    words.get()
                )));
            }
            if born.elapsed() > HEALTHY {
                pause = FIRST_PAUSE;
            }
            self.progress.say(&format!(
                "{} {how}; starting it again in {:.1} s",
                self.name,
                pause.as_secs_f64()
            ));
            tokio::select! {
                () = sleep(pause) => {}
                () = self.shutdown.cancelled() => return None,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// The child, its stdin, and the task that passes its log on. stdin is taken out of the child because
    /// waiting for a child closes what it still holds.
    async fn spawn(
        &self,
        words: &Arc<LastWords>,
    ) -> Result<(Child, Option<ChildStdin>, JoinSet<()>), CliError> {
        let failed = |error| CliError::runtime(&format!("{} cannot start", self.name), &error);
        let mut command = Command::new(&self.executable);
        command
            .arg(self.role)
            .args(["--config", "-"])
            .stdout(Stdio::null());
        if let Some(listener) = &self.listener {
            let copy = OwnedFd::from(listener.try_clone().map_err(failed)?);
            command.arg("--stdout-is-listener").stdout(copy);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            // ctrl-c on the terminal reaches this process only, which then drains in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let pid = child.id().unwrap_or_default();
        self.progress
            .say(&format!("{} runs as process {pid}", self.name));
        let mut output = JoinSet::new();
        if let Some(stderr) = child.stderr.take() {
            let (name, progress) = (self.name.clone(), self.progress.clone());
            output.spawn(pass_on(stderr, name, progress, Arc::clone(words)));
        }
        let mut stdin = child.stdin.take();
        if let Some(stdin) = &mut stdin {
            // A child that is dead already is seen by the caller, who waits for it.
            drop(timeout(DRAIN, stdin.write_all(&self.node_file)).await);
        }
        Ok((child, stdin, output))
    }

    /// Waits for a drain; kills the child if it takes too long.
    async fn stop(&self, mut child: Child) {
        if timeout(DRAIN, child.wait()).await.is_err() {
            self.progress.say(&format!(
                "{} did not drain in {} s and is killed",
                self.name,
                DRAIN.as_secs()
            ));
            if let Err(error) = child.kill().await {
                tracing::warn!(name = %self.name, %error, "cannot be killed");
            }
        }
    }
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => format!("ended ({status})"),
        Err(error) => format!("is lost ({error})"),
    }
}
