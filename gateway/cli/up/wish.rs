//! What the user wants: a manifest, from a file, from `--model`, or the example; with the flags applied.

use std::path::{Path, PathBuf};

use foregate_api::manifest::{API_VERSION, ClusterSpec, KIND, Manifest, Metadata, ModelSource};
use foregate_operator::parse_manifest;
use foregate_operator::validate::{ValidatedCluster, validate};

use super::UpArgs;
use crate::error::CliError;

const EXAMPLE: &str = "charts/examples/tiny.yaml";

/// A validated cluster with the directory its relative paths start from.
#[derive(Debug)]
pub(super) struct Wish {
    /// The document, flags applied.
    pub(super) cluster: ValidatedCluster,
    /// Base of relative model directories.
    pub(super) base: PathBuf,
    /// Where the keys of clients are.
    pub(super) api_keys: Option<String>,
}

impl Wish {
    /// Reads and validates what the arguments say.
    ///
    /// # Errors
    /// A missing, malformed or wrong manifest (exit code 2), with all findings.
    pub(super) fn read(args: &UpArgs) -> Result<Self, CliError> {
        let mut draft = match (&args.file, &args.model) {
            (Some(file), _) => Draft::from_file(file)?,
            (None, Some(uri)) => Draft::from_model(uri),
            (None, None) => Draft::from_file(&example()?)?,
        };
        let spec = &mut draft.manifest.spec;
        if let Some(workers) = args.workers {
            spec.workers.count = Some(workers);
        }
        if let Some(path) = args.cpu_path {
            spec.workers.cpu_path = Some(path);
        }
        spec.workers.pinning = args.pinning.or(spec.workers.pinning);
        if !args.served_model_name.is_empty() {
            spec.model.served_names.clone_from(&args.served_model_name);
        }
        spec.model.dtype = args.weights.dtype.or(spec.model.dtype);
        spec.model.quantization = args.weights.quantization.or(spec.model.quantization);
        let cluster = validate(draft.manifest)
            .map_err(|findings| CliError::Usage(format!("{}: {findings}", draft.origin)))?;
        let api_keys = args.api_key_file.as_deref();
        if let (Some(secret), None) = (&cluster.security.api_keys, api_keys) {
            return Err(CliError::Usage(format!(
                "{}: spec.security.apiKeys wants the keys of Secret {secret}, and there are no Secrets here; pass \
                 --api-key-file FILE",
                draft.origin
            )));
        }
        Ok(Self {
            cluster,
            base: draft.base,
            api_keys: api_keys.map(|path| path.to_string_lossy().into_owned()),
        })
    }
}

/// A manifest as written.
struct Draft {
    manifest: Manifest,
    base: PathBuf,
    origin: String,
}

impl Draft {
    fn from_file(path: &Path) -> Result<Self, CliError> {
        let wrong =
            |what: String| CliError::Usage(format!("manifest {}: {what}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let manifest = parse_manifest(&text).map_err(|error| wrong(error.to_string()))?;
        let base = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        Ok(Self {
            manifest,
            base,
            origin: format!("manifest {}", path.display()),
        })
    }

    fn from_model(uri: &str) -> Self {
        let manifest = Manifest {
            api_version: API_VERSION.to_owned(),
            kind: KIND.to_owned(),
            metadata: Metadata {
                name: "up".to_owned(),
                namespace: None,
                labels: std::collections::BTreeMap::new(),
                annotations: std::collections::BTreeMap::new(),
            },
            spec: ClusterSpec {
                model: ModelSource {
                    uri: uri.to_owned(),
                    ..ModelSource::default()
                },
                ..ClusterSpec::default()
            },
        };
        Self {
            manifest,
            base: PathBuf::from("."),
            origin: "arguments".to_owned(),
        }
    }
}

/// The example manifest: looked for above the working directory, then above the binary.
fn example() -> Result<PathBuf, CliError> {
    let starts = [std::env::current_dir().ok(), std::env::current_exe().ok()];
    starts
        .iter()
        .flatten()
        .flat_map(|start| start.ancestors())
        .map(|directory| directory.join(EXAMPLE))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            CliError::Usage(format!(
                "no {EXAMPLE} above the working directory or the binary; pass --model DIR_OR_URI or -f MANIFEST"
            ))
        })
}
