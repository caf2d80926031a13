//! Where a pod finds its model. Pure.
//!
//! Hub models are downloaded by an init container, which leaves a link of a known name; everything else is there when the
//! container starts.

use k8s_openapi::api::core::v1::{
    EmptyDirVolumeSource, EnvVar, EnvVarSource, ImageVolumeSource,
    PersistentVolumeClaimVolumeSource, SecretKeySelector, Volume, VolumeMount,
};

use crate::validate::ValidatedModel;

/// Where models are mounted.
const MODEL: &str = "/model";
/// Where downloads are kept: the hub's cache.
const CACHE: &str = "/cache";
/// The key of the token's Secret, and the variable that tools of the hub read.
const TOKEN: &str = "HF_TOKEN";

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// A directory of the image.
    Image(String),
    /// A directory of a claim.
    Claim {
        /// Name of the PersistentVolumeClaim.
        claim: String,
        /// Directory in it.
        path: String,
    },
    /// An OCI artifact, mounted as a volume.
    Artifact(String),
    /// The hub, into a cache.
    Hub {
        /// As `foregate fetch` takes it.
        uri: String,
        /// Claim that keeps the cache; `None`: the pod's own volume.
        cache: Option<String>,
        /// Secret with the token.
        secret: String,
    },
}

impl Source {
    /// The source that a manifest names. A path that begins with a slash or a dot, or has no slash, is a directory; any
    /// other is a model of the hub.
    pub(crate) fn of(model: &ValidatedModel) -> Self {
        let uri = model.uri.trim();
        let hub = |uri: &str| Self::Hub {
            uri: uri.to_owned(),
            cache: model.cache_claim.clone(),
            secret: model.token_secret.clone(),
        };
        match uri.split_once("://") {
            Some(("pvc", rest)) => {
                let (claim, path) = rest.split_once('/').unwrap_or((rest, ""));
                Self::Claim {
                    claim: claim.to_owned(),
                    path: path.trim_matches('/').to_owned(),
                }
            }
            Some(("oci", reference)) => Self::Artifact(reference.to_owned()),
            Some(("file", path)) => Self::Image(from_root(path)),
            Some(_) => hub(uri),
            None if uri.starts_with(['/', '.']) || !uri.contains('/') => {
                Self::Image(from_root(uri))
            }
            None => hub(&format!("hf://{uri}")),
        }
    }

    /// Where the container sees the model.
    pub(crate) fn directory(&self) -> String {
        match self {
            Self::Image(path) => path.clone(),
            Self::Claim { path, .. } if path.is_empty() => MODEL.to_owned(),
            Self::Claim { path, .. } => format!("{MODEL}/{path}"),
            Self::Artifact(_) => MODEL.to_owned(),
            Self::Hub { .. } => format!("{MODEL}/weights"),
        }
    }

    /// Volumes that the pod needs for it.
    pub(crate) fn volumes(&self) -> Vec<Volume> {
        let claim = |name: &str, claim: &str, read_only| Volume {
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim.to_owned(),
                read_only: Some(read_only),
            }),
            ..named(name)
        };
        match self {
            Self::Image(_) => Vec::new(),
            Self::Claim { claim: name, .. } => vec![claim("model", name, true)],
            Self::Artifact(reference) => vec![Volume {
                image: Some(ImageVolumeSource {
                    reference: Some(reference.clone()),
                    ..ImageVolumeSource::default()
                }),
                ..named("model")
            }],
            Self::Hub { cache, .. } => vec![
                empty("model"),
                cache
                    .as_ref()
                    .map_or_else(|| empty("cache"), |name| claim("cache", name, false)),
            ],
        }
    }

    /// Mounts of the container that uses the model, or, with `write`, of the one that brings it.
    pub(crate) fn mounts(&self, write: bool) -> Vec<VolumeMount> {
        let mount = |name: &str, path: &str, write: bool| VolumeMount {
            name: name.to_owned(),
            mount_path: path.to_owned(),
            read_only: (!write).then_some(true),
            ..VolumeMount::default()
        };
        match self {
            Self::Image(_) => Vec::new(),
            Self::Claim { .. } | Self::Artifact(_) => vec![mount("model", MODEL, false)],
            Self::Hub { .. } => {
                vec![mount("model", MODEL, write), mount("cache", CACHE, write)]
            }
        }
    }

    /// Arguments of the init container that brings the model, with its environment; `None` if it is there already.
    pub(crate) fn fetch(&self) -> Option<(Vec<String>, Vec<EnvVar>)> {
        let Self::Hub { uri, secret, .. } = self else {
            return None;
        };
        let arguments = ["fetch", uri, "--link", &self.directory()];
        let variable = |name: &str, value: &str| EnvVar {
            name: name.to_owned(),
            value: Some(value.to_owned()),
            ..EnvVar::default()
        };
        let token = EnvVar {
            name: TOKEN.to_owned(),
            value_from: Some(EnvVarSource {
                secret_key_ref: Some(SecretKeySelector {
                    name: secret.clone(),
                    key: TOKEN.to_owned(),
                    optional: Some(true),
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        };
        let arguments = arguments.map(str::to_owned).to_vec();
        Some((arguments, vec![variable("HF_HOME", CACHE), token]))
    }
}

/// A path of the image: relative ones start at its root, which `..` does not leave.
fn from_root(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn named(name: &str) -> Volume {
    Volume {
        name: name.to_owned(),
        ..Volume::default()
    }
}

fn empty(name: &str) -> Volume {
    Volume {
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..named(name)
    }
}

#[cfg(test)]
mod tests {
    use foregate_api::weights::WeightSettings;

    use super::*;
    use crate::validate::ModelLength;

    fn source(uri: &str) -> Source {
        Source::of(&ValidatedModel {
            uri: uri.to_owned(),
            served_names: vec!["m".to_owned()],
            length: ModelLength::AsPossible,
            weights: WeightSettings::default(),
            cache_claim: None,
            token_secret: "hf-token".to_owned(),
        })
    }

    #[test]
    fn directories_are_those_of_the_image() {
        for (uri, directory) in [
            ("../../e2e/models/demo", "/e2e/models/demo"),
            ("./demo", "/demo"),
            ("demo", "/demo"),
            ("/models/a/../b", "/models/b"),
            ("file:///models/demo/", "/models/demo"),
            ("..", "/"),
        ] {
            assert_eq!(source(uri), Source::Image(directory.to_owned()), "{uri}");
            assert!(source(uri).volumes().is_empty() && source(uri).fetch().is_none());
        }
    }

    #[test]
    fn claims_and_artifacts_are_mounted() {
        assert_eq!(source("pvc://models/qwen/3").directory(), "/model/qwen/3");
        assert_eq!(source("pvc://models").directory(), "/model");
        let volumes = source("oci://ghcr.io/org/model:1").volumes();
        let image = volumes[0].image.as_ref().unwrap();
        assert_eq!(image.reference.as_deref(), Some("ghcr.io/org/model:1"));
    }

    #[test]
    fn hub_models_are_fetched_into_the_cache() {
        for uri in ["hf://org/name@main", "org/name@main"] {
            let source = source(uri);
            let (arguments, variables) = source.fetch().unwrap();
            assert_eq!(
                arguments,
                ["fetch", "hf://org/name@main", "--link", "/model/weights"]
            );
            assert_eq!(variables[1].name, "HF_TOKEN");
            assert_eq!(source.mounts(true)[1].read_only, None);
            assert_eq!(source.mounts(false)[1].read_only, Some(true));
        }
    }
}
