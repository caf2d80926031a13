//! Processors as Linux tells them: its scheduler's calls, and `/sys/devices/system/cpu` (kernel documentation,
//! ABI/testing/sysfs-devices-system-cpu).

use std::fs;
use std::io;
use std::path::Path;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::Processor;

/// Those that the calling thread may use.
pub(super) fn processors() -> io::Result<Vec<Processor>> {
    Ok(bound()?.into_iter().map(processor).collect())
}

/// Numbers of the processors that the calling thread may use.
pub(super) fn bound() -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|id| set.is_set(*id)).collect())
}

/// Binds the calling thread to these; returns what it was bound to.
pub(super) fn bind(ids: &[usize]) -> io::Result<Vec<usize>> {
    let before = bound()?;
    let mut set = CpuSet::new();
    for id in ids {
        set.set(*id);
    }
    sched_setaffinity(None, &set)?;
    Ok(before)
}

/// Where the system does not tell, it is the only processor of its core, on node 0.
fn processor(id: usize) -> Processor {
    let folder = format!("/sys/devices/system/cpu/cpu{id}");
    let folder = Path::new(&folder);
    Processor {
        node: node(folder).unwrap_or(0),
        sibling: sibling(folder, id).unwrap_or(0),
        id,
    }
}

fn node(folder: &Path) -> Option<usize> {
    let names = fs::read_dir(folder).ok()?.flatten();
    let mut numbers = names.filter_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.strip_prefix("node")?.parse().ok()
    });
    numbers.next()
}

fn sibling(folder: &Path, id: usize) -> Option<usize> {
    let list = fs::read_to_string(folder.join("topology/thread_siblings_list")).ok()?;
    listed(&list).position(|sibling| sibling == id)
}

/// Numbers of a list like `0-2,8`.
fn listed(list: &str) -> impl Iterator<Item = usize> + '_ {
    list.trim().split(',').flat_map(|run| {
        let (first, last) = run.split_once('-').unwrap_or((run, run));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) => first..=last,
            _ => std::ops::RangeInclusive::new(1, 0),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        assert_eq!(listed("0-2,8\n").collect::<Vec<_>>(), [0, 1, 2, 8]);
        assert_eq!(listed("5").collect::<Vec<_>>(), [5]);
        assert_eq!(listed("what").count(), 0);
        assert_eq!(listed("").count(), 0);
    }
}
