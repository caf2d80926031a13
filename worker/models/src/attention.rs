//! Grouped-query attention over the paged cache.

use foregate_api::model::ModelSpec;
use foregate_api::weights::Part;
use foregate_checkpoint::names::of_block;
use foregate_kernels::{
    Array, Attention, Clamp, Executor, KvCache, KvWrite, MatMul, Matrix, Norm, OpError, Placed,
    Rope, RopeTable, StepRows, View,
};

use crate::batch::StepBatch;
use crate::error::ModelError;
use crate::load::Loader;
use crate::scratch::Scratch;

/// A linear layer with an optional bias.
#[derive(Debug)]
struct Linear {
    weight: Matrix,
    bias: Option<Array<f32>>,
}

/// Norms of queries and keys between projection and rotation.
#[derive(Debug)]
pub(crate) struct QkNorm {
    /// Its length is the width of one normalised row: a head, or the whole projection.
    pub(crate) query: Array<f32>,
    /// Likewise for keys.
    pub(crate) key: Array<f32>,
}

/// What a family does to queries, keys and values between projection and rotation.
#[derive(Debug, Default)]
pub(crate) struct AfterProjection {
    pub(crate) norm: Option<QkNorm>,
    /// Clamp of queries, keys and values to `-limit..=limit`, after the norm.
    pub(crate) clip: Option<f32>,
}

/// Weights of one block's attention.
#[derive(Debug)]
pub(crate) struct AttentionWeights {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Matrix,
    after: AfterProjection,
}

/// What all blocks of a step share.
pub(crate) struct Step<'a> {
    pub(crate) executor: &'a dyn Executor,
    pub(crate) spec: &'a ModelSpec,
    pub(crate) batch: &'a StepBatch<'a>,
    pub(crate) angles: &'a RopeTable,
    pub(crate) placed: &'a Placed,
}

impl<'a> Step<'a> {
    /// Where the batch's rows stand.
    pub(crate) fn rows(
        batch: &StepBatch<'a>,
        angles: &'a RopeTable,
        spec: &ModelSpec,
    ) -> StepRows<'a> {
        StepRows {
            positions: batch.positions,
            pages: batch.pages(),
            angles,
            group: spec.heads / spec.kv_heads.max(1),
        }
    }
}

impl AttentionWeights {
    pub(crate) fn load(
        loader: &mut Loader<'_>,
        block: usize,
        after: AfterProjection,
    ) -> Result<Self, ModelError> {
        let spec = loader.spec();
        let queries = spec.heads * spec.head_dim;
        let keys = spec.kv_heads * spec.head_dim;
        Ok(Self {
            query: Linear::load(loader, block, "q_proj", queries)?,
            key: Linear::load(loader, block, "k_proj", keys)?,
            value: Linear::load(loader, block, "v_proj", keys)?,
            after,
            output: loader.matrix(
                Part::Attention,
                &of_block(block, "self_attn.o_proj.weight"),
                spec.hidden,
                queries,
            )?,
        })
    }

    /// `scratch.branch = attention(scratch.normed)`; keys and values go to the cache first.
    pub(crate) fn run(
        &self,
        step: &Step<'_>,
        block: usize,
        kv: &mut KvCache,
        scratch: &mut Scratch,
    ) -> Result<(), OpError> {
        let rows = step.batch.rows();
        self.project(step, scratch)?;
        self.rotate(step, scratch)?;
        let (executor, pages) = (step.executor, step.batch.pages());
        let write = KvWrite {
            k: scratch.key.view(),
            v: scratch.value.view(),
            positions: step.batch.positions,
            pages,
            kv,
            layer: block,
        };
        executor.kv_write(write, step.placed)?;
        let attended = rows * self.output.k();
        let attention = Attention {
            q: scratch.query.view(),
            heads: step.spec.heads,
            scale: scale(step.spec.head_dim),
            positions: step.batch.positions,
            pages,
            kv,
            layer: block,
            out: scratch.attended.sized(executor, "attention", attended)?,
        };
        executor.attention(attention, step.placed)?;
        let branch = rows * self.output.n();
        executor.matmul(MatMul {
            x: scratch.attended.view(),
            rows,
            w: &self.output,
            bias: None,
            out: scratch.branch.sized(executor, "a branch", branch)?,
        })
    }

    fn project(&self, step: &Step<'_>, scratch: &mut Scratch) -> Result<(), OpError> {
        let rows = step.batch.rows();
        let (executor, x) = (step.executor, scratch.normed.view());
        self.query.run(executor, x, rows, &mut scratch.query)?;
        self.key.run(executor, x, rows, &mut scratch.key)?;
        self.value.run(executor, x, rows, &mut scratch.value)?;
        if let Some(limit) = self.after.clip {
            let x = scratch.value.view_mut();
            executor.clamp(Clamp { x, limit })?;
        }
        Ok(())
    }

    /// Queries and keys as they meet: normalised and clipped as the family wants it, turned by their positions.
    fn rotate(&self, step: &Step<'_>, scratch: &mut Scratch) -> Result<(), OpError> {
        let spec = step.spec;
        let AfterProjection { norm, clip } = &self.after;
        let norm = norm.as_ref();
        for (x, heads, weight) in [
            (&mut scratch.query, spec.heads, norm.map(|norm| &norm.query)),
            (&mut scratch.key, spec.kv_heads, norm.map(|norm| &norm.key)),
        ] {
            let rope = Rope {
                x: x.view_mut(),
                rows: step.batch.rows(),
                heads,
                head_dim: spec.head_dim,
                norm: weight.map(|weight| Norm {
                    weight: weight.view(),
                    eps: spec.norm_eps,
                }),
                clip: *clip,
                table: step.angles,
            };
            step.executor.rope(rope, step.placed)?;
        }
        Ok(())
    }
}

/// `1 / sqrt(head_dim)`, rounded once.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a head has far fewer than 2^24 dimensions; rounding to single precision is meant"
)]
fn scale(head_dim: usize) -> f32 {
    (1.0 / (head_dim as f64).sqrt()) as f32
}

impl Linear {
    fn load(
        loader: &mut Loader<'_>,
        block: usize,
        part: &str,
        width: usize,
    ) -> Result<Self, ModelError> {
        let name = |what: &str| of_block(block, &format!("self_attn.{part}.{what}"));
        let spec = loader.spec();
        let weight = loader.matrix(Part::Attention, &name("weight"), width, spec.hidden)?;
        let bias = if spec.qkv_bias {
            Some(loader.vector(&name("bias"))?)
        } else {
            None
        };
        Ok(Self { weight, bias })
    }

    fn run(
        &self,
        executor: &dyn Executor,
        x: View<'_, f32>,
        rows: usize,
        out: &mut Array<f32>,
    ) -> Result<(), OpError> {
        executor.matmul(MatMul {
            x,
            rows,
            w: &self.weight,
            bias: self.bias.as_ref().map(Array::view),
            out: out.sized(executor, "a projection", rows * self.weight.n())?,
        })
    }
}
