//! Faults from outside: signals to processes.

use std::process::Command;

/// Sends a signal by name (`KILL`, `STOP`, `CONT`, `INT`, `TERM`).
///
/// # Panics
/// If there is no such process.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(pid.to_string())
        .status()
        .expect("kill exists");
    assert!(status.success(), "kill -{name} {pid}");
}

/// Whether a process exists and is no zombie.
#[must_use]
pub fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}
