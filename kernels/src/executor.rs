//! What a model walks on: ops over values that stay where they are computed, and the memory for them.
//!
//! [`OnHost`] is the executor of a processor: its arrays are vectors, and every op is that of an [`Ops`], so results
//! have the same bits. A device implements [`Executor`] itself.

use std::fmt;
use std::sync::Arc;

use crate::cpu::Seated;
use crate::dtype::Dtype;
use crate::error::{OpError, ShapeError};
use crate::kv::{KvCache, KvShape, PageMap};
use crate::matrix::Matrix;
use crate::ops::{
    Add, Attention, Embed, ExpertFfn, Gate, KvWrite, MatMul, Norm, Ops, RmsNorm, Rope,
    RopeTable, SigmoidScale,
};
use crate::place::{Anywhere, Array, Extent, Region, View, ViewMut};

/// `x` is kept in `-limit..=limit`, in place.
#[derive(Debug)]
pub struct Clamp<'a> {
    /// Any number of values.
    pub x: ViewMut<'a, f32>,
    /// Not negative, and a number.
    pub limit: f32,
}

/// `out[i] = x[rows[i]]`.
#[derive(Debug)]
pub struct Gather<'a> {
    /// Rows of `width`.
    pub x: View<'a, f32>,
    /// Width of a row.
    pub width: usize,
    /// Row indices into `x`, any number of them.
    pub rows: &'a [u32],
    /// `rows.len() × width`.
    pub out: ViewMut<'a, f32>,
}

/// The three matrices of one expert, as [`ExpertFfn`] takes them.
#[derive(Debug, Clone, Copy)]
pub struct ExpertParts<'a> {
    /// `inner × hidden`.
    pub gate: &'a Matrix,
    /// `inner × hidden`.
    pub up: &'a Matrix,
    /// `hidden × inner`.
    pub down: &'a Matrix,
}

/// Where a device finds the experts of a layer: made by [`Executor::expert_table`], of use to that executor only, and
/// only as long as those matrices live.
#[derive(Debug, Default)]
pub struct ExpertTable {
    /// Addresses, in an order that the executor knows.
    pub addresses: Array<u64>,
    /// The same, in this process.
    pub here: Vec<u64>,
    /// Experts.
    pub experts: usize,
    /// Width between the products.
    pub inner: usize,
    /// Width of a row.
    pub hidden: usize,
    /// Formats of all gates and ups, and of all downs: groups that are whole rows have two lengths.
    pub dtypes: Option<[Dtype; 2]>,
}

/// `out[r] = Σ weight · expert(x[r])` over the row's experts as a gate left them: each expert as in [`ExpertFfn`], the
/// sum as in [`Combine`](crate::Combine), in ascending order of expert. Nothing comes to the host in between.
#[derive(Debug)]
pub struct ExpertLayer<'a> {
    /// `rows × hidden`.
    pub x: View<'a, f32>,
    /// Rows.
    pub rows: usize,
    /// `rows × top_k`, ascending within a row.
    pub experts: View<'a, u32>,
    /// `rows × top_k`.
    pub weights: View<'a, f32>,
    /// Experts of a row.
    pub top_k: usize,
    /// All experts of the layer.
    pub table: &'a ExpertTable,
    /// `rows × hidden`.
    pub out: ViewMut<'a, f32>,
}

/// Where the rows of a step stand.
#[derive(Debug, Clone, Copy)]
pub struct StepRows<'a> {
    /// Position of each row in its sequence.
    pub positions: &'a [u32],
    /// Where each row's sequence lives.
    pub pages: PageMap<'a>,
    /// One row of angles per row.
    pub angles: &'a RopeTable,
    /// Query heads that share a key/value head.
    pub group: usize,
}

/// What an executor keeps of [`StepRows`] for all layers of a step: [`Executor::place`] fills it. Kept from step to step
/// for its memory.
#[derive(Debug, Default)]
pub struct Placed {
    /// Where the executor computes.
    pub words: Array<u32>,
    /// The same here, to be copied at once.
    pub staged: Vec<u32>,
    /// Where parts begin, in an order that the executor knows.
    pub parts: Vec<usize>,
}

/// What a model walks on. Ops return when the device knows of them; an error of a device may come with a later call, at
/// the latest with the next read.
#[expect(
    clippy::missing_errors_doc,
    reason = "the causes are the variants of OpError, alike for all"
)]
pub trait Executor: fmt::Debug + Send + Sync {
    /// As [`Ops::enter`].
    fn enter(&self) -> Seated {
        Seated::default()
    }
    /// Bytes that nobody has of a device's memory; `None` of who computes in this process's memory.
    fn free_memory(&self) -> Result<Option<u64>, OpError> {
        Ok(None)
    }
    /// Memory for values, not zeroed; `None` of who computes in this process's memory. `what` names it in errors.
    fn allocate(
        &self,
        what: &'static str,
        bytes: usize,
    ) -> Result<Option<Box<dyn Region>>, OpError>;
    /// A weight of canonical bytes (see [`Dtype`]), laid out as products want it.
    fn matrix(&self, dtype: Dtype, n: usize, k: usize, bytes: &[u8])
    -> Result<Matrix, OpError>;
    /// Room for keys and values.
    fn kv_cache(&self, shape: KvShape) -> Result<KvCache, OpError>;
    /// Prepares the experts of a layer, by id.
    fn expert_table(&self, experts: &[ExpertParts<'_>]) -> Result<ExpertTable, OpError>;
    /// Prepares what the layers of a step read again.
    fn place(&self, rows: StepRows<'_>, placed: &mut Placed) -> Result<(), OpError>;

    /// See [`MatMul`].
    fn matmul(&self, op: MatMul<'_, Anywhere>) -> Result<(), OpError>;
    /// See [`Embed`].
    fn embed(&self, op: Embed<'_, Anywhere>) -> Result<(), OpError>;
    /// See [`RmsNorm`].
    fn rms_norm(&self, op: RmsNorm<'_, Anywhere>) -> Result<(), OpError>;
    /// See [`Rope`]; its angles are those of `placed`.
    fn rope(&self, op: Rope<'_, Anywhere>, placed: &Placed) -> Result<(), OpError>;
    /// See [`KvWrite`]; its positions and pages are those of `placed`.
    fn kv_write(&self, op: KvWrite<'_, Anywhere>, placed: &Placed) -> Result<(), OpError>;
    /// See [`Attention`]; its positions and pages are those of `placed`.
    fn attention(&self, op: Attention<'_, Anywhere>, placed: &Placed) -> Result<(), OpError>;
    /// See [`Gate`].
    fn gate(&self, op: Gate<'_, Anywhere>) -> Result<(), OpError>;
    /// See [`ExpertFfn`].
    fn expert_ffn(&self, op: ExpertFfn<'_, Anywhere>) -> Result<(), OpError>;
    /// See [`ExpertLayer`].
    fn expert_layer(&self, op: ExpertLayer<'_>) -> Result<(), OpError>;
    /// See [`Add`].
    fn add(&self, op: Add<'_, Anywhere>) -> Result<(), OpError>;
    /// See [`SigmoidScale`].
    fn sigmoid_scale(&self, op: SigmoidScale<'_, Anywhere>) -> Result<(), OpError>;
    /// See [`Clamp`].
    fn clamp(&self, op: Clamp<'_>) -> Result<(), OpError>;
    /// See [`Gather`].
    fn gather(&self, op: Gather<'_>) -> Result<(), OpError>;
}

impl Clamp<'_> {
    /// Whether the limit is one.
    ///
    /// # Errors
    /// When it is not; the error names the argument.
    pub fn check(&self) -> Result<(), ShapeError> {
        if self.limit.is_nan() || self.limit < 0.0 {
            return Err(ShapeError::new(
                "clamp",
                "limit, not negative and a number",
                0,
                0,
            ));
        }
        Ok(())
    }
}

impl Gather<'_> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Result<(), ShapeError> {
        const OP: &str = "gather";
        let rows = self.x.extent() / self.width.max(1);
        ShapeError::check_area(OP, "x, whole rows", (rows, self.width), self.x.extent())?;
        ShapeError::check_area(OP, "out", (self.rows.len(), self.width), self.out.extent())?;
        match self.rows.iter().find(|row| **row as usize >= rows) {
            Some(row) => Err(ShapeError::new(OP, "row below", rows, *row as usize)),
            None => Ok(()),
        }
    }
}

impl ExpertLayer<'_> {
    /// Whether sizes fit each other. That the experts exist is the gate's promise: on a device nobody looks.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Result<(), ShapeError> {
        const OP: &str = "expert_layer";
        let (rows, hidden) = (self.rows, self.table.hidden);
        ShapeError::check_area(OP, "x", (rows, hidden), self.x.extent())?;
        ShapeError::check_area(OP, "out", (rows, hidden), self.out.extent())?;
        ShapeError::check_area(OP, "experts", (rows, self.top_k), self.experts.extent())?;
        ShapeError::check_area(OP, "weights", (rows, self.top_k), self.weights.extent())?;
        if self.top_k == 0 || self.top_k > self.table.experts {
            let most = self.table.experts;
            return Err(ShapeError::new(OP, "top_k, from 1 to", most, self.top_k));
        }
        Ok(())
    }
}

/// A processor's ops as an executor: values stay in this process's memory, and nothing is copied for that.
pub struct OnHost {
    ops: Arc<dyn Ops>,
    pack: Pack,
}

/// As [`Matrix::pack`].
type Pack = Box<dyn Fn(Dtype, usize, usize, &[u8]) -> Result<Matrix, ShapeError> + Send + Sync>;

impl OnHost {
    /// Ops whose weights are packed on the calling thread.
    #[must_use]
    pub fn new(ops: Arc<dyn Ops>) -> Self {
        let pack = Box::new(Matrix::pack);
        Self { ops, pack }
    }

    /// A processor, whose weights are packed by all of its threads.
    #[must_use]
    pub fn cpu(cpu: Arc<crate::Cpu>) -> Self {
        let packer = Arc::clone(&cpu);
        Self {
            ops: cpu,
            pack: Box::new(move |dtype, n, k, bytes| packer.pack(dtype, n, k, bytes)),
        }
    }
}

impl fmt::Debug for OnHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnHost")
    }
}

fn norm_here<'a>(
    norm: Option<Norm<'a, Anywhere>>,
    op: &'static str,
) -> Result<Option<Norm<'a>>, OpError> {
    let Some(Norm { weight, eps }) = norm else {
        return Ok(None);
    };
    let weight = weight.host(op, "norm")?;
    Ok(Some(Norm { weight, eps }))
}

impl Executor for OnHost {
    fn enter(&self) -> Seated {
        self.ops.enter()
    }

    fn allocate(
        &self,
        _what: &'static str,
        _bytes: usize,
    ) -> Result<Option<Box<dyn Region>>, OpError> {
        Ok(None)
    }

    fn matrix(
        &self,
        dtype: Dtype,
        n: usize,
        k: usize,
        bytes: &[u8],
    ) -> Result<Matrix, OpError> {
        Ok((self.pack)(dtype, n, k, bytes)?)
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvCache, OpError> {
        Ok(KvCache::new(shape)?)
    }

    /// Nothing to prepare.
    fn expert_table(&self, _experts: &[ExpertParts<'_>]) -> Result<ExpertTable, OpError> {
        Ok(ExpertTable::default())
    }

    /// Nothing to prepare: arguments are here.
    fn place(&self, _rows: StepRows<'_>, _placed: &mut Placed) -> Result<(), OpError> {
        Ok(())
    }

    fn matmul(&self, op: MatMul<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "matmul";
        let bias = op.bias.map(|bias| bias.host(OP, "bias")).transpose()?;
        self.ops.matmul(MatMul {
            x: op.x.host(OP, "x")?,
            rows: op.rows,
            w: op.w,
            bias,
            out: op.out.host(OP, "out")?,
        })
    }

    fn embed(&self, op: Embed<'_, Anywhere>) -> Result<(), OpError> {
        self.ops.embed(Embed {
            table: op.table,
            ids: op.ids,
            out: op.out.host("embed", "out")?,
        })
    }

    fn rms_norm(&self, op: RmsNorm<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "rms_norm";
        let add = op.add.map(|add| add.host(OP, "add")).transpose()?;
        self.ops.rms_norm(RmsNorm {
            x: op.x.host(OP, "x")?,
            add,
            rows: op.rows,
            width: op.width,
            weight: op.weight.host(OP, "weight")?,
            eps: op.eps,
            out: op.out.host(OP, "out")?,
        })
    }

    fn rope(&self, op: Rope<'_, Anywhere>, _placed: &Placed) -> Result<(), OpError> {
        const OP: &str = "rope";
        self.ops.rope(Rope {
            x: op.x.host(OP, "x")?,
            rows: op.rows,
            heads: op.heads,
            head_dim: op.head_dim,
            norm: norm_here(op.norm, OP)?,
            clip: op.clip,
            table: op.table,
        })
    }

    fn kv_write(&self, op: KvWrite<'_, Anywhere>, _placed: &Placed) -> Result<(), OpError> {
        const OP: &str = "kv_write";
        self.ops.kv_write(KvWrite {
            k: op.k.host(OP, "k")?,
            v: op.v.host(OP, "v")?,
            positions: op.positions,
            pages: op.pages,
            kv: op.kv,
            layer: op.layer,
        })
    }

    fn attention(&self, op: Attention<'_, Anywhere>, _placed: &Placed) -> Result<(), OpError> {
        const OP: &str = "attention";
        self.ops.attention(Attention {
            q: op.q.host(OP, "q")?,
            heads: op.heads,
            scale: op.scale,
            positions: op.positions,
            pages: op.pages,
            kv: op.kv,
            layer: op.layer,
            out: op.out.host(OP, "out")?,
        })
    }

    fn gate(&self, op: Gate<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "gate";
        self.ops.gate(Gate {
            logits: op.logits.host(OP, "logits")?,
            rows: op.rows,
            experts: op.experts,
            top_k: op.top_k,
            normalise: op.normalise,
            out_experts: op.out_experts.host(OP, "out_experts")?,
            out_weights: op.out_weights.host(OP, "out_weights")?,
        })
    }

    fn expert_ffn(&self, op: ExpertFfn<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "expert_ffn";
        self.ops.expert_ffn(ExpertFfn {
            x: op.x.host(OP, "x")?,
            hidden: op.hidden,
            groups: op.groups,
            out: op.out.host(OP, "out")?,
        })
    }

    /// Who has the choice here sorts it here, and uses [`Executor::expert_ffn`].
    fn expert_layer(&self, _op: ExpertLayer<'_>) -> Result<(), OpError> {
        Err(OpError::Unsupported {
            op: "expert_layer",
            what: "a processor has the gate's choice at hand: sort it, then expert_ffn and combine"
                .to_owned(),
        })
    }

    fn add(&self, op: Add<'_, Anywhere>) -> Result<(), OpError> {
        self.ops.add(Add {
            x: op.x.host("add", "x")?,
            y: op.y.host("add", "y")?,
        })
    }

    fn sigmoid_scale(&self, op: SigmoidScale<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "sigmoid_scale";
        self.ops.sigmoid_scale(SigmoidScale {
            x: op.x.host(OP, "x")?,
            logits: op.logits.host(OP, "logits")?,
            width: op.width,
        })
    }

    fn clamp(&self, op: Clamp<'_>) -> Result<(), OpError> {
        op.check()?;
        for value in op.x.host("clamp", "x")? {
            *value = value.clamp(-op.limit, op.limit);
        }
        Ok(())
    }

    fn gather(&self, op: Gather<'_>) -> Result<(), OpError> {
        const OP: &str = "gather";
        op.check()?;
        let (x, out) = (op.x.host(OP, "x")?, op.out.host(OP, "out")?);
        for (row, out) in op.rows.iter().zip(out.chunks_exact_mut(op.width.max(1))) {
            let at = *row as usize * op.width;
            out.copy_from_slice(&x[at..at + op.width]);
        }
        Ok(())
    }
}
