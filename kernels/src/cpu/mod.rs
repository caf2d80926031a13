//! Ops on the processor: the instruction path is chosen once, at the start.

mod activation;
mod amx;
mod attention;
mod combine;
mod detect;
mod exp;
mod gate;
mod gemm;
mod lanes;
mod norm;
mod quantize;
mod read_through;
mod rope;
mod row;
mod seats;
mod softmax;
mod threads;

use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use crate::dtype::Dtype;
use crate::error::{OpError, ShapeError};
use crate::matrix::{Matrix, Source};
use crate::ops::{
    Add, Attention, Combine, Embed, ExpertFfn, Gate, KvWrite, LogSoftmax, MatMul, Ops, RmsNorm,
    Rope, SigmoidScale, SiluMul,
};

use detect::Isa;
use threads::Threads;

pub use detect::{Arithmetic, Path, PathError, UnknownPath};
pub use quantize::quantize;
pub use read_through::ReadThrough;
pub use seats::{Keep, SeatError, Seated, Seats, Share};

/// A processor with its instruction path and its threads. Clones share the threads.
#[derive(Debug, Clone)]
pub struct Cpu {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    isa: Isa,
    threads: Threads,
    seats: Seats,
    products: Kept<gemm::Scratch>,
    attention: Kept<attention::Scratch>,
}

/// Memory kept from call to call.
#[derive(Debug, Default)]
struct Kept<T>(Mutex<T>);

impl<T: Default> Kept<T> {
    /// Lends the memory that is kept; a second caller at the same time takes memory of its own.
    fn lend(&self, job: impl FnOnce(&mut T)) {
        match self.0.try_lock() {
            Ok(mut kept) => job(&mut kept),
            // What a panicking job left in it is overwritten before it is read.
            Err(TryLockError::Poisoned(kept)) => job(&mut kept.into_inner()),
            Err(TryLockError::WouldBlock) => job(&mut T::default()),
        }
    }
}

impl Cpu {
    /// The best path of this processor, with a thread per seat, the caller's included. A number of threads is as many
    /// seats anywhere, at least one.
    #[must_use]
    pub fn new(seats: impl Into<Seats>) -> Self {
        Self::build(Isa::best(), seats.into())
    }

    /// A given path.
    ///
    /// # Errors
    /// When this processor does not have it.
    pub fn with_path(path: Path, seats: impl Into<Seats>) -> Result<Self, PathError> {
        let isa = Isa::of(path).ok_or(PathError { path })?;
        Ok(Self::build(isa, seats.into()))
    }

    /// A given path, whatever this processor says that it has.
    ///
    /// # Safety
    /// Its instructions can be executed, or somebody handles the fault of those that cannot.
    #[must_use]
    pub unsafe fn with_path_unchecked(path: Path, seats: impl Into<Seats>) -> Self {
        // SAFETY: the caller's promise.
        Self::build(unsafe { Isa::trusted(path) }, seats.into())
    }

    /// [`Path::Amx`] with its products in plain Rust, on any processor: slow, to judge the instructions by.
    #[must_use]
    pub fn with_tiles_in_software(seats: impl Into<Seats>) -> Self {
        Self::build(Isa::software_tiles(), seats.into())
    }

    fn build(isa: Isa, seats: Seats) -> Self {
        let threads = Threads::new(&seats);
        tracing::debug!(
            path = %isa.path(),
            threads = threads.count(),
            processors = %seats.all(),
            "kernels ready"
        );
        Self {
            shared: Arc::new(Shared {
                isa,
                threads,
                seats,
                products: Kept::default(),
                attention: Kept::default(),
            }),
        }
    }

    /// The instruction path in use.
    #[must_use]
    pub fn path(&self) -> Path {
        self.shared.isa.path()
    }

    /// Threads that take part, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.shared.threads.count()
    }

    /// As [`Matrix::pack`], on all threads.
    ///
    /// # Errors
    /// As [`Matrix::pack`].
    pub fn pack(
        &self,
        dtype: Dtype,
        n: usize,
        k: usize,
        bytes: &[u8],
    ) -> Result<Matrix, ShapeError> {
        let mut matrix = Matrix::empty(dtype, n, k, bytes.len())?;
        let source = Source::of(&matrix, bytes);
        // Each panel is a lock that one thread takes once.
        let panels: Vec<_> = matrix.panels_mut().map(Mutex::new).collect();
        let refused = Mutex::new(None);
        self.shared.threads.run(panels.len(), &|panel| {
            if let Ok(mut out) = panels[panel].lock()
                && let Err(error) = source.pack(panel, &mut out)
                && let Ok(mut refused) = refused.lock()
            {
                *refused = Some(error);
            }
        });
        drop(panels);
        match refused.into_inner().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(matrix),
            Some(error) => Err(error),
        }
    }
}

impl Ops for Cpu {
    fn enter(&self) -> Seated {
        self.shared.seats.all().take()
    }

    fn matmul(&self, op: MatMul<'_>) -> Result<(), OpError> {
        op.check()?;
        self.shared
            .products
            .lend(|scratch| gemm::matmul(self.shared.isa, &self.shared.threads, op, scratch));
        Ok(())
    }

    fn embed(&self, op: Embed<'_>) -> Result<(), OpError> {
        op.check()?;
        Ok(op.table.rows(op.ids, op.out)?)
    }

    fn rms_norm(&self, op: RmsNorm<'_>) -> Result<(), OpError> {
        op.check()?;
        norm::rms_norm(self.shared.isa, &self.shared.threads, op);
        Ok(())
    }

    fn rope(&self, op: Rope<'_>) -> Result<(), OpError> {
        op.check()?;
        rope::rope(self.shared.isa, &self.shared.threads, op);
        Ok(())
    }

    fn kv_write(&self, op: KvWrite<'_>) -> Result<(), OpError> {
        op.check()?;
        attention::kv_write(&self.shared.threads, op);
        Ok(())
    }

    fn attention(&self, op: Attention<'_>) -> Result<(), OpError> {
        op.check()?;
        self.shared.attention.lend(|scratch| {
            attention::attention(self.shared.isa, &self.shared.threads, op, scratch)
        });
        Ok(())
    }

    fn gate(&self, op: Gate<'_>) -> Result<(), OpError> {
        op.check()?;
        gate::gate(self.shared.isa, &self.shared.threads, op);
        Ok(())
    }

    fn expert_ffn(&self, op: ExpertFfn<'_>) -> Result<(), OpError> {
        op.check()?;
        self.shared.products.lend(|scratch| {
            gemm::expert_ffn(self.shared.isa, &self.shared.threads, op, scratch)
        });
        Ok(())
    }

    fn combine(&self, op: Combine<'_>) -> Result<(), OpError> {
        op.check()?;
        combine::combine(self.shared.isa, &self.shared.threads, op);
        Ok(())
    }

    fn add(&self, op: Add<'_>) -> Result<(), OpError> {
        op.check()?;
        activation::add(self.shared.isa, &self.shared.threads, op);
        Ok(())
    }

    fn silu_mul(&self, op: SiluMul<'_>) -> Result<(), OpError> {
        op.check()?;
        activation::silu_mul(self.shared.isa, &self.shared.threads, op);
        Ok(())
    }

    fn sigmoid_scale(&self, op: SigmoidScale<'_>) -> Result<(), OpError> {
        op.check()?;
        activation::sigmoid_scale(self.shared.isa, op);
        Ok(())
    }

    fn log_softmax(&self, op: LogSoftmax<'_>) -> Result<(), OpError> {
        op.check()?;
        softmax::log_softmax(self.shared.isa, &self.shared.threads, op);
        Ok(())
    }
}
