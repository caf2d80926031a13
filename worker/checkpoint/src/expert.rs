//! One routed expert as a unit: its canonical bytes and their hash.
//!
//! Canonical bytes are those of gate, then up, then down, each in the format that it has in memory (see
//! [`WeightFormat`]). They are what workers send each other, and what the hash is over, so a copy that came
//! from a peer and one that came from the checkpoint can be told to be the same.

use std::borrow::Cow;
use std::fmt;

use foregate_api::weights::WeightFormat;

/// BLAKE3 of an expert's canonical bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertHash(pub [u8; 32]);

impl ExpertHash {
    /// The hash of canonical bytes.
    #[must_use]
    pub fn of(canonical: &[u8]) -> Self {
        Self(*blake3::hash(canonical).as_bytes())
    }
}

impl fmt::Display for ExpertHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ExpertHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExpertHash({self})")
    }
}

/// The three matrices of one expert, borrowed from the mapped file if they are in memory as they are there.
#[derive(Debug, Clone)]
pub struct ExpertParts<'a> {
    /// `inner × hidden`.
    pub gate: Cow<'a, [u8]>,
    /// `inner × hidden`.
    pub up: Cow<'a, [u8]>,
    /// `hidden × inner`.
    pub down: Cow<'a, [u8]>,
    /// Format of all three.
    pub format: WeightFormat,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Inner width.
    pub inner: usize,
}

impl ExpertParts<'_> {
    /// Gate, up and down, one after the other.
    #[must_use]
    pub fn to_canonical(&self) -> Vec<u8> {
        [&*self.gate, &*self.up, &*self.down].concat()
    }

    /// The hash of the canonical bytes, without copying them.
    #[must_use]
    pub fn hash(&self) -> ExpertHash {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(&self.gate)
            .update(&self.up)
            .update(&self.down);
        ExpertHash(*hasher.finalize().as_bytes())
    }
}
