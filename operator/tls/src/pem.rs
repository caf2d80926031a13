//! PEM files as certificates and keys.

use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::error::TlsError;

/// A file that the configuration names.
#[derive(Debug, Clone)]
pub(crate) struct Named {
    pub(crate) field: &'static str,
    pub(crate) path: String,
}

impl Named {
    pub(crate) fn new(field: &'static str, path: &str) -> Self {
        Self {
            field,
            path: path.to_owned(),
        }
    }

    pub(crate) fn read(&self) -> Result<Vec<u8>, TlsError> {
        std::fs::read(&self.path).map_err(|source| TlsError::Read {
            field: self.field,
            path: self.path.clone(),
            source,
        })
    }

    fn holds(&self, what: impl Into<String>) -> TlsError {
        TlsError::Holds {
            field: self.field,
            path: self.path.clone(),
            what: what.into(),
        }
    }

    fn certificates(&self, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
        let found = found.map_err(|error| self.holds(format!("is not PEM: {error}")))?;
        if found.is_empty() {
            return Err(
                self.holds("holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)")
            );
        }
        Ok(found)
    }

    /// The authorities of a file.
    pub(crate) fn authorities(&self, bytes: &[u8]) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(bytes)? {
            roots
                .add(certificate)
                .map_err(|error| self.holds(format!("has a broken certificate: {error}")))?;
        }
        Ok(Arc::new(roots))
    }
}

/// A certificate with its key, out of two files.
pub(crate) fn certified(
    (cert, cert_bytes): (&Named, &[u8]),
    (key, key_bytes): (&Named, &[u8]),
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, TlsError> {
    let chain = cert.certificates(cert_bytes)?;
    // The parser's words are left out: they might quote the file.
    let private = PrivateKeyDer::from_pem_slice(key_bytes).map_err(|_| {
        key.holds("holds no private key in PEM form (-----BEGIN PRIVATE KEY-----)")
    })?;
    let certified =
        CertifiedKey::from_der(chain, private, provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => key.holds(format!(
                "is not the key of the certificate in {}: write both anew, from one issue",
                cert.path
            )),
            other => key.holds(format!("cannot be used: {other}")),
        })?;
    Ok(Arc::new(certified))
}

/// Whether the certificate is for `name`; the remedy, if not.
pub(crate) fn is_for(
    cert: &Named,
    certified: &CertifiedKey,
    name: &rustls::pki_types::ServerName<'_>,
) -> Result<(), TlsError> {
    let judge = || {
        let parsed = rustls::server::ParsedCertificate::try_from(certified.end_entity_cert()?)?;
        rustls::client::verify_server_name(&parsed, name)
    };
    judge().map_err(|_| {
        cert.holds(format!(
            "is not for {0}: issue one with the DNS name {0}",
            name.to_str()
        ))
    })
}
