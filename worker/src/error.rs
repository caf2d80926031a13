//! Why a worker does not start, or ends.

use foregate_checkpoint::CheckpointError;
use foregate_models::ModelError;

use crate::engine::KvTooSmall;
use crate::residency::follow::Stranger;

/// Why [`run`](crate::run) failed.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A field of the configuration cannot be used.
    #[error("{field}: {what}")]
    Config {
        /// The field of `WorkerConfig` or `Deps`.
        field: &'static str,
        /// What is wrong, and the remedy.
        what: String,
    },
    /// The model directory cannot be used.
    #[error("model_dir: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// The model's weights cannot be used.
    #[error("model_dir: {0}")]
    Model(#[from] ModelError),
    /// The KV cache cannot be made.
    #[error(transparent)]
    Kv(#[from] KvTooSmall),
    /// Two workers of one process were given one metrics registry.
    #[error("registry: {0}; give each worker its own")]
    Metrics(#[from] prometheus::Error),
    /// A socket or a thread.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// The gRPC listener broke.
    #[error("rpc_listen: {0}")]
    Rpc(#[from] foregate_wire::tonic::transport::Error),
    /// The engine's thread died; the process should be replaced.
    #[error("the engine died: {0}")]
    EngineDied(String),
    /// The thread that runs experts for peers died; the process should be replaced.
    #[error("the experts' thread died")]
    ExpertsDied,
    /// The cluster computes otherwise than this worker.
    #[error("cpu_path: {0}")]
    Stranger(#[from] Stranger),
    /// A background task died; the process should be replaced.
    #[error("a background task died: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl WorkerError {
    /// Name for metrics and events.
    #[must_use]
    pub const fn category(&self) -> &'static str {
        match self {
            Self::Config { .. } | Self::Kv(_) | Self::Stranger(_) => "config",
            Self::Checkpoint(_) | Self::Model(_) => "model",
            Self::Metrics(_) => "metrics",
            Self::Io { .. } | Self::Rpc(_) => "io",
            Self::EngineDied(_) | Self::ExpertsDied => "engine",
            Self::Task(_) => "task",
        }
    }
}
