//! Keys of an instance, as files, and the names that certificates are issued for.

use serde::{Deserialize, Serialize};

/// Last labels of the names in a cluster's certificates. `internal` is the top-level domain that is set aside for
/// private names, so nobody else can be certified for one.
pub const ROOT: &str = "foregate.internal";

/// How a gateway and workers prove to each other that they are of one cluster. All files are PEM, and are read again
/// when they have changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// Certificates of the authorities whose word counts.
    pub ca_file: String,
    /// This instance's certificate, then those between it and its authority.
    pub cert_file: String,
    /// The private key of the certificate.
    pub key_file: String,
    /// The cluster as certificates name it: those of its workers are for the DNS name `worker.<domain>`.
    pub domain: String,
}

/// Who has a certificate of the cluster. One per role: replicas of a role may do the same things.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsRole {
    /// The HTTP side; calls workers.
    Gateway,
    /// Attention and experts; called by gateways and by each other.
    Worker,
}

impl TlsRole {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Gateway, Self::Worker];

    /// First label of the names in its certificate.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Worker => "worker",
        }
    }

    /// The DNS name that this role's certificate is for, in the cluster that certificates call `domain`.
    #[must_use]
    pub fn name(self, domain: &str) -> String {
        format!("{}.{domain}", self.label())
    }
}

/// How a client of etcd checks its server, and proves who it is. All files are PEM, and are read again when they have
/// changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreTls {
    /// Certificates of the authorities that certify etcd's servers.
    pub ca_file: String,
    /// What etcd is shown, if it asks who calls.
    pub client: Option<ClientKeys>,
}

/// A client's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientKeys {
    /// The certificate, then those between it and its authority.
    pub cert_file: String,
    /// The private key of the certificate.
    pub key_file: String,
}
