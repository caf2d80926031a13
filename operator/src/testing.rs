//! Values that unit tests share.

use foregate_api::model::ModelSpec;

/// A small model of one MoE layer.
pub(crate) fn model(experts: usize) -> ModelSpec {
    let mut value = serde_json::json!({
        "family": "qwen3_moe", "formats": "float32", "vocab": 8, "hidden": 8, "layers": 1, "heads": 1, "kv_heads": 1,
        "head_dim": 8, "max_positions": 64, "rope_theta": 10000.0, "norm_eps": 1e-6, "qkv_bias": false,
        "clip_qkv": null, "tied_embeddings": true, "dense_inner": 8, "moe_blocks": [true], "top_k": 1,
        "expert_inner": 8, "norm_top_k": true, "shared_inner": null, "eos": [], "bos": null,
    });
    value["experts"] = experts.into();
    serde_json::from_value(value).unwrap()
}
