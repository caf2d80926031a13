//! One transformer block: `x += attention(norm(x)); x += mlp(norm(x))`.

use foregate_api::ids::LayerId;
use foregate_checkpoint::names::of_block;
use foregate_kernels::{Add, KvCache, RmsNorm, ShapeError};

use crate::attention::{AttentionWeights, Step};
use crate::error::ModelError;
use crate::experts::Experts;
use crate::family;
use crate::load::Loader;
use crate::mixture::{Mlp, Notes};
use crate::scratch::{Scratch, sized};

/// Weights of one block, without its routed experts.
#[derive(Debug)]
pub(crate) struct Block {
    /// Its number, also its layer in the cache.
    number: usize,
    attention_norm: Vec<f32>,
    attention: AttentionWeights,
    mlp_norm: Vec<f32>,
    mlp: Mlp,
}

impl Block {
    /// `layer` is the block's number among the mixtures, if it is one.
    pub(crate) fn load(
        loader: &mut Loader<'_>,
        number: usize,
        layer: Option<LayerId>,
    ) -> Result<Self, ModelError> {
        let after_attention = of_block(number, "post_attention_layernorm.weight");
        let after_projection = family::after_projection(loader, number)?;
        Ok(Self {
            number,
            attention_norm: loader.vector(&of_block(number, "input_layernorm.weight"))?,
            attention: AttentionWeights::load(loader, number, after_projection)?,
            mlp_norm: loader.vector(&after_attention)?,
            mlp: match layer {
                None => Mlp::dense(loader, number)?,
                Some(layer) => {
                    let shared = family::shared_expert(loader, number)?;
                    Mlp::mixture(loader, number, layer, shared)?
                }
            },
        })
    }

    /// Takes `scratch.stream` through the block.
    pub(crate) fn run(
        &self,
        step: &Step<'_>,
        kv: &mut KvCache,
        experts: &mut dyn Experts,
        scratch: &mut Scratch,
        notes: &mut Notes<'_>,
    ) -> Result<(), ModelError> {
        norm(step, &self.attention_norm, Take::Stream, scratch)?;
        self.attention.run(step, self.number, kv, scratch)?;
        norm(step, &self.mlp_norm, Take::StreamAndBranch, scratch)?;
        self.mlp.run(step, experts, scratch, notes)?;
        step.ops.add(Add {
            x: &mut scratch.stream,
            y: &scratch.branch,
        })?;
        Ok(())
    }
}

/// What a norm is taken of.
#[derive(Clone, Copy)]
enum Take {
    Stream,
    /// The branch is added to the stream first.
    StreamAndBranch,
}

fn norm(
    step: &Step<'_>,
    weight: &[f32],
    take: Take,
    scratch: &mut Scratch,
) -> Result<(), ShapeError> {
    let rows = step.batch.rows();
    step.ops.rms_norm(RmsNorm {
        x: &mut scratch.stream,
        add: match take {
            Take::Stream => None,
            Take::StreamAndBranch => Some(&scratch.branch),
        },
        rows,
        width: weight.len(),
        weight,
        eps: step.spec.norm_eps,
        out: sized(&mut scratch.normed, rows * weight.len()),
    })
}
