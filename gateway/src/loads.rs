//! What this gateway has running on each worker: a count and the sum of signatures, kept by guards.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use foregate_api::ids::Rank;

use crate::signature::Signature;

#[derive(Debug, Default)]
struct Load {
    running: u32,
    /// Sums of whole numbers below 2^53, so adding and taking away is exact.
    signature: Vec<f64>,
}

/// Running sequences by worker.
#[derive(Debug, Default)]
pub struct Loads {
    by_rank: Mutex<BTreeMap<Rank, Load>>,
}

/// One sequence on one worker; counts it out when dropped, whatever the reason.
#[derive(Debug)]
pub struct LoadGuard {
    loads: Arc<Loads>,
    rank: Rank,
    signature: Option<Arc<Signature>>,
}

impl Loads {
    /// Counts a sequence in.
    #[must_use]
    pub fn enter(
        loads: &Arc<Self>,
        rank: Rank,
        signature: Option<Arc<Signature>>,
    ) -> LoadGuard {
        loads.with(rank, |load| {
            load.running += 1;
            load.add(signature.as_deref(), 1.0);
        });
        LoadGuard {
            loads: Arc::clone(loads),
            rank,
            signature,
        }
    }

    /// Running sequences on a worker.
    #[must_use]
    pub fn running(&self, rank: Rank) -> u32 {
        self.with(rank, |load| load.running)
    }

    /// Running sequences on a worker and the sum of their signatures.
    #[must_use]
    pub fn of(&self, rank: Rank) -> (u32, Vec<f64>) {
        self.with(rank, |load| (load.running, load.signature.clone()))
    }

    /// Forgets idle workers that are gone.
    pub fn keep_only(&self, alive: impl Fn(Rank) -> bool) {
        let mut by_rank = self.by_rank.lock().unwrap_or_else(PoisonError::into_inner);
        by_rank.retain(|rank, load| load.running > 0 || alive(*rank));
    }

    fn with<T>(&self, rank: Rank, change: impl FnOnce(&mut Load) -> T) -> T {
        let mut by_rank = self.by_rank.lock().unwrap_or_else(PoisonError::into_inner);
        change(by_rank.entry(rank).or_default())
    }
}

impl Load {
    fn add(&mut self, signature: Option<&Signature>, sign: f64) {
        let Some(signature) = signature else {
            return;
        };
        if self.signature.len() < signature.counts.len() {
            self.signature.resize(signature.counts.len(), 0.0);
        }
        for (sum, count) in self.signature.iter_mut().zip(&signature.counts) {
            *sum += sign * f64::from(*count);
        }
    }
}

impl LoadGuard {
    /// Replaces the guessed signature by the measured one.
    pub fn measured(&mut self, signature: Arc<Signature>) {
        self.loads.with(self.rank, |load| {
            load.add(self.signature.as_deref(), -1.0);
            load.add(Some(&signature), 1.0);
        });
        self.signature = Some(signature);
    }
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.loads.with(self.rank, |load| {
            load.running = load.running.saturating_sub(1);
            load.add(self.signature.as_deref(), -1.0);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_take_back_what_they_added() {
        let loads = Arc::new(Loads::default());
        let signature = |count| Arc::new(Signature::new(2, vec![count, 0]).unwrap());
        let first = Loads::enter(&loads, Rank(1), Some(signature(3)));
        let mut second = Loads::enter(&loads, Rank(1), None);
        second.measured(signature(4));
        assert_eq!(loads.of(Rank(1)), (2, vec![7.0, 0.0]));
        loads.keep_only(|_| false);
        drop(first);
        assert_eq!(loads.of(Rank(1)), (1, vec![4.0, 0.0]));
        drop(second);
        assert_eq!(loads.of(Rank(1)), (0, vec![0.0, 0.0]));
        loads.keep_only(|_| false);
        assert_eq!(loads.of(Rank(1)), (0, Vec::new()));
    }
}
