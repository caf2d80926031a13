//! Models of the Hugging Face hub, into the hub's own cache layout, by hf-hub.

mod download;
mod files;

use std::path::{Path, PathBuf};

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use super::FetchError;
use crate::environment;
use crate::progress::Progress;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// How to reach the hub.
#[derive(Debug, Clone)]
pub(crate) struct HubSettings {
    /// Base URL.
    pub endpoint: String,
    /// The cache, `$HF_HOME/hub`.
    pub cache: PathBuf,
    /// Token, if any.
    pub token: Option<String>,
    /// Whether downloads are forbidden.
    pub offline: bool,
}

impl HubSettings {
    /// From `HF_HOME`, `HF_TOKEN` (else the token file in `HF_HOME`), `HF_ENDPOINT`, `HF_HUB_OFFLINE`.
    pub(crate) fn from_environment() -> Self {
        let home = environment::variable("HF_HOME").map_or_else(
            || {
                let home = environment::variable("HOME").unwrap_or_else(|| ".".to_owned());
                Path::new(&home).join(".cache/huggingface")
            },
            PathBuf::from,
        );
        let cache = home.join("hub");
        Self {
            endpoint: environment::variable("HF_ENDPOINT").map_or_else(
                || DEFAULT_ENDPOINT.to_owned(),
                |url| url.trim_end_matches('/').to_owned(),
            ),
            token: environment::variable("HF_TOKEN")
                .or_else(|| Cache::new(cache.clone()).token()),
            offline: environment::flag("HF_HUB_OFFLINE"),
            cache,
        }
    }
}

/// One model at one revision, with the means to ask for it.
pub(super) struct Wanted {
    repo: String,
    revision: String,
    hub: HubSettings,
}

/// Makes a hub model available locally.
pub(super) async fn fetch(
    repo: String,
    revision: String,
    hub: &HubSettings,
    progress: &Progress,
) -> Result<PathBuf, FetchError> {
    let wanted = Wanted {
        repo,
        revision,
        hub: hub.clone(),
    };
    if hub.offline {
        return wanted.cached().ok_or_else(|| wanted.offline());
    }
    let watch = download::Watch::default();
    let (seen, progress) = (watch.clone(), progress.clone());
    let work = tokio::task::spawn_blocking(move || wanted.fetch(&seen, &progress));
    watch.guard(work).await
}

impl Wanted {
    fn fetch(
        &self,
        watch: &download::Watch,
        progress: &Progress,
    ) -> Result<PathBuf, FetchError> {
        let api = self.api()?;
        let info = match self.info(&api) {
            Ok(info) => info,
            Err(error @ FetchError::Unreachable { .. }) => {
                let Some(directory) = self.cached() else {
                    return Err(error);
                };
                tracing::warn!(%error, "using the cached copy of the model");
                return Ok(directory);
            }
            Err(error) => return Err(error),
        };
        let commit = self.commit(&info)?;
        let names: Vec<_> = info.siblings.into_iter().map(|s| s.rfilename).collect();
        let pinned = api.repo(self.at(&commit));
        let directory = self.cache().repo(self.at(&commit)).pointer_path(&commit);
        let get = |file: &str| {
            if directory.join(file).is_file() {
                return Ok(directory.join(file));
            }
            download::file(self, &api, &pinned, file, watch, progress)
        };
        for file in files::small(&names) {
            get(file)?;
        }
        for file in files::weights(&self.repo, &names, |index| get(index))? {
            get(&file)?;
        }
        self.cache()
            .repo(self.at(&self.revision))
            .create_ref(&commit)
            .map_err(|error| self.failed("refs", &error.to_string()))?;
        Ok(directory)
    }

    fn api(&self) -> Result<Api, FetchError> {
        ApiBuilder::from_cache(self.cache())
            .with_endpoint(self.hub.endpoint.clone())
            .with_token(self.hub.token.clone())
            .with_user_agent("foregate", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| self.explain("", &error))
    }

    fn cache(&self) -> Cache {
        Cache::new(self.hub.cache.clone())
    }

    fn at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.repo.clone(), RepoType::Model, revision.to_owned())
    }

    fn info(&self, api: &Api) -> Result<RepoInfo, FetchError> {
        match api.repo(self.at(&self.revision)).info() {
            Ok(info) => Ok(info),
            Err(error) => {
                let missing = status(&error) == Some(404);
                // The hub says 404 for both; the default branch tells which it was.
                if missing && api.repo(self.at("main")).info().is_ok() {
                    return Err(FetchError::NoRevision {
                        endpoint: self.hub.endpoint.clone(),
                        repo: self.repo.clone(),
                        revision: self.revision.clone(),
                    });
                }
                Err(self.explain("", &error))
            }
        }
    }

    /// The commit as the hub names it. It becomes a folder name, so nothing but hex is taken.
    fn commit(&self, info: &RepoInfo) -> Result<String, FetchError> {
        let fine = !info.sha.is_empty() && info.sha.chars().all(|c| c.is_ascii_hexdigit());
        if fine {
            return Ok(info.sha.clone());
        }
        Err(self.protocol(&format!("commit {:?} is not a hash", info.sha)))
    }

    /// The snapshot in the cache, if it has all that serving needs.
    fn cached(&self) -> Option<PathBuf> {
        let cache = self.cache();
        let repo = cache.repo(self.at(&self.revision));
        // A full commit needs no ref.
        let directory = match repo.get("config.json") {
            Some(config) => config.parent()?.to_owned(),
            None => repo.pointer_path(&self.revision),
        };
        files::complete(&directory).then_some(directory)
    }

    fn offline(&self) -> FetchError {
        FetchError::Offline {
            repo: self.repo.clone(),
            revision: self.revision.clone(),
            cache: self.hub.cache.clone(),
        }
    }

    fn protocol(&self, what: &str) -> FetchError {
        FetchError::Protocol {
            endpoint: self.hub.endpoint.clone(),
            repo: self.repo.clone(),
            what: what.to_owned(),
        }
    }

    pub(super) fn failed(&self, file: &str, what: &str) -> FetchError {
        FetchError::Download {
            repo: self.repo.clone(),
            file: file.to_owned(),
            what: what.to_owned(),
        }
    }

    /// The library's error in words that name a remedy; `file` is empty while asking for the list.
    pub(super) fn explain(&self, file: &str, error: &ApiError) -> FetchError {
        let (endpoint, repo) = (self.hub.endpoint.clone(), self.repo.clone());
        match status(error) {
            Some(401) if self.hub.token.is_some() => {
                return FetchError::BadToken { endpoint, repo };
            }
            Some(401) => return FetchError::TokenWanted { endpoint, repo },
            Some(403) => return FetchError::Forbidden { endpoint, repo },
            Some(404) if file.is_empty() => return FetchError::NoRepo { endpoint, repo },
            _ => {}
        }
        let what = innermost(error);
        match error {
            ApiError::RequestError(_) if file.is_empty() => match status(error) {
                Some(code) => self.protocol(&format!("status {code}")),
                None if is_json(error) => self.protocol(&what),
                None => FetchError::Unreachable { endpoint, what },
            },
            ApiError::MissingHeader(header) => self.protocol(&format!("no {header} header")),
            _ => self.failed(file, &what),
        }
    }
}

/// The HTTP status inside an error.
pub(super) fn status(error: &ApiError) -> Option<u16> {
    // ureq is hf-hub's own; its status error prints as "http status: 404".
    let text = error.to_string();
    let (_, code) = text.rsplit_once("http status: ")?;
    code.trim().parse().ok()
}

fn is_json(error: &ApiError) -> bool {
    error.to_string().contains("json")
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut last = error.to_string();
    let mut next = error.source();
    while let Some(inner) = next {
        last = inner.to_string();
        next = inner.source();
    }
    last
}
