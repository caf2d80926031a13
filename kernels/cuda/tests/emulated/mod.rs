//! A device on the CPU: the same host side, the same kernels, this process's memory.
#![expect(unsafe_code, reason = "kernels are C++ that reads and writes memory")]
#![allow(dead_code, unreachable_pub, reason = "each test target uses its part")]

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use foregate_cuda::{ALIGN, Driver, DriverError, Launch, MemoryInfo, NO_MEMORY};

/// What every byte of new memory is: as a float32 or a bfloat16 it is not a number.
const POISON: u8 = 0xff;
/// `CUDA_ERROR_ILLEGAL_ADDRESS`.
const ILLEGAL_ADDRESS: i32 = 700;
/// `CUDA_ERROR_LAUNCH_FAILED`.
const LAUNCH_FAILED: i32 = 719;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A device of this process's memory. New memory is poisoned; copies outside of allocated memory are errors, launches are
/// what the emulator makes of them. As on a card, a failed launch fails every later call.
#[derive(Debug)]
pub struct Emulated {
    id: u64,
    total: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Allocated memory: address and bytes.
    blocks: BTreeMap<u64, usize>,
    used: usize,
    launches: BTreeMap<&'static str, u64>,
    reads: u64,
    /// Launches until one fails.
    fails_after: Option<u64>,
    failed: Option<DriverError>,
}

impl Emulated {
    /// A device with so many bytes of memory.
    #[must_use]
    pub fn new(total: usize) -> Self {
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            total,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the launch after `count` others fail.
    pub fn fail_after(&self, count: u64) {
        self.state().fails_after = Some(count);
    }

    /// Launches so far, by kernel.
    #[must_use]
    pub fn launches(&self) -> BTreeMap<&'static str, u64> {
        self.state().launches.clone()
    }

    /// Copies from the device so far.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.state().reads
    }

    /// Bytes that are allocated.
    #[must_use]
    pub fn used(&self) -> usize {
        self.state().used
    }
}

impl State {
    fn alive(&self) -> Result<(), DriverError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Refuses what is not inside of one allocation.
    fn check(&self, call: &'static str, at: u64, bytes: usize) -> Result<(), DriverError> {
        self.alive()?;
        let inside = self
            .blocks
            .range(..=at)
            .next_back()
            .is_some_and(|(start, length)| at + bytes as u64 <= start + *length as u64);
        if inside {
            return Ok(());
        }
        Err(DriverError {
            call,
            code: ILLEGAL_ADDRESS,
            text: format!("{bytes} bytes at {at:#x} are not allocated"),
        })
    }
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.max(1), usize::try_from(ALIGN).ok()?).ok()
}

impl Driver for Emulated {
    fn id(&self) -> u64 {
        self.id
    }

    fn name(&self) -> &str {
        "emulated"
    }

    fn units(&self) -> u32 {
        2
    }

    fn memory(&self) -> Result<MemoryInfo, DriverError> {
        let state = self.state();
        state.alive()?;
        Ok(MemoryInfo {
            free: (self.total - state.used) as u64,
            total: self.total as u64,
        })
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DriverError> {
        let mut state = self.state();
        state.alive()?;
        let none = || DriverError {
            call: "allocate",
            code: NO_MEMORY,
            text: "out of memory".to_owned(),
        };
        let layout = layout(bytes).ok_or_else(none)?;
        if layout.size() > self.total - state.used {
            return Err(none());
        }
        // SAFETY: the layout has a size of at least one byte.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return Err(none());
        }
        // SAFETY: just allocated with this size.
        unsafe { ptr::write_bytes(memory, POISON, layout.size()) };
        let address = memory.expose_provenance() as u64;
        state.used += layout.size();
        state.blocks.insert(address, layout.size());
        Ok(address)
    }

    fn free(&self, address: u64) {
        let mut state = self.state();
        let bytes = state.blocks.remove(&address);
        if let Some((bytes, layout)) = bytes.and_then(|bytes| Some((bytes, layout(bytes)?))) {
            state.used -= bytes;
            // SAFETY: allocated with this layout, and taken out of the map above.
            unsafe { dealloc(pointer(address), layout) };
        }
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<(), DriverError> {
        let state = self.state();
        state.check("write", to, from.len())?;
        // SAFETY: inside of an allocation of ours, which no slice of this process overlaps.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), pointer(to), from.len()) };
        Ok(())
    }

    fn read(&self, from: u64, to: &mut [u8]) -> Result<(), DriverError> {
        let mut state = self.state();
        state.check("read", from, to.len())?;
        state.reads += 1;
        // SAFETY: as for `write`.
        unsafe { ptr::copy_nonoverlapping(pointer(from), to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), DriverError> {
        let state = self.state();
        state.check("zero", at, bytes)?;
        // SAFETY: inside of an allocation of ours.
        unsafe { ptr::write_bytes(pointer(at), 0, bytes) };
        Ok(())
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        let mut state = self.state();
        state.alive()?;
        *state.launches.entry(launch.symbol).or_default() += 1;
        let failed = |text: String| DriverError {
            call: "launch",
            code: LAUNCH_FAILED,
            text,
        };
        if let Some(left) = &mut state.fails_after {
            if *left == 0 {
                // Noticed later, as a card does.
                state.failed = Some(failed(format!("{} was told to fail", launch.symbol)));
                return Ok(());
            }
            *left -= 1;
        }
        let args: Vec<_> = launch
            .args
            .iter()
            .map(|arg| arg.pointer().cast_mut())
            .collect();
        // SAFETY: arguments point at values that live as long as `launch`; the emulator compares their number with the kernel's;
        // addresses are those of allocations that whoever launches owns.
        let done = unsafe {
            foregate_cuda_emulate::launch(
                launch.symbol,
                launch.grid,
                [launch.block, 1, 1],
                0,
                &args,
            )
        };
        done.map_err(|fault| {
            let error = failed(fault.to_string());
            state.failed = Some(error.clone());
            error
        })
    }

    fn finish(&self) -> Result<(), DriverError> {
        self.state().alive()
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        let blocks: Vec<u64> = self.state().blocks.keys().copied().collect();
        for address in blocks {
            self.free(address);
        }
    }
}

/// Memory of ours by its address.
fn pointer(address: u64) -> *mut u8 {
    ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0))
}
