//! Device code: CUDA kernels (`cu/`, with the table of them in `README.md`), their fatbins, and what calls them.
//!
//! Everything here compiles without CUDA: the driver is opened at run time. Feature `cuda` makes `build.rs` call nvcc and
//! embed the kernels; without it [`FATBINS`] is empty and there is no device to use. The kernels' logic runs on the
//! CPU in tests, by the crate in `emulate/`.
//!
//! [`Cuda`] is the executor that a model walks on; what runs its kernels is a [`Driver`]: a [`Card`], or in tests the
//! emulator. Start reading at `executor/mod.rs`, then `kernel.rs`.
#![expect(unsafe_code, reason = "the driver is a C library")]

pub mod comm;
mod driver;
mod executor;
mod fatbins;
mod kernel;
mod lane;
pub mod probe;
mod real;
mod region;
mod staged;

use std::sync::Arc;

pub use driver::{ALIGN, Arg, Driver, DriverError, Launch, MemoryInfo, NO_MEMORY};
pub use executor::{Cuda, cache_bytes};
pub use fatbins::{FATBINS, Fatbin};
pub use lane::Lane;
pub use real::{Card, CardLane, NoDevice};
pub use staged::Staged;

/// The card with this number, to walk on.
///
/// # Errors
/// When there is none that can run the kernels; the text says what helps.
pub fn open(ordinal: u32) -> Result<Cuda, NoDevice> {
    Ok(Cuda::new(Arc::new(Card::open(ordinal)?)))
}

/// Whether the driver's library can be opened. Nothing else of the driver may be touched before: its bindings panic
/// where there is no library.
#[must_use]
pub fn driver_present() -> bool {
    // SAFETY: opens a library by the names it is known by, which runs its initialisers as any program does.
    unsafe { cudarc::driver::sys::is_culib_present() }
}
