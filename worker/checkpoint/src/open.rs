//! Opening a model directory and checking that its parts belong together.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use foregate_api::ids::{ExpertId, LayerId};
use foregate_api::model::ModelSpec;
use foregate_api::weights::{Part, Quantization, WeightFormat, WeightSettings};

use crate::check;
use crate::convert::Conversion;
use crate::error::CheckpointError;
use crate::expert::ExpertParts;
use crate::index::{Index, Tensor};
use crate::names::{self, MlpNames};
use crate::spec::{self, Config};
use crate::stored::mxfp4::Fused;
use crate::stored::{Layouts, Wrong, widen};

/// A model directory whose configuration and weights were found to belong together.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    spec: ModelSpec,
    index: Index,
    layouts: Layouts,
    /// `LayerId` → block.
    blocks: Vec<usize>,
}

impl Checkpoint {
    /// Opens a model whose weights are kept as the files have them: see [`Checkpoint::open_with`].
    ///
    /// # Errors
    /// As [`Checkpoint::open_with`].
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        Self::open_with(dir, &WeightSettings::default())
    }

    /// Reads the configuration, maps the weights and checks every tensor's presence, shape and format.
    /// `settings` say in which formats the weights will be in memory, which the spec then tells.
    ///
    /// # Errors
    /// Names the file, and the field or tensor in it, that is missing, damaged or unsupported; or the
    /// setting that does not go with the files.
    pub fn open_with(dir: &Path, settings: &WeightSettings) -> Result<Self, CheckpointError> {
        let config = read_config(dir)?;
        if let Some(quantized) = &config.quantized
            && settings.quantization != Quantization::None
        {
            return Err(CheckpointError::Twofold {
                dir: dir.to_owned(),
                scheme: quantized.scheme.name(),
                wanted: settings.quantization,
            });
        }
        let index = Index::open(dir)?;
        let layouts = check::tensors(dir, &config, &index)?;
        let mut spec = config.spec;
        spec.formats = settings.in_memory(&layouts.formats(), spec.tied_embeddings);
        let blocks = (0..spec.layers)
            .filter(|block| spec.moe_blocks[*block])
            .collect();
        Ok(Self {
            dir: dir.to_owned(),
            spec,
            index,
            layouts,
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

    /// The format of a part as the files have it; in memory it has that of the spec.
    #[must_use]
    pub fn stored_format(&self, part: Part) -> WeightFormat {
        self.layouts.of(part).format()
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

    /// The matrix `name` (`….weight`) of `n` outputs and `k` inputs: its canonical bytes in the format that
    /// the spec tells for its part. Converted by at most `threads` threads.
    ///
    /// # Errors
    /// When a tensor is missing or its contents cannot be used.
    pub fn matrix(
        &self,
        part: Part,
        name: &str,
        (n, k): (usize, usize),
        threads: usize,
    ) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let layout = self.layouts.of(part);
        let stored = layout.read(&self.index, name, n, k);
        let stored = stored.map_err(|wrong| self.contents(wrong))?;
        self.convert(part, name, (n, k), stored, threads)
    }

    /// A norm or a bias, widened.
    ///
    /// # Errors
    /// When the checkpoint has none of that name.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        Ok(widen(&self.tensor(name)?))
    }

    /// One routed expert, borrowed from the mapped file if nothing is converted.
    ///
    /// # Errors
    /// When the model has no such layer or expert, or its tensors' contents cannot be used.
    pub fn expert(
        &self,
        layer: LayerId,
        expert: ExpertId,
    ) -> Result<ExpertParts<'_>, CheckpointError> {
        let names = self.expert_names(layer, expert)?;
        let (hidden, inner) = (self.spec.hidden, self.spec.expert_inner);
        let (gate, up, down) = match self.fused(layer) {
            Some(fused) => {
                let all = fused.read(&self.index, expert.index());
                let all = all.map_err(|wrong| self.contents(wrong))?;
                (all.gate.into(), all.up.into(), all.down.into())
            }
            None => {
                let read =
                    |name: &str, n: usize, k: usize| self.matrix(Part::Expert, name, (n, k), 1);
                (
                    read(&names.gate, inner, hidden)?,
                    read(&names.up, inner, hidden)?,
                    read(&names.down, hidden, inner)?,
                )
            }
        };
        Ok(ExpertParts {
            gate,
            up,
            down,
            format: self.spec.formats.expert,
            hidden,
            inner,
        })
    }

    /// Gives the memory that a matrix's mapped bytes take back to the system, once they are copied; reading
    /// them again takes them from the file again. Does nothing for a name that the checkpoint lacks.
    pub fn release(&self, part: Part, name: &str) {
        // The sizes do not matter: only names are used.
        for source in self.layouts.of(part).sources(name, 0, 0) {
            self.index.release(&source.name);
        }
    }

    /// As [`Checkpoint::release`], for the parts of a routed expert.
    pub fn release_expert(&self, layer: LayerId, expert: ExpertId) {
        if let Some(fused) = self.fused(layer) {
            for (name, range) in fused.ranges(expert.index()) {
                self.index.release_part(&name, range);
            }
        } else if let Ok(names) = self.expert_names(layer, expert) {
            for name in [names.gate, names.up, names.down] {
                self.release(Part::Expert, &name);
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

    /// Where a layer's experts are, if all of them stand in the same tensors.
    fn fused(&self, layer: LayerId) -> Option<Fused> {
        let block = self.blocks.get(layer.index())?;
        self.layouts
            .experts_are_fused()
            .then(|| Fused::of(&self.spec, *block))
    }

    fn convert<'a>(
        &self,
        part: Part,
        name: &str,
        (n, k): (usize, usize),
        bytes: Cow<'a, [u8]>,
        threads: usize,
    ) -> Result<Cow<'a, [u8]>, CheckpointError> {
        let conversion = Conversion {
            n,
            k,
            from: self.layouts.of(part).format(),
            to: self.spec.formats.of(part),
        };
        let converted = conversion.run(bytes, threads);
        converted.map_err(|what| {
            self.contents((
                name.to_owned(),
                format!(
                    "{what}: it cannot be in {}; choose another format",
                    conversion.to
                ),
            ))
        })
    }

    fn contents(&self, (name, what): Wrong) -> CheckpointError {
        CheckpointError::Contents {
            dir: self.dir.clone(),
            name,
            what,
        }
    }
}

/// Reads only the configuration of a model directory.
fn read_config(dir: &Path) -> Result<Config, CheckpointError> {
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

#[cfg(test)]
mod tests;
