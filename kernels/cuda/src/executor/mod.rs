//! Ops on a device: sizes are checked here, then kernels are launched. Values stay on the device.
//!
//! All launches stand in one order, whoever calls; memory between kernels is shared by all ops, and lent under a lock
//! for as long as an op is put in that order.

mod format;
mod grouped;
mod place;
mod product;
mod scratch;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foregate_kernels::{
    Add, Anywhere, Array, Attention, Clamp, Dtype, Element, Embed, Executor, ExpertFfn,
    ExpertLayer, ExpertParts, ExpertTable, Extent, Gate, Gather, KvCache, KvDtype, KvShape,
    KvWrite, MatMul, Matrix, OpError, Placed, Region, RmsNorm, Rope, ShapeError, SigmoidScale,
    SiluMul, Span, StepRows, View, ViewMut,
};

use self::format::{Coding, Kind, supported};
use self::place::Places;
use self::product::{NO_BIAS, THREADS};
use self::scratch::Scratch;
use crate::driver::Driver;
use crate::kernel::{
    Address, Attended, Chosen, ClampTo, CodedRows, KvWritten, LogSoftmaxed, Merged, NULL,
    Normed, Pairwise, Rotated, Rows, SigmoidScaled, failed, size,
};
use crate::region::DeviceRegion;

/// Most experts that the gate's kernel takes.
const MOST_EXPERTS: usize = 1024;
/// Widest head that attention's kernels take.
const WIDEST_HEAD: usize = 256;
/// Rows of the gate that a block takes.
const GATE_ROWS: u32 = 4;

/// A device as a model walks on it. Clones are the same device.
#[derive(Debug, Clone)]
pub struct Cuda {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    driver: Arc<dyn Driver>,
    scratch: Mutex<Scratch>,
}

impl Cuda {
    /// A device behind its driver.
    #[must_use]
    pub fn new(driver: Arc<dyn Driver>) -> Self {
        let scratch = Mutex::default();
        Self {
            shared: Arc::new(Shared { driver, scratch }),
        }
    }

    /// Its driver.
    #[must_use]
    pub fn driver(&self) -> &dyn Driver {
        &*self.shared.driver
    }

    fn lock(&self) -> MutexGuard<'_, Scratch> {
        // What a panicking op left in it is overwritten before it is read.
        self.shared
            .scratch
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn here<T: Element>(
        &self,
        op: &'static str,
        what: &'static str,
        span: Span<'_, T>,
    ) -> Result<Address, OpError> {
        if span.region().device() == self.shared.driver.id() {
            Ok(span.address())
        } else {
            Err(OpError::OnHost { op, what })
        }
    }

    fn input<T: Element>(
        &self,
        op: &'static str,
        what: &'static str,
        view: View<'_, T>,
    ) -> Result<Address, OpError> {
        self.here(op, what, view.device(op, what)?)
    }

    fn output<T: Element>(
        &self,
        op: &'static str,
        what: &'static str,
        view: ViewMut<'_, T>,
    ) -> Result<Address, OpError> {
        self.here(op, what, view.device(op, what)?)
    }

    fn cache(&self, op: &'static str, kv: &KvCache) -> Result<Address, OpError> {
        let region = kv
            .region()
            .filter(|region| region.device() == self.shared.driver.id());
        let region = region.ok_or(OpError::OnHost {
            op,
            what: "the cache",
        })?;
        Ok(region.address())
    }

    /// `x += y`, or another function of two values; `x` is changed.
    fn pairwise(
        &self,
        (op, symbol): (&'static str, &'static str),
        (x, y): (Address, Address),
        count: usize,
    ) -> Result<(), OpError> {
        let grid = [self.blocks(count), 1, 1];
        Pairwise {
            x,
            y,
            count: count as u64,
        }
        .run(self.driver(), (op, symbol), grid, THREADS)
    }

    /// See [`SiluMul`].
    ///
    /// # Errors
    /// As those of an [`Executor`].
    pub fn silu_mul(&self, op: SiluMul<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "silu_mul";
        op.check()?;
        let (count, y) = (op.up.extent(), self.input(OP, "up", op.up)?);
        let x = self.output(OP, "gate", op.gate)?;
        self.pairwise((OP, "fg_silu_mul"), (x, y), count)
    }

    /// `out[r] = log_softmax(logits[r])` of rows of `width`: see [`LogSoftmax`](foregate_kernels::LogSoftmax).
    ///
    /// # Errors
    /// As those of an [`Executor`].
    pub fn log_softmax(
        &self,
        logits: View<'_, f32>,
        width: usize,
        out: ViewMut<'_, f32>,
    ) -> Result<(), OpError> {
        const OP: &str = "log_softmax";
        let count = logits.extent();
        if width == 0 || !count.is_multiple_of(width) || out.extent() != count {
            let what = "logits and out, whole rows of";
            return Err(ShapeError {
                op: OP,
                what,
                want: width,
                got: count,
            }
            .into());
        }
        let logits = self.input(OP, "logits", logits)?;
        let out = self.output(OP, "out", out)?;
        let grid = [size(OP, "rows", count / width)?, 1, 1];
        let width = size(OP, "width", width)?;
        LogSoftmaxed { logits, out, width }.run(
            self.driver(),
            (OP, "fg_log_softmax"),
            grid,
            THREADS,
        )
    }

    /// Rows of a table by number.
    fn rows(
        &self,
        (op, symbol): (&'static str, &'static str),
        (table, out): (Address, Address),
        ids: &[u32],
        width: usize,
    ) -> Result<(), OpError> {
        let mut scratch = self.lock();
        let ids_at = scratch
            .ids
            .holding(&self.shared.driver, "numbers of rows", ids)?;
        let grid = [size(op, "rows", ids.len())?, 1, 1];
        let width = size(op, "width", width)?;
        Rows {
            table,
            ids: ids_at,
            out,
            width,
        }
        .run(self.driver(), (op, symbol), grid, THREADS)
    }

    /// Rows of a table of codes by number.
    fn coded_rows(
        &self,
        op: &'static str,
        (table, out): (Address, Address),
        ids: &[u32],
        coding: Coding,
        (n, width): (usize, usize),
    ) -> Result<(), OpError> {
        let mut scratch = self.lock();
        let driver = &self.shared.driver;
        let rows = CodedRows {
            table,
            format: coding.format,
            block_n: coding.block_n,
            block_k: coding.block_k,
            ids: scratch.ids.holding(driver, "numbers of rows", ids)?,
            out,
            n: size(op, "rows of the table", n)?,
            width: size(op, "width", width)?,
        };
        let grid = [size(op, "rows", ids.len())?, 1, 1];
        rows.run(self.driver(), (op, "fg_embed_coded"), grid, THREADS)
    }
}

/// Bytes of a cache: `[pages][layers][2][kv_heads][page_tokens][head_dim]`.
#[must_use]
pub fn cache_bytes(shape: KvShape) -> Option<usize> {
    [
        shape.layers,
        2,
        shape.kv_heads,
        shape.page_tokens,
        shape.head_dim,
        shape.dtype.bytes(),
    ]
    .iter()
    .try_fold(shape.pages, |bytes, size| bytes.checked_mul(*size))
}

impl Executor for Cuda {
    fn free_memory(&self) -> Result<Option<u64>, OpError> {
        let memory = self.shared.driver.memory().map_err(failed("free_memory"))?;
        Ok(Some(memory.free))
    }

    fn allocate(
        &self,
        what: &'static str,
        bytes: usize,
    ) -> Result<Option<Box<dyn Region>>, OpError> {
        let region = DeviceRegion::take(&self.shared.driver, what, bytes)?;
        Ok(Some(Box::new(region)))
    }

    /// Formats that kernels do not take are refused here, before anything is copied.
    fn matrix(
        &self,
        dtype: Dtype,
        n: usize,
        k: usize,
        bytes: &[u8],
    ) -> Result<Matrix, OpError> {
        const OP: &str = "weights";
        supported(OP, dtype, k)?;
        let want = dtype.bytes(n, k).unwrap_or(usize::MAX);
        if want != bytes.len() {
            let what = "bytes of a matrix";
            return Err(ShapeError {
                op: OP,
                what,
                want,
                got: bytes.len(),
            }
            .into());
        }
        let region = DeviceRegion::take(&self.shared.driver, OP, bytes.len())?;
        if !bytes.is_empty() {
            region.write(0, bytes)?;
        }
        Ok(Matrix::on_device(dtype, n, k, Box::new(region))?)
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvCache, OpError> {
        const WHAT: &str = "keys and values";
        if shape.head_dim > WIDEST_HEAD {
            return Err(OpError::Unsupported {
                op: WHAT,
                what: format!(
                    "heads of {} values, kernels take at most {WIDEST_HEAD}",
                    shape.head_dim
                ),
            });
        }
        let bytes = cache_bytes(shape).ok_or(ShapeError {
            op: WHAT,
            what: "pages that fit in memory",
            want: 0,
            got: shape.pages,
        })?;
        let region = DeviceRegion::take(&self.shared.driver, WHAT, bytes)?;
        Ok(KvCache::on_device(shape, Box::new(region))?)
    }

    fn expert_table(&self, experts: &[ExpertParts<'_>]) -> Result<ExpertTable, OpError> {
        const OP: &str = "expert_table";
        let Some(first) = experts.first() else {
            return Ok(ExpertTable::default());
        };
        let shape =
            |parts: &ExpertParts<'_>| (parts.gate.n(), parts.gate.k(), parts.down.dtype());
        let (inner, hidden, down) = shape(first);
        let dtypes = [first.gate.dtype(), down];
        let mut here = Vec::with_capacity(3 * experts.len());
        let parts: [(for<'a> fn(&ExpertParts<'a>) -> &'a Matrix, Dtype); 3] = [
            (|parts| parts.gate, dtypes[0]),
            (|parts| parts.up, dtypes[0]),
            (|parts| parts.down, dtypes[1]),
        ];
        for (part, dtype) in parts {
            for expert in experts {
                let w = part(expert);
                if shape(expert) != shape(first) || w.dtype() != dtype {
                    return Err(OpError::Unsupported {
                        op: OP,
                        what: "experts of one layer with several shapes or formats".to_owned(),
                    });
                }
                here.push(self.weight(OP, w)?);
            }
        }
        Ok(ExpertTable {
            addresses: Array::of(self, "addresses of experts", here.clone())?,
            here,
            experts: experts.len(),
            inner,
            hidden,
            dtypes: Some(dtypes),
        })
    }

    fn place(&self, rows: StepRows<'_>, placed: &mut Placed) -> Result<(), OpError> {
        place::fill(&rows, placed)?;
        let Placed { words, staged, .. } = placed;
        words
            .sized(self, "rows of a step", staged.len())?
            .write(staged)
    }

    fn matmul(&self, op: MatMul<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "matmul";
        op.check()?;
        let x = self.input(OP, "x", op.x)?;
        let bias = op
            .bias
            .map_or(Ok(NO_BIAS), |bias| self.input(OP, "bias", bias))?;
        let out = self.output(OP, "out", op.out)?;
        self.product(&mut self.lock(), OP, op.w, op.rows, (x, bias, out))
    }

    fn embed(&self, op: Embed<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "embed";
        op.check()?;
        let table = self.weight(OP, op.table)?;
        let out = self.output(OP, "out", op.out)?;
        let width = op.table.k();
        let symbol = match Kind::of(op.table.dtype(), width) {
            Kind::Plain(_, symbol) => symbol,
            Kind::Bf16 => "fg_embed_bf16",
            Kind::Coded(coding) => {
                return self.coded_rows(
                    OP,
                    (table, out),
                    op.ids,
                    coding,
                    (op.table.n(), width),
                );
            }
        };
        self.rows((OP, symbol), (table, out), op.ids, width)
    }

    fn rms_norm(&self, op: RmsNorm<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "rms_norm";
        op.check()?;
        let normed = Normed {
            x: self.output(OP, "x", op.x)?,
            add: op.add.map_or(Ok(NULL), |add| self.input(OP, "add", add))?,
            weight: self.input(OP, "weight", op.weight)?,
            eps: op.eps,
            out: self.output(OP, "out", op.out)?,
            out_bf16: NULL,
            width: size(OP, "width", op.width)?,
        };
        let grid = [size(OP, "rows", op.rows)?, 1, 1];
        normed.run(self.driver(), (OP, "fg_rms_norm"), grid, THREADS)
    }

    fn rope(&self, op: Rope<'_, Anywhere>, placed: &Placed) -> Result<(), OpError> {
        const OP: &str = "rope";
        op.check()?;
        let places = Places::of(&self.shared.driver, OP, placed)?;
        placed_here(OP, op.rows, places.rows)?;
        placed_here(OP, op.table.half(), places.half)?;
        let (norm_weight, norm_width, eps) = match op.norm {
            None => (NULL, 0, 0.0),
            Some(norm) => {
                let width = size(OP, "width of a norm", norm.weight.extent())?;
                (self.input(OP, "norm", norm.weight)?, width, norm.eps)
            }
        };
        let rotated = Rotated {
            x: self.output(OP, "x", op.x)?,
            norm_weight,
            norm_width,
            eps,
            clip: op.clip.unwrap_or(-1.0),
            cos: places.cos,
            sin: places.sin,
            heads: size(OP, "heads", op.heads)?,
            head_dim: size(OP, "head_dim", op.head_dim)?,
        };
        let grid = [size(OP, "rows", op.rows)?, 1, 1];
        rotated.run(self.driver(), (OP, "fg_rope"), grid, THREADS)
    }

    fn kv_write(&self, op: KvWrite<'_, Anywhere>, placed: &Placed) -> Result<(), OpError> {
        const OP: &str = "kv_write";
        op.check()?;
        let places = Places::of(&self.shared.driver, OP, placed)?;
        placed_here(OP, op.positions.len(), places.rows)?;
        let shape = op.kv.shape();
        let symbol = match shape.dtype {
            KvDtype::F32 => "fg_kv_write_f32",
            KvDtype::Bf16 => "fg_kv_write_bf16",
        };
        let written = KvWritten {
            k: self.input(OP, "k", op.k)?,
            v: self.input(OP, "v", op.v)?,
            positions: places.positions,
            sequence_of_row: places.sequence_of_row,
            tables: places.tables,
            table_stride: places.table_stride,
            cache: self.cache(OP, op.kv)?,
            layers: size(OP, "layers", shape.layers)?,
            layer: size(OP, "layer", op.layer)?,
            page_tokens: size(OP, "page_tokens", shape.page_tokens)?,
            kv_heads: size(OP, "kv_heads", shape.kv_heads)?,
            head_dim: size(OP, "head_dim", shape.head_dim)?,
        };
        let grid = [size(OP, "rows", op.positions.len())?, 1, 1];
        written.run(self.driver(), (OP, symbol), grid, THREADS)
    }

    fn attention(&self, op: Attention<'_, Anywhere>, placed: &Placed) -> Result<(), OpError> {
        const OP: &str = "attention";
        op.check()?;
        let places = Places::of(&self.shared.driver, OP, placed)?;
        placed_here(OP, op.positions.len(), places.rows)?;
        let (rows, shape) = (op.positions.len(), op.kv.shape());
        placed_here(OP, shape.head_dim, 2 * places.half)?;
        let (symbol, threads) = match (shape.dtype, shape.head_dim) {
            (KvDtype::F32, _) => ("fg_attention_f32", 128),
            (KvDtype::Bf16, 0..=64) => ("fg_attention_bf16_d64", 128),
            (KvDtype::Bf16, 65..=128) => ("fg_attention_bf16_d128", 128),
            (KvDtype::Bf16, _) => ("fg_attention_bf16_d256", 64),
        };
        let (heads, head_dim) = (
            size(OP, "heads", op.heads)?,
            size(OP, "head_dim", shape.head_dim)?,
        );
        let out = self.output(OP, "out", op.out)?;
        let splits = places.splits;
        let mut scratch = self.lock();
        let (part_out, part_max, part_sum) = if splits > 1 {
            let each = rows * op.heads * splits as usize;
            let bytes = each * (shape.head_dim + 2) * size_of::<f32>();
            let driver = &self.shared.driver;
            let at = scratch.partial.bytes(driver, "partial attention", bytes)?;
            let after = |values: usize| at + (values * size_of::<f32>()) as u64;
            (
                at,
                after(each * shape.head_dim),
                after(each * (shape.head_dim + 1)),
            )
        } else {
            (NULL, NULL, NULL)
        };
        let kv_heads = size(OP, "kv_heads", shape.kv_heads)?;
        Attended {
            q: self.input(OP, "q", op.q)?,
            cache: self.cache(OP, op.kv)?,
            positions: places.positions,
            sequence_of_row: places.sequence_of_row,
            tables: places.tables,
            table_stride: places.table_stride,
            tile_first: places.tile_first,
            tile_rows: places.tile_rows,
            layers: size(OP, "layers", shape.layers)?,
            layer: size(OP, "layer", op.layer)?,
            page_tokens: size(OP, "page_tokens", shape.page_tokens)?,
            heads,
            kv_heads,
            head_dim,
            scale: op.scale,
            splits,
            part_out,
            part_max,
            part_sum,
            out,
        }
        .run(
            self.driver(),
            (OP, symbol),
            [places.tiles, kv_heads, splits],
            threads,
        )?;
        if splits == 1 {
            return Ok(());
        }
        let positions = places.positions;
        let grid = [size(OP, "rows", rows)?, heads, 1];
        Merged {
            part_out,
            part_max,
            part_sum,
            positions,
            out,
            heads,
            head_dim,
            splits,
        }
        .run(self.driver(), (OP, "fg_attention_merge"), grid, 128)
    }

    fn gate(&self, op: Gate<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "gate";
        op.check()?;
        if op.experts > MOST_EXPERTS {
            return Err(OpError::Unsupported {
                op: OP,
                what: format!("{} experts, the kernel takes {MOST_EXPERTS}", op.experts),
            });
        }
        let rows = size(OP, "rows", op.rows)?;
        let chosen = Chosen {
            logits: self.input(OP, "logits", op.logits)?,
            rows,
            experts: size(OP, "experts", op.experts)?,
            top_k: size(OP, "top_k", op.top_k)?,
            normalise: u32::from(op.normalise),
            experts_out: self.output(OP, "out_experts", op.out_experts)?,
            weights_out: self.output(OP, "out_weights", op.out_weights)?,
            counts: NULL,
        };
        let grid = [rows.div_ceil(GATE_ROWS), 1, 1];
        chosen.run(self.driver(), (OP, "fg_gate"), grid, 128)
    }

    fn expert_ffn(&self, op: ExpertFfn<'_, Anywhere>) -> Result<(), OpError> {
        self.run_expert_ffn(op)
    }

    fn expert_layer(&self, op: ExpertLayer<'_>) -> Result<(), OpError> {
        self.run_expert_layer(op)
    }

    fn add(&self, op: Add<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "add";
        op.check()?;
        let (count, y) = (op.y.extent(), self.input(OP, "y", op.y)?);
        let x = self.output(OP, "x", op.x)?;
        self.pairwise((OP, "fg_add"), (x, y), count)
    }

    fn sigmoid_scale(&self, op: SigmoidScale<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "sigmoid_scale";
        op.check()?;
        let grid = [size(OP, "rows", op.logits.extent())?, 1, 1];
        let scaled = SigmoidScaled {
            x: self.output(OP, "x", op.x)?,
            logits: self.input(OP, "logits", op.logits)?,
            width: size(OP, "width", op.width)?,
        };
        scaled.run(self.driver(), (OP, "fg_sigmoid_scale"), grid, THREADS)
    }

    fn clamp(&self, op: Clamp<'_>) -> Result<(), OpError> {
        const OP: &str = "clamp";
        op.check()?;
        let count = op.x.extent();
        let clamp = ClampTo {
            x: self.output(OP, "x", op.x)?,
            limit: op.limit,
            count: count as u64,
        };
        let grid = [self.blocks(count), 1, 1];
        clamp.run(self.driver(), (OP, "fg_clamp"), grid, THREADS)
    }

    fn gather(&self, op: Gather<'_>) -> Result<(), OpError> {
        const OP: &str = "gather";
        op.check()?;
        let (x, out) = (self.input(OP, "x", op.x)?, self.output(OP, "out", op.out)?);
        self.rows((OP, "fg_gather_rows"), (x, out), op.rows, op.width)
    }
}

/// Whether an op's rows are those that were placed.
fn placed_here(op: &'static str, want: usize, got: usize) -> Result<(), OpError> {
    if want == got {
        return Ok(());
    }
    Err(ShapeError {
        op,
        what: "size of what was placed",
        want,
        got,
    }
    .into())
}
