//! `foregate-models`: forward passes over [`foregate_kernels::Ops`].
//!
//! What goes in: a [`Checkpoint`](foregate_checkpoint::Checkpoint) once, then a [`StepBatch`] per step.
//! What comes out: logits of the rows that asked for them, the experts every row chose, and the rows
//! that were lost on the way.
//! Invariants: a model never knows where its experts are, it calls the trait [`experts::Experts`]; a
//! row's logits have the same bits whatever else is in the batch and however its prompt was cut into
//! steps; every sum of several terms has a fixed order.
//! Start reading at [`Model::forward`], then `block.rs`, then a file of `family/`.
#![forbid(unsafe_code)]

mod attention;
mod batch;
mod block;
mod error;
pub mod expert;
pub mod experts;
mod family;
mod ffn;
mod load;
pub mod local;
mod mixture;
mod model;
mod reuse;
mod scratch;

pub use batch::{StepBatch, StepOutput};
pub use error::ModelError;
pub use expert::{
    ExpertRows, ExpertWeights, GroupMemory, combine, run_expert_rows, run_experts,
};
pub use local::{ExpertGroups, LocalExperts};
pub use model::{Model, WeakModel, kv_shape};
pub use reuse::emptied;
