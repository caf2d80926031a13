//! One routed expert in memory, and the two halves of its work: rows through it (the callee's side)
//! and the weighted sum of results (the home's side). Every implementation of `Experts` uses these two
//! functions, so all of them have the same bits.

use std::sync::Arc;

use foregate_api::ids::{ExpertId, LayerId};
use foregate_api::model::ModelSpec;
use foregate_checkpoint::{Checkpoint, ExpertHash, ExpertParts, dtype};
use foregate_kernels::{
    Combine, Dtype, Executor, ExpertFfn, ExpertGroup, Matrix, OpError, Ops, ShapeError,
};

use crate::error::ModelError;
use crate::reuse::emptied;

/// An expert packed for matrix products.
#[derive(Debug)]
pub struct ExpertWeights {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    hash: ExpertHash,
}

impl ExpertWeights {
    /// Packs canonical bytes: those of gate, up and down in the format of the spec's experts.
    ///
    /// # Errors
    /// When there are more or fewer bytes than [`ModelSpec::expert_bytes`].
    pub fn from_canonical(spec: &ModelSpec, bytes: &[u8]) -> Result<Self, ShapeError> {
        Self::from_parts(&cut(spec, bytes))
    }

    /// As [`ExpertWeights::from_canonical`], where `executor` computes.
    ///
    /// # Errors
    /// When there are more or fewer bytes than [`ModelSpec::expert_bytes`], or the device has no memory for them.
    pub fn from_canonical_on(
        executor: &dyn Executor,
        spec: &ModelSpec,
        bytes: &[u8],
    ) -> Result<Self, OpError> {
        Self::from_parts_on(executor, &cut(spec, bytes))
    }

    /// Packs an expert of a checkpoint.
    ///
    /// # Errors
    /// When the parts do not have the sizes they claim.
    pub fn from_parts(parts: &ExpertParts<'_>) -> Result<Self, ShapeError> {
        Self::packed(parts, Matrix::pack)
    }

    /// As [`ExpertWeights::from_parts`], where `executor` computes.
    ///
    /// # Errors
    /// When the parts do not have the sizes they claim, or the device has no memory for them.
    pub fn from_parts_on(
        executor: &dyn Executor,
        parts: &ExpertParts<'_>,
    ) -> Result<Self, OpError> {
        Self::packed(parts, |dtype, n, k, bytes| {
            executor.matrix(dtype, n, k, bytes)
        })
    }

    fn packed<E>(
        parts: &ExpertParts<'_>,
        matrix: impl Fn(Dtype, usize, usize, &[u8]) -> Result<Matrix, E>,
    ) -> Result<Self, E> {
        let (hidden, inner) = (parts.hidden, parts.inner);
        let pack =
            |n: usize, k: usize, bytes: &[u8]| matrix(dtype(parts.format, k), n, k, bytes);
        Ok(Self {
            gate: pack(inner, hidden, &parts.gate)?,
            up: pack(inner, hidden, &parts.up)?,
            down: pack(hidden, inner, &parts.down)?,
            hash: parts.hash(),
        })
    }

    /// Loads one expert of a checkpoint.
    ///
    /// # Errors
    /// When the model has no such expert.
    pub fn load(
        checkpoint: &Checkpoint,
        layer: LayerId,
        expert: ExpertId,
    ) -> Result<Self, ModelError> {
        Self::taken(checkpoint, layer, expert, |parts| {
            Ok(Self::from_parts(parts)?)
        })
    }

    /// As [`ExpertWeights::load`], where `executor` computes.
    ///
    /// # Errors
    /// When the model has no such expert, or the device has no memory for it.
    pub fn load_on(
        executor: &dyn Executor,
        checkpoint: &Checkpoint,
        layer: LayerId,
        expert: ExpertId,
    ) -> Result<Self, ModelError> {
        Self::taken(checkpoint, layer, expert, |parts| {
            Ok(Self::from_parts_on(executor, parts)?)
        })
    }

    fn taken(
        checkpoint: &Checkpoint,
        layer: LayerId,
        expert: ExpertId,
        pack: impl FnOnce(&ExpertParts<'_>) -> Result<Self, ModelError>,
    ) -> Result<Self, ModelError> {
        let packed = pack(&checkpoint.expert(layer, expert)?)?;
        // Else the weights would be in memory twice: packed, and as the file's pages.
        checkpoint.release_expert(layer, expert);
        Ok(packed)
    }

    /// The bytes it was packed from: what a peer is sent.
    ///
    /// # Errors
    /// When a device that has them fails.
    pub fn to_canonical(&self) -> Result<Vec<u8>, OpError> {
        Ok([self.gate.unpack()?, self.up.unpack()?, self.down.unpack()?].concat())
    }

    /// BLAKE3 of the canonical bytes.
    #[must_use]
    pub const fn hash(&self) -> ExpertHash {
        self.hash
    }

    /// Its matrices, as executors take them.
    #[must_use]
    pub const fn parts(&self) -> foregate_kernels::ExpertParts<'_> {
        foregate_kernels::ExpertParts {
            gate: &self.gate,
            up: &self.up,
            down: &self.down,
        }
    }

    /// Bytes of memory that the packed matrices take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }

    /// As an argument of the grouped feed-forward op.
    fn group<'a>(&'a self, rows: &'a [u32], out_offset: usize) -> ExpertGroup<'a> {
        ExpertGroup {
            gate: &self.gate,
            up: &self.up,
            down: &self.down,
            rows,
            out_offset,
        }
    }
}

/// Canonical bytes as parts. A wrong length leaves one of them too short or too long, which packing refuses.
fn cut<'a>(spec: &ModelSpec, bytes: &'a [u8]) -> ExpertParts<'a> {
    let (hidden, inner) = (spec.hidden, spec.expert_inner);
    let format = spec.formats.expert;
    let first = format.matrix_bytes(inner, hidden);
    let (gate, rest) = bytes.split_at(first.min(bytes.len()));
    let (up, down) = rest.split_at(first.min(rest.len()));
    ExpertParts {
        gate: gate.into(),
        up: up.into(),
        down: down.into(),
        format,
        hidden,
        inner,
    }
}

/// An expert and the rows of the input that go through it.
#[derive(Debug, Clone)]
pub struct ExpertRows<'a> {
    /// The expert.
    pub expert: Arc<ExpertWeights>,
    /// Row indices into the input.
    pub rows: &'a [u32],
}

/// Memory of grouped products, used again.
#[derive(Debug, Default)]
pub struct GroupMemory(Vec<ExpertGroup<'static>>);

/// Sends rows of `input` (`any × hidden`) through their experts. The results stand one after the other
/// in the order of `calls` and of the rows in each, so `out` has as many rows of `hidden` as the calls
/// have together. A row's result does not depend on the other rows or calls.
///
/// # Errors
/// When a size or a row index does not fit.
pub fn run_expert_rows(
    ops: &dyn Ops,
    input: &[f32],
    hidden: usize,
    calls: &[ExpertRows<'_>],
    out: &mut [f32],
) -> Result<(), OpError> {
    let calls = calls.iter().map(|call| (&*call.expert, call.rows));
    run_experts(
        ops,
        (input, hidden),
        calls,
        &mut GroupMemory::default(),
        out,
    )
}

/// As [`run_expert_rows`], for calls that come one after the other, in memory that is kept.
///
/// # Errors
/// When a size or a row index does not fit.
pub fn run_experts<'a>(
    ops: &dyn Ops,
    (input, hidden): (&'a [f32], usize),
    calls: impl Iterator<Item = (&'a ExpertWeights, &'a [u32])>,
    memory: &mut GroupMemory,
    out: &mut [f32],
) -> Result<(), OpError> {
    let mut groups: Vec<ExpertGroup<'a>> = emptied(std::mem::take(&mut memory.0));
    let mut offset = 0;
    groups.extend(calls.map(|(expert, rows)| {
        let group = expert.group(rows, offset);
        offset += rows.len();
        group
    }));
    let done = ops.expert_ffn(ExpertFfn {
        x: input,
        hidden,
        groups: &groups,
        out,
    });
    memory.0 = emptied(groups);
    done
}

/// `out[row] = Σ weight · part` over a row's parts in ascending order of expert, each added with one
/// fused multiply-add to an accumulator that starts at zero. `parts` is `rows × top_k`, in the order of
/// [`ExpertBatch::experts`](crate::experts::ExpertBatch::experts); an empty part is left out (a late or
/// dead row: its sum has no meaning).
///
/// # Errors
/// When a size does not fit.
pub fn combine(
    ops: &dyn Ops,
    parts: &[&[f32]],
    weights: &[f32],
    top_k: usize,
    hidden: usize,
    out: &mut [f32],
) -> Result<(), OpError> {
    ops.combine(Combine {
        parts,
        weights,
        top_k,
        width: hidden,
        out,
    })
}
