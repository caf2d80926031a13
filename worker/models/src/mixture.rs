//! The second half of a block: a dense feed-forward, or a gate with its experts.

use foregate_api::ids::LayerId;
use foregate_api::weights::Part;
use foregate_checkpoint::names;
use foregate_kernels::{Add, Gate, MatMul, Matrix, OpError, SigmoidScale};

use crate::attention::Step;
use crate::error::ModelError;
use crate::experts::{ExpertBatch, Experts};
use crate::ffn::Ffn;
use crate::load::Loader;
use crate::scratch::Scratch;

/// An expert that every row goes through, weighted by a sigmoid gate of its own (Qwen2-MoE).
#[derive(Debug)]
pub(crate) struct SharedExpert {
    pub(crate) ffn: Ffn,
    /// `1 × hidden`.
    pub(crate) gate: Matrix,
}

/// A gate and what stays at home of its layer.
#[derive(Debug)]
pub(crate) struct Mixture {
    layer: LayerId,
    router: Matrix,
    shared: Option<SharedExpert>,
}

/// A block's second half.
#[derive(Debug)]
pub(crate) enum Mlp {
    Dense(Ffn),
    Mixture(Mixture),
}

impl Mlp {
    pub(crate) fn dense(loader: &mut Loader<'_>, block: usize) -> Result<Self, ModelError> {
        let inner = loader.spec().dense_inner;
        Ok(Self::Dense(loader.ffn(&names::dense_mlp(block), inner)?))
    }

    pub(crate) fn mixture(
        loader: &mut Loader<'_>,
        block: usize,
        layer: LayerId,
        shared: Option<SharedExpert>,
    ) -> Result<Self, ModelError> {
        let spec = loader.spec();
        let router = names::router(spec.family, block);
        Ok(Self::Mixture(Mixture {
            layer,
            router: loader.matrix(Part::Router, &router, spec.experts, spec.hidden)?,
            shared,
        }))
    }

    /// `scratch.branch = mlp(scratch.normed)`.
    pub(crate) fn run(
        &self,
        step: &Step<'_>,
        experts: &mut dyn Experts,
        scratch: &mut Scratch,
        dead: &mut [bool],
    ) -> Result<(), ModelError> {
        match self {
            Self::Dense(ffn) => {
                let (executor, x) = (step.executor, scratch.normed.view());
                let out =
                    scratch
                        .branch
                        .sized(executor, "a branch", scratch.normed.extent())?;
                ffn.run(executor, x, &scratch.all_rows, out)?;
                Ok(())
            }
            Self::Mixture(mixture) => mixture.run(step, experts, scratch, dead),
        }
    }
}

impl Mixture {
    fn run(
        &self,
        step: &Step<'_>,
        experts: &mut dyn Experts,
        scratch: &mut Scratch,
        dead: &mut [bool],
    ) -> Result<(), ModelError> {
        let spec = step.spec;
        self.choose(step, scratch)?;
        let executor = step.executor;
        let out = scratch
            .branch
            .sized(executor, "a branch", scratch.normed.extent())?;
        let late = experts.run_on(
            executor,
            &ExpertBatch {
                layer: self.layer,
                input: scratch.normed.view(),
                hidden: spec.hidden,
                experts: scratch.chosen.view().slice(self.choices(step)),
                weights: scratch.weights.view(),
                top_k: spec.top_k,
                dead,
            },
            out,
        )?;
        // The walk goes on with whatever stands in a late row: rows do not touch each other.
        for row in late {
            if let Some(dead) = dead.get_mut(row as usize) {
                *dead = true;
            }
        }
        if let Some(shared) = &self.shared {
            shared.add(step, scratch)?;
        }
        Ok(())
    }

    /// Router logits in float32, then softmax and top-k.
    fn choose(&self, step: &Step<'_>, scratch: &mut Scratch) -> Result<(), OpError> {
        let spec = step.spec;
        let rows = step.batch.rows();
        let executor = step.executor;
        let (logits, weights) = (rows * spec.experts, rows * spec.top_k);
        executor.matmul(MatMul {
            x: scratch.normed.view(),
            rows,
            w: &self.router,
            bias: None,
            out: scratch.router.sized(executor, "router logits", logits)?,
        })?;
        executor.gate(Gate {
            logits: scratch.router.view(),
            rows,
            experts: spec.experts,
            top_k: spec.top_k,
            normalise: spec.norm_top_k,
            out_experts: scratch.chosen.slice_mut(self.choices(step)),
            out_weights: scratch
                .weights
                .sized(executor, "weights of experts", weights)?,
        })
    }

    /// Where this layer's choices stand among those of all layers.
    fn choices(&self, step: &Step<'_>) -> std::ops::Range<usize> {
        let width = step.batch.rows() * step.spec.top_k;
        let layer = self.layer.index();
        layer * width..(layer + 1) * width
    }
}

impl SharedExpert {
    /// `branch += sigmoid(gate · x) * ffn(x)`.
    fn add(&self, step: &Step<'_>, scratch: &mut Scratch) -> Result<(), OpError> {
        let (executor, rows) = (step.executor, step.batch.rows());
        let x = scratch.normed.view();
        let values = scratch.normed.extent();
        let out = scratch.shared.sized(executor, "a shared expert", values)?;
        self.ffn.run(executor, x, &scratch.all_rows, out)?;
        executor.matmul(MatMul {
            x,
            rows,
            w: &self.gate,
            bias: None,
            out: scratch
                .gate
                .sized(executor, "a shared expert's gate", rows)?,
        })?;
        executor.sigmoid_scale(SigmoidScale {
            x: scratch.shared.view_mut(),
            logits: scratch.gate.view(),
            width: step.spec.hidden,
        })?;
        executor.add(Add {
            x: scratch.branch.view_mut(),
            y: scratch.shared.view(),
        })
    }
}
