//! `foregate-checkpoint`: a model directory as the hub has it, opened, checked and mapped.
//!
//! What goes in: a directory with `config.json`, optionally `generation_config.json`, and
//! `model.safetensors` or `model.safetensors.index.json` with its shards.
//! What comes out: a [`ModelSpec`](foregate_api::model::ModelSpec) without open questions, matrices in the
//! formats that it names, and one routed expert as a unit with its hash. Bytes are borrowed from the mapped
//! files where nothing is converted.
//! Invariants: every tensor the family needs is present with the right shape and format once
//! [`Checkpoint::open`] returned; a field of the configuration that would change the computation is
//! either understood or refused; no bytes of any file make this crate panic.
//! Start reading at [`Checkpoint`], then [`spec`] and [`header`].
#![forbid(unsafe_code)]

mod check;
mod convert;
pub mod error;
pub mod expert;
pub mod header;
mod index;
pub mod names;
mod open;
pub mod spec;
mod stored;
pub mod tiny;

pub use convert::dtype;
pub use error::CheckpointError;
pub use expert::{ExpertHash, ExpertParts};
pub use index::Tensor;
pub use open::Checkpoint;
