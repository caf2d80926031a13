//! The cluster in a box: real nodes on this machine, made and ended by `e2e/cluster/run`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{Image, succeeded};
use crate::{on_path, repository};

/// A cluster that `e2e/cluster/run` made for this process.
#[derive(Debug)]
pub struct Hermetic {
    id: String,
    /// How many nodes it has: n1, n2, …
    pub nodes: u32,
    box_pid: u32,
}

impl Hermetic {
    /// Makes one.
    ///
    /// # Errors
    /// Why this machine cannot have one.
    pub(super) fn start() -> Result<Self, String> {
        possible()?;
        let nodes = std::env::var("FOREGATE_E2E_NODES").map_or(3, |text| {
            text.parse()
                .unwrap_or_else(|_| panic!("FOREGATE_E2E_NODES is 1 to 3, not {text}"))
        });
        let keep = std::env::var("FOREGATE_E2E_KEEP").is_ok_and(|value| value == "1");
        let id = format!("t{}", std::process::id());
        let mut up = run(&id);
        up.args(["up", &nodes.to_string()]);
        if !keep {
            up.env("FOREGATE_E2E_OWNER", std::process::id().to_string());
        }
        // What it says while it builds for minutes should be seen.
        let status = up.stderr(Stdio::inherit()).status();
        let status = status.unwrap_or_else(|error| panic!("{up:?}: {error}"));
        if !status.success() {
            let logs = run(&id)
                .arg("logs")
                .output()
                .expect("logs can be asked for");
            // The logs are told here, so nothing has to stay.
            let down = run(&id).arg("down").status();
            panic!(
                "the cluster did not start ({status}, then down: {down:?})\n{}",
                String::from_utf8_lossy(&logs.stdout)
            );
        }
        if keep {
            println!(
                "kept: FOREGATE_E2E_CLUSTER={id} e2e/cluster/run exec -- kubectl get pods -A"
            );
        }
        let env = succeeded("run env", run(&id).arg("env").output().expect("it starts"));
        let box_pid = env
            .lines()
            .find_map(|line| line.strip_prefix("pid=")?.parse().ok())
            .unwrap_or_else(|| panic!("no pid in {env}"));
        Ok(Self { id, nodes, box_pid })
    }

    pub(super) fn inside(&self, program: &str) -> Command {
        let mut command = run(&self.id);
        command.args(["exec", "--", program]);
        command
    }

    pub(super) fn load(&self, tar: &Path, name: &str) -> Image {
        let output = run(&self.id).arg("load").arg(tar).output();
        let _printed = succeeded("run load", output.expect("it starts"));
        Image {
            reference: name.to_owned(),
            pull_policy: "Never",
        }
    }

    /// Where a component of the cluster lies, such as `etcd`.
    ///
    /// # Panics
    /// If there is none of this name.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        let path = self.told("path");
        std::env::split_paths(&path)
            .map(|folder| folder.join(name))
            .find(|file| file.is_file())
            .unwrap_or_else(|| panic!("no {name} in {path}"))
    }

    /// What service accounts have asked the API server, one event of its audit log a line.
    ///
    /// # Panics
    /// If it cannot be read.
    #[must_use]
    pub fn audit(&self) -> String {
        let file = Path::new(&self.told("run")).join("logs/audit.jsonl");
        std::fs::read_to_string(&file)
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()))
    }

    /// The administrator's way to the API server, for a program in the box's network.
    ///
    /// # Panics
    /// If the box is gone.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.told("kubeconfig").into()
    }

    /// What `run env` says of the cluster.
    fn told(&self, what: &str) -> String {
        let env = run(&self.id).arg("env").output().expect("it starts");
        let env = succeeded("run env", env);
        let mut lines = env.lines().filter_map(|line| line.split_once('='));
        let found = lines.find(|(name, _)| *name == what);
        found
            .unwrap_or_else(|| panic!("no {what} in {env}"))
            .1
            .to_owned()
    }

    /// Drops what is forwarded to a port of pods on every node, until the answer is dropped. What a pod and its own
    /// node say to each other, such as probes, is not forwarded.
    ///
    /// # Panics
    /// If a node does not take the rule.
    #[must_use]
    pub fn cut(&self, port: u16) -> Cut<'_> {
        let cut = Cut { made: self, port };
        cut.rule("-I");
        cut
    }

    /// Ends a node without warning, as a power cut does.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn kill(&self, node: &str) {
        self.order("kill", node);
    }

    /// Starts a killed node again, with what its disk held.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn restart(&self, node: &str) {
        self.order("start", node);
    }

    fn order(&self, order: &str, node: &str) {
        // Started from a test, but not to be waited for by its pipes: the node inherits them.
        let status = run(&self.id)
            .args([order, node])
            .stdout(Stdio::null())
            .status();
        assert!(status.expect("it starts").success(), "{order} {node}");
    }

    /// Runs a job on a thread of its own whose network is the box's, so that its clients reach the API
    /// server, services and pods by their addresses. Threads and children that it starts are there too.
    ///
    /// # Panics
    /// If the box is gone, or the job panics.
    pub fn in_network<T: Send>(&self, job: impl FnOnce() -> T + Send) -> T {
        let namespace =
            File::open(format!("/proc/{}/ns/net", self.box_pid)).expect("the box is up");
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("root may enter a network");
                job()
            });
            match thread.join() {
                Ok(answer) => answer,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

/// A cut through the network of pods; mends when dropped.
#[derive(Debug)]
pub struct Cut<'a> {
    made: &'a Hermetic,
    port: u16,
}

impl Cut<'_> {
    fn rule(&self, what: &str) {
        let port = self.port.to_string();
        for node in 1..=self.made.nodes {
            let node = format!("n{node}");
            let rule = ["-p", "tcp", "--dport", &port, "-j", "DROP"];
            let output = self
                .made
                .inside("ip")
                .args(["netns", "exec", &node, "iptables", "-w", what, "FORWARD"])
                .args(rule)
                .output();
            let _printed = succeeded(
                &format!("iptables {what} on {node}"),
                output.expect("it starts"),
            );
        }
    }
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        // A second panic would hide the first.
        if !std::thread::panicking() {
            self.rule("-D");
        }
    }
}

/// Whether this machine can have one.
fn possible() -> Result<(), String> {
    if !cfg!(target_os = "linux") {
        return Err("no KUBECONFIG, and a cluster in a box needs Linux".to_owned());
    }
    if !rustix::process::geteuid().is_root() {
        return Err("no KUBECONFIG, and a cluster in a box needs root".to_owned());
    }
    let isolates = Command::new("unshare")
        .args([
            "-n",
            "-m",
            "-p",
            "-u",
            "-i",
            "--fork",
            "--mount-proc",
            "true",
        ])
        .output()
        .is_ok_and(|output| output.status.success());
    if !isolates {
        return Err("no KUBECONFIG, and no new namespaces may be made here".to_owned());
    }
    let lacks: Vec<_> = [
        "runc",
        "iptables",
        "nft",
        "conntrack",
        "ip",
        "openssl",
        "cc",
    ]
    .into_iter()
    .filter(|program| {
        on_path(program).is_none() && !Path::new("/usr/sbin").join(program).exists()
    })
    .collect();
    if !lacks.is_empty() {
        return Err(format!(
            "no KUBECONFIG, and no {}: .ci/need test",
            lacks.join(", ")
        ));
    }
    if on_path("go").is_none() && !Path::new("/usr/local/go/bin/go").exists() {
        return Err(
            "no KUBECONFIG, and no Go to build a cluster with: .ci/need test".to_owned(),
        );
    }
    Ok(())
}

fn run(id: &str) -> Command {
    let mut command = Command::new(script());
    command.env("FOREGATE_E2E_CLUSTER", id).stdin(Stdio::null());
    command
}

fn script() -> PathBuf {
    repository("e2e/cluster/run")
}
