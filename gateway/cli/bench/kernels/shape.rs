//! The sizes that operations have in a model.

use std::path::Path;

use foregate_api::model::ModelSpec;
use foregate_checkpoint::Checkpoint;
use foregate_checkpoint::tiny::Tiny;
use serde::Serialize;

use crate::error::CliError;

/// Sizes of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Shape {
    /// Width of the residual stream.
    pub(super) hidden: usize,
    pub(super) vocab: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) experts: usize,
    pub(super) top_k: usize,
    /// Inner width of an expert.
    pub(super) inner: usize,
}

impl Shape {
    fn of(spec: &ModelSpec) -> Self {
        Self {
            hidden: spec.hidden,
            vocab: spec.vocab,
            layers: spec.layers,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            experts: spec.experts,
            top_k: spec.top_k,
            inner: spec.expert_inner,
        }
    }

    /// Sizes of the benchmark model.
    pub(super) fn bench09() -> Result<Self, CliError> {
        let spec = Tiny::bench09().spec();
        spec.map(|spec| Self::of(&spec))
            .map_err(|error| CliError::runtime("bench09", &error))
    }

    /// Sizes of a checkpoint.
    pub(super) fn read(dir: &Path) -> Result<Self, CliError> {
        let checkpoint = Checkpoint::open(dir);
        checkpoint
            .map(|checkpoint| Self::of(checkpoint.spec()))
            .map_err(|error| CliError::runtime(&format!("--model {}", dir.display()), &error))
    }
}
