//! The machine's side: how fast memory is read, how much this process has taken.

use std::time::Duration;

use foregate_kernels::{Cpu, ReadThrough};
use tokio::time::Instant;

use crate::error::CliError;

/// Bytes to read: several times the last-level caches of most processors.
const BYTES: usize = 1 << 30;
/// The best of so many passes counts, where it is measured once.
const PASSES: usize = 8;
/// The same where it is measured again and again, beside what it is compared with.
const FEW_PASSES: usize = 3;

/// Memory to measure how fast a processor reads it.
pub(super) struct Memory(ReadThrough);

impl Memory {
    pub(super) fn new(cpu: &Cpu) -> Result<Self, CliError> {
        ReadThrough::new(cpu, BYTES)
            .map(Self)
            .map_err(|error| CliError::runtime("memory to measure bandwidth with", &error))
    }

    /// Bytes per second that all threads read together now. Neighbours of a machine share its memory, so this may be
    /// twice as much a second later.
    pub(super) fn bandwidth_now(&self) -> f64 {
        self.best_of(FEW_PASSES)
    }

    fn best_of(&self, passes: usize) -> f64 {
        let mut best = Duration::MAX;
        for _ in 0..passes {
            let since = Instant::now();
            std::hint::black_box(self.0.read());
            best = best.min(since.elapsed());
        }
        self.0.bytes() as f64 / best.as_secs_f64()
    }
}

/// Bytes per second that all threads of `cpu` read together.
pub(in crate::bench) fn bandwidth(cpu: &Cpu) -> Result<f64, CliError> {
    Ok(Memory::new(cpu)?.best_of(PASSES))
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
