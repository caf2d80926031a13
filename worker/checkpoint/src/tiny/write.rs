//! The files of a random checkpoint. One tensor at a time is in memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, View};
use serde_json::{Value, json};

use foregate_api::weights::WeightFormat;

use super::{Tiny, random};
use crate::error::CheckpointError;
use crate::names::{self, Expected};

/// A tensor that is drawn when it is written.
struct Drawn<'a> {
    want: &'a Expected,
    seed: u64,
    format: WeightFormat,
}

impl View for &Drawn<'_> {
    fn dtype(&self) -> Dtype {
        match self.format {
            WeightFormat::Bfloat16 => Dtype::BF16,
            WeightFormat::Float16 => Dtype::F16,
            // Others that are not plain were refused with the configuration.
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.want.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(random::tensor(self.seed, self.want, self.format))
    }

    fn data_len(&self) -> usize {
        self.format
            .matrix_bytes(1, self.want.shape.iter().product())
    }
}

impl Tiny {
    /// Writes `config.json`, `generation_config.json` and the weights into `dir`, which is made.
    ///
    /// # Errors
    /// When the settings describe no model or a file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), CheckpointError> {
        let spec = self.spec().map_err(|source| CheckpointError::Spec {
            path: dir.join("config.json"),
            source,
        })?;
        std::fs::create_dir_all(dir).map_err(|error| failed(dir, &error))?;
        write_json(&dir.join("config.json"), &self.config())?;
        let tokens = json!({ "bos_token_id": 1, "eos_token_id": 2 });
        write_json(&dir.join("generation_config.json"), &tokens)?;
        let wanted = names::expected(&spec);
        let drawn: Vec<Drawn<'_>> = wanted
            .iter()
            .map(|want| Drawn {
                want,
                seed: self.seed,
                format: self.format,
            })
            .collect();
        match self.shards {
            0 | 1 => write_file(&dir.join("model.safetensors"), &drawn),
            shards => write_shards(dir, &drawn, shards),
        }
    }
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> CheckpointError {
    CheckpointError::Write {
        path: path.to_owned(),
        what: error.to_string(),
    }
}

fn write_json(path: &Path, value: &Value) -> Result<(), CheckpointError> {
    std::fs::write(path, format!("{value:#}\n")).map_err(|error| failed(path, &error))
}

fn write_file(path: &Path, drawn: &[Drawn<'_>]) -> Result<(), CheckpointError> {
    let metadata = std::iter::once(("format".to_owned(), "pt".to_owned())).collect();
    let tensors = drawn.iter().map(|one| (one.want.name.as_str(), one));
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .map_err(|error| failed(path, &error))
}

/// Equal numbers of tensors per file, and the list of which file has which.
fn write_shards(dir: &Path, drawn: &[Drawn<'_>], shards: usize) -> Result<(), CheckpointError> {
    let mut weight_map = BTreeMap::new();
    let per_file = drawn.len().div_ceil(shards).max(1);
    let files = drawn.len().div_ceil(per_file);
    for (number, part) in drawn.chunks(per_file).enumerate() {
        let file = format!("model-{:05}-of-{files:05}.safetensors", number + 1);
        write_file(&dir.join(&file), part)?;
        for one in part {
            weight_map.insert(one.want.name.clone(), file.clone());
        }
    }
    let total: usize = drawn.iter().map(|one| one.data_len()).sum();
    let list = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    write_json(&dir.join("model.safetensors.index.json"), &list)
}
