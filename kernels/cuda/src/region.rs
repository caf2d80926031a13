//! Memory of a device as ops see it.

use std::sync::Arc;

use foregate_kernels::{OpError, Region, ShapeError};

use crate::driver::Driver;
use crate::kernel::failed;

/// Memory that is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct DeviceRegion {
    driver: Arc<dyn Driver>,
    address: u64,
    bytes: usize,
}

impl DeviceRegion {
    /// Takes memory; `what` names it when there is none.
    pub(crate) fn take(
        driver: &Arc<dyn Driver>,
        what: &'static str,
        bytes: usize,
    ) -> Result<Self, OpError> {
        // Nothing has an address as well: a kernel may be told of it.
        let address = driver.allocate(bytes.max(1)).map_err(|error| {
            if !error.is_no_memory() {
                return failed(what)(error);
            }
            let free = driver.memory().map_or(0, |memory| memory.free);
            OpError::NoMemory {
                what,
                wanted: bytes,
                free: usize::try_from(free).unwrap_or(usize::MAX),
            }
        })?;
        Ok(Self {
            driver: Arc::clone(driver),
            address,
            bytes,
        })
    }

    fn check(&self, op: &'static str, at: usize, bytes: usize) -> Result<u64, OpError> {
        let end = at.saturating_add(bytes);
        if end > self.bytes {
            let error = ShapeError {
                op,
                what: "end, at most",
                want: self.bytes,
                got: end,
            };
            return Err(error.into());
        }
        Ok(self.address + at as u64)
    }
}

impl Region for DeviceRegion {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn device(&self) -> u64 {
        self.driver.id()
    }

    fn write(&self, at: usize, from: &[u8]) -> Result<(), OpError> {
        const OP: &str = "copy to the device";
        let to = self.check(OP, at, from.len())?;
        self.driver.write(to, from).map_err(failed(OP))
    }

    fn read(&self, at: usize, to: &mut [u8]) -> Result<(), OpError> {
        const OP: &str = "copy from the device";
        let from = self.check(OP, at, to.len())?;
        self.driver.read(from, to).map_err(failed(OP))
    }
}

impl Drop for DeviceRegion {
    fn drop(&mut self) {
        self.driver.free(self.address);
    }
}
