//! Layers of which all experts are on this worker's device.
//!
//! A device finds the experts of a layer by a table of addresses. It is made when a step first needs it, and again when
//! the resident experts have changed.

use std::sync::{Arc, Weak};

use foregate_kernels::{Anywhere, Executor, ExpertTable, OpError, ViewMut};
use foregate_models::experts::{ExpertBatch, ExpertsError};

use crate::residency::table::Resident;

/// Tables of layers, for one state of the resident experts.
#[derive(Debug, Default)]
pub(super) struct WholeLayers {
    of: Weak<Resident>,
    /// By layer: not asked yet, not all experts here, or where they are.
    tables: Vec<Option<Option<ExpertTable>>>,
}

impl WholeLayers {
    /// Computes a layer if all of its experts are in `resident`; false if they are not. The caller holds `resident`, so
    /// the addresses stay valid while the device is told, and memory goes back in the order of what it is told.
    pub(super) fn run(
        &mut self,
        executor: &dyn Executor,
        resident: &Arc<Resident>,
        batch: &ExpertBatch<'_, Anywhere>,
        out: &mut ViewMut<'_, f32>,
    ) -> Result<bool, ExpertsError> {
        let failed = |error: OpError| ExpertsError {
            layer: batch.layer,
            what: error.to_string(),
        };
        // A weak reference keeps the place from being used again, so equal places are the same table.
        if !std::ptr::eq(self.of.as_ptr(), Arc::as_ptr(resident)) {
            self.tables.clear();
            self.of = Arc::downgrade(resident);
        }
        let at = batch.layer.index();
        if self.tables.len() <= at {
            self.tables.resize_with(at + 1, || None);
        }
        let table = match &mut self.tables[at] {
            Some(table) => table,
            unknown @ None => unknown.insert(table(executor, resident, batch).map_err(failed)?),
        };
        let Some(table) = table else {
            return Ok(false);
        };
        let op = batch.on_device(table, out.again());
        executor.expert_layer(op).map_err(failed)?;
        Ok(true)
    }
}

/// The table of a layer, if all of its experts are here.
fn table(
    executor: &dyn Executor,
    resident: &Resident,
    batch: &ExpertBatch<'_, Anywhere>,
) -> Result<Option<ExpertTable>, OpError> {
    let parts: Option<Vec<_>> = resident
        .experts()
        .map(|expert| {
            resident
                .get(batch.layer, expert)
                .map(|weights| weights.parts())
        })
        .collect();
    parts.map(|parts| executor.expert_table(&parts)).transpose()
}
