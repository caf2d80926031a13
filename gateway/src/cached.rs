//! Which worker read which prompt prefix, and so is likely to have its keys and values.
//!
//! Known by the same chained hashes as signatures. Workers do not say what they evict, so this is a guess that grows
//! old: the least recently used prefixes are forgotten, and with a worker all of its own.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use foregate_api::ids::Rank;

use crate::signature::{BLOCK, prefixes};

/// Prefixes remembered.
const CAPACITY: usize = 65_536;
/// Workers remembered per prefix, the newest.
const WORKERS: usize = 4;

#[derive(Debug, Default)]
struct Table {
    by_prefix: BTreeMap<u64, (u64, Vec<Rank>)>,
    by_use: BTreeMap<u64, u64>,
    tick: u64,
}

/// Workers by prompt prefix.
#[derive(Debug, Default)]
pub struct Cached {
    table: Mutex<Table>,
}

impl Cached {
    /// A worker read a prompt.
    pub fn read(&self, prompt: &[u32], worker: Rank) {
        let chain = prefixes(prompt);
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        for hash in chain {
            table.note(hash, worker);
        }
    }

    /// Prompt tokens that workers are likely to have, longest first; workers not named have none.
    #[must_use]
    pub fn of(&self, prompt: &[u32]) -> Vec<(Rank, u32)> {
        let chain = prefixes(prompt);
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found: Vec<(Rank, u32)> = Vec::new();
        for (block, hash) in chain.iter().enumerate().rev() {
            let Some((_, workers)) = table.by_prefix.get(hash) else {
                continue;
            };
            for worker in workers {
                if !found.iter().any(|(known, _)| known == worker) {
                    found.push((*worker, ((block + 1) * BLOCK) as u32));
                }
            }
        }
        found
    }

    /// Forgets workers that are gone.
    pub fn keep_only(&self, alive: impl Fn(Rank) -> bool) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, workers) in table.by_prefix.values_mut() {
            workers.retain(|worker| alive(*worker));
        }
    }
}

impl Table {
    fn note(&mut self, hash: u64, worker: Rank) {
        self.tick += 1;
        let (used, workers) = self.by_prefix.entry(hash).or_default();
        self.by_use.remove(used);
        *used = self.tick;
        workers.retain(|known| *known != worker);
        workers.insert(0, worker);
        workers.truncate(WORKERS);
        self.by_use.insert(self.tick, hash);
        while self.by_prefix.len() > CAPACITY {
            let Some((_, oldest)) = self.by_use.pop_first() else {
                return;
            };
            self.by_prefix.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_is_known_by_its_longest_prefix() {
        let cached = Cached::default();
        let prompt: Vec<u32> = (0..100).collect();
        cached.read(&prompt[..40], Rank(1));
        cached.read(&prompt, Rank(2));
        assert_eq!(cached.of(&prompt), [(Rank(2), 96), (Rank(1), 32)]);
        assert!(cached.of(&prompt[1..]).is_empty());
        cached.keep_only(|rank| rank == Rank(1));
        assert_eq!(cached.of(&prompt), [(Rank(1), 32)]);
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let cached = Cached::default();
        for id in 0..(CAPACITY as u32 + 2) {
            cached.read(&[id; BLOCK], Rank(0));
        }
        assert!(cached.of(&[1; BLOCK]).is_empty());
        assert_eq!(cached.of(&[2; BLOCK]), [(Rank(0), BLOCK as u32)]);
    }
}
