//! Validated cluster and model directory → launch plan, by the operator's own functions.

use std::path::{Path, PathBuf};

use foregate_api::node::{NodeConfig, RoleConfig};
use foregate_api::weights::WeightSettings;
use foregate_checkpoint::Checkpoint;
use foregate_operator::launch::{
    Form, Instance, KeyFolders, LaunchError, Machine, ModelFacts, Place, launch,
};
use foregate_operator::validate::ValidatedCluster;
use tokio::net::TcpListener;

use super::ready::Awaited;
use crate::error::CliError;
use crate::progress::Progress;

/// Where a role is in the order of draining: gateways end first, so that their streams still have workers;
/// then the operator, so that it makes no plans for a cluster that leaves; workers last.
pub(super) fn drain_order(node: &NodeConfig) -> usize {
    match node.role {
        RoleConfig::Gateway(_) => 0,
        RoleConfig::Operator(_) => 1,
        RoleConfig::Worker(_) => 2,
    }
}

/// What is known before the form is chosen.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) cluster: ValidatedCluster,
    pub(super) directory: PathBuf,
    pub(super) listener: TcpListener,
    /// Keys of gateway and workers.
    pub(super) keys: Option<KeyFolders>,
    /// Keys of clients.
    pub(super) api_keys: Option<String>,
}

/// A launch plan with what `up` itself must know of it.
#[derive(Debug)]
pub(super) struct Launch {
    /// All instances.
    pub(super) instances: Vec<Instance>,
    /// What makes it ready.
    pub(super) awaited: Awaited,
    /// The bound port of the HTTP API.
    pub(super) listener: TcpListener,
}

impl Launch {
    /// Opens the model, so that a missing or corrupt file, or a setting that does not go with it, is told before anything starts, and plans.
    ///
    /// # Errors
    /// The model's (exit code 1), or a manifest that does not go with it (exit code 2).
    pub(super) async fn plan(
        prepared: Prepared,
        form: Form,
        progress: &Progress,
    ) -> Result<Self, CliError> {
        let Prepared {
            cluster,
            directory,
            listener,
            keys,
            api_keys,
        } = prepared;
        let facts = facts(&directory, cluster.model.weights).await?;
        let address = listener
            .local_addr()
            .map_err(|error| CliError::runtime("the port of the HTTP API", &error))?;
        let place = Place {
            form,
            model_dir: directory.to_string_lossy().into_owned(),
            gateway_listen: address.to_string(),
            keys,
            api_keys,
            machine: Machine::Shared {
                cores: cores(),
                memory: crate::doctor::total_memory(),
            },
        };
        let plan = launch(&cluster, &facts, &place).map_err(|error| match error {
            LaunchError::Model { .. } => CliError::Runtime(error.to_string()),
            LaunchError::TooLong { .. }
            | LaunchError::KvMemory { .. }
            | LaunchError::MachineMemory { .. }
            | LaunchError::Strict { .. }
            | LaunchError::PodMemory { .. } => CliError::Usage(error.to_string()),
        })?;
        for note in &plan.notes {
            progress.say(&format!("note: {note}"));
        }
        // A client on this machine does not reach "every address".
        let host = match address.ip() {
            ip if !ip.is_unspecified() => ip,
            std::net::IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            std::net::IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        let url = std::net::SocketAddr::new(host, address.port());
        Ok(Self {
            instances: plan.instances,
            awaited: Awaited {
                cluster: cluster.name,
                served_name: cluster.model.served_names.join(", "),
                workers: cluster.workers.count as usize,
                url: format!("http://{url}"),
            },
            listener,
        })
    }
}

async fn facts(directory: &Path, weights: WeightSettings) -> Result<ModelFacts, CliError> {
    let path = directory.to_owned();
    let opened = tokio::task::spawn_blocking(move || {
        Checkpoint::open_with(&path, &weights)
            .map(|checkpoint| ModelFacts::of(checkpoint.spec()))
    });
    let what = format!("model {}", directory.display());
    opened
        .await
        .map_err(|error| CliError::runtime(&what, &error))?
        .map_err(|error| CliError::runtime(&what, &error))
}

fn cores() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(cores).unwrap_or(u32::MAX)
}
