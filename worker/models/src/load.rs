//! Dense weights out of a checkpoint: packed with all threads, counted for a progress bar.

use foregate_api::model::ModelSpec;
use foregate_checkpoint::names::{self, Kind, MlpNames};
use foregate_checkpoint::{Checkpoint, Tensor, header};
use foregate_kernels::{Cpu, Dtype, Matrix};

use crate::error::ModelError;
use crate::ffn::Ffn;

/// Told after each tensor: bytes done, bytes in all.
pub(crate) type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Reads tensors by name and reports progress.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    cpu: &'a Cpu,
    progress: Progress<'a>,
    done: u64,
    total: u64,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        cpu: &'a Cpu,
        progress: Progress<'a>,
    ) -> Result<Self, ModelError> {
        let mut total = 0;
        for want in names::expected(checkpoint.spec()) {
            match want.kind {
                Kind::Matrix | Kind::Vector => {
                    total += checkpoint.tensor(&want.name)?.bytes.len() as u64;
                }
                Kind::Expert => {}
            }
        }
        progress(0, total);
        Ok(Self {
            checkpoint,
            cpu,
            progress,
            done: 0,
            total,
        })
    }

    pub(crate) const fn spec(&self) -> &'a ModelSpec {
        self.checkpoint.spec()
    }

    /// A matrix of `n × k`, packed. The checkpoint was checked, so the sizes are those of the file.
    pub(crate) fn matrix(
        &mut self,
        name: &str,
        n: usize,
        k: usize,
    ) -> Result<Matrix, ModelError> {
        let (tensor, dtype) = self.tensor(name)?;
        let matrix = self.cpu.pack(dtype, n, k, tensor.bytes)?;
        // Else the weights would be in memory twice: packed, and as the file's pages.
        self.checkpoint.release(name);
        self.count(tensor.bytes.len());
        Ok(matrix)
    }

    /// A norm or a bias, widened.
    pub(crate) fn vector(&mut self, name: &str) -> Result<Vec<f32>, ModelError> {
        let (tensor, dtype) = self.tensor(name)?;
        self.count(tensor.bytes.len());
        dtype.widen(tensor.bytes).ok_or_else(|| ModelError::Format {
            name: name.to_owned(),
        })
    }

    /// A gated feed-forward block.
    pub(crate) fn ffn(&mut self, names: &MlpNames, inner: usize) -> Result<Ffn, ModelError> {
        let hidden = self.spec().hidden;
        Ok(Ffn {
            gate: self.matrix(&names.gate, inner, hidden)?,
            up: self.matrix(&names.up, inner, hidden)?,
            down: self.matrix(&names.down, hidden, inner)?,
        })
    }

    fn tensor(&self, name: &str) -> Result<(Tensor<'a>, Dtype), ModelError> {
        let tensor = self.checkpoint.tensor(name)?;
        let dtype = match tensor.dtype {
            header::Dtype::F32 => Dtype::F32,
            header::Dtype::BF16 => Dtype::Bf16,
            _ => {
                return Err(ModelError::Format {
                    name: name.to_owned(),
                });
            }
        };
        Ok((tensor, dtype))
    }

    fn count(&mut self, bytes: usize) {
        self.done += bytes as u64;
        (self.progress)(self.done, self.total);
    }
}
