//! Keys that clients show, from files that are read again when they have changed.
//!
//! Only hashes of keys are kept; two hashes are compared in constant time, and with every key, so that the time of an
//! answer tells nothing about a key. No key is ever logged.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::time::Instant;

/// How often the files are looked at, as long as requests come.
const LOOK: Duration = Duration::from_secs(1);
/// Largest file of keys.
const LARGEST: u64 = 1 << 20;

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
#[error(
    "api_keys: {path}: {source}; write one key, or name:key, a line, or mount a Secret there"
)]
pub struct ApiKeysError {
    path: String,
    #[source]
    source: io::Error,
}

/// Name of who has a key; never the key.
pub type Client = Arc<str>;

/// All keys, as of the last look.
pub struct ApiKeys {
    path: PathBuf,
    known: ArcSwap<Known>,
    looked: Mutex<Instant>,
}

#[derive(PartialEq, Eq, Default)]
struct Known(Vec<(blake3::Hash, Client)>);

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiKeys")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl ApiKeys {
    /// Reads the file, or all files of the folder, at `path`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(path: &str) -> Result<Self, ApiKeysError> {
        let known = read(Path::new(path)).map_err(|source| ApiKeysError {
            path: path.to_owned(),
            source,
        })?;
        if known.0.is_empty() {
            tracing::warn!(path, "there is no key, so every request is refused");
        }
        Ok(Self {
            path: PathBuf::from(path),
            known: ArcSwap::from_pointee(known),
            looked: Mutex::new(Instant::now()),
        })
    }

    /// Who has this key.
    #[must_use]
    pub fn client(&self, shown: &str) -> Option<Client> {
        self.look();
        let shown = blake3::hash(shown.as_bytes());
        let mut found = None;
        for (hash, client) in &self.known.load().0 {
            // In constant time, and without an end at the first that fits.
            if *hash == shown {
                found = Some(Arc::clone(client));
            }
        }
        found
    }

    /// Reads the files anew, if that is due. What cannot be read leaves the keys as they were.
    fn look(&self) {
        {
            let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
            if looked.elapsed() < LOOK {
                return;
            }
            *looked = Instant::now();
        }
        match read(&self.path) {
            Ok(known) if known == **self.known.load() => {}
            Ok(known) => {
                tracing::info!(keys = known.0.len(), "the keys of clients have changed");
                self.known.store(Arc::new(known));
            }
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "the keys of clients stay as they were");
            }
        }
    }
}

fn read(path: &Path) -> io::Result<Known> {
    let mut keys = BTreeMap::new();
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            // A mounted Secret has folders and links of its own, which begin with two dots.
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with("..") && entry.path().is_file() {
                read_file(&entry.path(), &name, &mut keys)?;
            }
        }
    } else {
        read_file(path, "default", &mut keys)?;
    }
    Ok(Known(
        keys.into_iter()
            .map(|(hash, client)| (blake3::Hash::from_bytes(hash), client))
            .collect(),
    ))
}

fn read_file(path: &Path, name: &str, keys: &mut BTreeMap<[u8; 32], Client>) -> io::Result<()> {
    if std::fs::metadata(path)?.len() > LARGEST {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} is larger than {LARGEST} bytes", path.display()),
        ));
    }
    for line in std::fs::read_to_string(path)?.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (client, key) = match line.split_once(':') {
            Some((client, key)) => (client.trim(), key.trim()),
            None => (name, line),
        };
        if !key.is_empty() {
            keys.insert(*blake3::hash(key.as_bytes()).as_bytes(), client.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_a_key_a_line_and_a_folder_one_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, "# ours\nsk-1\n\nalice: sk-2 \n").unwrap();
        let keys = ApiKeys::open(file.to_str().unwrap()).unwrap();
        assert_eq!(keys.client("sk-1").as_deref(), Some("default"));
        assert_eq!(keys.client("sk-2").as_deref(), Some("alice"));
        for wrong in ["", "sk", "sk-", "sk-3", "alice: sk-2", "# ours"] {
            assert_eq!(keys.client(wrong), None, "{wrong}");
        }
        let shown = format!("{keys:?}");
        assert!(!shown.contains("sk-"), "{shown}");

        let mount = dir.path().join("mount");
        std::fs::create_dir_all(mount.join("..2026")).unwrap();
        std::fs::write(mount.join("..2026/bob"), "sk-4\n").unwrap();
        std::os::unix::fs::symlink("..2026/bob", mount.join("bob")).unwrap();
        let keys = ApiKeys::open(mount.to_str().unwrap()).unwrap();
        assert_eq!(keys.client("sk-4").as_deref(), Some("bob"));
        let error = ApiKeys::open("/nowhere/keys").unwrap_err().to_string();
        assert!(error.starts_with("api_keys: /nowhere/keys"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn files_are_read_again_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, "sk-1").unwrap();
        let keys = ApiKeys::open(file.to_str().unwrap()).unwrap();
        std::fs::write(&file, "sk-2").unwrap();
        tokio::time::advance(LOOK).await;
        assert_eq!(keys.client("sk-1"), None);
        assert!(keys.client("sk-2").is_some());
        // What cannot be read changes nothing; no key at all lets nobody in.
        std::fs::remove_file(&file).unwrap();
        tokio::time::advance(LOOK).await;
        assert!(keys.client("sk-2").is_some());
        std::fs::write(&file, "").unwrap();
        tokio::time::advance(LOOK).await;
        assert_eq!(keys.client("sk-2"), None);
    }
}
