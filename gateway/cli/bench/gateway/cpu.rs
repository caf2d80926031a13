//! Processor time, as Linux counts it: of a gateway, of the bench's other processes, of the whole machine.

use std::fs::read_to_string;

use crate::error::CliError;

/// The kernel's unit in `/proc` on every platform that this runs on, `USER_HZ`: 100 per second.
const PER_SECOND: f64 = 100.0;

/// Processor seconds so far, or of a time.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Busy {
    /// Of the gateway.
    pub(super) gateway: f64,
    /// Of all of the bench.
    pub(super) bench: f64,
    /// Of everything on the machine.
    pub(super) machine: f64,
}

impl Busy {
    /// Reads the counters. The bench's processes are those given and this one.
    pub(super) fn read(gateway: Option<u32>, processes: &[u32]) -> Result<Self, CliError> {
        let of = |process: u32| {
            let path = format!("/proc/{process}/stat");
            let text =
                read_to_string(&path).map_err(|error| CliError::runtime(&path, &error))?;
            of_process(&text)
                .ok_or_else(|| CliError::Runtime(format!("{path}: no such fields")))
        };
        let path = "/proc/stat";
        let text = read_to_string(path).map_err(|error| CliError::runtime(path, &error))?;
        let machine = of_machine(&text)
            .ok_or_else(|| CliError::Runtime(format!("{path}: no line of all processors")))?;
        let mut bench = of(std::process::id())?;
        for process in processes {
            bench += of(*process)?;
        }
        Ok(Self {
            gateway: gateway.map(of).transpose()?.unwrap_or(0.0),
            bench,
            machine,
        })
    }

    /// What was used since `before`.
    pub(super) fn since(&self, before: &Self) -> Self {
        Self {
            gateway: self.gateway - before.gateway,
            bench: self.bench - before.bench,
            machine: self.machine - before.machine,
        }
    }
}

/// User and system time: fields 14 and 15, counted from behind the name, which may hold anything.
fn of_process(stat: &str) -> Option<f64> {
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some((next()? + next()?) / PER_SECOND)
}

/// All that was not idle, nor waiting for a disk, nor a guest's (which is in user time already).
fn of_machine(stat: &str) -> Option<f64> {
    let line = stat.lines().find(|line| line.starts_with("cpu "))?;
    let fields: Vec<f64> = line
        .split_ascii_whitespace()
        .skip(1)
        .map_while(|field| field.parse().ok())
        .collect();
    let [user, nice, system, _idle, _waits, hard, soft, ..] = fields[..] else {
        return None;
    };
    Some((user + nice + system + hard + soft) / PER_SECOND)
}

/// Work that wants a processor, mean of the last minute.
pub(super) fn load_average() -> Option<f64> {
    let text = read_to_string("/proc/loadavg").ok()?;
    text.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 9 9 20 0 2 0 5";
        assert_eq!(of_process(stat), Some(2.0));
        assert_eq!(of_process("7 (cut) S 1 2"), None);
        assert_eq!(of_process(""), None);
        let stat = "cpu  100 20 30 4000 500 6 4 9 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(of_machine(stat), Some(1.6));
        assert_eq!(of_machine("cpu0 1 1 1 1 1 1 1"), None);
    }

    #[test]
    fn time_passes_for_this_process() {
        let before = Busy::read(None, &[]).unwrap();
        let after = Busy::read(Some(std::process::id()), &[]).unwrap();
        let used = after.since(&before);
        assert!(used.bench >= 0.0 && used.machine >= 0.0);
        assert!(after.gateway > 0.0 || after.bench == 0.0);
    }
}
