//! The second half of a block: a dense feed-forward, or a gate with its experts.

use foregate_api::ids::LayerId;
use foregate_api::weights::Part;
use foregate_checkpoint::names;
use foregate_kernels::{Add, Gate, MatMul, Matrix, ShapeError, SigmoidScale};

use crate::attention::Step;
use crate::error::ModelError;
use crate::experts::{ExpertBatch, Experts};
use crate::ffn::Ffn;
use crate::load::Loader;
use crate::scratch::{Scratch, sized};

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

/// Where a step's routes and lost rows are noted.
pub(crate) struct Notes<'a> {
    /// `rows × moe_layers × top_k`.
    pub(crate) routes: &'a mut [u32],
    /// One per row.
    pub(crate) dead: &'a mut [bool],
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
        notes: &mut Notes<'_>,
    ) -> Result<(), ModelError> {
        match self {
            Self::Dense(ffn) => {
                let out = sized(&mut scratch.branch, scratch.normed.len());
                ffn.run(step.ops, &scratch.normed, &scratch.all_rows, out)?;
                Ok(())
            }
            Self::Mixture(mixture) => mixture.run(step, experts, scratch, notes),
        }
    }
}

impl Mixture {
    fn run(
        &self,
        step: &Step<'_>,
        experts: &mut dyn Experts,
        scratch: &mut Scratch,
        notes: &mut Notes<'_>,
    ) -> Result<(), ModelError> {
        let spec = step.spec;
        self.choose(step, scratch)?;
        self.note(step, scratch, notes);
        let out = sized(&mut scratch.branch, scratch.normed.len());
        let late = experts.run(
            &ExpertBatch {
                layer: self.layer,
                input: &scratch.normed,
                hidden: spec.hidden,
                experts: &scratch.chosen,
                weights: &scratch.weights,
                top_k: spec.top_k,
                dead: notes.dead,
            },
            out,
        )?;
        // The walk goes on with whatever stands in a late row: rows do not touch each other.
        for row in late {
            if let Some(dead) = notes.dead.get_mut(row as usize) {
                *dead = true;
            }
        }
        if let Some(shared) = &self.shared {
            shared.add(step, scratch)?;
        }
        Ok(())
    }

    /// Router logits in float32, then softmax and top-k.
    fn choose(&self, step: &Step<'_>, scratch: &mut Scratch) -> Result<(), ShapeError> {
        let spec = step.spec;
        let rows = step.batch.rows();
        step.ops.matmul(MatMul {
            x: &scratch.normed,
            rows,
            w: &self.router,
            bias: None,
            out: sized(&mut scratch.router, rows * spec.experts),
        })?;
        scratch.chosen.resize(rows * spec.top_k, 0);
        step.ops.gate(Gate {
            logits: &scratch.router,
            rows,
            experts: spec.experts,
            top_k: spec.top_k,
            normalise: spec.norm_top_k,
            out_experts: &mut scratch.chosen,
            out_weights: sized(&mut scratch.weights, rows * spec.top_k),
        })
    }

    /// Copies the choice into the step's routes, which are ordered by row first.
    fn note(&self, step: &Step<'_>, scratch: &Scratch, notes: &mut Notes<'_>) {
        let top_k = step.spec.top_k;
        let per_row = notes.routes.len() / step.batch.rows().max(1);
        let at = self.layer.index() * top_k;
        let rows = notes.routes.chunks_exact_mut(per_row.max(1));
        for (row, chosen) in rows.zip(scratch.chosen.chunks_exact(top_k)) {
            if let Some(place) = row.get_mut(at..at + top_k) {
                place.copy_from_slice(chosen);
            }
        }
    }
}

impl SharedExpert {
    /// `branch += sigmoid(gate · x) * ffn(x)`.
    fn add(&self, step: &Step<'_>, scratch: &mut Scratch) -> Result<(), ShapeError> {
        let rows = step.batch.rows();
        let x = &scratch.normed;
        let out = sized(&mut scratch.shared, x.len());
        self.ffn.run(step.ops, x, &scratch.all_rows, out)?;
        step.ops.matmul(MatMul {
            x,
            rows,
            w: &self.gate,
            bias: None,
            out: sized(&mut scratch.gate, rows),
        })?;
        step.ops.sigmoid_scale(SigmoidScale {
            x: &mut scratch.shared,
            logits: &scratch.gate,
            width: step.spec.hidden,
        })?;
        step.ops.add(Add {
            x: &mut scratch.branch,
            y: &scratch.shared,
        })
    }
}
