//! Model URI → local directory.
//!
//! A URI is a directory, `file:///dir`, `hf://org/name[@revision]` or bare `org/name[@revision]` where no such
//! directory exists. Hub models go to the hub's own cache (`$HF_HOME/hub`), so other tools share it.

mod hub;
mod link;
mod uri;

use std::path::{Path, PathBuf};

pub(crate) use hub::HubSettings;
pub(crate) use link::{FetchArgs, run};
pub(crate) use uri::ModelUri;

use crate::progress::Progress;

/// Why a model could not be had. Each case names its remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("model URI {uri:?}: {what}")]
    BadUri { uri: String, what: String },
    #[error("model directory {0} does not exist")]
    NoDirectory(PathBuf),
    #[error(
        "{0} is not a directory; a model is a directory with config.json and *.safetensors"
    )]
    NotADirectory(PathBuf),
    #[error("model directory {directory} has no {file}")]
    Incomplete { directory: PathBuf, file: String },
    #[error(
        "{endpoint} refused the token for {repo} (401): HF_TOKEN (or the token file in HF_HOME) is wrong or expired"
    )]
    BadToken { endpoint: String, repo: String },
    #[error(
        "{endpoint} wants a token for {repo} (401): the repository is private or does not exist; set HF_TOKEN if you have access"
    )]
    TokenWanted { endpoint: String, repo: String },
    #[error(
        "{endpoint} does not grant access to {repo} (403): accept its licence on the hub or use another token"
    )]
    Forbidden { endpoint: String, repo: String },
    #[error("{endpoint} has no model {repo} (404): check the spelling of org/name")]
    NoRepo { endpoint: String, repo: String },
    #[error(
        "{repo} on {endpoint} has no revision {revision} (404): use a branch, tag or commit that exists"
    )]
    NoRevision {
        endpoint: String,
        repo: String,
        revision: String,
    },
    #[error(
        "{repo}@{revision} is not complete in {cache} and HF_HUB_OFFLINE forbids downloads: unset it, or fetch the model first"
    )]
    Offline {
        repo: String,
        revision: String,
        cache: PathBuf,
    },
    #[error("{endpoint} is not reachable ({what}): check the network, HF_ENDPOINT and proxies")]
    Unreachable { endpoint: String, what: String },
    #[error("{repo} has no {what}; Foregate serves safetensors checkpoints with a config.json")]
    NotServable { repo: String, what: String },
    #[error(
        "download of {file} from {repo} failed: {what}; run the command again to resume it"
    )]
    Download {
        repo: String,
        file: String,
        what: String,
    },
    #[error("{endpoint} answered {repo} with something that is not the hub's API: {what}")]
    Protocol {
        endpoint: String,
        repo: String,
        what: String,
    },
    #[error("stopped while fetching the model")]
    Stopped,
}

/// Makes the model of `uri` available as a local directory; a relative directory is relative to `base`.
///
/// # Errors
/// See [`FetchError`].
pub(crate) async fn resolve(
    uri: &str,
    base: &Path,
    hub: &HubSettings,
    progress: &Progress,
) -> Result<PathBuf, FetchError> {
    let directory = match ModelUri::parse(uri, base)? {
        ModelUri::Directory(directory) => existing(directory)?,
        ModelUri::Hub { repo, revision } => hub::fetch(repo, revision, hub, progress).await?,
    };
    require(&directory, "config.json")?;
    Ok(directory)
}

fn existing(directory: PathBuf) -> Result<PathBuf, FetchError> {
    let Ok(found) = directory.canonicalize() else {
        return Err(FetchError::NoDirectory(directory));
    };
    if found.is_dir() {
        Ok(found)
    } else {
        Err(FetchError::NotADirectory(found))
    }
}

fn require(directory: &Path, file: &str) -> Result<(), FetchError> {
    if directory.join(file).is_file() {
        return Ok(());
    }
    Err(FetchError::Incomplete {
        directory: directory.to_owned(),
        file: file.to_owned(),
    })
}
