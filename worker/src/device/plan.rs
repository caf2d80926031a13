//! What a worker will take of a card's memory. Pure.
//!
//! A card has no other memory to go to, and what does not fit would show under load, in the largest step. So all of it is
//! reckoned before anything is taken, for the largest step that the limits allow.

use foregate_api::model::ModelSpec;
use foregate_api::node::WorkerConfig;
use foregate_kernels::KvShape;

use crate::engine::LOGIT_BYTES;

/// Bytes that are left to the driver, its context, and the rounding of many small pieces.
pub(crate) const RESERVE: u64 = 256 << 20;
/// Positions of a sequence that one block of the attention takes; more are split, and partial results kept.
const ATTENTION_SPLIT: u64 = 512;

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CardPlan {
    /// Weights that are no expert's.
    pub(crate) dense: u64,
    /// Expert slots of all layers.
    pub(crate) experts: u64,
    /// Copies under way to a new placement, beside those of the old: one per layer.
    pub(crate) moving: u64,
    /// Keys and values.
    pub(crate) kv: u64,
    /// What the largest step needs between its kernels.
    pub(crate) activations: u64,
}

impl CardPlan {
    /// Of a worker that takes sequences into a cache of `kv`, if it does.
    pub(crate) fn of(spec: &ModelSpec, config: &WorkerConfig, kv: Option<KvShape>) -> Self {
        let layers = spec.moe_layers() as u64;
        let slots = u64::from(config.slots).min(spec.experts as u64);
        let expert = spec.expert_bytes() as u64;
        let attends = kv.is_some();
        Self {
            dense: if attends {
                spec.dense_bytes() as u64
            } else {
                0
            },
            experts: (layers * slots).saturating_mul(expert),
            moving: if slots < spec.experts as u64 {
                layers * expert
            } else {
                0
            },
            kv: kv.map_or(0, cache),
            activations: rows(spec, config, attends)
                .saturating_add(logits(spec, config, attends)),
        }
    }

    /// All of it, with the reserve.
    pub(crate) fn total(&self) -> u64 {
        [
            self.dense,
            self.experts,
            self.moving,
            self.kv,
            self.activations,
            RESERVE,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }

    /// Whether it fits into what is free.
    ///
    /// # Errors
    /// The sum, and what would fit.
    pub(crate) fn fits(&self, free: u64) -> Result<(), String> {
        let total = self.total();
        if total <= free {
            return Ok(());
        }
        let Self {
            dense,
            experts,
            moving,
            kv,
            activations,
        } = self;
        let sum = format!(
            "weights {dense} bytes + expert slots {experts} + copies under way {moving} + keys and values {kv} + activations \
             {activations} + reserve {RESERVE} = {total}, and {free} bytes of the card are free"
        );
        let without = total - kv;
        Err(match free.checked_sub(without).map(|left| left >> 20) {
            Some(most) if most > 0 && *kv > 0 => {
                format!("{sum}: spec.workers.kvMemory {most}Mi would fit")
            }
            _ => format!(
                "{sum}: give more workers (spec.workers.count), fewer redundantSlots, a smaller maxNumBatchedTokens, or a \
                 larger card"
            ),
        })
    }
}

/// Keys and values of all pages.
fn cache(shape: KvShape) -> u64 {
    let values = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.page_tokens;
    (shape.pages as u64).saturating_mul((values * shape.dtype.bytes()) as u64)
}

/// Activations of the largest step, rows by rows: the model's (`foregate_models`' scratch), those between kernels, and rows
/// that come from peers or go to them, for the engine's thread and the callee's.
fn rows(spec: &ModelSpec, config: &WorkerConfig, attends: bool) -> u64 {
    let n = |number: usize| number as u64;
    let (hidden, top_k, inner) = (n(spec.hidden), n(spec.top_k), n(spec.expert_inner));
    let (queries, keys) = (
        n(spec.heads * spec.head_dim),
        n(spec.kv_heads * spec.head_dim),
    );
    let widest = [
        hidden,
        queries,
        inner,
        n(spec.dense_inner),
        n(spec.shared_inner.unwrap_or(0)),
    ]
    .into_iter()
    .max()
    .unwrap_or(hidden);
    let splits = u64::from(config.max_model_len).div_ceil(ATTENTION_SPLIT);
    let partial = if splits > 1 {
        n(spec.heads) * splits * (n(spec.head_dim) + 2)
    } else {
        0
    };
    let walk = 4 * hidden + 2 * queries + 2 * keys + n(spec.experts) + 1;
    let chosen = top_k * (n(spec.moe_layers()) + 1);
    // Inputs rounded, products between the halves, both as wide as the widest feed-forward, in float32.
    let between = hidden + 3 * widest;
    let routed = top_k * (2 * inner + 2 * hidden + 8);
    let staged = 2 * (hidden + top_k * hidden);
    let dense = if attends { walk + chosen + partial } else { 0 };
    let row = 4 * (dense + between + routed + staged);
    u64::from(config.max_num_batched_tokens).saturating_mul(row)
}

fn logits(spec: &ModelSpec, config: &WorkerConfig, attends: bool) -> u64 {
    if !attends {
        return 0;
    }
    let decode = u64::from(config.max_num_seqs).saturating_mul(4 * spec.vocab as u64);
    decode.max(LOGIT_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn plan() -> CardPlan {
        CardPlan {
            dense: GIB,
            experts: 4 * GIB,
            moving: GIB,
            kv: 8 * GIB,
            activations: GIB,
        }
    }

    #[test]
    fn what_does_not_fit_is_told_with_what_would() {
        let total = plan().total();
        assert_eq!(total, 15 * GIB + RESERVE);
        assert_eq!(plan().fits(total), Ok(()));
        let less = plan().fits(total - 3 * GIB).unwrap_err();
        assert!(less.contains("+ keys and values 8589934592 +"), "{less}");
        assert!(
            less.ends_with("spec.workers.kvMemory 5120Mi would fit"),
            "{less}"
        );
        // What it says does fit.
        assert_eq!(
            CardPlan {
                kv: 5120 << 20,
                ..plan()
            }
            .fits(total - 3 * GIB),
            Ok(())
        );
        let none = plan().fits(7 * GIB).unwrap_err();
        assert!(none.contains("spec.workers.count"), "{none}");
        assert!(
            CardPlan {
                kv: u64::MAX,
                ..plan()
            }
            .fits(u64::MAX - 1)
            .is_err(),
            "no overflow"
        );
    }
}
