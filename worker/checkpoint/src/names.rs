//! Tensor names and shapes per family, as the hub has them.

use foregate_api::model::{Family, ModelSpec};
use foregate_api::weights::Part;

/// The tensors of one dense MLP or one expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MlpNames {
    /// `inner × hidden`, goes through the activation.
    pub gate: String,
    /// `inner × hidden`, multiplied with it.
    pub up: String,
    /// `hidden × inner`.
    pub down: String,
}

/// Token embedding, `vocab × hidden`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Norm before the output projection, `hidden`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Output projection, `vocab × hidden`; absent with tied embeddings.
pub const OUTPUT: &str = "lm_head.weight";

/// Name of a tensor of block `block`, e.g. `self_attn.q_proj.weight`.
#[must_use]
pub fn of_block(block: usize, rest: &str) -> String {
    format!("model.layers.{block}.{rest}")
}

/// Router of block `block`, `experts × hidden`.
#[must_use]
pub fn router(family: Family, block: usize) -> String {
    of_block(block, &format!("{}.gate.weight", moe_prefix(family)))
}

/// Routed expert `expert` of block `block`.
#[must_use]
pub fn expert(family: Family, block: usize, expert: usize) -> MlpNames {
    let (gate, up, down) = match family {
        Family::Mixtral => ("w1", "w3", "w2"),
        Family::Qwen3Moe | Family::Qwen2Moe | Family::Olmoe => {
            ("gate_proj", "up_proj", "down_proj")
        }
    };
    let prefix = experts_prefix(family, block);
    let name = |part: &str| format!("{prefix}.{expert}.{part}.weight");
    MlpNames {
        gate: name(gate),
        up: name(up),
        down: name(down),
    }
}

/// What the names of a block's routed experts begin with.
pub(crate) fn experts_prefix(family: Family, block: usize) -> String {
    of_block(block, &format!("{}.experts", moe_prefix(family)))
}

/// The dense MLP of block `block`.
#[must_use]
pub fn dense_mlp(block: usize) -> MlpNames {
    plain_mlp(block, "mlp")
}

/// The shared expert of block `block` (Qwen2-MoE).
#[must_use]
pub fn shared_expert(block: usize) -> MlpNames {
    plain_mlp(block, "mlp.shared_expert")
}

fn plain_mlp(block: usize, prefix: &str) -> MlpNames {
    MlpNames {
        gate: of_block(block, &format!("{prefix}.gate_proj.weight")),
        up: of_block(block, &format!("{prefix}.up_proj.weight")),
        down: of_block(block, &format!("{prefix}.down_proj.weight")),
    }
}

const fn moe_prefix(family: Family) -> &'static str {
    match family {
        Family::Mixtral => "block_sparse_moe",
        Family::Qwen3Moe | Family::Qwen2Moe | Family::Olmoe => "mlp",
    }
}

/// Widths of the query and key norms, for the families that have them: a head (Qwen3-MoE) or the
/// whole projection (OLMoE).
#[must_use]
pub const fn qk_norm_widths(spec: &ModelSpec) -> Option<(usize, usize)> {
    match spec.family {
        Family::Qwen3Moe => Some((spec.head_dim, spec.head_dim)),
        Family::Olmoe => Some((spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim)),
        Family::Qwen2Moe | Family::Mixtral => None,
    }
}

/// What a tensor is for, which decides the formats it may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Packed for matrix products. A routed expert's is loaded only where a placement wants it.
    Matrix(Part),
    /// Norm or bias: widened to single precision, so any plain format will do.
    Vector,
}

/// A tensor the model cannot do without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Its name.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// What it is for.
    pub kind: Kind,
}

/// All tensors of a model, in the order of the forward pass.
#[must_use]
pub fn expected(spec: &ModelSpec) -> Vec<Expected> {
    let mut list = List(Vec::new());
    list.matrix(
        Part::Embedding,
        EMBEDDING.to_owned(),
        spec.vocab,
        spec.hidden,
    );
    for (block, moe) in spec.moe_blocks.iter().enumerate() {
        list.attention(spec, block);
        list.vector(
            of_block(block, "post_attention_layernorm.weight"),
            spec.hidden,
        );
        if *moe {
            list.mixture(spec, block);
        } else {
            list.mlp(Part::Dense, dense_mlp(block), spec.hidden, spec.dense_inner);
        }
    }
    list.vector(FINAL_NORM.to_owned(), spec.hidden);
    if !spec.tied_embeddings {
        list.matrix(Part::Output, OUTPUT.to_owned(), spec.vocab, spec.hidden);
    }
    list.0
}

/// A tensor that some checkpoints carry and no forward pass needs: the rotary frequencies that old
/// exports kept as a buffer, and the copy of the embedding that tied models may store.
#[must_use]
pub fn is_known_extra(spec: &ModelSpec, name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (spec.tied_embeddings && name == OUTPUT)
}

struct List(Vec<Expected>);

impl List {
    fn push(&mut self, kind: Kind, name: String, shape: Vec<usize>) {
        self.0.push(Expected { name, shape, kind });
    }

    fn matrix(&mut self, part: Part, name: String, rows: usize, columns: usize) {
        self.push(Kind::Matrix(part), name, vec![rows, columns]);
    }

    fn vector(&mut self, name: String, width: usize) {
        self.push(Kind::Vector, name, vec![width]);
    }

    fn mlp(&mut self, part: Part, names: MlpNames, hidden: usize, inner: usize) {
        self.matrix(part, names.gate, inner, hidden);
        self.matrix(part, names.up, inner, hidden);
        self.matrix(part, names.down, hidden, inner);
    }

    fn attention(&mut self, spec: &ModelSpec, block: usize) {
        let queries = spec.heads * spec.head_dim;
        let keys = spec.kv_heads * spec.head_dim;
        self.vector(of_block(block, "input_layernorm.weight"), spec.hidden);
        for (part, width) in [("q", queries), ("k", keys), ("v", keys)] {
            let name = |what: &str| of_block(block, &format!("self_attn.{part}_proj.{what}"));
            self.matrix(Part::Attention, name("weight"), width, spec.hidden);
            if spec.qkv_bias {
                self.vector(name("bias"), width);
            }
        }
        if let Some((query, key)) = qk_norm_widths(spec) {
            self.vector(of_block(block, "self_attn.q_norm.weight"), query);
            self.vector(of_block(block, "self_attn.k_norm.weight"), key);
        }
        self.matrix(
            Part::Attention,
            of_block(block, "self_attn.o_proj.weight"),
            spec.hidden,
            queries,
        );
    }

    fn mixture(&mut self, spec: &ModelSpec, block: usize) {
        self.matrix(
            Part::Router,
            router(spec.family, block),
            spec.experts,
            spec.hidden,
        );
        for number in 0..spec.experts {
            let names = expert(spec.family, block, number);
            self.mlp(Part::Expert, names, spec.hidden, spec.expert_inner);
        }
        if let Some(inner) = spec.shared_inner {
            self.mlp(Part::Dense, shared_expert(block), spec.hidden, inner);
            self.matrix(
                Part::Router,
                of_block(block, "mlp.shared_expert_gate.weight"),
                1,
                spec.hidden,
            );
        }
    }
}
