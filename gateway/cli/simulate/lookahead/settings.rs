//! The settings of the benchmark.

use super::tokens::{Fit, NONE, STRONG, WEAK};

/// What is simulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Setting {
    /// Strong correlation of prefill and decode, 16 slots per worker, load 1.25.
    StrongB16Sat,
    /// The same at load 0.8: hardly a queue.
    StrongB16Load80,
    /// Weak correlation, 16 slots, load 1.25.
    WeakB16Sat,
    /// Topics nearly absent, 16 slots, load 1.25.
    NoneB16Sat,
    /// Strong correlation, 8 slots, load 1.25.
    StrongB8Sat,
    /// Strong correlation, 32 slots, load 1.25.
    StrongB32,
    /// Expert caches, strong correlation.
    CacheStrong,
    /// Expert caches, weak correlation.
    CacheWeak,
}

/// A setting of the router.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cluster {
    pub(super) fit: Fit,
    /// Slots per worker.
    pub(super) slots: u32,
    /// Arrivals over what full random batches serve.
    pub(super) load: f64,
}

/// What a setting asks for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Subject {
    Router(Cluster),
    /// The share of the signature in the value of a cached expert, and what a use still weighs a step later: one pair
    /// per fit, the same for all cache sizes.
    Cache {
        fit: Fit,
        share: f64,
        decay: f64,
    },
}

impl Setting {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::StrongB16Sat => "strong-b16-sat",
            Self::StrongB16Load80 => "strong-b16-load80",
            Self::WeakB16Sat => "weak-b16-sat",
            Self::NoneB16Sat => "none-b16-sat",
            Self::StrongB8Sat => "strong-b8-sat",
            Self::StrongB32 => "strong-b32",
            Self::CacheStrong => "cache-strong",
            Self::CacheWeak => "cache-weak",
        }
    }

    pub(super) const fn subject(self) -> Subject {
        let (fit, slots, load) = match self {
            Self::StrongB16Sat => (STRONG, 16, 1.25),
            Self::StrongB16Load80 => (STRONG, 16, 0.8),
            Self::WeakB16Sat => (WEAK, 16, 1.25),
            Self::NoneB16Sat => (NONE, 16, 1.25),
            Self::StrongB8Sat => (STRONG, 8, 1.25),
            Self::StrongB32 => (STRONG, 32, 1.25),
            Self::CacheStrong => {
                return Subject::Cache {
                    fit: STRONG,
                    share: 0.6,
                    decay: 0.9,
                };
            }
            Self::CacheWeak => {
                return Subject::Cache {
                    fit: WEAK,
                    share: 0.3,
                    decay: 0.9,
                };
            }
        };
        Subject::Router(Cluster { fit, slots, load })
    }
}
