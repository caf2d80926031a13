//! What goes wrong, with the file to change.

use std::io;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError};

/// Why keys cannot be used, or why a connection did not come about.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of keys cannot be read.
    #[error("tls.{field}: {path} cannot be read: {source}; is the Secret there and mounted?")]
    Read {
        /// Field of the configuration.
        field: &'static str,
        /// The file.
        path: String,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// A file of keys does not hold what it should.
    #[error("tls.{field}: {path} {what}")]
    Holds {
        /// Field of the configuration.
        field: &'static str,
        /// The file.
        path: String,
        /// What is wrong with it, and what it should hold.
        what: String,
    },
    /// A name that certificates cannot have.
    #[error(
        "tls.domain: {name:?} is no DNS name; write one such as tiny.default.foregate.internal"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The other side is not who it should be, or does not believe this one.
    #[error("{why}")]
    Peer {
        /// What is the matter, and what helps.
        why: String,
        /// What was found.
        #[source]
        source: rustls::Error,
    },
    /// The connection broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The handshake took too long.
    #[error("no handshake within {} ms; does the other side speak TLS?", .0.as_millis())]
    Slow(Duration),
}

impl TlsError {
    /// Whether the other side is to blame, or what it thinks of this one; not the network.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        matches!(self, Self::Peer { .. })
    }

    /// A failed handshake, told in terms of the files. `peer` is who should be there.
    pub(crate) fn handshake(error: io::Error, files: &Files<'_>) -> Self {
        match error.downcast::<rustls::Error>() {
            Ok(source) => Self::Peer {
                why: why(&source, files),
                source,
            },
            Err(error) => Self::Io(error),
        }
    }
}

/// What a handshake was about.
#[derive(Debug)]
pub(crate) struct Files<'a> {
    /// The authorities that were asked.
    pub(crate) ca_file: &'a str,
    /// What this side showed.
    pub(crate) cert_file: Option<&'a str>,
    /// Names that the other side's certificate might have been for.
    pub(crate) names: &'a [String],
}

fn why(error: &rustls::Error, files: &Files<'_>) -> String {
    let Files {
        ca_file,
        cert_file,
        names,
    } = files;
    let names = names.join(" or ");
    match error {
        rustls::Error::NoCertificatesPresented => format!(
            "the other side shows no certificate: give it one for {names} from an authority of {ca_file}"
        ),
        rustls::Error::InvalidCertificate(what) => match what {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => format!(
                "the other side's certificate is from none of the authorities in {ca_file}: is it of another cluster? \
                 Give it one from there, or add its authority's certificate to that file"
            ),
            CertificateError::NotValidForName
            | CertificateError::NotValidForNameContext { .. } => format!(
                "the other side's certificate is not for {names}: is it of another cluster or role?"
            ),
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => format!(
                "the other side's certificate is not valid at this time: {what}. Renew it, or set the clocks"
            ),
            other => format!("the other side's certificate cannot be used: {other}"),
        },
        rustls::Error::AlertReceived(alert) => refused(*alert, *cert_file),
        rustls::Error::InvalidMessage(_) | rustls::Error::InappropriateMessage { .. } => {
            format!(
                "the other side does not speak TLS as agreed ({error}): has it a `tls` section too?"
            )
        }
        other => format!("the handshake failed: {other}"),
    }
}

fn refused(alert: AlertDescription, cert_file: Option<&str>) -> String {
    match cert_file {
        None => format!(
            "the other side wants a certificate, or refuses this connection ({alert:?}): give it a certificate to show"
        ),
        Some(file) => format!(
            "the other side refuses the certificate in {file} ({alert:?}): compare its authorities and names with those \
             that the other side trusts"
        ),
    }
}
