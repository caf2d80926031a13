//! One transformer block: `x += attention(norm(x)); x += mlp(norm(x))`.

use foregate_api::ids::LayerId;
use foregate_checkpoint::names::of_block;
use foregate_kernels::{Add, Array, KvCache, OpError, RmsNorm};

use crate::attention::{AttentionWeights, Step};
use crate::error::ModelError;
use crate::experts::Experts;
use crate::family;
use crate::load::Loader;
use crate::mixture::Mlp;
use crate::scratch::Scratch;

/// Weights of one block, without its routed experts.
#[derive(Debug)]
pub(crate) struct Block {
    /// Its number, also its layer in the cache.
    number: usize,
    attention_norm: Array<f32>,
    attention: AttentionWeights,
    mlp_norm: Array<f32>,
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
        dead: &mut [bool],
    ) -> Result<(), ModelError> {
        norm(step, &self.attention_norm, Take::Stream, scratch)?;
        self.attention.run(step, self.number, kv, scratch)?;
        norm(step, &self.mlp_norm, Take::StreamAndBranch, scratch)?;
        self.mlp.run(step, experts, scratch, dead)?;
        step.executor.add(Add {
            x: scratch.stream.view_mut(),
            y: scratch.branch.view(),
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
    weight: &Array<f32>,
    take: Take,
    scratch: &mut Scratch,
) -> Result<(), OpError> {
    let (rows, width) = (step.batch.rows(), weight.extent());
    step.executor.rms_norm(RmsNorm {
        x: scratch.stream.view_mut(),
        add: match take {
            Take::Stream => None,
            Take::StreamAndBranch => Some(scratch.branch.view()),
        },
        rows,
        width,
        weight: weight.view(),
        eps: step.spec.norm_eps,
        out: scratch
            .normed
            .sized(step.executor, "a norm", rows * width)?,
    })
}
