//! Memory of ops between their kernels. Kernels run in the order of their launches, so that what one op is done with
//! the next may overwrite; memory that grows is given back after what uses it.

use std::sync::Arc;

use foregate_kernels::{OpError, Region};

use crate::driver::Driver;
use crate::kernel::Address;
use crate::region::DeviceRegion;

/// Memory as large as the largest use of it.
#[derive(Debug, Default)]
pub(super) struct Grown(Option<DeviceRegion>);

/// Sizes are rounded up to this.
const STEP: usize = 64 << 10;

impl Grown {
    /// At least so many bytes; what they hold is stale.
    pub(super) fn bytes(
        &mut self,
        driver: &Arc<dyn Driver>,
        what: &'static str,
        bytes: usize,
    ) -> Result<Address, OpError> {
        if let Some(region) = &self.0
            && region.bytes() >= bytes
        {
            return Ok(region.address());
        }
        // The old memory first: there may be no room for both.
        self.0 = None;
        let region = DeviceRegion::take(driver, what, bytes.next_multiple_of(STEP))?;
        Ok(self.0.insert(region).address())
    }

    /// A copy of `values`.
    pub(super) fn holding<T: bytemuck::Pod>(
        &mut self,
        driver: &Arc<dyn Driver>,
        what: &'static str,
        values: &[T],
    ) -> Result<Address, OpError> {
        let bytes = bytemuck::cast_slice(values);
        let at = self.bytes(driver, what, bytes.len())?;
        if !bytes.is_empty() {
            driver
                .write(at, bytes)
                .map_err(crate::kernel::failed(what))?;
        }
        Ok(at)
    }
}

/// All of it, by what it is for.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Inputs of a product, rounded to bfloat16.
    pub(super) rounded: Grown,
    /// Token ids, or numbers of rows.
    pub(super) ids: Grown,
    /// Partial results of attention: values, maxima, sums.
    pub(super) partial: Grown,
    /// What grouped products are told: lists and counts of experts, slots and tiles.
    pub(super) lists: Grown,
    /// Addresses of a group's weights.
    pub(super) weights: Grown,
    /// Between the halves of a feed-forward: bfloat16, or float32 twice.
    pub(super) inner: Grown,
    /// Rows of a group, one after the other.
    pub(super) gathered: Grown,
    /// Results of experts before they are summed.
    pub(super) parts: Grown,
}
