//! What can be wrong with a model directory; every message names the file and what to do.

use std::path::PathBuf;

use crate::header::HeaderError;
use crate::spec::SpecError;

/// Why a checkpoint cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file is missing or unreadable.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// `config.json` or `generation_config.json` is not one we can serve.
    #[error("{}: {source}", path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// Field, problem, remedy.
        source: SpecError,
    },
    /// There are no weights in the directory.
    #[error(
        "{}: neither model.safetensors nor model.safetensors.index.json; \
         download the model's safetensors files into this directory",
        dir.display()
    )]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// The list of shards is not usable.
    #[error("{}: {what}", path.display())]
    ShardList {
        /// `model.safetensors.index.json`.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// A safetensors file is damaged.
    #[error("{}: {source}; the file is damaged or incomplete, download it again", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// Two files define one tensor.
    #[error(
        "tensor `{name}` is in {} and in {}; remove the shard that does not belong to this model",
        first.display(),
        second.display()
    )]
    Twice {
        /// The tensor.
        name: String,
        /// One file.
        first: PathBuf,
        /// The other file.
        second: PathBuf,
    },
    /// A tensor that the configuration calls for is not there, or not as expected.
    #[error(
        "{}: tensor `{name}`: expected {expected}, found {found}; \
         config.json and the weights do not belong together or a file is missing",
        dir.display()
    )]
    Tensor {
        /// The model directory.
        dir: PathBuf,
        /// The tensor.
        name: String,
        /// Shape and format wanted.
        expected: String,
        /// What the files have.
        found: String,
    },
    /// A tensor whose contents cannot be used.
    #[error("{}: tensor `{name}`: {what}", dir.display())]
    Contents {
        /// The model directory.
        dir: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// Matrices of one part in several formats.
    #[error(
        "{}: `{name}` is {found}, others of its part ({part}) are {expected}; \
         a part in several formats is not supported",
        dir.display()
    )]
    Mixed {
        /// The model directory.
        dir: PathBuf,
        /// The matrix.
        name: String,
        /// The part of the model.
        part: foregate_api::weights::Part,
        /// Format of the part's first matrix.
        expected: String,
        /// Format of this one.
        found: String,
    },
    /// A matrix that is quantised although the configuration exempts it.
    #[error(
        "{}: field `quantization_config.modules_to_not_convert` names `{module}`, but its tensors are quantised; \
         config.json and the weights do not belong together",
        dir.display()
    )]
    Exempt {
        /// The model directory.
        dir: PathBuf,
        /// The module.
        module: String,
    },
    /// Quantising a second time.
    #[error(
        "quantization: {wanted}, but {} is already quantised ({scheme}); leave the setting at `none`",
        dir.display()
    )]
    Twofold {
        /// The model directory.
        dir: PathBuf,
        /// How the files are quantised.
        scheme: &'static str,
        /// What was asked for.
        wanted: foregate_api::weights::Quantization,
    },
    /// Tensors that the family does not know; ignoring them would compute another model.
    #[error(
        "{}: {count} tensor(s) this model family does not have, the first is `{first}`; \
         check `model_type` and the layer counts of config.json",
        dir.display()
    )]
    Unexpected {
        /// The model directory.
        dir: PathBuf,
        /// How many.
        count: usize,
        /// The first in order of name.
        first: String,
    },
    /// A layer or expert outside the model was asked for.
    #[error("expert {expert} of MoE layer {layer} does not exist in this model")]
    NoSuchExpert {
        /// The layer asked for.
        layer: foregate_api::ids::LayerId,
        /// The expert asked for.
        expert: foregate_api::ids::ExpertId,
    },
    /// A checkpoint could not be written.
    #[error("cannot write {}: {what}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The reason.
        what: String,
    },
}
