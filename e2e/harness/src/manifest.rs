//! Manifests of the demonstration model, written for one test.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::repository;

/// A manifest file that vanishes with its owner.
#[derive(Debug)]
pub struct ManifestFile {
    _directory: TempDir,
    path: PathBuf,
}

impl ManifestFile {
    /// The demonstration model with these fields below `spec:` (YAML, indented by two).
    ///
    /// # Panics
    /// If there is no temporary directory.
    #[must_use]
    pub fn demo(fields: &str) -> Self {
        let uri = repository("e2e/models/demo");
        let spec = format!(
            "  model:\n    uri: {}\n    servedNames: [demo]\n{fields}",
            uri.display()
        );
        Self::text(&format!(
            "apiVersion: foregate.dev/v1alpha1\nkind: MoeCluster\nmetadata:\n  name: e2e\nspec:\n{spec}"
        ))
    }

    /// This text.
    ///
    /// # Panics
    /// If there is no temporary directory.
    #[must_use]
    pub fn text(text: &str) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let path = directory.path().join("manifest.yaml");
        std::fs::write(&path, text).expect("the manifest can be written");
        Self {
            _directory: directory,
            path,
        }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its path as an argument.
    ///
    /// # Panics
    /// If the path is not UTF-8.
    #[must_use]
    pub fn argument(&self) -> &str {
        self.path.to_str().expect("the path is UTF-8")
    }
}
