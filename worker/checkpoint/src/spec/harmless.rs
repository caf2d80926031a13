//! Fields that inference does not depend on, and fields of which only the neutral value is supported.

use serde_json::Value;

use foregate_api::model::Family;

use super::SpecError;
use super::fields::{Fields, refuse, shorten};

/// Fields that do not change the logits of a forward pass: provenance, training, and settings of
/// generation that a request brings itself.
pub(super) const FIELDS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "length_penalty",
    "max_length",
    "max_window_layers",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "router_z_loss_coef",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
];

/// Fields that are fine when they are absent or have their neutral value, with the remedy otherwise.
fn neutral() -> [(&'static str, Value, &'static str); 11] {
    const OTHER: &str = "this variant of the architecture is not supported";
    [
        ("hidden_act", Value::from("silu"), OTHER),
        ("attention_bias", Value::from(false), OTHER),
        ("mlp_bias", Value::from(false), OTHER),
        ("add_cross_attention", Value::from(false), OTHER),
        ("is_encoder_decoder", Value::from(false), OTHER),
        ("tie_encoder_decoder", Value::from(false), OTHER),
        ("is_decoder", Value::from(false), OTHER),
        ("attn_logit_softcapping", Value::Null, OTHER),
        ("final_logit_softcapping", Value::Null, OTHER),
        (
            "auto_map",
            Value::Null,
            "models that bring their own code are not supported",
        ),
        (
            "pruned_heads",
            Value::Object(serde_json::Map::new()),
            "use the checkpoint without pruned heads",
        ),
    ]
}

/// Fields that some of a family's configurations repeat although its architecture fixes them.
fn fixed(family: Family) -> Vec<(&'static str, Value, &'static str)> {
    const OTHER: &str = "this variant of the family is not supported";
    match family {
        Family::Qwen3Moe => vec![
            ("qkv_bias", Value::from(false), OTHER),
            ("shared_expert_intermediate_size", Value::from(0), OTHER),
            ("use_qk_norm", Value::from(true), OTHER),
        ],
        Family::Qwen2Moe | Family::Mixtral | Family::Olmoe => Vec::new(),
    }
}

/// Refuses what would switch on a computation that this crate's users do not have.
pub(super) fn refuse_active(fields: &mut Fields<'_>, family: Family) -> Result<(), SpecError> {
    for (name, wanted, remedy) in neutral().into_iter().chain(fixed(family)) {
        if let Some(value) = fields.value(name)
            && *value != wanted
        {
            return Err(refuse(
                name,
                format!("{} is not supported", shorten(value)),
                remedy,
            ));
        }
    }
    Ok(())
}
