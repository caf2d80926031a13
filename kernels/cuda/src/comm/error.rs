//! What goes wrong between ranks.

use std::path::PathBuf;
use std::time::Duration;

use super::Version;

/// An error of the NCCL layer.
#[derive(Debug, thiserror::Error)]
pub enum CommError {
    /// No library could be opened.
    #[error("NCCL cannot be opened ({tried}): {why}")]
    Library {
        /// The names or the path that were tried.
        tried: String,
        /// What the loader says.
        why: String,
    },
    /// The library is older than this layer speaks.
    #[error("{} is NCCL {found}; {floor} or newer is needed", path.display())]
    Old {
        /// The library.
        path: PathBuf,
        /// Its version.
        found: Version,
        /// The oldest that is taken.
        floor: Version,
    },
    /// The library lacks a function that every version from the floor on has.
    #[error("{} lacks {symbol}: it is no NCCL, or a reduced one", path.display())]
    Symbol {
        /// The library.
        path: PathBuf,
        /// The function.
        symbol: &'static str,
    },
    /// A call of the library itself, before there was a communicator.
    #[error("{call} failed with code {code}: {text}")]
    Early {
        /// The function.
        call: &'static str,
        /// NCCL's result code.
        code: i32,
        /// NCCL's words.
        text: String,
    },
    /// A call failed, or an operation that it had begun.
    #[error("{call} failed with code {code} on rank {rank} of epoch {epoch}: {text}")]
    Call {
        /// The function.
        call: &'static str,
        /// NCCL's result code.
        code: i32,
        /// NCCL's words.
        text: String,
        /// Who called.
        rank: u32,
        /// For which epoch.
        epoch: u64,
    },
    /// An operation did not end in time.
    #[error("{call} did not end within {waited:?} on rank {rank} of epoch {epoch}")]
    Deadline {
        /// The function.
        call: &'static str,
        /// How long it was waited for.
        waited: Duration,
        /// Who waited.
        rank: u32,
        /// For which epoch.
        epoch: u64,
    },
    /// Not called at all.
    #[error("{call} is refused on rank {rank} of epoch {epoch}: {why}")]
    Refused {
        /// The function.
        call: &'static str,
        /// Why.
        why: String,
        /// Who called.
        rank: u32,
        /// For which epoch.
        epoch: u64,
    },
}

impl CommError {
    /// Short name of the kind, for metrics and events.
    #[must_use]
    pub const fn category(&self) -> &'static str {
        match self {
            Self::Library { .. } => "library",
            Self::Old { .. } => "version",
            Self::Symbol { .. } => "symbol",
            Self::Early { .. } | Self::Call { .. } => "call",
            Self::Deadline { .. } => "deadline",
            Self::Refused { .. } => "refused",
        }
    }

    /// The function that failed or was not called; that of opening a library, before there is any other.
    #[must_use]
    pub const fn call(&self) -> &'static str {
        match self {
            Self::Library { .. } | Self::Old { .. } | Self::Symbol { .. } => "dlopen",
            Self::Early { call, .. }
            | Self::Call { call, .. }
            | Self::Deadline { call, .. }
            | Self::Refused { call, .. } => call,
        }
    }

    /// Whether a new communicator, of a later epoch, may do better. What the library or the machine lacks stays.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Call { .. } | Self::Deadline { .. } | Self::Refused { .. }
        )
    }
}
