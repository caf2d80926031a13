//! The safetensors files of a model: data mapped and never copied, tensors by name over all shards.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use foregate_kernels::MappedFile;
use serde::Deserialize;

use crate::error::CheckpointError;
use crate::header::{Dtype, Entry, parse_header};

/// A tensor of the mapped files.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Format of its elements.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: &'a [usize],
    /// Its elements, row-major, little-endian, at any alignment.
    pub bytes: &'a [u8],
}

/// All tensors of a model, by name.
#[derive(Debug)]
pub(crate) struct Index {
    shards: Vec<Shard>,
    /// Name → index into `shards`.
    home: BTreeMap<String, usize>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: Arc<MappedFile>,
    entries: BTreeMap<String, Entry>,
}

impl Index {
    /// Maps and checks the files of a model directory.
    pub(crate) fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let single = dir.join("model.safetensors");
        let list = dir.join("model.safetensors.index.json");
        if single.is_file() {
            Self::from_shards(vec![Shard::open(single)?])
        } else if list.is_file() {
            let names = ShardList::read(&list)?;
            let shards = names
                .files(&list)?
                .into_iter()
                .map(|name| Shard::open(dir.join(name)))
                .collect::<Result<_, _>>()?;
            let index = Self::from_shards(shards)?;
            names.check(&list, &index)?;
            Ok(index)
        } else {
            Err(CheckpointError::NoWeights {
                dir: dir.to_owned(),
            })
        }
    }

    fn from_shards(shards: Vec<Shard>) -> Result<Self, CheckpointError> {
        let mut home: BTreeMap<String, usize> = BTreeMap::new();
        for (at, shard) in shards.iter().enumerate() {
            for name in shard.entries.keys() {
                if let Some(first) = home.insert(name.clone(), at) {
                    return Err(CheckpointError::Twice {
                        name: name.clone(),
                        first: shards[first].path.clone(),
                        second: shard.path.clone(),
                    });
                }
            }
        }
        Ok(Self { shards, home })
    }

    /// A tensor by name.
    pub(crate) fn get(&self, name: &str) -> Option<Tensor<'_>> {
        let shard = self.shards.get(*self.home.get(name)?)?;
        let entry = shard.entries.get(name)?;
        Some(Tensor {
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: shard.file.get(entry.range.clone())?,
        })
    }

    /// Gives the memory of a tensor's mapped bytes back.
    pub(crate) fn release(&self, name: &str) {
        let shard = self.home.get(name).and_then(|at| self.shards.get(*at));
        let entry = shard.and_then(|shard| shard.entries.get(name));
        if let (Some(shard), Some(entry)) = (shard, entry) {
            shard.file.release(entry.range.clone());
        }
    }

    /// As [`Index::release`], for a part of a tensor.
    pub(crate) fn release_part(&self, name: &str, part: std::ops::Range<usize>) {
        let shard = self.home.get(name).and_then(|at| self.shards.get(*at));
        let entry = shard.and_then(|shard| shard.entries.get(name));
        if let (Some(shard), Some(entry)) = (shard, entry) {
            let at = |offset: usize| (entry.range.start + offset).min(entry.range.end);
            shard.file.release(at(part.start)..at(part.end));
        }
    }

    /// Names of all tensors, ascending.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.home.keys().map(String::as_str)
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, CheckpointError> {
        let file = MappedFile::open(&path).map_err(|source| CheckpointError::Read {
            path: path.clone(),
            source,
        })?;
        let entries = parse_header(&file).map_err(|source| CheckpointError::Header {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            path,
            file: Arc::new(file),
            entries,
        })
    }
}

/// `model.safetensors.index.json`: which shard has which tensor.
#[derive(Debug, Deserialize)]
struct ShardList {
    weight_map: BTreeMap<String, String>,
}

impl ShardList {
    fn read(path: &Path) -> Result<Self, CheckpointError> {
        let bytes = std::fs::read(path).map_err(|source| CheckpointError::Read {
            path: path.to_owned(),
            source,
        })?;
        serde_json::from_slice(&bytes).map_err(|error| CheckpointError::ShardList {
            path: path.to_owned(),
            what: format!("{error}; restore the file from the model's repository"),
        })
    }

    /// The shards, each once. A name that leaves the directory is refused.
    fn files(&self, path: &Path) -> Result<Vec<&str>, CheckpointError> {
        let files: BTreeSet<&str> = self.weight_map.values().map(String::as_str).collect();
        for file in &files {
            let plain = Path::new(file)
                .file_name()
                .is_some_and(|name| name == *file);
            if !plain {
                return Err(CheckpointError::ShardList {
                    path: path.to_owned(),
                    what: format!("`{file}` is not a file name in this directory"),
                });
            }
        }
        Ok(files.into_iter().collect())
    }

    /// Every tensor must be where the list says.
    fn check(&self, path: &Path, index: &Index) -> Result<(), CheckpointError> {
        for (name, file) in &self.weight_map {
            let there = index
                .home
                .get(name)
                .and_then(|at| index.shards[*at].path.file_name());
            if there != Some(std::ffi::OsStr::new(file)) {
                return Err(CheckpointError::ShardList {
                    path: path.to_owned(),
                    what: format!(
                        "tensor `{name}` is not in `{file}`; download the shards again"
                    ),
                });
            }
        }
        Ok(())
    }
}
