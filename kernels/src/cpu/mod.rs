//! Ops on the processor: the instruction path is chosen once, at the start.

mod detect;

use std::sync::Arc;

use crate::dtype::Dtype;
use crate::matrix::Matrix;
use crate::ops::{
    Add, Attention, Combine, Embed, ExpertFfn, Gate, KvWrite, LogSoftmax, MatMul, Ops, RmsNorm,
    Rope, ShapeError, SigmoidScale, SiluMul,
};
use crate::oracle::Oracle;

pub use detect::{Path, PathError, UnknownPath};

/// A processor with its instruction path and its threads. Clones share the threads.
#[derive(Debug, Clone)]
pub struct Cpu {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: Path,
    threads: usize,
}

impl Cpu {
    /// The best path of this processor, with `threads` threads (at least one), the caller's included.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self::build(Path::best(), threads)
    }

    /// A given path.
    ///
    /// # Errors
    /// When this processor does not have it.
    pub fn with_path(path: Path, threads: usize) -> Result<Self, PathError> {
        if path.is_present() {
            Ok(Self::build(path, threads))
        } else {
            Err(PathError { path })
        }
    }

    fn build(path: Path, threads: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                path,
                threads: threads.max(1),
            }),
        }
    }

    /// The instruction path in use.
    #[must_use]
    pub fn path(&self) -> Path {
        self.shared.path
    }

    /// Threads that take part, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// As [`Matrix::pack`], on all threads.
    ///
    /// # Errors
    /// When `bytes` does not have exactly `n * k * dtype.size()` bytes.
    pub fn pack(
        &self,
        dtype: Dtype,
        n: usize,
        k: usize,
        bytes: &[u8],
    ) -> Result<Matrix, ShapeError> {
        Matrix::pack(dtype, n, k, bytes)
    }
}

impl Ops for Cpu {
    fn matmul(&self, op: MatMul<'_>) -> Result<(), ShapeError> {
        Oracle.matmul(op)
    }
    fn embed(&self, op: Embed<'_>) -> Result<(), ShapeError> {
        Oracle.embed(op)
    }
    fn rms_norm(&self, op: RmsNorm<'_>) -> Result<(), ShapeError> {
        Oracle.rms_norm(op)
    }
    fn rope(&self, op: Rope<'_>) -> Result<(), ShapeError> {
        Oracle.rope(op)
    }
    fn kv_write(&self, op: KvWrite<'_>) -> Result<(), ShapeError> {
        Oracle.kv_write(op)
    }
    fn attention(&self, op: Attention<'_>) -> Result<(), ShapeError> {
        Oracle.attention(op)
    }
    fn gate(&self, op: Gate<'_>) -> Result<(), ShapeError> {
        Oracle.gate(op)
    }
    fn expert_ffn(&self, op: ExpertFfn<'_>) -> Result<(), ShapeError> {
        Oracle.expert_ffn(op)
    }
    fn combine(&self, op: Combine<'_>) -> Result<(), ShapeError> {
        Oracle.combine(op)
    }
    fn add(&self, op: Add<'_>) -> Result<(), ShapeError> {
        Oracle.add(op)
    }
    fn silu_mul(&self, op: SiluMul<'_>) -> Result<(), ShapeError> {
        Oracle.silu_mul(op)
    }
    fn sigmoid_scale(&self, op: SigmoidScale<'_>) -> Result<(), ShapeError> {
        Oracle.sigmoid_scale(op)
    }
    fn log_softmax(&self, op: LogSoftmax<'_>) -> Result<(), ShapeError> {
        Oracle.log_softmax(op)
    }
}
