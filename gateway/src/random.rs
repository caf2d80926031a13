//! Random numbers for ids and for seeds that a client did not give. Not for secrets.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers from a keyed hash (SipHash) of a counter; the key is drawn by the system at start.
#[derive(Debug, Default)]
pub struct Random {
    key: RandomState,
    counter: AtomicU64,
}

impl Random {
    /// The next number, uniform over 64 bits.
    pub fn next(&self) -> u64 {
        self.key
            .hash_one(self.counter.fetch_add(1, Ordering::Relaxed))
    }

    /// 32 hexadecimal digits.
    pub fn hex128(&self) -> String {
        format!("{:016x}{:016x}", self.next(), self.next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_differ() {
        let random = Random::default();
        let drawn: std::collections::BTreeSet<u64> = (0..1000).map(|_| random.next()).collect();
        assert_eq!(drawn.len(), 1000);
        assert_eq!(random.hex128().len(), 32);
    }
}
