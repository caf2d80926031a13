//! Ops that say what they read and how long they took.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use foregate_kernels::{
    Add, Attention, Combine, Embed, ExpertFfn, Gate, KvWrite, LogSoftmax, MatMul, OpError, Ops,
    RmsNorm, Rope, Seated, SigmoidScale, SiluMul,
};
use tokio::time::Instant;

use super::steps::{Ledger, Step};

/// What an op is done for.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    /// For what comes after it: a norm or a projection.
    Next,
    /// Ends a block's half; projections before it end the attention.
    Residual,
    Gate,
    Experts,
    Attention,
    Rest,
}

/// What an op reads and multiplies.
#[derive(Debug, Clone, Copy)]
struct Spent {
    bytes: usize,
    multiply_adds: usize,
}

impl From<usize> for Spent {
    fn from(bytes: usize) -> Self {
        Self {
            bytes,
            multiply_adds: 0,
        }
    }
}

/// Another implementation's ops, each written down in a ledger: bytes of weights, and of keys and values,
/// that it has to read from memory, and its time. Activations count as nothing, they stay in the cache.
pub(super) struct Audited {
    inner: Arc<dyn Ops>,
    ledger: Ledger,
    /// Time of ops whose purpose the next op tells.
    undecided: Mutex<Duration>,
}

impl Audited {
    pub(super) fn new(inner: Arc<dyn Ops>, ledger: &Ledger) -> Self {
        Self {
            inner,
            ledger: ledger.clone(),
            undecided: Mutex::default(),
        }
    }

    fn timed(
        &self,
        purpose: Purpose,
        work: impl Into<Spent>,
        op: impl FnOnce(&dyn Ops) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        let since = Instant::now();
        op(self.inner.as_ref())?;
        let time = since.elapsed();
        let mut undecided = self
            .undecided
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Purpose::Next = purpose {
            *undecided += time;
        }
        let spent = work.into();
        self.ledger.note(|step| {
            step.bytes += spent.bytes as u64;
            step.multiply_adds += spent.multiply_adds as u64;
            spend(step, purpose, time, &mut undecided);
        });
        Ok(())
    }
}

/// Books an op's time, and that of the ops that prepared it.
fn spend(step: &mut Step, purpose: Purpose, time: Duration, undecided: &mut Duration) {
    let parts = &mut step.parts;
    match purpose {
        Purpose::Next => {}
        Purpose::Residual => parts.attention += std::mem::take(undecided),
        Purpose::Gate => parts.gate += time + std::mem::take(undecided),
        Purpose::Experts => parts.experts += time + std::mem::take(undecided),
        Purpose::Attention => parts.attention += time + std::mem::take(undecided),
        // The embedding begins a step: what is left of the one before was its output projection.
        Purpose::Rest => *undecided = Duration::ZERO,
    }
}

/// Keys and values that a batch's sequences have up to their last rows, each counted once.
fn context_bytes(op: &Attention<'_>) -> usize {
    let mut tokens = vec![0; op.pages.tables.len()];
    for (sequence, position) in op.pages.sequence_of_row.iter().zip(op.positions) {
        if let Some(tokens) = tokens.get_mut(*sequence as usize) {
            *tokens = (*tokens).max(*position as usize + 1);
        }
    }
    let shape = op.kv.shape();
    tokens.iter().sum::<usize>() * 2 * shape.kv_heads * shape.head_dim * shape.dtype.bytes()
}

/// Weights of the experts that have a row, and the products of all rows.
fn expert_work(op: &ExpertFfn<'_>) -> Spent {
    let used = op.groups.iter().filter(|group| !group.rows.is_empty());
    let mut spent = Spent::from(0);
    for group in used {
        for part in [group.gate, group.up, group.down] {
            spent.bytes += part.bytes();
            spent.multiply_adds += group.rows.len() * part.n() * part.k();
        }
    }
    spent
}

impl Ops for Audited {
    fn enter(&self) -> Seated {
        self.inner.enter()
    }

    fn matmul(&self, op: MatMul<'_>) -> Result<(), OpError> {
        let bias = op.bias.map_or(0, size_of_val);
        let spent = Spent {
            bytes: op.w.bytes() + bias,
            multiply_adds: op.rows * op.w.n() * op.w.k(),
        };
        self.timed(Purpose::Next, spent, |ops| ops.matmul(op))
    }

    fn embed(&self, op: Embed<'_>) -> Result<(), OpError> {
        let row = op.table.dtype().bytes(1, op.table.k());
        let bytes = op.ids.len() * row.unwrap_or(0);
        self.timed(Purpose::Rest, bytes, |ops| ops.embed(op))
    }

    fn rms_norm(&self, op: RmsNorm<'_>) -> Result<(), OpError> {
        if op.add.is_some() {
            self.timed(Purpose::Residual, 0, |_| Ok(()))?;
        }
        self.timed(Purpose::Next, size_of_val(op.weight), |ops| {
            ops.rms_norm(op)
        })
    }

    fn rope(&self, op: Rope<'_>) -> Result<(), OpError> {
        let norm = op.norm.map_or(0, |norm| size_of_val(norm.weight));
        self.timed(Purpose::Attention, norm, |ops| ops.rope(op))
    }

    fn kv_write(&self, op: KvWrite<'_>) -> Result<(), OpError> {
        self.timed(Purpose::Attention, 0, |ops| ops.kv_write(op))
    }

    fn attention(&self, op: Attention<'_>) -> Result<(), OpError> {
        self.timed(Purpose::Attention, context_bytes(&op), |ops| {
            ops.attention(op)
        })
    }

    fn gate(&self, op: Gate<'_>) -> Result<(), OpError> {
        self.timed(Purpose::Gate, 0, |ops| ops.gate(op))
    }

    fn expert_ffn(&self, op: ExpertFfn<'_>) -> Result<(), OpError> {
        self.timed(Purpose::Experts, expert_work(&op), |ops| ops.expert_ffn(op))
    }

    /// Its time is that of the exchange, which is measured around all of it.
    fn combine(&self, op: Combine<'_>) -> Result<(), OpError> {
        self.inner.combine(op)
    }

    fn add(&self, op: Add<'_>) -> Result<(), OpError> {
        self.timed(Purpose::Residual, 0, |ops| ops.add(op))
    }

    fn silu_mul(&self, op: SiluMul<'_>) -> Result<(), OpError> {
        self.timed(Purpose::Experts, 0, |ops| ops.silu_mul(op))
    }

    fn sigmoid_scale(&self, op: SigmoidScale<'_>) -> Result<(), OpError> {
        self.timed(Purpose::Experts, 0, |ops| ops.sigmoid_scale(op))
    }

    /// Sampling, after the forward pass.
    fn log_softmax(&self, op: LogSoftmax<'_>) -> Result<(), OpError> {
        self.inner.log_softmax(op)
    }
}

#[cfg(test)]
mod tests;
