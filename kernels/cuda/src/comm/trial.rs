//! A group of one rank on a card: what of NCCL can be tried with a single card.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError,
};

use super::{Buffers, CommError, Communicator, Element, Join, Library, Reduction};
use crate::driver_present;

/// Values of each operation.
const COUNT: usize = 1 << 20;
/// Longest wait for any operation.
const DEADLINE: Duration = Duration::from_secs(60);

/// Why a trial failed.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// NCCL's.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// No driver.
    #[error("libcuda.so.1 cannot be opened")]
    NoDriver,
    /// The driver's.
    #[error("the driver: {0:?}")]
    Driver(DriverError),
    /// What came back is not what was sent.
    #[error("{call} gave a wrong value at {at} of {COUNT}")]
    Wrong {
        /// The operation.
        call: &'static str,
        /// The first wrong value.
        at: usize,
    },
}

impl From<DriverError> for TrialError {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

/// Joins a group of this process alone on a card, reduces and exchanges, ends it in order, joins another one and aborts
/// that in the middle of an operation.
///
/// # Errors
/// The first thing that went wrong.
pub fn one_rank(library: &Arc<Library>, ordinal: usize) -> Result<(), TrialError> {
    if !driver_present() {
        return Err(TrialError::NoDriver);
    }
    let context = CudaContext::new(ordinal)?;
    context.bind_to_thread()?;
    let stream = context.default_stream();
    let mut communicator = join(library)?;
    for call in ["ncclAllReduce", "ncclAlltoAll"] {
        let (sent, got) = exchange(&mut communicator, &stream, call)?;
        // With one rank a sum and an exchange both give what was sent.
        let wrong = sent
            .iter()
            .zip(&got)
            .position(|(a, b)| a.to_bits() != b.to_bits());
        if let Some(at) = wrong {
            return Err(TrialError::Wrong { call, at });
        }
    }
    communicator.finalize(DEADLINE)?;
    let mut communicator = join(library)?;
    let in_flight = Running::start(&mut communicator, &stream, "ncclAllReduce")?;
    communicator.abort()?;
    // The memory stays until the device has passed what was in flight.
    stream.synchronize()?;
    drop(in_flight);
    Ok(())
}

fn join(library: &Arc<Library>) -> Result<Communicator, TrialError> {
    let joined = Communicator::join(
        library,
        Join {
            id: library.unique_id()?,
            ranks: 1,
            rank: 0,
            epoch: 0,
            deadline: DEADLINE,
            abort: DEADLINE,
        },
    );
    Ok(joined?)
}

/// An operation that was handed over, with its memory.
struct Running {
    sent: Vec<f32>,
    _from: CudaSlice<f32>,
    into: CudaSlice<f32>,
}

impl Running {
    fn start(
        communicator: &mut Communicator,
        stream: &Arc<CudaStream>,
        call: &'static str,
    ) -> Result<Self, TrialError> {
        // Every value another one, none of them zero.
        #[expect(clippy::cast_precision_loss, reason = "small integers")]
        let sent: Vec<f32> = (0..COUNT).map(|at| 1.0 + at as f32).collect();
        let from = stream.clone_htod(&sent)?;
        let mut into = stream.clone_htod(&vec![f32::NAN; COUNT])?;
        {
            let (send, _read) = from.device_ptr(stream);
            let (recv, _written) = into.device_ptr_mut(stream);
            let buffers = Buffers {
                send: address(send).cast_const(),
                recv: address(recv),
                count: COUNT,
                element: Element::F32,
            };
            let raw = stream.cu_stream().cast();
            // SAFETY: both are memory of this context's device for `COUNT` values, kept in the result until the stream was
            // synchronised; the communicator was joined with this context current.
            unsafe {
                match call {
                    "ncclAlltoAll" => communicator.all_to_all(buffers, raw)?,
                    _ => communicator.all_reduce(buffers, Reduction::Sum, raw)?,
                }
            }
        }
        Ok(Self {
            sent,
            _from: from,
            into,
        })
    }
}

/// One operation to its end: what was sent, and what came.
fn exchange(
    communicator: &mut Communicator,
    stream: &Arc<CudaStream>,
    call: &'static str,
) -> Result<(Vec<f32>, Vec<f32>), TrialError> {
    let running = Running::start(communicator, stream, call)?;
    communicator.settle(DEADLINE)?;
    stream.synchronize()?;
    let got = stream.clone_dtoh(&running.into)?;
    Ok((running.sent, got))
}

/// Device addresses are numbers to the driver and pointers to NCCL.
fn address(number: u64) -> *mut std::ffi::c_void {
    std::ptr::with_exposed_provenance_mut(usize::try_from(number).unwrap_or_default())
}
