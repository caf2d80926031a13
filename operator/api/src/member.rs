//! A worker as the others see it in the store.

use serde::{Deserialize, Serialize};

use crate::cpu::Arithmetic;
use crate::ids::{Epoch, Rank};
use crate::model::ModelSpec;

/// What a worker does for the others. All do both, unless the manifest divides them
/// (attention-FFN disaggregation).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Duty {
    /// Takes sequences, and holds experts.
    #[default]
    Both,
    /// Takes sequences; their rows all go to others.
    Attention,
    /// Holds experts; has neither attention weights nor keys and values.
    Experts,
}

impl Duty {
    /// The duty of a rank: the first ranks run attention only, the next hold experts only, the others do both.
    #[must_use]
    pub const fn of(rank: Rank, attention_only: u32, expert_only: u32) -> Self {
        if rank.0 < attention_only {
            Self::Attention
        } else if rank.0 - attention_only < expert_only {
            Self::Experts
        } else {
            Self::Both
        }
    }

    /// Whether it takes sequences.
    #[must_use]
    pub const fn runs_attention(self) -> bool {
        matches!(self, Self::Both | Self::Attention)
    }

    /// Whether it holds experts.
    #[must_use]
    pub const fn holds_experts(self) -> bool {
        matches!(self, Self::Both | Self::Experts)
    }
}

/// Where a worker is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Dense weights loaded, waiting for the first placement or fetching its experts.
    Joining,
    /// Serving.
    Ready,
    /// Finishes what it has, takes nothing new.
    Draining,
}

/// One worker's registration, kept under its lease.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its number.
    pub rank: Rank,
    /// A number drawn anew at every start of the process, so that a restart is told from a reconnect.
    pub incarnation: u64,
    /// `host:port` of its gRPC services (Generate, Experts).
    pub rpc: String,
    /// `host:port` of its exchange listener; the local fabric uses `local:<rank>`.
    pub exchange: String,
    /// Failure domain (host name, rack, zone: whatever the manifest said), empty if unknown.
    pub domain: String,
    /// Expert slots per MoE layer; none if it holds no experts.
    pub slots: u32,
    /// Where it is in its life.
    pub phase: Phase,
    /// The model it loaded; members of one cluster agree on it.
    pub model: ModelSpec,
    /// Name of the instruction path its kernels chose, for example `avx512`; [`Arithmetic::CARD`] if a card computes.
    pub cpu_path: String,
    /// Pages of its KV cache; none if it takes no sequences.
    pub kv_pages: u32,
    /// Tokens per page.
    pub page_tokens: u32,
}

impl Member {
    /// How its kernels sum.
    #[must_use]
    pub fn arithmetic(&self) -> Arithmetic {
        Arithmetic::of(&self.cpu_path)
    }

    /// Whether it takes sequences, once it is ready.
    #[must_use]
    pub const fn runs_attention(&self) -> bool {
        self.kv_pages > 0
    }

    /// Whether rows and tokens of both may be mixed: the same model, summed in the same way.
    #[must_use]
    pub fn is_kin(&self, other: &Self) -> bool {
        self.model == other.model && self.arithmetic() == other.arithmetic()
    }
}

/// A worker's progress in a rollover, under `placement/ack/<rank>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ack {
    /// Highest epoch whose experts are all resident and verified here.
    pub prepared: Epoch,
    /// Epoch that this worker's engine uses for new steps.
    pub serving: Epoch,
    /// Highest epoch that no step of this worker uses any more and never will again.
    pub drained: Epoch,
}
