//! Identities as types, so that a rank is never passed where an expert is meant.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The id as an index into a dense array.
            #[must_use]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// A worker's number in its cluster, from 0 without gaps at start.
    Rank(u32)
}
id! {
    /// An MoE layer, counted over MoE layers only (a dense layer has no `LayerId`), from 0.
    LayerId(u32)
}
id! {
    /// A routed expert of a layer, from 0.
    ExpertId(u32)
}
id! {
    /// The number of a placement. It also fixes the ranks it was made for. The first is 1; 0 means "none yet".
    Epoch(u64)
}

impl Epoch {
    /// The epoch after this one; the last one has none and stays.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}
