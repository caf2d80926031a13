//! Device code: CUDA kernels (`cu/`, with the table of them in `README.md`), their fatbins, and what calls them.
//!
//! Everything here compiles without CUDA: the driver is opened at run time. Feature `cuda` makes `build.rs` call nvcc and
//! embed the kernels; without it [`FATBINS`] is empty and there is no device to use. The kernels' logic runs on the
//! CPU in tests, by the crate in `emulate/`.
#![expect(unsafe_code, reason = "the driver is a C library")]

pub mod comm;
mod fatbins;
pub mod probe;

pub use fatbins::{FATBINS, Fatbin};

/// Whether the driver's library can be opened. Nothing else of the driver may be touched before: its bindings panic
/// where there is no library.
#[must_use]
pub fn driver_present() -> bool {
    // SAFETY: opens a library by the names it is known by, which runs its initialisers as any program does.
    unsafe { cudarc::driver::sys::is_culib_present() }
}
