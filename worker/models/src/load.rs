//! Dense weights out of a checkpoint: laid out where they are computed, counted for a progress bar.

use foregate_api::model::ModelSpec;
use foregate_api::weights::Part;
use foregate_checkpoint::names::MlpNames;
use foregate_checkpoint::{Checkpoint, dtype};
use foregate_kernels::{Array, Executor, Matrix};

use crate::error::ModelError;
use crate::ffn::Ffn;

/// Told after each tensor: bytes done, bytes in all.
pub(crate) type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Reads tensors by name and reports progress.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    executor: &'a dyn Executor,
    /// Of this process, to convert with.
    threads: usize,
    progress: Progress<'a>,
    done: u64,
    total: u64,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        executor: &'a dyn Executor,
        threads: usize,
        progress: Progress<'a>,
    ) -> Self {
        let total = checkpoint.spec().dense_bytes() as u64;
        progress(0, total);
        Self {
            checkpoint,
            executor,
            threads,
            progress,
            done: 0,
            total,
        }
    }

    pub(crate) const fn spec(&self) -> &'a ModelSpec {
        self.checkpoint.spec()
    }

    /// A matrix of `n × k`, packed. The checkpoint was checked, so the sizes are those of the file.
    pub(crate) fn matrix(
        &mut self,
        part: Part,
        name: &str,
        n: usize,
        k: usize,
    ) -> Result<Matrix, ModelError> {
        let format = self.spec().formats.of(part);
        let bytes = (self.checkpoint).matrix(part, name, (n, k), self.threads)?;
        let matrix = self.executor.matrix(dtype(format, k), n, k, &bytes)?;
        // Else the weights would be in memory twice: packed, and as the file's pages.
        self.checkpoint.release(part, name);
        self.count(bytes.len());
        Ok(matrix)
    }

    /// A norm or a bias, widened.
    pub(crate) fn vector(&mut self, name: &str) -> Result<Array<f32>, ModelError> {
        let values = self.checkpoint.vector(name)?;
        let bytes = size_of_val(values.as_slice());
        let array = Array::of(self.executor, "a norm or a bias", values)?;
        self.count(bytes);
        Ok(array)
    }

    /// A gated feed-forward block.
    pub(crate) fn ffn(&mut self, names: &MlpNames, inner: usize) -> Result<Ffn, ModelError> {
        let hidden = self.spec().hidden;
        Ok(Ffn {
            gate: self.matrix(Part::Dense, &names.gate, inner, hidden)?,
            up: self.matrix(Part::Dense, &names.up, inner, hidden)?,
            down: self.matrix(Part::Dense, &names.down, hidden, inner)?,
        })
    }

    fn count(&mut self, bytes: usize) {
        self.done += bytes as u64;
        (self.progress)(self.done, self.total);
    }
}
