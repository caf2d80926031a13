//! Page-locked host memory that copies go through.

use std::ptr;
use std::time::Instant;

use cudarc::driver::sys::{self, CUresult};

use super::{DEADLINE, check};
use crate::driver::DriverError;

/// Bytes of a buffer: large enough that a copy's start costs little beside it.
const SLOT: usize = 1 << 20;
/// Buffers on their way to the device: so many small copies of a step may wait behind its kernels.
const SLOTS: usize = 16;
/// Times that a wait asks before it lets other threads run.
const SPINS: u32 = 2000;

/// A page-locked buffer and the event after its last copy.
struct Slot {
    memory: *mut u8,
    event: sys::CUevent,
}

// SAFETY: owned memory and a handle of the driver; nothing in it is bound to a thread.
unsafe impl Send for Slot {}

impl Slot {
    fn new() -> Result<Self, DriverError> {
        let mut slot = Self {
            memory: ptr::null_mut(),
            event: ptr::null_mut(),
        };
        let mut memory = ptr::null_mut();
        // SAFETY: writes a pointer to memory that the slot frees when it is dropped.
        check("cuMemHostAlloc", unsafe {
            sys::cuMemHostAlloc(&raw mut memory, SLOT, 0)
        })?;
        slot.memory = memory.cast();
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes a handle that the slot destroys when it is dropped.
        check("cuEventCreate", unsafe {
            sys::cuEventCreate(&raw mut slot.event, flags)
        })?;
        Ok(slot)
    }

    /// Waits until all before the last record of its event is done.
    #[expect(
        clippy::disallowed_methods,
        reason = "the engine's thread waits on the wall clock for the device"
    )]
    fn wait(&self) -> Result<(), DriverError> {
        let begun = Instant::now();
        for spins in 0_u64.. {
            // SAFETY: the event lives as long as the slot.
            match unsafe { sys::cuEventQuery(self.event) } {
                CUresult::CUDA_ERROR_NOT_READY => {}
                result => return check("cuEventQuery", result),
            }
            if spins < u64::from(SPINS) {
                std::hint::spin_loop();
                continue;
            }
            if begun.elapsed() > DEADLINE {
                break;
            }
            std::thread::yield_now();
        }
        Err(DriverError {
            call: "cuEventQuery",
            code: CUresult::CUDA_ERROR_NOT_READY as i32,
            text: format!("the device did not answer for {} s", DEADLINE.as_secs()),
        })
    }

    fn record(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: both handles live.
        check("cuEventRecord", unsafe {
            sys::cuEventRecord(self.event, stream)
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if !self.event.is_null() {
            // SAFETY: made by `new`, destroyed here only; a failure leaves nothing to do.
            let _gone = unsafe { sys::cuEventDestroy_v2(self.event) };
        }
        if !self.memory.is_null() {
            // SAFETY: made by `new`, freed here only; a failure leaves nothing to do.
            let _gone = unsafe { sys::cuMemFreeHost(self.memory.cast()) };
        }
    }
}

/// The buffers of a card.
pub(super) struct Staging {
    /// Towards the device, used in turn.
    out: Vec<Slot>,
    next: usize,
    /// From the device.
    back: Slot,
}

impl Staging {
    pub(super) fn new() -> Result<Self, DriverError> {
        Ok(Self {
            out: (0..SLOTS).map(|_| Slot::new()).collect::<Result<_, _>>()?,
            next: 0,
            back: Slot::new()?,
        })
    }

    pub(super) fn write(
        &mut self,
        stream: sys::CUstream,
        mut to: u64,
        from: &[u8],
    ) -> Result<(), DriverError> {
        for piece in from.chunks(SLOT) {
            let slot = &self.out[self.next];
            self.next = (self.next + 1) % self.out.len();
            // An event that was never recorded counts as done.
            slot.wait()?;
            // SAFETY: the slot has room for a piece, and no copy from it is under way.
            unsafe { ptr::copy_nonoverlapping(piece.as_ptr(), slot.memory, piece.len()) };
            // SAFETY: the slot keeps the bytes until its event; the owner of the device's memory names it.
            check("cuMemcpyHtoDAsync", unsafe {
                sys::cuMemcpyHtoDAsync_v2(to, slot.memory.cast(), piece.len(), stream)
            })?;
            slot.record(stream)?;
            to += piece.len() as u64;
        }
        Ok(())
    }

    pub(super) fn read(
        &mut self,
        stream: sys::CUstream,
        mut from: u64,
        to: &mut [u8],
    ) -> Result<(), DriverError> {
        let slot = &self.back;
        // After a wait that was given up its copy may still be under way.
        slot.wait()?;
        for piece in to.chunks_mut(SLOT) {
            // SAFETY: the slot has room for a piece; the owner of the device's memory names it.
            check("cuMemcpyDtoHAsync", unsafe {
                sys::cuMemcpyDtoHAsync_v2(slot.memory.cast(), from, piece.len(), stream)
            })?;
            slot.record(stream)?;
            slot.wait()?;
            // SAFETY: the copy into the slot is done, and it has as many bytes.
            unsafe { ptr::copy_nonoverlapping(slot.memory, piece.as_mut_ptr(), piece.len()) };
            from += piece.len() as u64;
        }
        Ok(())
    }

    pub(super) fn finish(&mut self, stream: sys::CUstream) -> Result<(), DriverError> {
        self.back.wait()?;
        self.back.record(stream)?;
        self.back.wait()
    }
}
