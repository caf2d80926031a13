//! Grouped-query attention over the paged cache.

use foregate_api::model::ModelSpec;
use foregate_api::weights::Part;
use foregate_checkpoint::names::of_block;
use foregate_kernels::{
    Attention, KvCache, KvWrite, MatMul, Matrix, Norm, Ops, PageMap, Rope, RopeTable,
    ShapeError,
};

use crate::batch::StepBatch;
use crate::error::ModelError;
use crate::load::Loader;
use crate::scratch::{Scratch, sized};

/// A linear layer with an optional bias.
#[derive(Debug)]
struct Linear {
    weight: Matrix,
    bias: Option<Vec<f32>>,
}

/// Norms of queries and keys between projection and rotation.
#[derive(Debug)]
pub(crate) struct QkNorm {
    /// Its length is the width of one normalised row: a head, or the whole projection.
    pub(crate) query: Vec<f32>,
    /// Likewise for keys.
    pub(crate) key: Vec<f32>,
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
    pub(crate) ops: &'a dyn Ops,
    pub(crate) spec: &'a ModelSpec,
    pub(crate) batch: &'a StepBatch<'a>,
    pub(crate) angles: &'a RopeTable,
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
    ) -> Result<(), ShapeError> {
        let rows = step.batch.rows();
        self.project(step, scratch)?;
        self.rotate(step, scratch)?;
        let pages = PageMap {
            sequence_of_row: step.batch.sequence_of_row,
            tables: step.batch.page_tables,
        };
        step.ops.kv_write(KvWrite {
            k: &scratch.key,
            v: &scratch.value,
            positions: step.batch.positions,
            pages,
            kv,
            layer: block,
        })?;
        step.ops.attention(Attention {
            q: &scratch.query,
            heads: step.spec.heads,
            scale: scale(step.spec.head_dim),
            positions: step.batch.positions,
            pages,
            kv,
            layer: block,
            out: sized(&mut scratch.attended, rows * self.output.k()),
        })?;
        step.ops.matmul(MatMul {
            x: &scratch.attended,
            rows,
            w: &self.output,
            bias: None,
            out: sized(&mut scratch.branch, rows * self.output.n()),
        })
    }

    fn project(&self, step: &Step<'_>, scratch: &mut Scratch) -> Result<(), ShapeError> {
        let rows = step.batch.rows();
        let x = &scratch.normed;
        self.query.run(step.ops, x, rows, &mut scratch.query)?;
        self.key.run(step.ops, x, rows, &mut scratch.key)?;
        self.value.run(step.ops, x, rows, &mut scratch.value)?;
        if let Some(limit) = self.after.clip {
            for value in &mut scratch.value {
                *value = value.clamp(-limit, limit);
            }
        }
        Ok(())
    }

    /// Queries and keys as they meet: normalised and clipped as the family wants it, turned by their positions.
    fn rotate(&self, step: &Step<'_>, scratch: &mut Scratch) -> Result<(), ShapeError> {
        let spec = step.spec;
        let AfterProjection { norm, clip } = &self.after;
        let norm = norm.as_ref();
        for (x, heads, weight) in [
            (&mut scratch.query, spec.heads, norm.map(|norm| &norm.query)),
            (&mut scratch.key, spec.kv_heads, norm.map(|norm| &norm.key)),
        ] {
            step.ops.rope(Rope {
                x,
                rows: step.batch.rows(),
                heads,
                head_dim: spec.head_dim,
                norm: weight.map(|weight| Norm {
                    weight,
                    eps: spec.norm_eps,
                }),
                clip: *clip,
                table: step.angles,
            })?;
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
        ops: &dyn Ops,
        x: &[f32],
        rows: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), ShapeError> {
        ops.matmul(MatMul {
            x,
            rows,
            w: &self.weight,
            bias: self.bias.as_deref(),
            out: sized(out, rows * self.weight.n()),
        })
    }
}
