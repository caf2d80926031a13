//! A real etcd that a test can kill and start again on the same data.

use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

/// An etcd of the test's own.
#[derive(Debug)]
pub struct Etcd {
    data: TempDir,
    client: u16,
    peer: u16,
    child: Option<Child>,
}

impl Etcd {
    /// Starts one on free ports.
    ///
    /// # Panics
    /// If it does not answer in time.
    pub async fn start() -> Self {
        let mut etcd = Self {
            data: TempDir::new().expect("a temporary directory"),
            client: free_port().await,
            peer: free_port().await,
            child: None,
        };
        etcd.resume().await;
        etcd
    }

    /// Its client URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client)
    }

    /// Kills it without warning.
    pub async fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().await.expect("etcd can be killed");
        }
    }

    /// Starts it again on its data.
    ///
    /// # Panics
    /// If it does not answer in time.
    pub async fn resume(&mut self) {
        let peer = format!("http://127.0.0.1:{}", self.peer);
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.data.path())
            .args(["--listen-client-urls", &self.url()])
            .args(["--advertise-client-urls", &self.url()])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("etcd is on PATH");
        self.child = Some(child);
        let since = Instant::now();
        loop {
            let health = reqwest::get(format!("{}/health", self.url())).await;
            if health.is_ok_and(|answer| answer.status().is_success()) {
                return;
            }
            assert!(since.elapsed() < Duration::from_secs(30), "etcd is silent");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    listener.local_addr().expect("an address").port()
}
