//! Keys of gateway and workers for one run: an authority that is forgotten once it has issued them.

use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use foregate_api::tls::{ROOT, TlsRole};
use foregate_operator::launch::KeyFolders;
use foregate_tls::authority::{Authority, Validity};
use tempfile::TempDir;

use crate::error::CliError;

/// Longest run. Certificates of one run are not renewed.
const LIFE: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The folder, for as long as this is held.
#[derive(Debug)]
pub(crate) struct RunKeys {
    pub(crate) folders: KeyFolders,
    _dir: TempDir,
}

/// Makes an authority and a certificate per role.
///
/// # Errors
/// When the temporary directory cannot be written.
pub(crate) fn make(cluster: &str) -> Result<RunKeys, CliError> {
    let failed = |error: &dyn std::error::Error| {
        CliError::Runtime(format!("keys for --mtls cannot be made: {error}"))
    };
    let dir = tempfile::tempdir().map_err(|error| failed(&error))?;
    let domain = format!("{cluster}.up.{ROOT}");
    let validity = validity();
    let stored = Authority::create(&format!("foregate up {cluster}"), validity)
        .map_err(|error| failed(&error))?;
    let authority = Authority::open(&stored).map_err(|error| failed(&error))?;
    let folder = |role: TlsRole| dir.path().join(role.label());
    for role in TlsRole::ALL {
        let issued = authority
            .role(role, &domain, validity)
            .map_err(|error| failed(&error))?;
        let files = [
            ("ca.crt", &stored.cert),
            ("tls.crt", &issued.cert),
            ("tls.key", &issued.key),
        ];
        write(&folder(role), &files).map_err(|error| failed(&error))?;
    }
    let text = |role| folder(role).to_string_lossy().into_owned();
    Ok(RunKeys {
        folders: KeyFolders {
            gateway: text(TlsRole::Gateway),
            worker: text(TlsRole::Worker),
            domain,
        },
        _dir: dir,
    })
}

#[expect(
    clippy::disallowed_methods,
    reason = "certificates are valid on the wall clock"
)]
fn validity() -> Validity {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    Validity {
        from: now.saturating_sub(60),
        until: now + LIFE.as_secs(),
    }
}

/// Files that only their owner reads.
fn write(folder: &Path, files: &[(&str, &String)]) -> std::io::Result<()> {
    DirBuilder::new().mode(0o700).create(folder)?;
    for (name, text) in files {
        let mut options = File::options();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(folder.join(name))?;
        file.write_all(text.as_bytes())?;
    }
    Ok(())
}
