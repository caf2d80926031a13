//! Dense weights in memory once for all workers of a process.
//!
//! Every rank computes attention and router for its own rows, so each needs all dense weights. Workers
//! of one process read the same memory: it is there once, and what one has just read the other finds
//! in the processor's cache. A process with one worker has nothing to share, and shares nothing.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use foregate_api::model::ModelSpec;
use foregate_checkpoint::Checkpoint;
use foregate_kernels::{Cpu, OnHost};
use foregate_models::{Model, ModelError, WeakModel};

/// The dense weights that the workers of this process have in memory.
///
/// It holds none itself: they go with the last worker that uses them.
#[derive(Debug, Default)]
pub struct DenseWeights {
    models: Mutex<Vec<Kept>>,
}

#[derive(Debug)]
struct Kept {
    dir: PathBuf,
    /// Formats included: who keeps weights in other formats has other weights.
    spec: ModelSpec,
    /// Paths lay out matrices differently.
    path: foregate_kernels::Path,
    model: WeakModel,
}

impl DenseWeights {
    /// None in memory yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The dense part of the checkpoint in `dir`, computed by `cpu`: what another worker has, or else
    /// loaded now. Workers that come while one loads wait for it. `progress` as in [`Model::load`].
    ///
    /// # Errors
    /// When a tensor cannot be read or packed.
    pub fn model(
        &self,
        dir: &Path,
        checkpoint: &Checkpoint,
        cpu: Arc<Cpu>,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Model, ModelError> {
        // A load that panicked has left nothing behind.
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        models.retain(|kept| kept.model.is_alive());
        let same = |kept: &&Kept| {
            kept.dir == dir && kept.path == cpu.path() && kept.spec == *checkpoint.spec()
        };
        let there = models.iter().find(same);
        let executor = Arc::new(OnHost::cpu(Arc::clone(&cpu)));
        if let Some(model) = there.and_then(|kept| kept.model.upgrade(executor)) {
            let total = checkpoint.spec().dense_bytes() as u64;
            progress(0, total);
            progress(total, total);
            return Ok(model);
        }
        let path = cpu.path();
        let model = Model::load(checkpoint, cpu, progress)?;
        models.push(Kept {
            dir: dir.to_path_buf(),
            spec: checkpoint.spec().clone(),
            path,
            model: model.downgrade(),
        });
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use foregate_api::model::Family;
    use foregate_checkpoint::tiny::Tiny;
    use foregate_kernels::Path as CpuPath;

    /// Takes a model; true if it was loaded for that.
    fn take(weights: &DenseWeights, dir: &Path, cpu: CpuPath) -> (Model, bool) {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let cpu = Arc::new(Cpu::with_path(cpu, 1).unwrap());
        let mut told = Vec::new();
        let model = weights
            .model(dir, &checkpoint, cpu, |done, total| {
                assert!(done <= total);
                told.push(done);
            })
            .unwrap();
        assert_eq!(told[0], 0);
        // What is there already comes in one piece.
        (model, told.len() > 2)
    }

    #[test]
    fn equal_weights_are_loaded_once_while_somebody_has_them() {
        let (here, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&here, &other] {
            Tiny::new(Family::Qwen3Moe).write(dir.path()).unwrap();
        }
        let weights = DenseWeights::default();
        let (one, loaded) = take(&weights, here.path(), CpuPath::Portable);
        assert!(loaded);
        let (two, loaded) = take(&weights, here.path(), CpuPath::Portable);
        assert!(!loaded, "loaded twice");
        let (_elsewhere, loaded) = take(&weights, other.path(), CpuPath::Portable);
        assert!(loaded, "another directory may hold another model");

        drop(one);
        let (three, loaded) = take(&weights, here.path(), CpuPath::Portable);
        assert!(!loaded, "one still has them");
        drop((two, three));
        assert!(
            take(&weights, here.path(), CpuPath::Portable).1,
            "nobody has them"
        );
    }

    #[test]
    fn what_is_laid_out_differently_is_not_shared() {
        let dir = tempfile::tempdir().unwrap();
        Tiny::new(Family::Qwen3Moe).write(dir.path()).unwrap();
        let weights = DenseWeights::default();
        let _one = take(&weights, dir.path(), CpuPath::Portable);
        for path in CpuPath::ALL {
            if path != CpuPath::Portable && Cpu::with_path(path, 1).is_ok() {
                assert!(take(&weights, dir.path(), path).1, "{path}");
            }
        }
    }
}
