//! `spec.security` of a manifest: who may speak with whom.

use serde::{Deserialize, Serialize};

/// Who may speak with whom.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SecuritySpec {
    /// Whether gateways and workers prove to each other by certificates that they are of this cluster, and encrypt what
    /// they say. Default true. A change starts all of them anew, and requests fail until all are. `foregate up` does not
    /// look at it; it has `--mtls`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtls: Option<bool>,
    /// Issuer of cert-manager that issues the certificates. Default: the operator does, from an authority that it keeps in
    /// the Secret `<cluster>-authority`; one of your own in that Secret is used as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cert_manager: Option<CertManagerSpec>,
    /// Keys that clients of the API show. Default: everybody who reaches a gateway may call it. `foregate up` has no
    /// Secrets; it wants `--api-key-file` then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_keys: Option<ApiKeysSpec>,
}

/// An issuer of cert-manager.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CertManagerSpec {
    /// Name of the issuer. It must write `ca.crt` into its Secrets, as those of kind CA and Vault do.
    pub issuer: String,
    /// `Issuer`, of the cluster's namespace, or `ClusterIssuer`. Default `Issuer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<IssuerKind>,
}

/// Which of cert-manager's issuers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum IssuerKind {
    /// Of a namespace.
    #[default]
    Issuer,
    /// Of all namespaces.
    ClusterIssuer,
}

impl IssuerKind {
    /// As cert-manager spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Issuer => "Issuer",
            Self::ClusterIssuer => "ClusterIssuer",
        }
    }
}

/// Where the keys of clients are.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ApiKeysSpec {
    /// A Secret of the cluster's namespace: each of its entries is a key of the API, by the name of who has it.
    pub secret_ref: SecretRef,
}

/// A Secret by its name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SecretRef {
    /// Its name.
    pub name: String,
}
