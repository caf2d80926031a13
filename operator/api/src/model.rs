//! What a model is, as far as anybody but its own forward pass must know.

use serde::{Deserialize, Serialize};

use crate::weights::{Part, WeightFormat, WeightFormats};

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
    /// Formats of the matrices in memory.
    #[serde(alias = "format", deserialize_with = "one_or_each")]
    pub formats: WeightFormats,
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

/// A format for every part, or, as values of the store's format 1 have it, one for all.
fn one_or_each<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<WeightFormats, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrEach {
        Each(WeightFormats),
        One(WeightFormat),
    }
    Ok(match OneOrEach::deserialize(deserializer)? {
        OneOrEach::Each(formats) => formats,
        OneOrEach::One(format) => WeightFormats::all(format),
    })
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
        self.mlp_bytes(Part::Expert, self.expert_inner)
    }

    /// Bytes of what every worker holds: all matrices but routed experts, and norms and biases as float32.
    #[must_use]
    pub fn dense_bytes(&self) -> usize {
        let bytes = |part: Part, n: usize, k: usize| self.formats.of(part).matrix_bytes(n, k);
        let hidden = self.hidden;
        let queries = self.heads.saturating_mul(self.head_dim);
        let keys = self.kv_heads.saturating_mul(self.head_dim);
        let attention = [
            bytes(Part::Attention, queries, hidden),
            bytes(Part::Attention, keys, hidden).saturating_mul(2),
            bytes(Part::Attention, hidden, queries),
            self.vector_values_of_block(queries, keys).saturating_mul(4),
        ];
        let mut mixture = bytes(Part::Router, self.experts, hidden);
        if let Some(inner) = self.shared_inner {
            let shared = self.mlp_bytes(Part::Dense, inner);
            mixture = mixture.saturating_add(shared);
            mixture = mixture.saturating_add(bytes(Part::Router, 1, hidden));
        }
        let mixtures = self.moe_layers();
        let dense = self.mlp_bytes(Part::Dense, self.dense_inner);
        let mut all = vec![
            bytes(Part::Embedding, self.vocab, hidden),
            attention
                .into_iter()
                .fold(0, usize::saturating_add)
                .saturating_mul(self.layers),
            mixture.saturating_mul(mixtures),
            dense.saturating_mul(self.layers.saturating_sub(mixtures)),
            hidden.saturating_mul(4),
        ];
        if !self.tied_embeddings {
            all.push(bytes(Part::Output, self.vocab, hidden));
        }
        all.into_iter().fold(0, usize::saturating_add)
    }

    /// Values of a block's norms and biases.
    fn vector_values_of_block(&self, queries: usize, keys: usize) -> usize {
        let norms = match self.family {
            Family::Qwen3Moe => 2 * self.head_dim,
            Family::Olmoe => queries + keys,
            Family::Qwen2Moe | Family::Mixtral => 0,
        };
        let biases = if self.qkv_bias { queries + 2 * keys } else { 0 };
        2 * self.hidden + norms + biases
    }

    fn mlp_bytes(&self, part: Part, inner: usize) -> usize {
        let format = self.formats.of(part);
        format
            .matrix_bytes(inner, self.hidden)
            .saturating_mul(2)
            .saturating_add(format.matrix_bytes(self.hidden, inner))
    }

    /// Keys and values are kept as the attention computes: rounded where its inputs are.
    #[must_use]
    pub fn kv_format(&self) -> KvFormat {
        match self.formats.of(Part::Attention) {
            WeightFormat::Float32 | WeightFormat::Float16 => KvFormat::Float32,
            WeightFormat::Bfloat16
            | WeightFormat::Int8
            | WeightFormat::Int4 { .. }
            | WeightFormat::Fp8 { .. }
            | WeightFormat::Mxfp4 => KvFormat::Bfloat16,
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

/// What a launch must know of a model: its memory plan follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ModelFacts {
    /// Routed experts per MoE layer.
    pub experts: u32,
    /// Longest sequence in tokens.
    pub max_positions: u32,
    /// Bytes of keys and values of one token over all layers.
    pub kv_bytes_per_token: u64,
    /// Bytes of one slot over all MoE layers: an expert of each.
    pub slot_bytes: u64,
    /// Bytes of the weights that every worker holds.
    pub dense_bytes: u64,
}

impl ModelFacts {
    /// The facts of a model.
    #[must_use]
    pub fn of(model: &ModelSpec) -> Self {
        let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Self {
            experts: small(model.experts),
            max_positions: small(model.max_positions),
            kv_bytes_per_token: model.kv_bytes_per_token() as u64,
            slot_bytes: (model.expert_bytes() as u64).saturating_mul(model.moe_layers() as u64),
            dense_bytes: model.dense_bytes() as u64,
        }
    }
}
