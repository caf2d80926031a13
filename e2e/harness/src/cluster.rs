//! A real Kubernetes cluster, found or made.
//!
//! 1. `KUBECONFIG` is set: that cluster. 2. Otherwise, on Linux as root: one of up to three nodes in a box
//!    without a route out, made by `e2e/cluster/run`. 3. Neither: the reason, for [`crate::skip`].
//!
//! One per test program, shared by its tests; each test works in a namespace of its own. A made one ends
//! with the program, however that ends, unless `FOREGATE_E2E_KEEP=1`.

mod forward;
mod given;
mod hermetic;
mod namespace;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

pub use forward::Forward;
pub use hermetic::{Cut, Hermetic};
pub use namespace::Namespace;

/// Longest wait for one pod on a busy machine.
pub const POD: Duration = Duration::from_secs(60);
/// Longest wait for several pods, one after the other.
pub const ROLLOUT: Duration = Duration::from_secs(120);
/// Pause between two looks at what is waited for.
const POLL: Duration = Duration::from_millis(200);

/// A cluster that answers.
#[derive(Debug)]
pub struct Cluster {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Given,
    Hermetic(Hermetic),
}

/// An image that every node can start, as a pod names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The container's `image`.
    pub reference: String,
    /// The container's `imagePullPolicy`.
    pub pull_policy: &'static str,
}

impl Cluster {
    /// The cluster of this test program. The first call may take a minute, or half an hour where the
    /// components have to be built.
    ///
    /// # Errors
    /// Why there can be none here.
    ///
    /// # Panics
    /// If there should be one and it does not start.
    pub fn shared() -> Result<&'static Self, &'static str> {
        static CLUSTER: OnceLock<Result<Cluster, String>> = OnceLock::new();
        let found = CLUSTER.get_or_init(|| {
            if std::env::var_os("KUBECONFIG").is_some_and(|value| !value.is_empty()) {
                given::check();
                return Ok(Self { kind: Kind::Given });
            }
            Hermetic::start().map(|made| Self {
                kind: Kind::Hermetic(made),
            })
        });
        found.as_ref().map_err(String::as_str)
    }

    /// What only a made cluster has: nodes to kill, a network to enter.
    ///
    /// # Errors
    /// Why not, with a given one.
    pub fn hermetic(&self) -> Result<&Hermetic, &'static str> {
        match &self.kind {
            Kind::Hermetic(made) => Ok(made),
            Kind::Given => Err("the cluster of KUBECONFIG lets nobody kill its nodes"),
        }
    }

    /// Whether Foregate's resources here are the tests' own, to remove as well.
    #[must_use]
    pub fn resources_are_ours(&self) -> bool {
        match &self.kind {
            Kind::Hermetic(_) => true,
            Kind::Given => !given::reuse(),
        }
    }

    /// Runs a job where the cluster's addresses lead somewhere: in the box of a made one, here with a given one, whose
    /// addresses are those of [`Self::forward`].
    ///
    /// # Panics
    /// If the box is gone, or the job panics.
    pub fn in_network<T: Send>(&self, job: impl FnOnce() -> T + Send) -> T {
        match &self.kind {
            Kind::Hermetic(made) => made.in_network(job),
            Kind::Given => job(),
        }
    }

    /// A way to a port of a service or pod, such as `service/tiny`, for as long as the answer lives.
    ///
    /// # Panics
    /// If there is no such object, or with a given cluster no way.
    #[must_use]
    pub fn forward(&self, namespace: &str, what: &str, port: u16) -> Forward {
        match &self.kind {
            Kind::Hermetic(_) => Forward::direct(self, namespace, what, port),
            Kind::Given => Forward::through_kubectl(namespace, what, port),
        }
    }

    /// Where a program that belongs to the cluster lies, such as `etcd`; with a given one, the machine's, if it has it.
    ///
    /// # Panics
    /// If a made cluster has none of this name.
    #[must_use]
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        match &self.kind {
            Kind::Hermetic(made) => Some(made.program(name)),
            Kind::Given => crate::on_path(name),
        }
    }

    /// A program with this cluster as its `KUBECONFIG`, where the API server can be reached.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        match &self.kind {
            Kind::Given => Command::new(program),
            Kind::Hermetic(made) => made.inside(program),
        }
    }

    /// Runs kubectl; input on stdin.
    #[must_use]
    pub fn try_kubectl(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = self.command("kubectl");
        command.args(arguments);
        with_input(command, input)
    }

    /// Runs kubectl and returns what it printed.
    ///
    /// # Panics
    /// With its stderr if it fails.
    #[must_use]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        succeeded(
            &format!("kubectl {arguments:?}"),
            self.try_kubectl(arguments, ""),
        )
    }

    /// Runs helm and returns what it printed.
    ///
    /// # Panics
    /// With its stderr if it fails.
    pub fn helm(&self, arguments: &[&str]) -> String {
        succeeded(&format!("helm {arguments:?}"), self.try_helm(arguments))
    }

    /// Runs helm.
    #[must_use]
    pub fn try_helm(&self, arguments: &[&str]) -> Output {
        let mut command = self.command("helm");
        command.args(arguments);
        with_input(command, "")
    }

    /// Applies objects given as YAML.
    ///
    /// # Panics
    /// With the API server's words if it refuses.
    pub fn apply(&self, yaml: &str) {
        let output = self.try_kubectl(&["apply", "-f", "-"], yaml);
        let _printed = succeeded(&format!("kubectl apply of\n{yaml}"), output);
    }

    /// Brings a docker-archive onto every node.
    ///
    /// # Panics
    /// If the loader fails.
    #[must_use]
    pub fn load(&self, tar: &Path, name: &str) -> Image {
        match &self.kind {
            Kind::Given => given::load(tar, name),
            Kind::Hermetic(made) => made.load(tar, name),
        }
    }

    /// A namespace under the restricted profile; deleted with its owner.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn namespace(&self, name: &str) -> Namespace<'_> {
        Namespace::restricted(self, name)
    }
}

/// Looks until there is an answer.
///
/// # Panics
/// At the deadline, with what was waited for and the last look's words.
pub fn awaited<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> T {
    let since = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(last) => assert!(
                since.elapsed() < limit,
                "waited {limit:?} for {what}, last seen: {last}"
            ),
        }
        std::thread::sleep(POLL);
    }
}

fn with_input(mut command: Command, input: &str) -> Output {
    use std::io::Write;

    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("stdin is piped");
    // A program that fails early reads nothing; its own words say more than the broken pipe.
    let _unread = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("the output can be read")
}

fn succeeded(what: &str, output: Output) -> String {
    assert!(
        output.status.success(),
        "{what}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}
