//! An etcd of one's own: the `etcd` binary from PATH on loopback, with a data directory that vanishes with it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use foregate_tls::StoreKeys;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::etcd::EtcdStore;

/// How long a start may take until etcd answers.
const START_DEADLINE: Duration = Duration::from_secs(45);
/// How often other ports are tried, in case a stranger takes one between choice and use.
const PORT_ATTEMPTS: usize = 5;
/// Where its ports are looked for, three in a row each.
const PORTS: std::ops::Range<u16> = 20_000..29_999;
/// Bytes of etcd's log shown in an error: etcd 3.5 puts a stack of calls after its last words.
const LOG_TAIL: usize = 2000;

/// Why an etcd of one's own does not run.
#[derive(Debug, thiserror::Error)]
pub enum OwnEtcdError {
    /// There is no binary.
    #[error(
        "no `etcd` binary in PATH: install the Debian package etcd-server (apt-get install etcd-server), or name a \
         running etcd with --etcd URL"
    )]
    Missing,
    /// The binary, its directory or a port could not be used.
    #[error("etcd could not be started ({what}): {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// It ended or did not answer in time.
    #[error("etcd did not become healthy: {why}; its last words: {log}")]
    Unhealthy {
        /// What was seen.
        why: String,
        /// End of its log.
        log: String,
    },
}

/// Files of an etcd that is proven, and wants its clients to be.
#[derive(Debug, Clone)]
pub struct ServerFiles {
    /// Authorities of its clients.
    pub ca: String,
    /// Its certificate, for 127.0.0.1.
    pub cert: String,
    /// Its key.
    pub key: String,
    /// What it is asked with whether it is well.
    pub keys: StoreKeys,
}

/// A running etcd. Dropping it kills the process and removes the data.
#[derive(Debug)]
pub struct OwnEtcd {
    data: tempfile::TempDir,
    ports: Ports,
    child: Option<Child>,
    proven: Option<ServerFiles>,
}

impl OwnEtcd {
    /// Starts etcd on free loopback ports and waits until it answers.
    ///
    /// # Errors
    /// See [`OwnEtcdError`].
    pub async fn start() -> Result<Self, OwnEtcdError> {
        Self::start_with(None).await
    }

    /// The same behind TLS.
    ///
    /// # Errors
    /// See [`OwnEtcdError`].
    pub async fn start_proven(files: ServerFiles) -> Result<Self, OwnEtcdError> {
        Self::start_with(Some(files)).await
    }

    async fn start_with(proven: Option<ServerFiles>) -> Result<Self, OwnEtcdError> {
        let mut attempt = 1;
        loop {
            let mut own = Self::prepare(proven.clone())?;
            match own.launch().await {
                Ok(()) => return Ok(own),
                Err(OwnEtcdError::Unhealthy { log, .. })
                    if attempt < PORT_ATTEMPTS && log.contains("address already in use") =>
                {
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Where clients find it, for [`EtcdStore::connect`] and `StoreConfig::Etcd`.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        vec![self.client_url()]
    }

    /// Number of the process, if it was started: what a fault test sends its signals to.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// Whether the process runs.
    pub fn is_running(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Kills it, as a crash would, and keeps data and ports for [`Self::restart`].
    ///
    /// # Errors
    /// If the process cannot be ended.
    pub async fn stop_keeping_data(&mut self) -> Result<(), OwnEtcdError> {
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        child.kill().await.map_err(|source| OwnEtcdError::Io {
            what: "ending the process",
            source,
        })
    }

    /// Starts it again on the same ports and data, and waits until it answers.
    ///
    /// # Errors
    /// See [`OwnEtcdError`].
    pub async fn restart(&mut self) -> Result<(), OwnEtcdError> {
        self.stop_keeping_data().await?;
        self.launch().await
    }

    /// Ends it and removes the data.
    ///
    /// # Errors
    /// If the process cannot be ended or the directory cannot be removed.
    pub async fn stop(mut self) -> Result<(), OwnEtcdError> {
        self.stop_keeping_data().await?;
        self.data.close().map_err(|source| OwnEtcdError::Io {
            what: "removing its data",
            source,
        })
    }

    fn client_url(&self) -> String {
        let scheme = if self.proven.is_some() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://127.0.0.1:{}", self.ports.client())
    }

    fn prepare(proven: Option<ServerFiles>) -> Result<Self, OwnEtcdError> {
        let data = tempfile::Builder::new()
            .prefix("foregate-etcd-")
            .tempdir()
            .map_err(|source| OwnEtcdError::Io {
                what: "making a data directory",
                source,
            })?;
        let ports = Ports::take(data.path()).map_err(|source| OwnEtcdError::Io {
            what: "choosing ports",
            source,
        })?;
        Ok(Self {
            data,
            ports,
            child: None,
            proven,
        })
    }

    async fn launch(&mut self) -> Result<(), OwnEtcdError> {
        self.child = Some(self.spawn()?);
        let keys = self.proven.as_ref().map(|files| files.keys.clone());
        let until = Instant::now() + START_DEADLINE;
        loop {
            let status = match self.child.as_mut() {
                Some(child) => child.try_wait().ok().flatten(),
                None => None,
            };
            if let Some(status) = status {
                return Err(self.unhealthy(format!("it ended with {status}")));
            }
            let wait = Duration::from_millis(500);
            match EtcdStore::connect_proven(&self.endpoints(), keys.as_ref(), wait).await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= until => {
                    return Err(self.unhealthy(error.to_string()));
                }
                Err(_) => {}
            }
        }
    }

    fn spawn(&self) -> Result<Child, OwnEtcdError> {
        let log =
            std::fs::File::create(self.log_path()).map_err(|source| OwnEtcdError::Io {
                what: "writing its log",
                source,
            })?;
        let client = self.client_url();
        let peer = format!("http://127.0.0.1:{}", self.ports.peer());
        let mut command = Command::new("etcd");
        if let Some(files) = &self.proven {
            command
                .arg("--client-cert-auth")
                .arg(format!("--trusted-ca-file={}", files.ca))
                .arg(format!("--cert-file={}", files.cert))
                .arg(format!("--key-file={}", files.key));
        }
        command
            .arg("--name=foregate")
            .arg("--data-dir")
            .arg(self.data.path().join("data"))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=foregate={peer}"))
            // Load windows are rewritten every few seconds; their history is of no use.
            .arg("--auto-compaction-mode=revision")
            .arg("--auto-compaction-retention=1000")
            // What vanishes with the process need not survive a power cut: a slow disk does not make calls slow.
            // By the environment, since an etcd that does not know it then only says so.
            .env("ETCD_UNSAFE_NO_FSYNC", "true")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| match source.kind() {
                std::io::ErrorKind::NotFound => OwnEtcdError::Missing,
                _ => OwnEtcdError::Io {
                    what: "running the binary",
                    source,
                },
            })
    }

    fn log_path(&self) -> PathBuf {
        self.data.path().join("etcd.log")
    }

    fn unhealthy(&self, why: String) -> OwnEtcdError {
        let log = std::fs::read(self.log_path()).unwrap_or_default();
        let tail = log
            .get(log.len().saturating_sub(LOG_TAIL)..)
            .unwrap_or_default();
        OwnEtcdError::Unhealthy {
            why,
            log: String::from_utf8_lossy(tail).trim().to_owned(),
        }
    }
}

/// Three loopback ports in a row: the first is held here for as long as the etcd is ours, the others are etcd's.
///
/// An etcd that is down for a moment listens on nothing; whoever looks for ports of an etcd of his own in that moment
/// finds the first of the three taken and goes on.
///
/// They lie below the range that Linux takes outgoing connections from (`ip_local_port_range`, from 32768 on): a
/// port of that range could be another connection's by the time etcd is started again on it, or even that of a
/// client that dials it in the meantime and is connected to itself.
#[derive(Debug)]
struct Ports {
    first: u16,
    _held: TcpListener,
}

impl Ports {
    /// Ports that are free now, looked for from a place that the random name of `directory` picks.
    fn take(directory: &Path) -> std::io::Result<Self> {
        let bind = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        let places = PORTS.step_by(3);
        let mut hasher = DefaultHasher::new();
        directory.hash(&mut hasher);
        let from = usize::try_from(hasher.finish() % places.len() as u64).unwrap_or_default();
        for first in places.clone().cycle().skip(from).take(places.len()) {
            if let (Ok(held), Ok(_), Ok(_)) = (bind(first), bind(first + 1), bind(first + 2)) {
                return Ok(Self { first, _held: held });
            }
        }
        Err(std::io::Error::other(
            "no three free ports in a row from 20000 to 29999",
        ))
    }

    const fn client(&self) -> u16 {
        self.first + 1
    }

    const fn peer(&self) -> u16 {
        self.first + 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_one_owners_though_nobody_listens_on_them() {
        let place = Path::new("the same");
        let (first, second) = (Ports::take(place).unwrap(), Ports::take(place).unwrap());
        assert_ne!(first.client(), second.client());
    }
}
