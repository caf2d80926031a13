//! Files of a model directory, read once at start.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// Why a file of the model directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelFileError {
    /// It is there and cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what it must be.
    #[error("{path}: {what}", path = path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl ModelFileError {
    pub(crate) fn parse(path: &Path, what: impl Into<String>) -> Self {
        Self::Parse {
            path: path.to_owned(),
            what: what.into(),
        }
    }
}

/// The bytes of a file; `None` if there is none.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, ModelFileError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModelFileError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// A file as JSON; `None` if there is none.
pub(crate) fn json(path: &Path) -> Result<Option<Value>, ModelFileError> {
    let Some(bytes) = read(path)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| ModelFileError::parse(path, error.to_string()))
}
