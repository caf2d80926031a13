//! For tests: the CUDA kernels of `kernels/cuda/cu`, compiled for the CPU and launched by name, with the arguments that
//! `cuLaunchKernel` takes.
//!
//! A block's threads are fibers of the calling thread, run in a fixed order ([`Order`]); blocks come one after the other. So a
//! launch has returned when it is complete, and gives the same bits each time. Any number of threads may launch at once.
//!
//! Where a card would hang or do what CUDA does not define, a launch returns a [`Fault`]: threads that wait at a barrier
//! others never reach, lanes of a warp that do different things together, addresses of vector copies that are not
//! aligned. Shared memory is full of NaN when a block begins, and so is what an asynchronous copy will overwrite until it
//! has been waited for.
#![expect(unsafe_code, reason = "kernels are C++ that reads and writes memory")]

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;

/// A launch that did not end well.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kernel {kernel}: {why}")]
pub struct Fault {
    /// Name of the kernel.
    pub kernel: String,
    /// What was wrong.
    pub why: String,
}

/// In which order threads run where no barrier orders them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// The first thread first.
    #[default]
    Ascending,
    /// The last thread first. A correct kernel gives the same bits.
    Descending,
}

/// A kernel that can be launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// Its symbol.
    pub name: String,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of each argument, in order.
    pub arguments: Vec<u8>,
}

unsafe extern "C" {
    fn foregate_emulate_symbol(
        index: usize,
        name: *mut *const c_char,
        threads: *mut u32,
        count: *mut u32,
        sizes: *mut *const u8,
    ) -> bool;
    fn foregate_emulate_launch(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared_bytes: u32,
        arguments: *const *mut c_void,
        count: u32,
        descending: bool,
        why: *mut c_char,
        room: usize,
    ) -> bool;
}

/// All kernels, in no particular order.
#[must_use]
pub fn kernels() -> Vec<Kernel> {
    (0..).map_while(nth).collect()
}

fn nth(index: usize) -> Option<Kernel> {
    let (mut name, mut sizes) = (ptr::null(), ptr::null());
    let (mut threads, mut count) = (0, 0);
    // SAFETY: writes the four only if there is such a kernel, as pointers to constants of the program.
    unsafe {
        if !foregate_emulate_symbol(index, &mut name, &mut threads, &mut count, &mut sizes) {
            return None;
        }
        Some(Kernel {
            name: CStr::from_ptr(name).to_string_lossy().into_owned(),
            threads,
            arguments: std::slice::from_raw_parts(sizes, count as usize).to_vec(),
        })
    }
}

/// Launches a kernel and waits for it. `arguments` are pointers to the values of its parameters, in order.
///
/// # Errors
/// When there is no such kernel, when its arguments or its block are not what it takes, or when it would hang.
///
/// # Safety
/// Each argument points to a value of its parameter's type (see `kernels/cuda/README.md`); addresses among the values are of
/// memory that the kernel may read and write as that table says.
pub unsafe fn launch(
    kernel: &str,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    arguments: &[*mut c_void],
) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    unsafe {
        launch_in(
            Order::Ascending,
            kernel,
            grid,
            block,
            shared_bytes,
            arguments,
        )
    }
}

/// As [`launch`], with threads in an order of choice.
///
/// # Errors
/// As [`launch`].
///
/// # Safety
/// As [`launch`].
pub unsafe fn launch_in(
    order: Order,
    kernel: &str,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    arguments: &[*mut c_void],
) -> Result<(), Fault> {
    let fault = |why: String| Fault {
        kernel: kernel.to_owned(),
        why,
    };
    let name = CString::new(kernel).map_err(|_| fault("a name with a zero byte".into()))?;
    let count =
        u32::try_from(arguments.len()).map_err(|_| fault("too many arguments".into()))?;
    let mut why: [c_char; 512] = [0; 512];
    // SAFETY: grid and block have three values, `why` has the room that it says, the rest is the caller's promise. A reason is
    // written with its ending zero.
    unsafe {
        let done = foregate_emulate_launch(
            name.as_ptr(),
            grid.as_ptr(),
            block.as_ptr(),
            shared_bytes,
            arguments.as_ptr(),
            count,
            order == Order::Descending,
            why.as_mut_ptr(),
            why.len(),
        );
        if done {
            return Ok(());
        }
        let why = CStr::from_ptr(why.as_ptr()).to_string_lossy();
        Err(fault(why.into_owned()))
    }
}
