//! The whole model: embed → blocks → norm → logits.

use std::fmt;
use std::sync::{Arc, Weak};

use foregate_api::ids::LayerId;
use foregate_api::model::{KvFormat, ModelSpec};
use foregate_api::weights::Part;
use foregate_checkpoint::{Checkpoint, names};
use foregate_kernels::{
    Array, Cpu, Embed, Executor, Gather, KvCache, KvDtype, KvShape, MatMul, Matrix, OnHost,
    OpError, Ops, Placed, RmsNorm, RopeTable, View,
};

use crate::attention::Step;
use crate::batch::{StepBatch, StepOutput};
use crate::block::Block;
use crate::error::ModelError;
use crate::experts::Experts;
use crate::load::Loader;
use crate::scratch::Scratch;

/// The dense part of a model, ready to step, with the memory its steps use.
///
/// A clone shares the weights and has memory of its own.
pub struct Model {
    executor: Arc<dyn Executor>,
    weights: Arc<Weights>,
    scratch: Scratch,
}

struct Weights {
    spec: ModelSpec,
    embedding: Matrix,
    blocks: Vec<Block>,
    final_norm: Array<f32>,
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

    /// A model of these weights, unless nobody has them any more. `executor` must lay out matrices as the one
    /// that they were loaded for.
    #[must_use]
    pub fn upgrade(&self, executor: Arc<dyn Executor>) -> Option<Model> {
        Some(Model {
            executor,
            weights: self.0.upgrade()?,
            scratch: Scratch::default(),
        })
    }
}

impl Clone for Model {
    fn clone(&self) -> Self {
        Self {
            executor: Arc::clone(&self.executor),
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
        progress: impl FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        let threads = cpu.threads();
        Self::load_on(checkpoint, Arc::new(OnHost::cpu(cpu)), threads, progress)
    }

    /// As [`Model::load`], with the weights where `executor` computes; `threads` of this process convert them.
    ///
    /// # Errors
    /// When a tensor cannot be read or packed, or a device has no memory for it.
    pub fn load_on(
        checkpoint: &Checkpoint,
        executor: Arc<dyn Executor>,
        threads: usize,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        let mut loader = Loader::new(checkpoint, &*executor, threads, &mut progress);
        let weights = Arc::new(Weights::load(&mut loader)?);
        Ok(Self {
            executor,
            weights,
            scratch: Scratch::default(),
        })
    }

    /// The same weights, computed with other ops of the processor that give the same results.
    #[must_use]
    pub fn with_ops(&self, ops: Arc<dyn Ops>) -> Self {
        Self {
            executor: Arc::new(OnHost::new(ops)),
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

    /// What it computes on.
    #[must_use]
    pub fn executor(&self) -> &Arc<dyn Executor> {
        &self.executor
    }

    /// Sizes of a cache for this model.
    #[must_use]
    pub fn kv_shape(&self, pages: usize, page_tokens: usize) -> KvShape {
        kv_shape(self.spec(), pages, page_tokens)
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
        let mut placed = std::mem::take(&mut self.scratch.placed);
        angles.fill(&weights.inverse_frequencies, batch.positions);
        let done = self.walk(batch, (&angles, &mut placed), kv, experts, out);
        self.scratch.angles = angles;
        self.scratch.placed = placed;
        done
    }

    fn walk(
        &mut self,
        batch: &StepBatch<'_>,
        (angles, placed): (&RopeTable, &mut Placed),
        kv: &mut KvCache,
        experts: &mut dyn Experts,
        out: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let executor = &*self.executor;
        let spec = &self.weights.spec;
        executor.place(Step::rows(batch, angles, spec), placed)?;
        let step = Step {
            executor,
            spec,
            batch,
            angles,
            placed,
        };
        self.weights.run(&step, kv, experts, &mut self.scratch, out)
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
        let choices = self.spec.moe_layers() * step.batch.rows() * self.spec.top_k;
        scratch
            .chosen
            .sized(step.executor, "choices of experts", choices)?;
        for block in &self.blocks {
            block.run(step, kv, experts, scratch, &mut out.dead)?;
        }
        self.logits(step, scratch, &mut out.logits)?;
        self.routes(step, scratch, &mut out.routes)?;
        Ok(())
    }

    fn embed(&self, step: &Step<'_>, scratch: &mut Scratch) -> Result<(), OpError> {
        let rows = step.batch.rows();
        scratch.all_rows.clear();
        scratch.all_rows.extend((0_u32..).take(rows));
        let stream = rows * self.spec.hidden;
        step.executor.embed(Embed {
            table: &self.embedding,
            ids: step.batch.tokens,
            out: scratch.stream.sized(step.executor, "the stream", stream)?,
        })
    }

    /// Norm and output projection, only for the rows that want them.
    fn logits(
        &self,
        step: &Step<'_>,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) -> Result<(), OpError> {
        let (executor, wanted) = (step.executor, step.batch.logit_rows);
        if wanted.is_empty() {
            return Ok(());
        }
        let (rows, hidden) = (wanted.len(), self.spec.hidden);
        executor.gather(Gather {
            x: scratch.stream.view(),
            width: hidden,
            rows: wanted,
            out: scratch
                .branch
                .sized(executor, "rows of logits", rows * hidden)?,
        })?;
        executor.rms_norm(RmsNorm {
            x: scratch.branch.view_mut(),
            add: None,
            rows,
            width: hidden,
            weight: self.final_norm.view(),
            eps: self.spec.norm_eps,
            out: scratch.normed.sized(executor, "a norm", rows * hidden)?,
        })?;
        let x = scratch.normed.view();
        let project = |out| {
            executor.matmul(MatMul {
                x,
                rows,
                w: self.output.as_ref().unwrap_or(&self.embedding),
                bias: None,
                out,
            })
        };
        if let View::Host(_) = x {
            return project(out.into());
        }
        project(scratch.logits.sized(executor, "logits", out.len())?)?;
        scratch.logits.view().read(out)
    }

    /// The choices of all layers, by row first.
    fn routes(
        &self,
        step: &Step<'_>,
        scratch: &mut Scratch,
        out: &mut [u32],
    ) -> Result<(), OpError> {
        let chosen = match scratch.chosen.view() {
            View::Host(chosen) => chosen,
            chosen @ View::Device(_) => {
                scratch.routes.resize(out.len(), 0);
                chosen.read(&mut scratch.routes)?;
                &scratch.routes
            }
        };
        let (layers, top_k) = (self.spec.moe_layers(), self.spec.top_k.max(1));
        let by_layer = chosen.chunks_exact((step.batch.rows() * top_k).max(1));
        for (layer, chosen) in by_layer.enumerate() {
            let rows = out.chunks_exact_mut((layers * top_k).max(1));
            for (row, chosen) in rows.zip(chosen.chunks_exact(top_k)) {
                row[layer * top_k..(layer + 1) * top_k].copy_from_slice(chosen);
            }
        }
        Ok(())
    }
}

/// Sizes of a cache for a model.
#[must_use]
pub fn kv_shape(spec: &ModelSpec, pages: usize, page_tokens: usize) -> KvShape {
    KvShape {
        layers: spec.layers,
        pages,
        page_tokens,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        dtype: kv_dtype(spec.kv_format()),
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
