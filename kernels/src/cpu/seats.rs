//! Which processors a pool's threads keep to.
//!
//! A machine with several memory nodes reads its own node's memory faster than another's. Threads that stay on one node
//! find there what they wrote at load. On a machine with one node the system places threads at least as well as we
//! could, so only a wish for whole cores changes anything there.

use std::fmt;
use std::io;
use std::marker::PhantomData;

#[cfg(target_os = "linux")]
#[path = "seats/linux.rs"]
mod system;
#[cfg(not(target_os = "linux"))]
#[path = "seats/elsewhere.rs"]
mod system;

/// A logical processor that this process may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Processor {
    /// Its memory node.
    node: usize,
    /// Place among the logical processors of its core: 0 for the first. Second ones share the arithmetic of first ones.
    sibling: usize,
    /// Its number in the system.
    id: usize,
}

/// How closely threads are bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// To all processors of a memory node.
    Node,
    /// To one processor each.
    Processor,
}

/// Which of the pools on this machine asks, so that each finds a place of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Its number, below `of`.
    pub index: usize,
    /// Pools on the machine.
    pub of: usize,
}

/// Why threads cannot be bound as wished.
#[derive(Debug, thiserror::Error)]
pub enum SeatError {
    /// More threads than processors.
    #[error(
        "{wanted} threads ({of} workers of {threads}) cannot have a processor each: this process may use {have}"
    )]
    TooFew {
        /// Threads of all pools.
        wanted: usize,
        /// Pools.
        of: usize,
        /// Threads of each.
        threads: usize,
        /// Processors.
        have: usize,
    },
    /// The system does not tell, or has no such call.
    #[error("the system does not say which processors there are: {0}")]
    Unknown(#[from] io::Error),
}

/// The processors that one thread keeps to; the default one keeps to none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seat(Vec<usize>);

impl Seat {
    /// Binds the calling thread, until the guard is dropped. A system that refuses is told in the log: the thread then
    /// runs where it may.
    pub(super) fn take(&self) -> Seated {
        let bound = (!self.0.is_empty()).then(|| system::bind(&self.0));
        if let Some(Err(error)) = &bound {
            tracing::warn!(processors = %self, %error, "thread not bound");
        }
        Seated {
            before: bound.and_then(Result::ok),
            _stays: PhantomData,
        }
    }
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for &id in &self.0 {
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == id => *last = id,
                _ => runs.push((id, id)),
            }
        }
        for (i, (first, last)) in runs.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

/// Binds the thread that made it; dropped there, it lets the thread go where it went before. The default binds nothing.
#[derive(Debug, Default)]
#[must_use = "the thread is free again when the guard goes"]
pub struct Seated {
    before: Option<Vec<usize>>,
    /// It means the thread that made it.
    _stays: PhantomData<*const ()>,
}

impl Drop for Seated {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.before.take().map(|before| system::bind(&before)) {
            tracing::warn!(%error, "thread still bound");
        }
    }
}

/// One seat per thread of a pool, the caller's first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seats(Vec<Seat>);

impl From<usize> for Seats {
    /// So many threads, bound to nothing.
    fn from(threads: usize) -> Self {
        Self(vec![Seat::default(); threads.max(1)])
    }
}

impl Seats {
    /// Seats for `threads` threads on this machine.
    ///
    /// # Errors
    /// When there are fewer processors than threads that want one each, or the system does not tell.
    pub fn here(keep: Keep, share: Share, threads: usize) -> Result<Self, SeatError> {
        match system::processors() {
            Ok(processors) => choose(&processors, keep, share, threads),
            // Such a system has no nodes that a program could tell apart.
            Err(error) if error.kind() == io::ErrorKind::Unsupported && keep == Keep::Node => {
                Ok(Self::from(threads))
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn seat(&self, thread: usize) -> Seat {
        self.0.get(thread).cloned().unwrap_or_default()
    }

    /// All processors of all threads; for a thread that comes and goes.
    pub(super) fn all(&self) -> Seat {
        let mut all: Vec<usize> = self.0.iter().flat_map(|seat| &seat.0).copied().collect();
        all.sort_unstable();
        all.dedup();
        Seat(all)
    }
}

/// As [`Seats::here`], for a machine with these processors.
///
/// Pools are dealt to nodes in turn of their numbers, several to a node or several nodes to a pool; a pool of several
/// nodes deals its threads to them in turn. Within a node pools take cores one after the other, and second siblings
/// only when first ones are gone.
fn choose(
    processors: &[Processor],
    keep: Keep,
    share: Share,
    threads: usize,
) -> Result<Seats, SeatError> {
    let threads = threads.max(1);
    let of = share.of.max(1);
    let index = share.index.min(of - 1);
    let nodes = nodes(processors);
    if keep == Keep::Node && nodes.len() < 2 {
        return Ok(Seats::from(threads));
    }
    let too_few = || SeatError::TooFew {
        wanted: threads * of,
        of,
        threads,
        have: processors.len(),
    };
    if nodes.is_empty() {
        return Err(too_few());
    }
    let mut taken = vec![0; nodes.len()];
    let mut seats = Vec::new();
    // Pools before this one sit down first, so that it knows what is left.
    for pool in 0..=index {
        seats.clear();
        let own = nodes_of(pool, of, nodes.len());
        for thread in 0..threads {
            let node = own.start + thread % own.len();
            seats.push(match keep {
                Keep::Node => Seat(ids(&nodes[node])),
                Keep::Processor => {
                    let free = |node: usize| nodes[node].get(taken[node]).map(|p| (node, p.id));
                    // A full node sends its guests to the next one with room.
                    let found = free(node).or_else(|| (0..nodes.len()).find_map(free));
                    let (node, id) = found.ok_or_else(too_few)?;
                    taken[node] += 1;
                    Seat(vec![id])
                }
            });
        }
    }
    if keep == Keep::Processor && threads * of > processors.len() {
        return Err(too_few());
    }
    Ok(Seats(seats))
}

/// Processors by node, cores before second siblings.
fn nodes(processors: &[Processor]) -> Vec<Vec<Processor>> {
    let mut sorted = processors.to_vec();
    sorted.sort_unstable();
    let by_node = sorted.chunk_by(|a, b| a.node == b.node);
    by_node.map(<[Processor]>::to_vec).collect()
}

/// Nodes of pool `pool` of `of`.
fn nodes_of(pool: usize, of: usize, nodes: usize) -> std::ops::Range<usize> {
    let first = pool * nodes / of;
    let end = (pool + 1) * nodes / of;
    first..end.max(first + 1).min(nodes)
}

fn ids(node: &[Processor]) -> Vec<usize> {
    let mut ids: Vec<usize> = node.iter().map(|processor| processor.id).collect();
    ids.sort_unstable();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbered as Linux does: first siblings of all nodes, then the second ones.
    fn machine(nodes: usize, cores: usize, siblings: usize) -> Vec<Processor> {
        let per_sibling = nodes * cores;
        (0..per_sibling * siblings)
            .map(|id| Processor {
                node: id % per_sibling / cores,
                sibling: id / per_sibling,
                id,
            })
            .collect()
    }

    fn seats(
        machine: &[Processor],
        keep: Keep,
        index: usize,
        of: usize,
        threads: usize,
    ) -> Vec<String> {
        let seats = choose(machine, keep, Share { index, of }, threads).unwrap();
        seats.0.iter().map(Seat::to_string).collect()
    }

    #[test]
    fn one_node_binds_nobody_to_it() {
        let laptop = machine(1, 4, 2);
        assert_eq!(seats(&laptop, Keep::Node, 0, 2, 2), ["", ""]);
    }

    #[test]
    fn pools_have_nodes_of_their_own() {
        let server = machine(2, 4, 2);
        assert_eq!(
            seats(&server, Keep::Node, 0, 2, 2),
            ["0-3,8-11", "0-3,8-11"]
        );
        assert_eq!(seats(&server, Keep::Node, 1, 2, 1), ["4-7,12-15"]);
        // Two pools a node.
        assert_eq!(seats(&server, Keep::Node, 1, 4, 1), ["0-3,8-11"]);
        assert_eq!(seats(&server, Keep::Node, 2, 4, 1), ["4-7,12-15"]);
        // One pool on both.
        let both = seats(&server, Keep::Node, 0, 1, 3);
        assert_eq!(both, ["0-3,8-11", "4-7,12-15", "0-3,8-11"]);
    }

    #[test]
    fn cores_come_before_second_siblings() {
        let server = machine(2, 2, 2);
        assert_eq!(seats(&server, Keep::Processor, 0, 2, 3), ["0", "1", "4"]);
        assert_eq!(seats(&server, Keep::Processor, 1, 2, 3), ["2", "3", "6"]);
        assert_eq!(
            seats(&server, Keep::Processor, 0, 1, 4),
            ["0", "2", "1", "3"]
        );
    }

    #[test]
    fn no_processor_is_given_twice() {
        for (nodes, cores, siblings) in [(1, 3, 2), (2, 3, 1), (3, 2, 2), (4, 5, 1)] {
            let machine = machine(nodes, cores, siblings);
            for of in 1..=machine.len() {
                for threads in 1..=machine.len() / of {
                    let mut all: Vec<String> = (0..of)
                        .flat_map(|i| seats(&machine, Keep::Processor, i, of, threads))
                        .collect();
                    let given = all.len();
                    all.sort_unstable();
                    all.dedup();
                    assert_eq!(given, threads * of);
                    assert_eq!(
                        all.len(),
                        given,
                        "{nodes} {cores} {siblings} {of} {threads}"
                    );
                }
            }
        }
    }

    #[test]
    fn too_many_threads_are_refused_by_every_pool() {
        let laptop = machine(1, 2, 2);
        for index in 0..2 {
            let share = Share { index, of: 2 };
            let error = choose(&laptop, Keep::Processor, share, 3).unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with("6 threads (2 workers of 3)"), "{text}");
        }
        assert!(choose(&[], Keep::Processor, Share { index: 0, of: 1 }, 1).is_err());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_sits_where_it_was_told_and_gets_up_again() {
        let processors = system::processors().unwrap();
        let before = system::bound().unwrap();
        assert_eq!(processors.len(), before.len());
        let last = processors.last().unwrap().id;
        let seat = Seat(vec![last]);
        {
            let _seated = seat.take();
            assert_eq!(system::bound().unwrap(), [last]);
        }
        assert_eq!(system::bound().unwrap(), before);
        let _none = Seat::default().take();
        assert_eq!(system::bound().unwrap(), before);
    }
}
