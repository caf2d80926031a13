//! An authority with a folder of key files per role.
#![allow(
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a module of several test targets; its certificates are valid on the wall clock"
)]

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use foregate_api::tls::{TlsConfig, TlsRole};
use foregate_tls::Keys;
use foregate_tls::authority::{Authority, Issued, Validity};
use tempfile::TempDir;

/// The cluster of the tests.
pub const DOMAIN: &str = "tiny.default.foregate.internal";

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

fn validity(until: u64) -> Validity {
    Validity {
        from: now() - 7_200,
        until,
    }
}

pub struct Desk {
    domain: String,
    stored: Issued,
    dir: TempDir,
}

impl Desk {
    pub fn new() -> Self {
        let stored = Authority::create("an authority", validity(now() + 3_600)).unwrap();
        Self::with(stored, DOMAIN)
    }

    fn with(stored: Issued, domain: &str) -> Self {
        let desk = Self {
            domain: domain.to_owned(),
            stored,
            dir: tempfile::tempdir().unwrap(),
        };
        desk.trust(&[&desk]);
        desk
    }

    /// The same authority, for another cluster.
    pub fn of_cluster(&self, domain: &str) -> Self {
        Self::with(self.stored.clone(), domain)
    }

    /// The next authority of the same cluster.
    pub fn successor() -> Self {
        Self::new()
    }

    /// A certificate for a role.
    pub fn issued(&self, role: TlsRole) -> Issued {
        self.issued_until(role, now() + 3_600)
    }

    fn issued_until(&self, role: TlsRole, until: u64) -> Issued {
        let authority = Authority::open(&self.stored).unwrap();
        authority.role(role, &self.domain, validity(until)).unwrap()
    }

    fn path(&self, role: TlsRole, file: &str) -> PathBuf {
        self.dir.path().join(format!("{}-{file}", role.label()))
    }

    fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.crt")
    }

    pub fn config(&self, role: TlsRole) -> TlsConfig {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        TlsConfig {
            ca_file: text(&self.ca()),
            cert_file: text(&self.path(role, "tls.crt")),
            key_file: text(&self.path(role, "tls.key")),
            domain: self.domain.clone(),
        }
    }

    /// Writes a role's files.
    pub fn write(&self, role: TlsRole, issued: &Issued) {
        self.write_file(role, "tls.crt", &issued.cert);
        self.write_file(role, "tls.key", &issued.key);
    }

    pub fn write_file(&self, role: TlsRole, file: &str, text: &str) {
        std::fs::write(self.path(role, file), text).unwrap();
    }

    /// Writes whose word counts.
    pub fn trust(&self, desks: &[&Self]) {
        let all: String = desks.iter().map(|desk| desk.stored.cert.as_str()).collect();
        std::fs::write(self.ca(), all).unwrap();
    }

    pub fn forget_authorities(&self) {
        std::fs::remove_file(self.ca()).unwrap();
    }

    /// Keys of a role, in this desk's files.
    pub fn keys(&self, role: TlsRole) -> Keys {
        self.keys_until(role, now() + 3_600)
    }

    pub fn keys_until(&self, role: TlsRole, until: u64) -> Keys {
        self.write(role, &self.issued_until(role, until));
        Keys::open(&self.config(role), role).unwrap()
    }

    /// Keys of a role in files of their own; trusts what this desk trusts.
    pub fn keys_of(&self, role: TlsRole, issued: &Issued) -> Keys {
        let mut config = self.config(role);
        for (file, text) in [
            (&mut config.cert_file, &issued.cert),
            (&mut config.key_file, &issued.key),
        ] {
            file.push_str("-apart");
            std::fs::write(&*file, text).unwrap();
        }
        Keys::open(&config, role).unwrap()
    }

    /// The authority's certificate.
    pub fn authority(&self) -> &str {
        &self.stored.cert
    }
}
