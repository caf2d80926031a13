//! The four families' fields, with the defaults of their configuration classes in transformers.

use foregate_api::model::{Family, ModelSpec};
use foregate_api::weights::WeightFormats;

use super::SpecError;
use super::fields::{Fields, refuse, shorten};
use super::rope;
use super::tokens::Tokens;

/// Upper bounds that keep sizes computed from a configuration far from overflow
/// (`2^24 · 2^20 · 4` bytes for the embedding) and a hostile file from a huge allocation.
const MOST_WIDTH: usize = 1 << 20;
const MOST_VOCAB: usize = 1 << 24;
const MOST_LAYERS: usize = 1 << 12;
const MOST_HEADS: usize = 1 << 14;
const MOST_EXPERTS: usize = 1 << 16;
const MOST_POSITIONS: usize = 1 << 28;
/// Experts over all layers; the largest public models have some forty thousand. Each has three names in
/// the list that the weights are checked against.
const MOST_EXPERTS_IN_ALL: usize = 1 << 18;

/// What a family assumes where its configuration is silent.
struct Defaults {
    kv_heads: Option<usize>,
    max_positions: usize,
    rope_theta: f64,
    norm_eps: f64,
    dense_inner: usize,
    expert_inner: Option<usize>,
}

impl Defaults {
    const fn of(family: Family) -> Self {
        match family {
            Family::Qwen3Moe => Self {
                kv_heads: Some(4),
                max_positions: 32_768,
                rope_theta: 10_000.0,
                norm_eps: 1e-6,
                dense_inner: 6144,
                expert_inner: Some(768),
            },
            Family::Qwen2Moe => Self {
                kv_heads: Some(16),
                max_positions: 32_768,
                rope_theta: 10_000.0,
                norm_eps: 1e-6,
                dense_inner: 5632,
                expert_inner: Some(1408),
            },
            Family::Mixtral => Self {
                kv_heads: Some(8),
                max_positions: 131_072,
                rope_theta: 1_000_000.0,
                norm_eps: 1e-5,
                dense_inner: 14_336,
                expert_inner: None,
            },
            Family::Olmoe => Self {
                kv_heads: None,
                max_positions: 4096,
                rope_theta: 10_000.0,
                norm_eps: 1e-5,
                dense_inner: 2048,
                expert_inner: None,
            },
        }
    }
}

/// Everything of a [`ModelSpec`] but family, formats and special tokens.
pub(super) struct Shape {
    pub(super) vocab: usize,
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    max_positions: usize,
    rope_theta: f64,
    norm_eps: f32,
    qkv_bias: bool,
    clip_qkv: Option<f32>,
    tied_embeddings: bool,
    dense_inner: usize,
    moe_blocks: Vec<bool>,
    experts: usize,
    top_k: usize,
    expert_inner: usize,
    norm_top_k: bool,
    shared_inner: Option<usize>,
}

impl Shape {
    pub(super) fn read(fields: &mut Fields<'_>, family: Family) -> Result<Self, SpecError> {
        let defaults = Defaults::of(family);
        let qwen = matches!(family, Family::Qwen3Moe | Family::Qwen2Moe);
        let hidden = fields.required_size("hidden_size", MOST_WIDTH)?;
        let layers = fields.required_size("num_hidden_layers", MOST_LAYERS)?;
        let heads = fields.required_size("num_attention_heads", MOST_HEADS)?;
        let kv_heads = fields
            .size("num_key_value_heads", MOST_HEADS)?
            .or(defaults.kv_heads)
            .unwrap_or(heads);
        let experts = experts(fields)?;
        let max_positions = fields
            .size("max_position_embeddings", MOST_POSITIONS)?
            .unwrap_or(defaults.max_positions);
        let intermediate = fields
            .size("intermediate_size", MOST_WIDTH)?
            .unwrap_or(defaults.dense_inner);
        // Mixtral and OLMoE call the width of an expert `intermediate_size`; they have no dense blocks.
        let expert_inner = match defaults.expert_inner {
            Some(default) => fields
                .size("moe_intermediate_size", MOST_WIDTH)?
                .unwrap_or(default),
            None => intermediate,
        };
        layer_types(fields, layers)?;
        window(fields, qwen, max_positions)?;
        let shape = Self {
            vocab: fields.required_size("vocab_size", MOST_VOCAB)?,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim: head_dim(fields, hidden, heads)?,
            max_positions,
            rope_theta: rope::theta(fields, defaults.rope_theta)?,
            norm_eps: narrow(
                "rms_norm_eps",
                fields
                    .positive("rms_norm_eps")?
                    .unwrap_or(defaults.norm_eps),
            )?,
            qkv_bias: family == Family::Qwen2Moe && fields.flag("qkv_bias", true)?,
            clip_qkv: match family {
                Family::Olmoe => fields
                    .positive("clip_qkv")?
                    .map(|limit| narrow("clip_qkv", limit))
                    .transpose()?,
                Family::Qwen3Moe | Family::Qwen2Moe | Family::Mixtral => None,
            },
            tied_embeddings: fields.flag("tie_word_embeddings", false)?,
            dense_inner: intermediate,
            moe_blocks: if qwen {
                moe_blocks(fields, layers)?
            } else {
                vec![true; layers]
            },
            experts,
            top_k: fields.required_size("num_experts_per_tok", experts)?,
            expert_inner,
            // Mixtral always divides by the sum of the chosen, which equals its softmax over them.
            norm_top_k: family == Family::Mixtral || fields.flag("norm_topk_prob", false)?,
            shared_inner: match family {
                Family::Qwen2Moe => Some(
                    fields
                        .size("shared_expert_intermediate_size", MOST_WIDTH)?
                        .unwrap_or(5632),
                ),
                Family::Qwen3Moe | Family::Mixtral | Family::Olmoe => None,
            },
        };
        shape.check()?;
        Ok(shape)
    }

    fn check(&self) -> Result<(), SpecError> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(refuse(
                "num_key_value_heads",
                format!("{} does not divide {} heads", self.kv_heads, self.heads),
                "restore the value of the model's repository",
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(refuse(
                "head_dim",
                format!("{} is odd, but positions rotate pairs", self.head_dim),
                "restore the value of the model's repository",
            ));
        }
        if self.layers * self.experts > MOST_EXPERTS_IN_ALL {
            return Err(refuse(
                "num_experts",
                format!("{} in each of {} layers", self.experts, self.layers),
                format!("at most {MOST_EXPERTS_IN_ALL} over all layers are supported"),
            ));
        }
        if !self.moe_blocks.contains(&true) {
            return Err(refuse(
                "mlp_only_layers",
                "no layer is a mixture of experts",
                "use a mixture-of-experts model, or set decoder_sparse_step to 1",
            ));
        }
        Ok(())
    }

    pub(super) fn into_spec(
        self,
        family: Family,
        formats: WeightFormats,
        tokens: Tokens,
    ) -> ModelSpec {
        let Self {
            vocab,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            max_positions,
            rope_theta,
            norm_eps,
            qkv_bias,
            clip_qkv,
            tied_embeddings,
            dense_inner,
            moe_blocks,
            experts,
            top_k,
            expert_inner,
            norm_top_k,
            shared_inner,
        } = self;
        ModelSpec {
            family,
            formats,
            vocab,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            max_positions,
            rope_theta,
            norm_eps,
            qkv_bias,
            clip_qkv,
            tied_embeddings,
            dense_inner,
            moe_blocks,
            experts,
            top_k,
            expert_inner,
            norm_top_k,
            shared_inner,
            eos: tokens.eos,
            bos: tokens.bos,
        }
    }
}

/// Both spellings of the number of experts; they must agree where both are given.
fn experts(fields: &mut Fields<'_>) -> Result<usize, SpecError> {
    let one = fields.size("num_experts", MOST_EXPERTS)?;
    let other = fields.size("num_local_experts", MOST_EXPERTS)?;
    match (one, other) {
        (Some(one), Some(other)) if one != other => Err(refuse(
            "num_experts",
            format!("{one}, but `num_local_experts` says {other}"),
            "keep the number of experts that the weights have",
        )),
        (one, other) => one.or(other).ok_or_else(|| fields.missing("num_experts")),
    }
}

fn head_dim(fields: &mut Fields<'_>, hidden: usize, heads: usize) -> Result<usize, SpecError> {
    if let Some(given) = fields.size("head_dim", MOST_WIDTH)? {
        return Ok(given);
    }
    if hidden.is_multiple_of(heads) {
        Ok(hidden / heads)
    } else {
        Err(refuse(
            "head_dim",
            format!("missing, and {heads} heads do not divide a width of {hidden}"),
            "give head_dim",
        ))
    }
}

/// Which blocks are mixtures: every `decoder_sparse_step`-th, except those in `mlp_only_layers`.
fn moe_blocks(fields: &mut Fields<'_>, layers: usize) -> Result<Vec<bool>, SpecError> {
    let step = fields
        .size("decoder_sparse_step", MOST_LAYERS)?
        .unwrap_or(1);
    let dense = fields.indices("mlp_only_layers")?;
    if let Some(outside) = dense.iter().find(|at| **at >= layers as u64) {
        return Err(refuse(
            "mlp_only_layers",
            format!("layer {outside} does not exist, there are {layers}"),
            "restore the value of the model's repository",
        ));
    }
    Ok((0..layers)
        .map(|layer| !dense.contains(&(layer as u64)) && (layer + 1).is_multiple_of(step))
        .collect())
}

fn layer_types(fields: &mut Fields<'_>, layers: usize) -> Result<(), SpecError> {
    let Some(value) = fields.value("layer_types") else {
        return Ok(());
    };
    let full = value.as_array().is_some_and(|list| {
        list.len() == layers && list.iter().all(|kind| kind == "full_attention")
    });
    if full {
        Ok(())
    } else {
        Err(refuse(
            "layer_types",
            format!("{} is not supported", shorten(value)),
            format!("only `full_attention` for each of the {layers} layers is supported"),
        ))
    }
}

/// A window as long as the longest sequence cuts nothing off; a shorter one is refused. The Qwen
/// families have a switch, and without it `sliding_window` says nothing.
fn window(fields: &mut Fields<'_>, qwen: bool, max_positions: usize) -> Result<(), SpecError> {
    let switch = fields.flag("use_sliding_window", !qwen)?;
    let Some(value) = fields.value("sliding_window") else {
        return Ok(());
    };
    let reaches = value
        .as_u64()
        .is_some_and(|window| window >= max_positions as u64);
    if !switch || reaches {
        return Ok(());
    }
    Err(refuse(
        "sliding_window",
        format!("a window of {} is in force", shorten(value)),
        "sliding-window attention is not supported; a window of at least \
         max_position_embeddings, or null, is",
    ))
}

/// A double as the single precision that the kernels compute with.
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to single precision is the purpose; range is checked"
)]
fn narrow(name: &str, value: f64) -> Result<f32, SpecError> {
    let narrowed = value as f32;
    if narrowed.is_finite() && narrowed > 0.0 {
        Ok(narrowed)
    } else {
        Err(refuse(
            name,
            format!("{value} is outside single precision"),
            "restore the value of the model's repository",
        ))
    }
}
