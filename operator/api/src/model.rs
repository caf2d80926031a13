//! What a model is, as far as anybody but its own forward pass must know.

use serde::{Deserialize, Serialize};

/// A supported model family; each is one file in `worker/models/src/family` and one in the checkpoint's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Qwen3-MoE: QK norm per head, softmax then top-k, renormalised.
    Qwen3Moe,
    /// Qwen2-MoE: QKV bias, a shared expert behind a sigmoid gate.
    Qwen2Moe,
    /// Mixtral: softmax over the chosen top-k.
    Mixtral,
    /// OLMoE: QK norm over the whole projection.
    Olmoe,
}

/// The format of weights as stored and kept in memory. Arithmetic is float32 in both cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// IEEE single precision, 4 bytes.
    Float32,
    /// bfloat16, 2 bytes.
    Bfloat16,
}

impl WeightFormat {
    /// Bytes per weight.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 => 2,
        }
    }
}

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvFormat {
    /// IEEE single precision, 4 bytes.
    Float32,
    /// bfloat16, 2 bytes; queries and probabilities that meet them are rounded to it.
    Bfloat16,
}

impl KvFormat {
    /// Bytes per value.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 => 2,
        }
    }
}

/// A model's shape, resolved from its `config.json`: every field explicit, no defaults inferred later.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Which forward pass.
    pub family: Family,
    /// Format of the matrices.
    pub format: WeightFormat,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer blocks, dense and MoE together.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Longest sequence in tokens (prompt and answer).
    pub max_positions: usize,
    /// Rotary base frequency.
    pub rope_theta: f64,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Whether q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// OLMoE's clamp on q, k and v, if any.
    pub clip_qkv: Option<f32>,
    /// Input and output embedding are one matrix.
    pub tied_embeddings: bool,
    /// Inner width of the MLP of dense blocks; unused if every block is MoE.
    pub dense_inner: usize,
    /// For each block, whether its MLP is a mixture (true) or dense (false). Length `layers`.
    pub moe_blocks: Vec<bool>,
    /// Routed experts per MoE layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Inner width of one routed expert.
    pub expert_inner: usize,
    /// Whether the chosen weights are divided by their sum.
    pub norm_top_k: bool,
    /// Inner width of the shared expert, if the family has one.
    pub shared_inner: Option<usize>,
    /// Token ids that end a sequence (generation_config.json first, then config.json).
    pub eos: Vec<u32>,
    /// Token id that starts a sequence, if the tokenizer adds one.
    pub bos: Option<u32>,
}

impl ModelSpec {
    /// Number of MoE layers, the length of every per-layer array of placements and loads.
    #[must_use]
    pub fn moe_layers(&self) -> usize {
        self.moe_blocks.iter().filter(|moe| **moe).count()
    }

    /// Bytes of one routed expert in one layer: gate, up and down matrices.
    #[must_use]
    pub fn expert_bytes(&self) -> usize {
        let weights = self.hidden.saturating_mul(self.expert_inner);
        weights.saturating_mul(3 * self.format.bytes())
    }

    /// Keys and values are kept as the model computes: rounded where its weights are.
    #[must_use]
    pub const fn kv_format(&self) -> KvFormat {
        match self.format {
            WeightFormat::Float32 => KvFormat::Float32,
            WeightFormat::Bfloat16 => KvFormat::Bfloat16,
        }
    }

    /// Bytes of keys and values of one token over all layers.
    #[must_use]
    pub fn kv_bytes_per_token(&self) -> usize {
        let values = self.layers.saturating_mul(self.kv_heads);
        values
            .saturating_mul(self.head_dim)
            .saturating_mul(2 * self.kv_format().bytes())
    }
}
