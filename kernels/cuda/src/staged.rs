//! A device for rows of this process: every op copies its arguments there and its results back. This is how workers
//! exchange rows, and how a device is judged by the suite that judges the processor.

use std::sync::{Mutex, MutexGuard, PoisonError};

use foregate_kernels::{
    Add, Anywhere, Array, Attention, Combine, Cpu, Embed, Executor, ExpertFfn, Gate, KvShape,
    KvWrite, LogSoftmax, MatMul, Norm, OpError, Ops, PageMap, Placed, RmsNorm, Rope, RopeTable,
    SigmoidScale, SiluMul, StepRows,
};

use crate::executor::Cuda;
use crate::kernel::failed;

/// Ops over slices of this process, computed by a device whose weights and caches they name.
#[derive(Debug)]
pub struct Staged {
    cuda: Cuda,
    host: Cpu,
    held: Mutex<Held>,
}

/// Memory of the device, kept from call to call.
#[derive(Debug, Default)]
struct Held {
    first: Array<f32>,
    second: Array<f32>,
    third: Array<f32>,
    out: Array<f32>,
    numbers: Array<u32>,
    placed: Placed,
}

const WHAT: &str = "rows from the host";

impl Staged {
    /// Ops of a device; `host` sums results that are here.
    #[must_use]
    pub fn new(cuda: Cuda, host: Cpu) -> Self {
        Self {
            cuda,
            host,
            held: Mutex::default(),
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rows of a cache, with angles that nobody reads.
    fn place_rows(
        &self,
        positions: &[u32],
        pages: PageMap<'_>,
        shape: KvShape,
        group: usize,
        placed: &mut Placed,
    ) -> Result<(), OpError> {
        let angles = RopeTable::new(&vec![0.0; shape.head_dim / 2], positions);
        let rows = StepRows {
            positions,
            pages,
            angles: &angles,
            group,
        };
        self.cuda.place(rows, placed)
    }

    fn copy(&self, to: &mut Array<f32>, from: &[f32]) -> Result<(), OpError> {
        to.sized(&self.cuda, WHAT, from.len())?.write(from)
    }
}

/// Angles of a table, and rows without pages: what a rotation alone needs to be placed.
fn turned<'a>(table: &'a RopeTable, zeros: &'a [u32]) -> StepRows<'a> {
    StepRows {
        positions: zeros,
        pages: PageMap {
            sequence_of_row: zeros,
            tables: &[&[]],
        },
        angles: table,
        group: 1,
    }
}

impl Ops for Staged {
    fn matmul(&self, op: MatMul<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.copy(&mut held.first, op.x)?;
        self.copy(&mut held.second, op.bias.unwrap_or_default())?;
        self.cuda.matmul(MatMul {
            x: held.first.view(),
            rows: op.rows,
            w: op.w,
            bias: op.bias.map(|_| held.second.view()),
            out: held.out.sized(&self.cuda, WHAT, op.out.len())?,
        })?;
        held.out.view().read(op.out)
    }

    fn embed(&self, op: Embed<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.cuda.embed(Embed {
            table: op.table,
            ids: op.ids,
            out: held.out.sized(&self.cuda, WHAT, op.out.len())?,
        })?;
        held.out.view().read(op.out)
    }

    fn rms_norm(&self, op: RmsNorm<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.copy(&mut held.first, op.x)?;
        self.copy(&mut held.second, op.add.unwrap_or_default())?;
        self.copy(&mut held.third, op.weight)?;
        self.cuda.rms_norm(RmsNorm {
            x: held.first.view_mut(),
            add: op.add.map(|_| held.second.view()),
            rows: op.rows,
            width: op.width,
            weight: held.third.view(),
            eps: op.eps,
            out: held.out.sized(&self.cuda, WHAT, op.out.len())?,
        })?;
        held.first.view().read(op.x)?;
        held.out.view().read(op.out)
    }

    fn rope(&self, op: Rope<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.copy(&mut held.first, op.x)?;
        self.copy(&mut held.second, op.norm.map_or(&[], |norm| norm.weight))?;
        let zeros = vec![0; op.rows];
        self.cuda
            .place(turned(op.table, &zeros), &mut held.placed)?;
        let rope: Rope<'_, Anywhere> = Rope {
            x: held.first.view_mut(),
            rows: op.rows,
            heads: op.heads,
            head_dim: op.head_dim,
            norm: op.norm.map(|norm| Norm {
                weight: held.second.view(),
                eps: norm.eps,
            }),
            clip: op.clip,
            table: op.table,
        };
        self.cuda.rope(rope, &held.placed)?;
        held.first.view().read(op.x)
    }

    fn kv_write(&self, op: KvWrite<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.copy(&mut held.first, op.k)?;
        self.copy(&mut held.second, op.v)?;
        let write: KvWrite<'_, Anywhere> = KvWrite {
            k: held.first.view(),
            v: held.second.view(),
            positions: op.positions,
            pages: op.pages,
            kv: op.kv,
            layer: op.layer,
        };
        write.check()?;
        self.place_rows(
            op.positions,
            op.pages,
            write.kv.shape(),
            1,
            &mut held.placed,
        )?;
        self.cuda.kv_write(write, &held.placed)?;
        self.cuda.driver().finish().map_err(failed("kv_write"))
    }

    fn attention(&self, op: Attention<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.copy(&mut held.first, op.q)?;
        let attention: Attention<'_, Anywhere> = Attention {
            q: held.first.view(),
            heads: op.heads,
            scale: op.scale,
            positions: op.positions,
            pages: op.pages,
            kv: op.kv,
            layer: op.layer,
            out: held.out.sized(&self.cuda, WHAT, op.out.len())?,
        };
        attention.check()?;
        let shape = op.kv.shape();
        let group = op.heads / shape.kv_heads;
        self.place_rows(op.positions, op.pages, shape, group, &mut held.placed)?;
        self.cuda.attention(attention, &held.placed)?;
        held.out.view().read(op.out)
    }

    fn gate(&self, op: Gate<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.copy(&mut held.first, op.logits)?;
        self.cuda.gate(Gate {
            logits: held.first.view(),
            rows: op.rows,
            experts: op.experts,
            top_k: op.top_k,
            normalise: op.normalise,
            out_experts: held.numbers.sized(&self.cuda, WHAT, op.out_experts.len())?,
            out_weights: held.out.sized(&self.cuda, WHAT, op.out_weights.len())?,
        })?;
        held.numbers.view().read(op.out_experts)?;
        held.out.view().read(op.out_weights)
    }

    fn expert_ffn(&self, op: ExpertFfn<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.copy(&mut held.first, op.x)?;
        self.copy(&mut held.out, op.out)?;
        self.cuda.expert_ffn(ExpertFfn {
            x: held.first.view(),
            hidden: op.hidden,
            groups: op.groups,
            out: held.out.view_mut(),
        })?;
        held.out.view().read(op.out)
    }

    /// Parts that are here are summed here: they would be copied for nothing else.
    fn combine(&self, op: Combine<'_>) -> Result<(), OpError> {
        self.host.combine(op)
    }

    fn add(&self, op: Add<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.copy(&mut held.first, op.x)?;
        self.copy(&mut held.second, op.y)?;
        self.cuda.add(Add {
            x: held.first.view_mut(),
            y: held.second.view(),
        })?;
        held.first.view().read(op.x)
    }

    fn silu_mul(&self, op: SiluMul<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.copy(&mut held.first, op.gate)?;
        self.copy(&mut held.second, op.up)?;
        self.cuda.silu_mul(SiluMul {
            gate: held.first.view_mut(),
            up: held.second.view(),
        })?;
        held.first.view().read(op.gate)
    }

    fn sigmoid_scale(&self, op: SigmoidScale<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.copy(&mut held.first, op.x)?;
        self.copy(&mut held.second, op.logits)?;
        self.cuda.sigmoid_scale(SigmoidScale {
            x: held.first.view_mut(),
            logits: held.second.view(),
            width: op.width,
        })?;
        held.first.view().read(op.x)
    }

    fn log_softmax(&self, op: LogSoftmax<'_>) -> Result<(), OpError> {
        let held = &mut *self.held();
        self.copy(&mut held.first, op.logits)?;
        let out = held.out.sized(&self.cuda, WHAT, op.out.len())?;
        self.cuda.log_softmax(held.first.view(), op.width, out)?;
        held.out.view().read(op.out)
    }
}
