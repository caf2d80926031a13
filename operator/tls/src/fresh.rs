//! A value made of files, made again when they have changed.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use crate::error::TlsError;
use crate::pem::Named;

type Build<T> = dyn Fn(&[Vec<u8>]) -> Result<T, TlsError> + Send + Sync;

/// The value, as of the files at the last look.
pub(crate) struct Fresh<T> {
    files: Vec<Named>,
    build: Box<Build<T>>,
    kept: ArcSwap<Kept<T>>,
    /// The last complaint, so that it is not repeated at every handshake.
    complaint: Mutex<Option<String>>,
}

struct Kept<T> {
    /// Hash of the files; what they hold is not kept.
    hash: blake3::Hash,
    value: Arc<T>,
}

impl<T> Fresh<T> {
    /// Reads the files and makes the value of their bytes.
    pub(crate) fn open(
        files: Vec<Named>,
        build: impl Fn(&[Vec<u8>]) -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        let (hash, bytes) = read(&files)?;
        let value = Arc::new(build(&bytes)?);
        Ok(Self {
            files,
            build: Box::new(build),
            kept: ArcSwap::from_pointee(Kept { hash, value }),
            complaint: Mutex::default(),
        })
    }

    /// The value of the files as they are now. If they cannot be used (half of a change may be written), it is the
    /// last one that could, and the log says so.
    pub(crate) fn get(&self) -> Arc<T> {
        let looked = self.look();
        let mut complaint = self
            .complaint
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match looked {
            Ok(value) => {
                *complaint = None;
                value
            }
            Err(error) => {
                let text = error.to_string();
                if complaint.as_ref() != Some(&text) {
                    tracing::warn!(%error, "tls_files_unusable_last_ones_stay");
                    *complaint = Some(text);
                }
                Arc::clone(&self.kept.load().value)
            }
        }
    }

    fn look(&self) -> Result<Arc<T>, TlsError> {
        let (hash, bytes) = read(&self.files)?;
        let kept = self.kept.load();
        if kept.hash == hash {
            return Ok(Arc::clone(&kept.value));
        }
        let value = Arc::new((self.build)(&bytes)?);
        self.kept.store(Arc::new(Kept {
            hash,
            value: Arc::clone(&value),
        }));
        tracing::info!(file = %self.files[0].path, "tls_files_changed");
        Ok(value)
    }
}

fn read(files: &[Named]) -> Result<(blake3::Hash, Vec<Vec<u8>>), TlsError> {
    let bytes: Vec<Vec<u8>> = files.iter().map(Named::read).collect::<Result<_, _>>()?;
    let mut hasher = blake3::Hasher::new();
    for file in &bytes {
        hasher.update(&(file.len() as u64).to_le_bytes());
        hasher.update(file);
    }
    Ok((hasher.finalize(), bytes))
}
