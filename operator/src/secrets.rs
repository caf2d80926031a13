//! The Secrets of a cluster: its authority, the keys of its roles, and the key that the operator asks a gateway with.
//!
//! What they should hold is [`authority`]'s to say. A Secret that somebody else made under one of their names is used as it
//! is and never written: so one brings an authority, or certificates, of one's own. Two operators that both believe to lead
//! do not overwrite each other: a Secret is created once, and replaced only as it was read.

use std::collections::BTreeMap;

use foregate_api::tls::{StoreTls, TlsRole};
use foregate_tls::authority::Issued;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt as _};

use crate::authority::{self, Kept, RoleKeys};
use crate::build::{Component, MANAGER, Owner, etcd_secret, keys_secret};

/// Entries of a Secret with a certificate, as Kubernetes and cert-manager name them.
const CERT: &str = "tls.crt";
const KEY: &str = "tls.key";
const TRUSTED: &str = "ca.crt";
/// Further ones of an authority.
const NEXT_CERT: &str = "next.crt";
const NEXT_KEY: &str = "next.key";
const BEFORE: &str = "before.crt";

/// Why Secrets are not as they should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretsError {
    /// The API server's.
    #[error(transparent)]
    Api(#[from] kube::Error),
    /// What a person has to put right.
    #[error("{0}")]
    Unusable(String),
}

/// What a Secret holds, as Kubernetes knows it.
const CERTIFICATE: &str = "kubernetes.io/tls";
const ANYTHING: &str = "Opaque";

/// Whose a Secret is.
enum Whose {
    /// This cluster's.
    Ours,
    /// Somebody made it by hand, or another controller did.
    Theirs,
}

/// A key of the API that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct ApiKey(pub(crate) String);

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey")
    }
}

/// Brings the authority and the roles' keys to what they should be at `now`, in seconds since 1970.
///
/// # Errors
/// The API server's; or what is wrong with a Secret of somebody else's.
pub(crate) async fn ensure(
    client: &Client,
    owner: &Owner,
    domain: &str,
    now: u64,
) -> Result<(), SecretsError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), &owner.namespace);
    let kept = ensure_authority(&api, owner, domain, now).await?;
    for role in TlsRole::ALL {
        let name = keys_secret(owner, role);
        let there = api.get_opt(&name).await?;
        if let Some(secret) = &there
            && matches!(whose(owner, secret)?, Whose::Theirs)
        {
            continue;
        }
        let has = there.as_ref().and_then(role_keys);
        let wanted = authority::role(&kept, role, has.as_ref(), domain, now)
            .map_err(|error| broken(&authority_name(owner), &error))?;
        if has.as_ref() != Some(&wanted) {
            let RoleKeys { issued, trusted } = &wanted;
            let data = [(CERT, &issued.cert), (KEY, &issued.key), (TRUSTED, trusted)];
            write(&api, owner, &name, CERTIFICATE, &data, there.as_ref()).await?;
            tracing::info!(cluster = %owner.name, %name, "keys_issued");
        }
    }
    Ok(())
}

async fn ensure_authority(
    api: &Api<Secret>,
    owner: &Owner,
    domain: &str,
    now: u64,
) -> Result<Kept, SecretsError> {
    let name = authority_name(owner);
    let there = api.get_opt(&name).await?;
    let kept = there
        .as_ref()
        .map(|secret| kept(&name, secret))
        .transpose()?;
    if let (Some(secret), Some(kept)) = (&there, &kept)
        && matches!(whose(owner, secret)?, Whose::Theirs)
    {
        let until = foregate_tls::authority::validity(&kept.current.cert);
        let until = until.map_err(|error| broken(&name, &error))?.until;
        if until <= now {
            return Err(SecretsError::Unusable(format!(
                "the authority in Secret {name}, which is not the operator's to renew, has ended: put a new one there"
            )));
        }
        return Ok(kept.clone());
    }
    let wanted = authority::authority(kept.as_ref(), domain, now)
        .map_err(|error| broken(&name, &error))?;
    if kept.as_ref() != Some(&wanted) {
        let trusted = wanted.trusted();
        let mut data = vec![
            (CERT, &wanted.current.cert),
            (KEY, &wanted.current.key),
            (TRUSTED, &trusted),
        ];
        if let Some(next) = &wanted.next {
            data.extend([(NEXT_CERT, &next.cert), (NEXT_KEY, &next.key)]);
        }
        data.extend(wanted.before.iter().map(|before| (BEFORE, before)));
        write(api, owner, &name, CERTIFICATE, &data, there.as_ref()).await?;
        tracing::info!(cluster = %owner.name, %name, "authority_changed");
    }
    Ok(wanted)
}

/// Copies the operator's own keys of etcd's clients to where the cluster's pods mount them from.
///
/// # Errors
/// The API server's; or a file that cannot be read.
pub(crate) async fn ensure_etcd(
    client: &Client,
    owner: &Owner,
    tls: &StoreTls,
) -> Result<(), SecretsError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), &owner.namespace);
    let name = etcd_secret(owner);
    let mut files = vec![(TRUSTED, &tls.ca_file)];
    if let Some(client) = &tls.client {
        files.extend([(CERT, &client.cert_file), (KEY, &client.key_file)]);
    }
    let mut data = Vec::new();
    for (entry, file) in files {
        let text = tokio::fs::read_to_string(file).await.map_err(|error| {
            SecretsError::Unusable(format!("the operator cannot read {file} for etcd: {error}"))
        })?;
        data.push((entry, text));
    }
    let there = api.get_opt(&name).await?;
    if let Some(secret) = &there {
        let same = data
            .iter()
            .all(|(entry, wanted)| text(secret, entry).as_ref() == Some(wanted));
        if same || matches!(whose(owner, secret)?, Whose::Theirs) {
            return Ok(());
        }
    }
    let data: Vec<_> = data.iter().map(|(entry, text)| (*entry, text)).collect();
    write(&api, owner, &name, ANYTHING, &data, there.as_ref()).await?;
    Ok(())
}

/// The first key of a Secret with keys of the API's clients; `None` if there is none.
///
/// # Errors
/// The API server's.
pub(crate) async fn api_key(
    client: &Client,
    owner: &Owner,
    secret: &str,
) -> Result<Option<ApiKey>, kube::Error> {
    let api: Api<Secret> = Api::namespaced(client.clone(), &owner.namespace);
    let secret = api.get_opt(secret).await?;
    let entries = secret.and_then(|secret| secret.data).unwrap_or_default();
    let texts = entries
        .into_values()
        .filter_map(|entry| String::from_utf8(entry.0).ok());
    let mut keys = texts
        .map(|text| text.trim().to_owned())
        .filter(|key| !key.is_empty());
    Ok(keys.next().map(ApiKey))
}

fn authority_name(owner: &Owner) -> String {
    format!("{}-authority", owner.name)
}

fn whose(owner: &Owner, secret: &Secret) -> Result<Whose, SecretsError> {
    if owner.owns(secret) {
        return Ok(Whose::Ours);
    }
    if secret
        .owner_references()
        .iter()
        .any(|reference| reference.kind == owner.reference().kind)
    {
        return Err(SecretsError::Unusable(format!(
            "Secret {} is of another cluster, probably of an earlier one of this name that Kubernetes is still removing",
            secret.name_any()
        )));
    }
    Ok(Whose::Theirs)
}

fn broken(name: &str, error: &dyn std::error::Error) -> SecretsError {
    SecretsError::Unusable(format!(
        "Secret {name} holds no usable authority in {CERT} and {KEY}: {error}. Put one there, or delete the Secret for a \
         new one"
    ))
}

fn text(secret: &Secret, entry: &str) -> Option<String> {
    let bytes = secret.data.as_ref()?.get(entry)?;
    String::from_utf8(bytes.0.clone()).ok()
}

fn issued(secret: &Secret, cert: &str, key: &str) -> Option<Issued> {
    Some(Issued {
        cert: text(secret, cert)?,
        key: text(secret, key)?,
    })
}

fn kept(name: &str, secret: &Secret) -> Result<Kept, SecretsError> {
    let current = issued(secret, CERT, KEY)
        .ok_or_else(|| broken(name, &std::io::Error::from(std::io::ErrorKind::NotFound)))?;
    Ok(Kept {
        current,
        next: issued(secret, NEXT_CERT, NEXT_KEY),
        before: text(secret, BEFORE),
    })
}

fn role_keys(secret: &Secret) -> Option<RoleKeys> {
    Some(RoleKeys {
        issued: issued(secret, CERT, KEY)?,
        trusted: text(secret, TRUSTED)?,
    })
}

async fn write(
    api: &Api<Secret>,
    owner: &Owner,
    name: &str,
    kind: &str,
    data: &[(&str, &String)],
    there: Option<&Secret>,
) -> Result<(), kube::Error> {
    let data: BTreeMap<String, ByteString> = data
        .iter()
        .map(|(entry, text)| ((*entry).to_owned(), ByteString(text.as_bytes().to_vec())))
        .collect();
    let mut secret = Secret {
        metadata: owner.meta(name.to_owned(), Component::Cluster),
        type_: Some(kind.to_owned()),
        data: Some(data),
        ..Secret::default()
    };
    let how = PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    };
    match there {
        None => api.create(&how, &secret).await.map(drop),
        Some(there) => {
            secret.metadata.resource_version = there.resource_version();
            api.replace(name, &how, &secret).await.map(drop)
        }
    }
}
