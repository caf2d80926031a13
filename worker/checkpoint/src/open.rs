//! Opening a model directory and checking that its parts belong together.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use foregate_api::ids::{ExpertId, LayerId};
use foregate_api::model::{ModelSpec, WeightFormat};

use crate::error::CheckpointError;
use crate::expert::ExpertParts;
use crate::header::Dtype;
use crate::index::{Index, Tensor};
use crate::names::{self, Expected, Kind, MlpNames};
use crate::spec;

/// A model directory whose configuration and weights were found to belong together.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    spec: ModelSpec,
    index: Index,
    /// `LayerId` → block.
    blocks: Vec<usize>,
}

impl Checkpoint {
    /// Reads the configuration, maps the weights and checks every tensor's presence, shape and format.
    ///
    /// # Errors
    /// Names the file, and the field or tensor in it, that is missing, damaged or unsupported.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let spec = read_spec(dir)?;
        let index = Index::open(dir)?;
        check_tensors(dir, &spec, &index)?;
        let blocks = (0..spec.layers)
            .filter(|block| spec.moe_blocks[*block])
            .collect();
        Ok(Self {
            dir: dir.to_owned(),
            spec,
            index,
            blocks,
        })
    }

    /// The model's shape.
    #[must_use]
    pub const fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The directory it was opened from.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A tensor by its name on the hub.
    ///
    /// # Errors
    /// When the checkpoint has none of that name.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, CheckpointError> {
        self.index.get(name).ok_or_else(|| CheckpointError::Tensor {
            dir: self.dir.clone(),
            name: name.to_owned(),
            expected: "a tensor".to_owned(),
            found: "none".to_owned(),
        })
    }

    /// One routed expert, borrowed from the mapped file.
    ///
    /// # Errors
    /// When the model has no such layer or expert.
    pub fn expert(
        &self,
        layer: LayerId,
        expert: ExpertId,
    ) -> Result<ExpertParts<'_>, CheckpointError> {
        let names = self.expert_names(layer, expert)?;
        Ok(ExpertParts {
            gate: self.tensor(&names.gate)?.bytes,
            up: self.tensor(&names.up)?.bytes,
            down: self.tensor(&names.down)?.bytes,
            format: self.spec.format,
            hidden: self.spec.hidden,
            inner: self.spec.expert_inner,
        })
    }

    /// Gives the memory that a tensor's mapped bytes take back to the system, once they are copied; reading
    /// them again takes them from the file again. Does nothing for a name that the checkpoint lacks.
    pub fn release(&self, name: &str) {
        self.index.release(name);
    }

    /// As [`Checkpoint::release`], for the parts of a routed expert.
    pub fn release_expert(&self, layer: LayerId, expert: ExpertId) {
        if let Ok(names) = self.expert_names(layer, expert) {
            for name in [names.gate, names.up, names.down] {
                self.index.release(&name);
            }
        }
    }

    fn expert_names(
        &self,
        layer: LayerId,
        expert: ExpertId,
    ) -> Result<MlpNames, CheckpointError> {
        match self.blocks.get(layer.index()) {
            Some(block) if expert.index() < self.spec.experts => {
                Ok(names::expert(self.spec.family, *block, expert.index()))
            }
            _ => Err(CheckpointError::NoSuchExpert { layer, expert }),
        }
    }
}

/// Reads only the configuration of a model directory: what a role without weights needs to know.
///
/// # Errors
/// As [`Checkpoint::open`] does for `config.json` and `generation_config.json`.
pub fn read_spec(dir: &Path) -> Result<ModelSpec, CheckpointError> {
    let config_path = dir.join("config.json");
    let generation_path = dir.join("generation_config.json");
    let read = |path: &Path| {
        std::fs::read(path).map_err(|source| CheckpointError::Read {
            path: path.to_owned(),
            source,
        })
    };
    let config = read(&config_path)?;
    let generation = if generation_path.is_file() {
        Some(read(&generation_path)?)
    } else {
        None
    };
    if let Some(bytes) = &generation {
        spec::check_object(bytes).map_err(|source| CheckpointError::Spec {
            path: generation_path,
            source,
        })?;
    }
    spec::parse(&config, generation.as_deref()).map_err(|source| CheckpointError::Spec {
        path: config_path,
        source,
    })
}

fn check_tensors(dir: &Path, spec: &ModelSpec, index: &Index) -> Result<(), CheckpointError> {
    let expected = names::expected(spec);
    for want in &expected {
        let found = index.get(&want.name);
        if !found.is_some_and(|tensor| fits(&tensor, want, spec.format)) {
            return Err(CheckpointError::Tensor {
                dir: dir.to_owned(),
                name: want.name.clone(),
                expected: describe_expected(want, spec.format),
                found: found.map_or_else(|| "none".to_owned(), |tensor| describe(&tensor)),
            });
        }
    }
    let known: BTreeSet<&str> = expected.iter().map(|want| want.name.as_str()).collect();
    let mut extra = index
        .names()
        .filter(|name| !known.contains(name) && !names::is_known_extra(spec, name))
        .peekable();
    match extra.peek().map(|first| (*first).to_owned()) {
        None => Ok(()),
        Some(first) => Err(CheckpointError::Unexpected {
            dir: dir.to_owned(),
            count: extra.count(),
            first,
        }),
    }
}

fn fits(tensor: &Tensor<'_>, want: &Expected, format: WeightFormat) -> bool {
    let formats: &[Dtype] = match want.kind {
        Kind::Matrix | Kind::Expert => match format {
            WeightFormat::Float32 => &[Dtype::F32],
            WeightFormat::Bfloat16 => &[Dtype::BF16],
        },
        Kind::Vector => &[Dtype::F32, Dtype::BF16],
    };
    tensor.shape == want.shape && formats.contains(&tensor.dtype)
}

fn describe_expected(want: &Expected, format: WeightFormat) -> String {
    let formats = match (want.kind, format) {
        (Kind::Matrix | Kind::Expert, WeightFormat::Float32) => "F32",
        (Kind::Matrix | Kind::Expert, WeightFormat::Bfloat16) => "BF16",
        (Kind::Vector, _) => "F32 or BF16",
    };
    format!("shape {:?} of {formats}", want.shape)
}

fn describe(tensor: &Tensor<'_>) -> String {
    format!("shape {:?} of {:?}", tensor.shape, tensor.dtype)
}

#[cfg(test)]
mod tests;
