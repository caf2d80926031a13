//! The instances as tasks of this process: in-memory store, local fabric.

use std::sync::Arc;
use std::time::Duration;

use foregate_api::node::RoleConfig;
use foregate_operator::launch::Form;
use foregate_store::kv::Store;
use foregate_store::memory::MemoryStore;
use foregate_worker::dense::DenseWeights;
use foregate_worker::fabric::local::LocalHub;
use prometheus::Registry;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::launch::{Launch, Prepared, drain_order};
use super::ready::{self, Loads};
use crate::error::CliError;
use crate::progress::Progress;
use crate::roles::{self, Role, Seams, Sink};
use crate::telemetry::Telemetry;

/// Longest wait for one kind of role to drain.
const DRAIN: Duration = Duration::from_secs(30);

type Ended = (String, Result<(), CliError>);

/// Runs the cluster to its end.
///
/// # Errors
/// A wrong manifest or model; a role that ends by itself.
pub(crate) async fn run(
    prepared: Prepared,
    telemetry: &mut Telemetry,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    let launch = Launch::plan(prepared, Form::InProcess, progress).await?;
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let seams = Seams {
        store: Arc::clone(&store),
        hub: LocalHub::new(),
        dense: DenseWeights::new(),
    };
    let mut cluster = Tasks::default();
    let mut listener = Some(launch.listener);
    let loads = Loads::default();
    for instance in launch.instances {
        let registry = Registry::new();
        telemetry.export(registry.clone());
        let order = drain_order(&instance.node);
        let role = Role {
            listener: match instance.node.role {
                RoleConfig::Gateway(_) => listener.take(),
                RoleConfig::Operator(_) | RoleConfig::Worker(_) => None,
            },
            progress: match &instance.node.role {
                RoleConfig::Worker(worker) => Sink(loads.sink(worker.rank)),
                RoleConfig::Operator(_) | RoleConfig::Gateway(_) => Sink::default(),
            },
            node: instance.node,
            seams: seams.clone(),
            registry,
            shutdown: cluster.tokens[order].clone(),
        };
        cluster.start(order, instance.name, role);
    }
    let end = tokio::select! {
        ended = cluster.first_end() => Err(unexpected(ended)),
        end = ready::ready_here(&launch.awaited, store, progress, loads) => end,
        () = drain.cancelled() => Ok(()),
    };
    let end = match end {
        Ok(()) => tokio::select! {
            ended = cluster.first_end() => Err(unexpected(ended)),
            () = drain.cancelled() => Ok(()),
        },
        error => error,
    };
    if end.is_ok() {
        progress.say("draining; press ctrl-c again to stop at once");
    }
    cluster.drain().await;
    end
}

/// Roles by their order of draining.
#[derive(Debug, Default)]
struct Tasks {
    tokens: [CancellationToken; 3],
    sets: [JoinSet<Ended>; 3],
}

impl Tasks {
    fn start(&mut self, order: usize, name: String, role: Role) {
        self.sets[order].spawn(async move {
            let end = Box::pin(roles::run(role)).await;
            (name, end)
        });
    }

    /// Resolves when any role ends.
    async fn first_end(&mut self) -> Option<Result<Ended, JoinError>> {
        let [first, second, third] = &mut self.sets;
        tokio::select! {
            Some(end) = first.join_next() => Some(end),
            Some(end) = second.join_next() => Some(end),
            Some(end) = third.join_next() => Some(end),
            else => None,
        }
    }

    /// In the order of [`drain_order`].
    async fn drain(&mut self) {
        for (token, set) in self.tokens.iter().zip(&mut self.sets) {
            token.cancel();
            let all = async {
                while let Some(end) = set.join_next().await {
                    if let Ok((name, Err(error))) = end {
                        tracing::warn!(%name, %error, "ended with an error while draining");
                    }
                }
            };
            if tokio::time::timeout(DRAIN, all).await.is_err() {
                tracing::warn!(
                    "a role did not drain in {} s and is stopped",
                    DRAIN.as_secs()
                );
                set.abort_all();
            }
        }
    }
}

fn unexpected(ended: Option<Result<Ended, JoinError>>) -> CliError {
    match ended {
        Some(Ok((name, Err(CliError::Runtime(why))))) => {
            CliError::Runtime(format!("{name}: {why}"))
        }
        Some(Ok((name, Err(CliError::Usage(why))))) => {
            CliError::Usage(format!("{name}: {why}"))
        }
        Some(Ok((name, Ok(())))) => CliError::Runtime(format!("{name} ended by itself")),
        Some(Err(error)) => CliError::runtime("a role failed", &error),
        None => CliError::Runtime("the launch plan has no instance".to_owned()),
    }
}
