//! `foregate-harness`: what the end-to-end tests drive the real binary with.
//!
//! In: the path of the binary, arguments, a model. Out: a running cluster and its URL, an HTTP and SSE
//! client, faults, an etcd that can be stopped, a hub and an OTLP receiver that speak the real protocols,
//! a Kubernetes cluster.
//! Invariants: every wait has a deadline and says what it waited for; whatever was started ends with its
//! owner; ports are chosen by the system. A failure here is the failure of the test that called, so this
//! crate panics with a message instead of returning errors.
#![forbid(unsafe_code)]
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "support for tests: a failure here is the test's failure, its clock is the real one"
)]

pub mod binary;
pub mod client;
pub mod cluster;
pub mod faults;
pub mod golden;
pub mod hub;
pub mod manifest;
pub mod otlp;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

/// A path of the repository.
#[must_use]
pub fn repository(path: &str) -> PathBuf {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    PathBuf::from(root)
        .join(path)
        .canonicalize()
        .unwrap_or_else(|error| panic!("{path} of the repository: {error}"))
}

/// Says that a test cannot run here. Under `FOREGATE_E2E_REQUIRE=1` that is a failure. The line is also added
/// to the file that `FOREGATE_E2E_SKIPPED` names, since what a passing test prints is not shown.
///
/// # Panics
/// Under `FOREGATE_E2E_REQUIRE=1`.
pub fn skip(reason: &str) {
    let required = std::env::var("FOREGATE_E2E_REQUIRE").is_ok_and(|value| value == "1");
    assert!(!required, "cannot run and must: {reason}");
    let line = format!("skipped: {reason}\n");
    print!("{line}");
    if let Some(path) = std::env::var_os("FOREGATE_E2E_SKIPPED") {
        let file = OpenOptions::new().create(true).append(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .expect("FOREGATE_E2E_SKIPPED names a file that can be written");
    }
}

/// Where PATH has a program.
#[must_use]
pub fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut files = std::env::split_paths(&path).map(|directory| directory.join(program));
    files.find(|file| file.is_file())
}
