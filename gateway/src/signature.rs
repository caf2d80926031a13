//! A request's expert signature: rows per (MoE layer, expert), remembered per prompt prefix.
//!
//! A prompt is cut into blocks of 32 tokens; block `i` is known by a hash chained over blocks `0..=i`, so a
//! hash stands for a whole prefix. A finished prefill stores its histogram under the prefixes of its prompt;
//! a new request takes the histogram of its longest known prefix. The newest histogram of a prefix wins.

mod profile;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use profile::sampled_layers;
pub use profile::{Profile, probability};

/// Tokens per block.
pub const BLOCK: usize = 32;
/// Blocks of a prompt that are looked at; later ones say nothing new about the first expert choice.
const MAX_BLOCKS: usize = 256;
/// Prefixes remembered.
const CAPACITY: usize = 8192;
/// Bytes of histograms remembered; with large models it is this bound that holds.
const MAX_BYTES: usize = 64 << 20;

/// Rows per (MoE layer, expert), layer-major.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Signature {
    /// Experts per layer.
    pub experts: usize,
    /// `layers × experts` counts.
    pub counts: Vec<u32>,
}

impl Signature {
    /// A histogram as workers send it; `None` if its length is no multiple of `experts` or it is empty.
    #[must_use]
    pub fn new(experts: usize, counts: Vec<u32>) -> Option<Self> {
        let fits = experts > 0 && !counts.is_empty() && counts.len().is_multiple_of(experts);
        (fits && counts.iter().any(|count| *count > 0)).then_some(Self { experts, counts })
    }
}

/// What is known of a prompt.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// The histogram of the longest known prefix.
    pub signature: Option<Arc<Signature>>,
    /// Tokens of that prefix.
    pub tokens: usize,
}

#[derive(Debug)]
struct Remembered {
    signature: Arc<Signature>,
    used: u64,
}

#[derive(Debug, Default)]
struct Table {
    by_prefix: BTreeMap<u64, Remembered>,
    by_use: BTreeMap<u64, u64>,
    tick: u64,
}

/// Histograms by prompt prefix, the least recently used ones forgotten.
#[derive(Debug, Default)]
pub struct Signatures {
    table: Mutex<Table>,
}

impl Signatures {
    /// What is known of a prompt.
    #[must_use]
    pub fn known(&self, prompt: &[u32]) -> Known {
        let chain = prefixes(prompt);
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        for (blocks, hash) in chain.iter().enumerate().rev() {
            if let Some(signature) = table.touch(*hash) {
                return Known {
                    signature: Some(signature),
                    tokens: (blocks + 1) * BLOCK,
                };
            }
        }
        Known::default()
    }

    /// Remembers the histogram of a prompt under all its prefixes.
    pub fn remember(&self, prompt: &[u32], signature: &Arc<Signature>) {
        let capacity = CAPACITY
            .min(MAX_BYTES / (signature.counts.len() * 4).max(1))
            .max(64);
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        for hash in prefixes(prompt) {
            table.insert(hash, Arc::clone(signature), capacity);
        }
    }

    /// Prefixes remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.by_prefix.len()
    }

    /// Whether nothing is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Table {
    fn touch(&mut self, hash: u64) -> Option<Arc<Signature>> {
        self.tick += 1;
        let entry = self.by_prefix.get_mut(&hash)?;
        self.by_use.remove(&entry.used);
        entry.used = self.tick;
        self.by_use.insert(self.tick, hash);
        Some(Arc::clone(&entry.signature))
    }

    fn insert(&mut self, hash: u64, signature: Arc<Signature>, capacity: usize) {
        self.tick += 1;
        let used = self.tick;
        if let Some(old) = self.by_prefix.insert(hash, Remembered { signature, used }) {
            self.by_use.remove(&old.used);
        }
        self.by_use.insert(used, hash);
        while self.by_prefix.len() > capacity {
            let Some((_, oldest)) = self.by_use.pop_first() else {
                return;
            };
            self.by_prefix.remove(&oldest);
        }
    }
}

/// Chained hashes of the full blocks of a prompt (SipHash with a fixed key: equal prompts, equal hashes).
pub(crate) fn prefixes(prompt: &[u32]) -> Vec<u64> {
    let mut chain = 0_u64;
    prompt
        .chunks_exact(BLOCK)
        .take(MAX_BLOCKS)
        .map(|block| {
            let mut hasher = DefaultHasher::new();
            hasher.write_u64(chain);
            for token in block {
                hasher.write_u32(*token);
            }
            chain = hasher.finish();
            chain
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature(first: u32) -> Arc<Signature> {
        Arc::new(Signature::new(2, vec![first, 1]).unwrap())
    }

    #[test]
    fn the_longest_known_prefix_wins() {
        let signatures = Signatures::default();
        let long: Vec<u32> = (0..100).collect();
        signatures.remember(&long[..40], &signature(7));
        assert_eq!(signatures.known(&long).tokens, 32);
        signatures.remember(&long, &signature(9));
        let known = signatures.known(&long);
        assert_eq!(known.tokens, 96);
        assert_eq!(known.signature.unwrap().counts[0], 9);
        let mut other = long.clone();
        other[33] = 1000;
        assert_eq!(signatures.known(&other).tokens, 32);
        other[0] = 1000;
        assert!(signatures.known(&other).signature.is_none());
        assert!(signatures.known(&long[..31]).signature.is_none());
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let signatures = Signatures::default();
        let kept: Vec<u32> = vec![1; 32];
        signatures.remember(&kept, &signature(1));
        for id in 0..(CAPACITY as u32 + 50) {
            assert!(signatures.known(&kept).signature.is_some());
            signatures.remember(&[id + 2; 32], &signature(1));
        }
        assert_eq!(signatures.len(), CAPACITY);
        assert!(signatures.known(&[2; 32]).signature.is_none());
    }

    #[test]
    fn shapes_are_checked() {
        assert!(Signature::new(4, vec![1; 6]).is_none());
        assert!(Signature::new(0, vec![1]).is_none());
        assert!(Signature::new(2, vec![0; 4]).is_none());
        assert!(Signature::new(2, vec![]).is_none());
    }
}
