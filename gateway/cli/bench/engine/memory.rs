//! The machine's side: how fast memory is read, how much this process has taken.

use std::time::Duration;

use foregate_kernels::{Cpu, ReadThrough};
use tokio::time::Instant;

use crate::error::CliError;

/// Bytes to read: several times the last-level caches of most processors.
const BYTES: usize = 1 << 30;
/// The best of so many passes counts.
const PASSES: usize = 8;

/// Bytes per second that all threads of `cpu` read together.
pub(in crate::bench) fn bandwidth(cpu: &Cpu) -> Result<f64, CliError> {
    let memory = ReadThrough::new(cpu, BYTES)
        .map_err(|error| CliError::runtime("memory to measure bandwidth with", &error))?;
    let mut best = Duration::MAX;
    for _ in 0..PASSES {
        let since = Instant::now();
        std::hint::black_box(memory.read());
        best = best.min(since.elapsed());
    }
    Ok(memory.bytes() as f64 / best.as_secs_f64())
}

/// Most bytes of memory that this process had at once, files it mapped included; `None` where the system
/// does not say.
pub(super) fn peak_rss() -> Option<u64> {
    peak_of(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// The line `VmHWM` of proc(5), in KiB there.
fn peak_of(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read_in_bytes() {
        let status = "VmPeak:\t  900 kB\nVmHWM:\t   12 kB\nVmRSS:\t 8 kB\n";
        assert_eq!(peak_of(status), Some(12 * 1024));
        assert_eq!(peak_of("VmRSS:\t 8 kB\n"), None);
        assert_eq!(peak_of("VmHWM:\t many kB\n"), None);
    }
}
