//! Small random checkpoints of every family, as a hub download has them: for tests, and large ones for
//! benchmarks. The same settings give the same bytes everywhere.
//!
//! Weights are drawn so that activations keep their scale and routing is far from ties: matrices at
//! `1.2 / sqrt(fan_in)`, routers at `3 / sqrt(fan_in)`, norms at `1 ± 0.1`, biases at `± 0.2`.

mod random;
mod write;

use serde_json::{Map, Value, json};

use foregate_api::model::{Family, ModelSpec};
use foregate_api::weights::WeightFormat;

use crate::spec::{self, SpecError};

/// What to draw. Fields that a family does not have are not written.
#[derive(Debug, Clone, PartialEq)]
pub struct Tiny {
    /// Which family.
    pub family: Family,
    /// Format of all tensors, one of the plain ones.
    pub format: WeightFormat,
    /// Another seed gives other weights.
    pub seed: u64,
    /// Tokens in the vocabulary; 1 begins, 2 ends a sequence.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head; `None` for `hidden / heads`.
    pub head_dim: Option<usize>,
    /// Routed experts per layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Inner width of an expert.
    pub expert_inner: usize,
    /// Inner width of dense blocks and of the shared expert.
    pub dense_inner: usize,
    /// Longest sequence in tokens.
    pub max_positions: usize,
    /// Number of safetensors files.
    pub shards: usize,
    /// Further fields of `config.json`, or other values for those written.
    pub set: Map<String, Value>,
}

impl Tiny {
    /// A model of some ten thousand weights.
    #[must_use]
    pub fn new(family: Family) -> Self {
        Self {
            family,
            format: WeightFormat::Float32,
            seed: 0,
            vocab: 64,
            hidden: 32,
            layers: 3,
            heads: 4,
            kv_heads: 2,
            head_dim: None,
            experts: 8,
            top_k: 2,
            expert_inner: 24,
            dense_inner: 48,
            max_positions: 256,
            shards: 1,
            set: Map::new(),
        }
    }

    /// The shape that the repository's throughput figures are given for: 0.9 billion weights, of which
    /// about 0.2 billion work on a token.
    #[must_use]
    pub fn bench09() -> Self {
        Self {
            family: Family::Qwen3Moe,
            format: WeightFormat::Bfloat16,
            seed: 0,
            vocab: 32_000,
            hidden: 1024,
            layers: 8,
            heads: 16,
            kv_heads: 4,
            head_dim: Some(64),
            experts: 64,
            top_k: 8,
            expert_inner: 512,
            dense_inner: 2048,
            max_positions: 4096,
            shards: 1,
            set: Map::new(),
        }
    }

    /// `config.json`.
    #[must_use]
    pub fn config(&self) -> Value {
        let mut config = self.common();
        let own = match self.family {
            Family::Qwen3Moe => json!({
                "moe_intermediate_size": self.expert_inner,
                "intermediate_size": self.dense_inner,
                "num_experts": self.experts,
                "norm_topk_prob": true,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "attention_bias": false,
                "use_sliding_window": false,
            }),
            Family::Qwen2Moe => json!({
                "moe_intermediate_size": self.expert_inner,
                "intermediate_size": self.dense_inner,
                "shared_expert_intermediate_size": self.dense_inner,
                "num_experts": self.experts,
                "norm_topk_prob": false,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "qkv_bias": true,
                "use_sliding_window": false,
            }),
            Family::Mixtral => json!({
                "intermediate_size": self.expert_inner,
                "num_local_experts": self.experts,
                "sliding_window": null,
            }),
            Family::Olmoe => json!({
                "intermediate_size": self.expert_inner,
                "num_experts": self.experts,
                "norm_topk_prob": false,
                "attention_bias": false,
                "clip_qkv": null,
            }),
        };
        for part in [own, Value::Object(self.set.clone())] {
            if let Value::Object(fields) = part {
                config.extend(fields);
            }
        }
        Value::Object(config)
    }

    /// Fields that all families have.
    fn common(&self) -> Map<String, Value> {
        let (model_type, architecture) = match self.family {
            Family::Qwen3Moe => ("qwen3_moe", "Qwen3MoeForCausalLM"),
            Family::Qwen2Moe => ("qwen2_moe", "Qwen2MoeForCausalLM"),
            Family::Mixtral => ("mixtral", "MixtralForCausalLM"),
            Family::Olmoe => ("olmoe", "OlmoeForCausalLM"),
        };
        let fields = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "dtype": self.format.to_string(),
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": self.max_positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_parameters": { "rope_theta": 10000.0, "rope_type": "default" },
            "tie_word_embeddings": false,
            "bos_token_id": 1,
            "eos_token_id": 2,
        });
        match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }

    /// The model's shape, by the same reading as any other checkpoint's.
    ///
    /// # Errors
    /// When the settings describe no model.
    pub fn spec(&self) -> Result<ModelSpec, SpecError> {
        spec::parse(self.config().to_string().as_bytes(), None).map(|config| config.spec)
    }
}

#[cfg(test)]
mod tests;
