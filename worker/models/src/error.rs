//! Why a step or a load failed.

use foregate_checkpoint::CheckpointError;
use foregate_kernels::{OpError, ShapeError};

use crate::experts::ExpertsError;

/// A step that was not computed, or a model that was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The batch contradicts itself or the model.
    #[error("batch: {what}")]
    Batch {
        /// Which part and why.
        what: String,
    },
    /// Sizes that do not fit each other; with a checked checkpoint and batch, a page out of range.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// An op that was not done.
    #[error(transparent)]
    Op(#[from] OpError),
    /// A whole layer's experts failed.
    #[error(transparent)]
    Experts(#[from] ExpertsError),
    /// The weights could not be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A thread that loaded weights ended early.
    #[error("loading was interrupted: a thread ended early")]
    Interrupted,
}
