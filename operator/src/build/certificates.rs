//! Keys in pods: the Secrets that they are mounted from, and cert-manager's Certificates that fill those.

use foregate_api::security::IssuerKind;
use foregate_api::tls::{ClientKeys, StoreTls, TlsRole};
use k8s_openapi::api::core::v1::{PodSpec, SecretVolumeSource, Volume};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::json;

use super::{Component, Inputs, Object, Owner, Prepared, config};
use crate::launch::{KeyFolders, folders};
use crate::validate::{Certificates, ValidatedCluster};

/// The Secret with the keys of a role; each of its pods has it mounted.
pub(crate) fn keys_secret(owner: &Owner, role: TlsRole) -> String {
    format!("{}-{}-tls", owner.name, role.label())
}

/// What the cluster is called in certificates.
pub(crate) fn domain(owner: &Owner) -> String {
    format!(
        "{}.{}.{}",
        owner.name,
        owner.namespace,
        foregate_api::tls::ROOT
    )
}

/// Where pods of the cluster find their keys, if it has any.
pub(crate) fn keys(owner: &Owner, cluster: &ValidatedCluster) -> Option<KeyFolders> {
    (cluster.security.certificates != Certificates::None).then(|| KeyFolders {
        gateway: folders::TLS.to_owned(),
        worker: folders::TLS.to_owned(),
        domain: domain(owner),
    })
}

/// The Secret with what pods show etcd.
pub(crate) fn etcd_secret(owner: &Owner) -> String {
    format!("{}-etcd", owner.name)
}

/// Where pods find what they show etcd; `of` are the operator's own files.
pub(crate) fn etcd_keys(of: Option<&StoreTls>) -> Option<StoreTls> {
    let file = |name: &str| format!("{}/{name}", folders::ETCD);
    of.map(|of| StoreTls {
        ca_file: file("ca.crt"),
        client: of.client.as_ref().map(|_| ClientKeys {
            cert_file: file("tls.crt"),
            key_file: file("tls.key"),
        }),
    })
}

/// Mounts what is shown to etcd, if it wants to see anything.
pub(super) fn with_etcd_keys(inputs: &Inputs<'_>, spec: &mut PodSpec) {
    if inputs.defaults.etcd_tls.is_some() {
        mount(spec, "etcd", &etcd_secret(inputs.owner), folders::ETCD);
    }
}

/// Mounts the keys of a role, if the cluster has any.
pub(super) fn with_keys(inputs: &Inputs<'_>, role: TlsRole, spec: &mut PodSpec) {
    if inputs.cluster.security.certificates != Certificates::None {
        mount(spec, "tls", &keys_secret(inputs.owner, role), folders::TLS);
    }
}

/// Mounts the keys that clients of the API show, if the manifest names any.
pub(super) fn with_api_keys(inputs: &Inputs<'_>, spec: &mut PodSpec) {
    if let Some(secret) = &inputs.cluster.security.api_keys {
        mount(spec, "api-keys", secret, folders::API_KEYS);
    }
}

fn mount(spec: &mut PodSpec, name: &str, secret: &str, folder: &str) {
    spec.volumes.get_or_insert_default().push(Volume {
        name: name.to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret.to_owned()),
            // Read by the pod's group, fsGroup, and by nobody else.
            default_mode: Some(0o440),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    });
    for container in &mut spec.containers {
        let mounts = container.volume_mounts.get_or_insert_default();
        mounts.push(config::mount(name, folder, true));
    }
}

/// What cert-manager is asked for, if it is to issue.
pub(super) fn build(
    inputs: &Inputs<'_>,
    prepared: &mut Prepared,
) -> Result<(), serde_json::Error> {
    if let Certificates::CertManager { issuer, kind } = &inputs.cluster.security.certificates {
        for role in TlsRole::ALL {
            prepared
                .objects
                .push(certificate(inputs.owner, role, issuer, *kind)?);
        }
    }
    Ok(())
}

fn certificate(
    owner: &Owner,
    role: TlsRole,
    issuer: &str,
    kind: IssuerKind,
) -> Result<Object, serde_json::Error> {
    let name = keys_secret(owner, role);
    let gvk = GroupVersionKind::gvk("cert-manager.io", "v1", "Certificate");
    let body = json!({
        "apiVersion": "cert-manager.io/v1",
        "kind": "Certificate",
        "metadata": serde_json::to_value(owner.meta(name.clone(), Component::Cluster))?,
        "spec": {
            "secretName": name,
            "dnsNames": [role.name(&domain(owner))],
            "duration": "2160h",
            "renewBefore": "720h",
            "usages": ["digital signature", "server auth", "client auth"],
            "privateKey": { "algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always" },
            "issuerRef": { "group": "cert-manager.io", "kind": kind.name(), "name": issuer },
        },
    });
    Ok(Object {
        api: ApiResource::from_gvk(&gvk),
        name,
        body,
    })
}
