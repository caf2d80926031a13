//! `spec.security`.

use foregate_api::security::{ApiKeysSpec, CertManagerSpec, IssuerKind, SecuritySpec};

use super::checks::{Checks, object_name};

/// Who may speak with whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidatedSecurity {
    /// Where certificates of gateways and workers come from.
    pub certificates: Certificates,
    /// Secret with the keys of the API's clients.
    pub api_keys: Option<String>,
}

/// Where certificates come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Certificates {
    /// There are none: everybody is believed.
    None,
    /// The operator issues them.
    Operator,
    /// cert-manager does.
    CertManager {
        /// Name of the issuer.
        issuer: String,
        /// Which issuers it is of.
        kind: IssuerKind,
    },
}

pub(super) fn security(checks: &mut Checks, spec: SecuritySpec) -> ValidatedSecurity {
    let SecuritySpec {
        mtls,
        cert_manager,
        api_keys,
    } = spec;
    let mtls = mtls.unwrap_or(true);
    if !mtls && cert_manager.is_some() {
        checks.certificates_of_nobody();
    }
    let certificates = match cert_manager {
        _ if !mtls => Certificates::None,
        None => Certificates::Operator,
        Some(CertManagerSpec { issuer, kind }) => {
            checks.must("spec.security.certManager.issuer", &issuer, object_name);
            Certificates::CertManager {
                issuer,
                kind: kind.unwrap_or_default(),
            }
        }
    };
    let api_keys = api_keys.map(|ApiKeysSpec { secret_ref }| {
        checks.must(
            "spec.security.apiKeys.secretRef.name",
            &secret_ref.name,
            object_name,
        );
        secret_ref.name
    });
    ValidatedSecurity {
        certificates,
        api_keys,
    }
}
