//! A certificate authority of one cluster: what the operator keeps, and what tests issue their keys with.
//!
//! In: names and times. Out: PEM. Keys are ECDSA over P-256, which every TLS library reads.

use std::time::{Duration, SystemTime};

use foregate_api::tls::TlsRole;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::UnixTime;

use crate::pem::{Named, certified};

/// From when to when a certificate is valid, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub from: u64,
    /// The last second.
    pub until: u64,
}

/// A certificate and its private key, both PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Issued {
    /// The certificate.
    pub cert: String,
    /// The private key.
    pub key: String,
}

impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued")
            .field("cert", &self.cert)
            .finish_non_exhaustive()
    }
}

/// Why nothing was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The library's; it never quotes a key.
    #[error("a certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
    /// A stored certificate is none.
    #[error("not a certificate in PEM form")]
    NotPem,
}

/// An authority with its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    /// A new authority. `name` is what people see in its certificate.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn create(name: &str, validity: Validity) -> Result<Issued, IssueError> {
        let mut params = params(name, Vec::new(), validity)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        Ok(Issued {
            cert: params.self_signed(&key)?.pem(),
            key: key.serialize_pem(),
        })
    }

    /// The authority that was [created](Self::create) earlier.
    ///
    /// # Errors
    /// When it is not one.
    pub fn open(stored: &Issued) -> Result<Self, IssueError> {
        let key = KeyPair::from_pem(&stored.key)?;
        Ok(Self {
            issuer: Issuer::from_ca_cert_pem(&stored.cert, key)?,
        })
    }

    /// A certificate for instances of `role`, of the cluster that certificates call `domain`.
    ///
    /// # Errors
    /// When the domain is no DNS name.
    pub fn role(
        &self,
        role: TlsRole,
        domain: &str,
        validity: Validity,
    ) -> Result<Issued, IssueError> {
        self.issue(&[role.name(domain)], validity)
    }

    /// A certificate for servers and clients of these names: DNS names or addresses.
    ///
    /// # Errors
    /// When a name is neither.
    pub fn issue(&self, names: &[String], validity: Validity) -> Result<Issued, IssueError> {
        let subject = names.first().map_or("", String::as_str);
        let mut params = params(subject, names.to_vec(), validity)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        Ok(Issued {
            cert: params.signed_by(&key, &self.issuer)?.pem(),
            key: key.serialize_pem(),
        })
    }
}

fn params(
    subject: &str,
    names: Vec<String>,
    validity: Validity,
) -> Result<CertificateParams, IssueError> {
    let mut params = CertificateParams::new(names)?;
    let mut shown = DistinguishedName::new();
    // X.509 allows 64 characters here. Nobody decides by it: names count, and they are elsewhere.
    shown.push(
        DnType::CommonName,
        subject.chars().take(64).collect::<String>(),
    );
    params.distinguished_name = shown;
    params.not_before = at(validity.from).into();
    params.not_after = at(validity.until).into();
    Ok(params)
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// From when to when the first certificate of a PEM text is valid.
///
/// # Errors
/// When there is none.
pub fn validity(pem: &str) -> Result<Validity, IssueError> {
    let (_, pem) =
        x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| IssueError::NotPem)?;
    let certificate = pem.parse_x509().map_err(|_| IssueError::NotPem)?;
    let times = certificate.validity();
    let seconds = |time: x509_parser::time::ASN1Time| {
        u64::try_from(time.timestamp()).map_err(|_| IssueError::NotPem)
    };
    Ok(Validity {
        from: seconds(times.not_before)?,
        until: seconds(times.not_after)?,
    })
}

/// Whether who trusts the authorities in `trusted` believes at `now` (seconds since 1970) that the holder of `issued` is
/// `name`. Also false if the key is not the certificate's, or anything is broken.
#[must_use]
pub fn vouches(trusted: &str, issued: &Issued, name: &str, now: u64) -> bool {
    let judge = || -> Option<()> {
        let provider = crate::keys::provider();
        let ca = Named::new("ca_file", "trusted");
        let roots = ca.authorities(trusted.as_bytes()).ok()?;
        let cert = Named::new("cert_file", "certificate");
        let key = Named::new("key_file", "key");
        let certified = certified(
            (&cert, issued.cert.as_bytes()),
            (&key, issued.key.as_bytes()),
            &provider,
        )
        .ok()?;
        let (leaf, between) = certified.cert.split_first()?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider)
            .build()
            .ok()?;
        let name = crate::keys::name(name).ok()?;
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
        let judged = verifier.verify_server_cert(leaf, between, &name, &[], now);
        judged.ok().map(drop)
    };
    judge().is_some()
}
