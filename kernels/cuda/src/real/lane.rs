//! A stream of a card for rows between cards, beside that of its kernels.

use std::ptr;

use cudarc::driver::sys::{self, CUresult};

use super::{NoDevice, check, device};
use crate::comm::RawStream;
use crate::driver::DriverError;
use crate::lane::Lane;

/// Bytes of the first room each way: a decode step's blocks fit, so it rarely grows.
const FIRST: usize = 1 << 20;

/// A card's stream with memory on both sides. It holds the card's context as long as it lives.
#[derive(Debug)]
pub struct CardLane {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    mark: sys::CUevent,
    out: Room,
    back: Room,
}

// SAFETY: the driver's handles may be used by any thread that has made the context current, which `enter` does; the memory
// is owned, and nothing in it is bound to a thread.
unsafe impl Send for CardLane {}

/// Memory on both sides, or none.
#[derive(Debug)]
struct Room {
    device: u64,
    host: *mut u8,
    bytes: usize,
}

impl Room {
    const NONE: Self = Self {
        device: 0,
        host: ptr::null_mut(),
        bytes: 0,
    };

    /// In the context that is current.
    fn take(&mut self, bytes: usize) -> Result<(), DriverError> {
        self.give_back();
        let mut host = ptr::null_mut();
        // SAFETY: writes a pointer to memory that this room gives back.
        check("cuMemHostAlloc", unsafe {
            sys::cuMemHostAlloc(&raw mut host, bytes, 0)
        })?;
        self.host = host.cast();
        // SAFETY: just taken, with so many bytes; as a slice it must have been written once.
        unsafe { ptr::write_bytes(self.host, 0, bytes) };
        // SAFETY: writes an address that this room gives back.
        check("cuMemAlloc", unsafe {
            sys::cuMemAlloc_v2(&raw mut self.device, bytes)
        })?;
        self.bytes = bytes;
        Ok(())
    }

    /// A failure leaves nothing to do: a context that broke gives nothing back, and goes with the process.
    fn give_back(&mut self) {
        let Self { device, host, .. } = std::mem::replace(self, Self::NONE);
        if device != 0 {
            // SAFETY: taken by this room and forgotten above; nothing is under way.
            let _gone = unsafe { sys::cuMemFree_v2(device) };
        }
        if !host.is_null() {
            // SAFETY: as above.
            let _gone = unsafe { sys::cuMemFreeHost(host.cast()) };
        }
    }
}

impl CardLane {
    /// A lane of the card with this number.
    ///
    /// # Errors
    /// When there is no driver or no such card, or the driver fails.
    pub fn open(ordinal: u32) -> Result<Self, NoDevice> {
        if !crate::driver_present() {
            return Err(NoDevice::NoDriver);
        }
        let device = device(ordinal)?;
        let mut context = ptr::null_mut();
        // SAFETY: writes a handle; `device` is one of the driver's.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&raw mut context, device)
        })?;
        // From here on `Drop` gives back what there is.
        let mut lane = Self {
            device,
            context,
            stream: ptr::null_mut(),
            mark: ptr::null_mut(),
            out: Room::NONE,
            back: Room::NONE,
        };
        lane.enter()?;
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes a handle, in the context that is current.
        check("cuStreamCreate", unsafe {
            sys::cuStreamCreate(&raw mut lane.stream, flags)
        })?;
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: as above.
        check("cuEventCreate", unsafe {
            sys::cuEventCreate(&raw mut lane.mark, flags)
        })?;
        lane.reserve(FIRST)?;
        Ok(lane)
    }
}

/// A copy that does not fit its room is the caller's mistake, and must not become the driver's.
fn fits(call: &'static str, bytes: usize, room: &Room) -> Result<(), DriverError> {
    if bytes <= room.bytes {
        return Ok(());
    }
    Err(DriverError {
        call,
        code: CUresult::CUDA_ERROR_INVALID_VALUE as i32,
        text: format!("{bytes} bytes in a room of {}", room.bytes),
    })
}

impl Lane for CardLane {
    fn enter(&mut self) -> Result<(), DriverError> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe {
            sys::cuCtxSetCurrent(self.context)
        })
    }

    fn stream(&self) -> RawStream {
        self.stream.cast()
    }

    fn reserve(&mut self, bytes: usize) -> Result<(), DriverError> {
        for room in [&mut self.out, &mut self.back] {
            if room.bytes < bytes {
                room.take(bytes.next_power_of_two().max(FIRST))?;
            }
        }
        Ok(())
    }

    fn rooms(&self) -> (u64, u64) {
        (self.out.device, self.back.device)
    }

    fn outbox(&mut self) -> &mut [u8] {
        if self.out.host.is_null() {
            return &mut [];
        }
        // SAFETY: owned memory of so many bytes, written once when it was taken; a copy of it is over before it is filled again.
        unsafe { std::slice::from_raw_parts_mut(self.out.host, self.out.bytes) }
    }

    fn inbox(&self) -> &[u8] {
        if self.back.host.is_null() {
            return &[];
        }
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.back.host, self.back.bytes) }
    }

    fn upload(&mut self, bytes: usize) -> Result<(), DriverError> {
        fits("cuMemcpyHtoDAsync", bytes, &self.out)?;
        // SAFETY: both sides have so many bytes and live until the stream has passed: who drops a lane waits for that.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(self.out.device, self.out.host.cast(), bytes, self.stream)
        })
    }

    fn download(&mut self, bytes: usize) -> Result<(), DriverError> {
        fits("cuMemcpyDtoHAsync", bytes, &self.back)?;
        if bytes > 0 {
            // SAFETY: as for `upload`.
            check("cuMemcpyDtoHAsync", unsafe {
                sys::cuMemcpyDtoHAsync_v2(
                    self.back.host.cast(),
                    self.back.device,
                    bytes,
                    self.stream,
                )
            })?;
        }
        // SAFETY: both handles live.
        check("cuEventRecord", unsafe {
            sys::cuEventRecord(self.mark, self.stream)
        })
    }

    fn passed(&mut self) -> Result<bool, DriverError> {
        // SAFETY: the event lives as long as the lane.
        match unsafe { sys::cuEventQuery(self.mark) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }
}

impl Drop for CardLane {
    /// Failures leave nothing to do: a context that broke gives nothing back, and goes with the process.
    fn drop(&mut self) {
        if self.enter().is_ok() {
            self.out.give_back();
            self.back.give_back();
            if !self.mark.is_null() {
                // SAFETY: made by `open`, destroyed here only.
                let _gone = unsafe { sys::cuEventDestroy_v2(self.mark) };
            }
            if !self.stream.is_null() {
                // SAFETY: as above.
                let _gone = unsafe { sys::cuStreamDestroy_v2(self.stream) };
            }
        }
        // SAFETY: retained by `open`, released here only.
        let _gone = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
