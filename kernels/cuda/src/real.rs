//! A card behind NVIDIA's driver, which is opened at run time.
//!
//! One context and one stream: all calls of all threads stand in one order. Copies go through page-locked buffers, so that
//! the host may go on while the device copies; the files of a checkpoint are read into them piece by piece.
//!
//! A failed kernel leaves the context unusable: every later call returns its error.

mod lane;
mod staging;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_int};
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};

pub use self::lane::CardLane;
use self::staging::Staging;
use crate::driver::{Driver, DriverError, Launch, MemoryInfo, NO_MEMORY};
use crate::fatbins::FATBINS;

/// Oldest cards that kernels are compiled for: bfloat16 arithmetic and asynchronous copies begin there.
const OLDEST: (i32, i32) = (8, 0);
/// Longest wait for the device: a step takes a fraction of it.
const DEADLINE: Duration = Duration::from_secs(60);

/// Why there is no device to compute on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoDevice {
    /// The binary has no kernels.
    NotBuilt,
    /// The system has no driver.
    NoDriver,
    /// The driver has no such card.
    NoCard {
        /// Asked for.
        ordinal: u32,
        /// That there are.
        cards: u32,
    },
    /// The card cannot run the kernels.
    TooOld {
        /// Its name.
        name: String,
        /// Its compute capability.
        capability: (i32, i32),
    },
    /// A call of the driver failed.
    Driver(DriverError),
}

impl fmt::Display for NoDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBuilt => f.write_str(
                "this binary was built without CUDA kernels: build it with `--features cuda`, or use an image that has them",
            ),
            Self::NoDriver => f.write_str(
                "no NVIDIA driver was found (libcuda.so.1): install it, or let the container runtime mount it \
                 (resources nvidia.com/gpu)",
            ),
            Self::NoCard { ordinal, cards } => {
                write!(f, "there is no GPU number {ordinal}, the driver shows {cards}")
            }
            Self::TooOld { name, capability: (major, minor) } => write!(
                f,
                "{name} has compute capability {major}.{minor}, the kernels need {}.{} or newer",
                OLDEST.0, OLDEST.1
            ),
            Self::Driver(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for NoDevice {}

impl From<DriverError> for NoDevice {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

/// A card.
pub struct Card {
    id: u64,
    name: String,
    units: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    functions: Mutex<BTreeMap<&'static str, Function>>,
    staging: Mutex<Option<Staging>>,
}

/// A kernel that was found.
#[derive(Debug, Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: the driver's handles may be used by any thread that has made the context current, which every call here
// does first; what is no handle stands behind locks.
unsafe impl Send for Card {}
// SAFETY: as above.
unsafe impl Sync for Card {}
// SAFETY: as above.
unsafe impl Send for Function {}

impl fmt::Debug for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Card")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// An error with the driver's words for it.
pub(crate) fn check(call: &'static str, result: CUresult) -> Result<(), DriverError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: writes a pointer to a constant of the driver, or none for a code it does not know.
    let known = unsafe { sys::cuGetErrorString(result, &raw mut text) };
    let text = if known == CUresult::CUDA_SUCCESS && !text.is_null() {
        // SAFETY: not null, and such constants end with a zero.
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    } else {
        "no words for it".to_owned()
    };
    let code = i32::try_from(result as u32).unwrap_or(i32::MAX);
    Err(DriverError { call, code, text })
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1 << 32);

impl Card {
    /// The card with this number, with all kernels loaded.
    ///
    /// # Errors
    /// When there is none that can run them; the text says what helps.
    pub fn open(ordinal: u32) -> Result<Self, NoDevice> {
        if FATBINS.is_empty() {
            return Err(NoDevice::NotBuilt);
        }
        if !crate::driver_present() {
            return Err(NoDevice::NoDriver);
        }
        let device = device(ordinal)?;
        let name = name(device)?;
        let capability = (
            attribute(
                device,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            )?,
            attribute(
                device,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )?,
        );
        if capability < OLDEST {
            return Err(NoDevice::TooOld { name, capability });
        }
        let units = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let mut context = ptr::null_mut();
        // SAFETY: writes a handle; `device` is one of the driver's.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&raw mut context, device)
        })?;
        // From here on `Drop` gives back what there is.
        let mut card = Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            name,
            units: u32::try_from(units).unwrap_or(1).max(1),
            device,
            context,
            stream: ptr::null_mut(),
            modules: Vec::with_capacity(FATBINS.len()),
            functions: Mutex::default(),
            staging: Mutex::default(),
        };
        card.current()?;
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes a handle, in the context that is current.
        check("cuStreamCreate", unsafe {
            sys::cuStreamCreate(&raw mut card.stream, flags)
        })?;
        for fatbin in FATBINS {
            let mut module = ptr::null_mut();
            // SAFETY: writes a handle; the bytes are a fatbin that nvcc made, which says its own length.
            check("cuModuleLoadData", unsafe {
                sys::cuModuleLoadData(&raw mut module, fatbin.bytes.as_ptr().cast())
            })?;
            card.modules.push(module);
        }
        *card
            .staging
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner) = Some(Staging::new()?);
        Ok(card)
    }

    /// Makes this card's context that of the calling thread.
    fn current(&self) -> Result<(), DriverError> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe {
            sys::cuCtxSetCurrent(self.context)
        })
    }

    fn function(&self, symbol: &'static str) -> Result<Function, DriverError> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(symbol) {
            return Ok(*function);
        }
        let missing = || DriverError {
            call: "cuModuleGetFunction",
            code: CUresult::CUDA_ERROR_NOT_FOUND as i32,
            text: format!("no kernel {symbol}"),
        };
        let name = CString::new(symbol).map_err(|_| missing())?;
        for module in &self.modules {
            let mut function = ptr::null_mut();
            // SAFETY: writes a handle; the module is loaded, the name ends with a zero.
            let found =
                unsafe { sys::cuModuleGetFunction(&raw mut function, *module, name.as_ptr()) };
            if found == CUresult::CUDA_SUCCESS {
                return Ok(*functions.entry(symbol).or_insert(Function(function)));
            }
        }
        Err(missing())
    }

    fn staging(&self) -> MutexGuard<'_, Option<Staging>> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn device(ordinal: u32) -> Result<sys::CUdevice, NoDevice> {
    let (mut cards, mut device) = (0, 0);
    // SAFETY: the library is there, which `Card::open` asked first.
    check("cuInit", unsafe { sys::cuInit(0) })?;
    // SAFETY: writes a number.
    check("cuDeviceGetCount", unsafe {
        sys::cuDeviceGetCount(&raw mut cards)
    })?;
    let cards = u32::try_from(cards).unwrap_or(0);
    if ordinal >= cards {
        return Err(NoDevice::NoCard { ordinal, cards });
    }
    let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
    // SAFETY: writes a handle.
    check("cuDeviceGet", unsafe {
        sys::cuDeviceGet(&raw mut device, ordinal)
    })?;
    Ok(device)
}

fn name(device: sys::CUdevice) -> Result<String, DriverError> {
    let mut name = [0; 256];
    // SAFETY: writes at most 256 bytes, the last of them a zero.
    check("cuDeviceGetName", unsafe {
        sys::cuDeviceGetName(name.as_mut_ptr(), 256, device)
    })?;
    // SAFETY: ends with a zero.
    Ok(unsafe { CStr::from_ptr(name.as_ptr()) }
        .to_string_lossy()
        .into_owned())
}

fn attribute(device: sys::CUdevice, attribute: Attribute) -> Result<i32, DriverError> {
    let mut value = 0;
    // SAFETY: writes a number; `device` is one of the driver's.
    check("cuDeviceGetAttribute", unsafe {
        sys::cuDeviceGetAttribute(&raw mut value, attribute, device)
    })?;
    Ok(value)
}

/// What an open card no longer has.
fn closed() -> DriverError {
    DriverError {
        call: "staging",
        code: NO_MEMORY,
        text: "the card is closed".to_owned(),
    }
}

impl Driver for Card {
    fn id(&self) -> u64 {
        self.id
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn units(&self) -> u32 {
        self.units
    }

    fn memory(&self) -> Result<MemoryInfo, DriverError> {
        self.current()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        check("cuMemGetInfo", unsafe {
            sys::cuMemGetInfo_v2(&raw mut free, &raw mut total)
        })?;
        Ok(MemoryInfo {
            free: free as u64,
            total: total as u64,
        })
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DriverError> {
        self.current()?;
        let mut address = 0;
        // SAFETY: writes an address of the device.
        check("cuMemAlloc", unsafe {
            sys::cuMemAlloc_v2(&raw mut address, bytes)
        })?;
        Ok(address)
    }

    fn free(&self, address: u64) {
        // SAFETY: whoever owns the memory gives it back once; the driver waits for what uses it.
        let freed = self
            .current()
            .and_then(|()| check("cuMemFree", unsafe { sys::cuMemFree_v2(address) }));
        if let Err(error) = freed {
            tracing::error!(%error, "device_memory_not_freed");
        }
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<(), DriverError> {
        self.current()?;
        self.staging()
            .as_mut()
            .ok_or_else(closed)?
            .write(self.stream, to, from)
    }

    fn read(&self, from: u64, to: &mut [u8]) -> Result<(), DriverError> {
        self.current()?;
        self.staging()
            .as_mut()
            .ok_or_else(closed)?
            .read(self.stream, from, to)
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), DriverError> {
        self.current()?;
        // SAFETY: memory of the device that its owner names.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(at, 0, bytes, self.stream)
        })
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        self.current()?;
        let Function(function) = self.function(launch.symbol)?;
        let mut args: Vec<_> = launch
            .args
            .iter()
            .map(|arg| arg.pointer().cast_mut())
            .collect();
        let [x, y, z] = launch.grid;
        // SAFETY: the structs of `kernel.rs` are the parameters of the symbols they are used with, in their order and
        // with their types; the driver copies the values before it returns.
        check("cuLaunchKernel", unsafe {
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                launch.block,
                1,
                1,
                0,
                self.stream,
                args.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }

    fn finish(&self) -> Result<(), DriverError> {
        self.current()?;
        self.staging()
            .as_mut()
            .ok_or_else(closed)?
            .finish(self.stream)
    }
}

impl Drop for Card {
    /// Failures are logged: a context that a kernel broke gives nothing back, and goes with the process.
    fn drop(&mut self) {
        let told = |done: Result<(), DriverError>| {
            if let Err(error) = done {
                tracing::warn!(%error, "device_not_closed");
            }
        };
        if let Err(error) = self.current() {
            return told(Err(error));
        }
        *self.staging() = None;
        for module in &self.modules {
            // SAFETY: loaded by `open`, unloaded here only.
            told(check("cuModuleUnload", unsafe {
                sys::cuModuleUnload(*module)
            }));
        }
        if !self.stream.is_null() {
            // SAFETY: made by `open`, destroyed here only.
            told(check("cuStreamDestroy", unsafe {
                sys::cuStreamDestroy_v2(self.stream)
            }));
        }
        // SAFETY: retained by `open`, released here only.
        told(check("cuDevicePrimaryCtxRelease", unsafe {
            sys::cuDevicePrimaryCtxRelease_v2(self.device)
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where there is no card, the reason is one sentence and nothing panics.
    #[test]
    fn a_machine_without_a_card_says_so() {
        let told = match Card::open(0) {
            Ok(card) => return assert!(!card.name().is_empty()),
            Err(why) => why,
        };
        if FATBINS.is_empty() {
            assert_eq!(told, NoDevice::NotBuilt);
            assert!(told.to_string().contains("--features cuda"));
        } else if !crate::driver_present() {
            assert_eq!(told, NoDevice::NoDriver);
        }
        assert!(!told.to_string().contains('\n'));
        let old = NoDevice::TooOld {
            name: "Tesla T4".to_owned(),
            capability: (7, 5),
        };
        assert_eq!(
            old.to_string(),
            "Tesla T4 has compute capability 7.5, the kernels need 8.0 or newer"
        );
    }
}
