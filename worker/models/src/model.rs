//! The whole model: embed → blocks → norm → logits.

use std::fmt;
use std::sync::{Arc, Weak};

use foregate_api::ids::LayerId;
use foregate_api::model::{KvFormat, ModelSpec};
use foregate_api::weights::Part;
use foregate_checkpoint::{Checkpoint, names};
use foregate_kernels::{
    Cpu, Embed, KvCache, KvDtype, KvShape, MatMul, Matrix, Ops, RmsNorm, ShapeError,
};

use crate::attention::Step;
use crate::batch::{StepBatch, StepOutput};
use crate::block::Block;
use crate::error::ModelError;
use crate::experts::Experts;
use crate::load::Loader;
use crate::mixture::Notes;
use crate::scratch::{Scratch, sized};

/// The dense part of a model, ready to step, with the memory its steps use.
///
/// A clone shares the weights and has memory of its own.
pub struct Model {
    ops: Arc<dyn Ops>,
    weights: Arc<Weights>,
    scratch: Scratch,
}

struct Weights {
    spec: ModelSpec,
    embedding: Matrix,
    blocks: Vec<Block>,
    final_norm: Vec<f32>,
    /// Absent with tied embeddings.
    output: Option<Matrix>,
    /// `theta^(-2i / head_dim)` for each pair `i` of a head.
    inverse_frequencies: Vec<f32>,
}

/// Weights that live as long as some [`Model`] uses them.
pub struct WeakModel(Weak<Weights>);

impl fmt::Debug for WeakModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WeakModel").field(&self.is_alive()).finish()
    }
}

impl WeakModel {
    /// Whether some model still uses them.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// A model of these weights, unless nobody has them any more. `ops` must lay out matrices as those
    /// ops did that packed them.
    #[must_use]
    pub fn upgrade(&self, ops: Arc<dyn Ops>) -> Option<Model> {
        Some(Model {
            ops,
            weights: self.0.upgrade()?,
            scratch: Scratch::default(),
        })
    }
}

impl Clone for Model {
    fn clone(&self) -> Self {
        Self {
            ops: Arc::clone(&self.ops),
            weights: Arc::clone(&self.weights),
            scratch: Scratch::default(),
        }
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("spec", &self.weights.spec)
            .finish_non_exhaustive()
    }
}

impl Model {
    /// Packs the dense weights of a checkpoint with all of `cpu`'s threads; no routed expert is read.
    /// `progress` is told bytes done and bytes in all, first with zero done.
    ///
    /// # Errors
    /// When a tensor cannot be read or packed.
    pub fn load(
        checkpoint: &Checkpoint,
        cpu: Arc<Cpu>,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        let weights = Weights::load(&mut Loader::new(checkpoint, &cpu, &mut progress))?;
        Ok(Self {
            ops: cpu,
            weights: Arc::new(weights),
            scratch: Scratch::default(),
        })
    }

    /// The same weights, computed with other ops that give the same results.
    #[must_use]
    pub fn with_ops(&self, ops: Arc<dyn Ops>) -> Self {
        Self {
            ops,
            ..self.clone()
        }
    }

    /// The weights, without keeping them.
    #[must_use]
    pub fn downgrade(&self) -> WeakModel {
        WeakModel(Arc::downgrade(&self.weights))
    }

    /// The model's shape.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        &self.weights.spec
    }

    /// The ops it computes with.
    #[must_use]
    pub fn ops(&self) -> &Arc<dyn Ops> {
        &self.ops
    }

    /// Sizes of a cache for this model.
    #[must_use]
    pub fn kv_shape(&self, pages: usize, page_tokens: usize) -> KvShape {
        let spec = self.spec();
        KvShape {
            layers: spec.layers,
            pages,
            page_tokens,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            dtype: kv_dtype(spec.kv_format()),
        }
    }

    /// Takes a batch through the model. Rows that `experts` lost walk on with whatever stands in their
    /// place and are named in `out.dead`.
    ///
    /// # Errors
    /// When the batch contradicts itself, or all rows of a layer failed; `out` and the written cache
    /// positions then have no meaning.
    pub fn forward(
        &mut self,
        batch: &StepBatch<'_>,
        kv: &mut KvCache,
        experts: &mut dyn Experts,
        out: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let weights = Arc::clone(&self.weights);
        let spec = &weights.spec;
        batch.check(spec.vocab, spec.max_positions)?;
        let rows = batch.rows();
        out.routes.clear();
        out.routes.resize(rows * spec.moe_layers() * spec.top_k, 0);
        out.dead.clear();
        out.dead.resize(rows, false);
        out.logits.resize(batch.logit_rows.len() * spec.vocab, 0.0);
        if rows == 0 {
            return Ok(());
        }
        let mut angles = std::mem::take(&mut self.scratch.angles);
        angles.fill(&weights.inverse_frequencies, batch.positions);
        let step = Step {
            ops: self.ops.as_ref(),
            spec,
            batch,
            angles: &angles,
        };
        let done = weights.run(&step, kv, experts, &mut self.scratch, out);
        self.scratch.angles = angles;
        done
    }
}

impl Weights {
    fn load(loader: &mut Loader<'_>) -> Result<Self, ModelError> {
        let spec = loader.spec();
        let mut layers = 0..;
        let mut blocks = Vec::with_capacity(spec.layers);
        let embedding =
            loader.matrix(Part::Embedding, names::EMBEDDING, spec.vocab, spec.hidden)?;
        for (number, moe) in spec.moe_blocks.iter().enumerate() {
            let layer = if *moe {
                layers.next().map(LayerId)
            } else {
                None
            };
            blocks.push(Block::load(loader, number, layer)?);
        }
        Ok(Self {
            embedding,
            blocks,
            final_norm: loader.vector(names::FINAL_NORM)?,
            output: if spec.tied_embeddings {
                None
            } else {
                Some(loader.matrix(Part::Output, names::OUTPUT, spec.vocab, spec.hidden)?)
            },
            inverse_frequencies: inverse_frequencies(spec),
            spec: spec.clone(),
        })
    }

    /// A step, from tokens to logits.
    fn run(
        &self,
        step: &Step<'_>,
        kv: &mut KvCache,
        experts: &mut dyn Experts,
        scratch: &mut Scratch,
        out: &mut StepOutput,
    ) -> Result<(), ModelError> {
        self.embed(step, scratch)?;
        let mut notes = Notes {
            routes: &mut out.routes,
            dead: &mut out.dead,
        };
        for block in &self.blocks {
            block.run(step, kv, experts, scratch, &mut notes)?;
        }
        self.logits(step, scratch, &mut out.logits)?;
        Ok(())
    }

    fn embed(&self, step: &Step<'_>, scratch: &mut Scratch) -> Result<(), ShapeError> {
        let rows = step.batch.rows();
        scratch.all_rows.clear();
        scratch.all_rows.extend((0_u32..).take(rows));
        step.ops.embed(Embed {
            table: &self.embedding,
            ids: step.batch.tokens,
            out: sized(&mut scratch.stream, rows * self.spec.hidden),
        })
    }

    /// Norm and output projection, only for the rows that want them.
    fn logits(
        &self,
        step: &Step<'_>,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let wanted = step.batch.logit_rows;
        if wanted.is_empty() {
            return Ok(());
        }
        let hidden = self.spec.hidden;
        scratch.branch.clear();
        for row in wanted {
            let at = *row as usize * hidden;
            scratch
                .branch
                .extend_from_slice(&scratch.stream[at..at + hidden]);
        }
        step.ops.rms_norm(RmsNorm {
            x: &mut scratch.branch,
            add: None,
            rows: wanted.len(),
            width: hidden,
            weight: &self.final_norm,
            eps: self.spec.norm_eps,
            out: sized(&mut scratch.normed, wanted.len() * hidden),
        })?;
        step.ops.matmul(MatMul {
            x: &scratch.normed,
            rows: wanted.len(),
            w: self.output.as_ref().unwrap_or(&self.embedding),
            bias: None,
            out,
        })
    }
}

/// The kernels' name of a format of keys and values.
const fn kv_dtype(format: KvFormat) -> KvDtype {
    match format {
        KvFormat::Float32 => KvDtype::F32,
        KvFormat::Bfloat16 => KvDtype::Bf16,
    }
}

/// Computed in double precision and rounded once.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a head has far fewer than 2^52 dimensions; rounding to single precision is meant"
)]
fn inverse_frequencies(spec: &ModelSpec) -> Vec<f32> {
    (0..spec.head_dim / 2)
        .map(|pair| {
            let exponent = -2.0 * pair as f64 / spec.head_dim as f64;
            spec.rope_theta.powf(exponent) as f32
        })
        .collect()
}
