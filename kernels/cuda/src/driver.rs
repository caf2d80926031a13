//! The seam between the host side of ops and what runs kernels: a card's driver, or in tests the CPU.

use std::fmt;

/// What a device does for us. All calls of all threads take place in one order, that of the calls; only reads and
/// [`Driver::finish`] wait. Every wait has a deadline.
pub trait Driver: fmt::Debug + Send + Sync {
    /// Number of this device within the process; no two drivers have the same.
    fn id(&self) -> u64;
    /// What it is, for logs and for the cluster to see.
    fn name(&self) -> &str;
    /// Units that run blocks side by side: grids that may have any size are made from it.
    fn units(&self) -> u32;
    /// Memory of the device.
    ///
    /// # Errors
    /// When the driver fails.
    fn memory(&self) -> Result<MemoryInfo, DriverError>;
    /// Memory that is not zeroed, aligned to at least [`ALIGN`].
    ///
    /// # Errors
    /// When there is not so much in one piece ([`DriverError::is_no_memory`]), or the driver fails.
    fn allocate(&self, bytes: usize) -> Result<u64, DriverError>;
    /// Gives memory back that [`Driver::allocate`] gave, after all calls before it. Failures are logged.
    fn free(&self, address: u64);
    /// Copies to the device; `from` may be reused when it returns.
    ///
    /// # Errors
    /// When the driver fails.
    fn write(&self, to: u64, from: &[u8]) -> Result<(), DriverError>;
    /// Copies from the device, and waits for it and all calls before it.
    ///
    /// # Errors
    /// When the driver fails, a kernel before it failed, or the deadline is over.
    fn read(&self, from: u64, to: &mut [u8]) -> Result<(), DriverError>;
    /// Zeroes memory of the device.
    ///
    /// # Errors
    /// When the driver fails.
    fn zero(&self, at: u64, bytes: usize) -> Result<(), DriverError>;
    /// Runs a kernel.
    ///
    /// # Errors
    /// When there is no such kernel, or the driver refuses it; a failure while it runs shows in a later call.
    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError>;
    /// Waits for all calls before it.
    ///
    /// # Errors
    /// When a kernel failed, or the deadline is over.
    fn finish(&self) -> Result<(), DriverError>;
}

/// Alignment of what [`Driver::allocate`] gives.
pub const ALIGN: u64 = 256;

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// That nobody has.
    pub free: u64,
    /// In all.
    pub total: u64,
}

/// A kernel with its arguments.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// Its name in the table of `kernels/cuda/README.md`.
    pub symbol: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// In the order of the table.
    pub args: &'a [Arg],
}

/// One argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// 4 bytes.
    U32(u32),
    /// 8 bytes: a number, or an address of the device.
    U64(u64),
    /// 4 bytes.
    F32(f32),
}

impl Arg {
    /// Where its value is, as `cuLaunchKernel` wants to be told. Good as long as `self` stays where it is.
    #[must_use]
    pub const fn pointer(&self) -> *const std::ffi::c_void {
        match self {
            Self::U32(value) => (&raw const *value).cast(),
            Self::U64(value) => (&raw const *value).cast(),
            Self::F32(value) => (&raw const *value).cast(),
        }
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::U64(value)
    }
}

/// A call of the driver that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverError {
    /// The call.
    pub call: &'static str,
    /// What it returned.
    pub code: i32,
    /// The driver's words for it.
    pub text: String,
}

/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub const NO_MEMORY: i32 = 2;

impl DriverError {
    /// Whether the device has too little memory.
    #[must_use]
    pub const fn is_no_memory(&self) -> bool {
        self.code == NO_MEMORY
    }
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed with {}: {}", self.call, self.code, self.text)
    }
}

impl std::error::Error for DriverError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_passed_by_the_addresses_of_their_values() {
        let args = [Arg::from(7_u32), Arg::from(1_u64 << 40), Arg::from(0.5_f32)];
        // SAFETY: each points at a value of that type inside of `args`, which lives.
        let values = unsafe {
            (
                *args[0].pointer().cast::<u32>(),
                *args[1].pointer().cast::<u64>(),
                *args[2].pointer().cast::<f32>(),
            )
        };
        assert_eq!(values, (7, 1 << 40, 0.5));
    }
}
