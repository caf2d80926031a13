//! The seam between a model and its experts: a model never knows where they are.

use foregate_api::ids::LayerId;
use foregate_kernels::{
    Anywhere, Executor, ExpertLayer, ExpertTable, Extent, Host, Memory, OpError, View, ViewMut,
};

/// One layer's rows on their way to experts: in this process's memory, or [`Anywhere`].
#[derive(Debug)]
pub struct ExpertBatch<'a, M: Memory = Host> {
    /// Which MoE layer.
    pub layer: LayerId,
    /// Normalised activations, `rows × hidden`, row-major.
    pub input: M::In<'a, f32>,
    /// Width of a row.
    pub hidden: usize,
    /// Chosen experts, `rows × top_k`, ascending within a row.
    pub experts: M::In<'a, u32>,
    /// Their weights, `rows × top_k`, in the order of `experts`.
    pub weights: M::In<'a, f32>,
    /// Experts per row.
    pub top_k: usize,
    /// Rows already lost in an earlier layer of this step, by row index: their result is not needed.
    pub dead: &'a [bool],
}

/// Rows that did not come back in time, or were refused, by row index of the batch.
pub type LateRows = Vec<u32>;

/// Why a whole layer could not be computed (a bug or a shutdown, never one slow peer).
#[derive(Debug, thiserror::Error)]
#[error("experts of layer {layer}: {what}")]
pub struct ExpertsError {
    /// The MoE layer.
    pub layer: LayerId,
    /// What happened.
    pub what: String,
}

/// Runs routed experts. One process is the oracle of many: every implementation gives the same bits.
pub trait Experts {
    /// Writes `out[row] = Σ weight · expert(row)` (`rows × hidden`), summed in ascending order of expert,
    /// each term added with one fused multiply-add to an accumulator that starts at zero.
    /// Rows named in the result have no meaning in `out`.
    ///
    /// # Errors
    /// When no row of the layer can be computed.
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError>;

    /// As [`Experts::run`], for rows that are where `executor` computes. Unless an implementation knows better, rows
    /// of a device come here and results go back; those of this process are taken as they are.
    ///
    /// # Errors
    /// When no row of the layer can be computed, or the device failed.
    fn run_on(
        &mut self,
        _executor: &dyn Executor,
        batch: &ExpertBatch<'_, Anywhere>,
        out: ViewMut<'_, f32>,
    ) -> Result<LateRows, ExpertsError> {
        through_host(batch, out, |batch, out| self.run(batch, out))
    }
}

/// Hands rows to `run` in this process's memory, wherever they are.
///
/// # Errors
/// Those of `run`, and of a device that has the rows.
pub fn through_host(
    batch: &ExpertBatch<'_, Anywhere>,
    mut out: ViewMut<'_, f32>,
    run: impl FnOnce(&ExpertBatch<'_>, &mut [f32]) -> Result<LateRows, ExpertsError>,
) -> Result<LateRows, ExpertsError> {
    if let (View::Host(input), View::Host(experts), View::Host(weights), ViewMut::Host(out)) =
        (batch.input, batch.experts, batch.weights, &mut out)
    {
        return run(&batch.here(input, experts, weights), out);
    }
    let failed = |error: OpError| ExpertsError {
        layer: batch.layer,
        what: error.to_string(),
    };
    let mut input = vec![0.0; batch.input.extent()];
    let mut experts = vec![0; batch.experts.extent()];
    let mut weights = vec![0.0; batch.weights.extent()];
    batch.input.read(&mut input).map_err(failed)?;
    batch.experts.read(&mut experts).map_err(failed)?;
    batch.weights.read(&mut weights).map_err(failed)?;
    let mut results = vec![0.0; out.extent()];
    let late = run(&batch.here(&input, &experts, &weights), &mut results)?;
    out.write(&results).map_err(failed)?;
    Ok(late)
}

impl ExpertBatch<'_> {
    /// The same batch for as long as this one is borrowed: the lifetime of a generic struct does not shorten by itself.
    #[must_use]
    pub const fn again(&self) -> ExpertBatch<'_> {
        ExpertBatch {
            layer: self.layer,
            input: self.input,
            hidden: self.hidden,
            experts: self.experts,
            weights: self.weights,
            top_k: self.top_k,
            dead: self.dead,
        }
    }
}

impl ExpertBatch<'_, Anywhere> {
    /// All of it as one op of the device that has the rows and, as `table` says, the experts.
    #[must_use]
    pub const fn on_device<'b>(
        &'b self,
        table: &'b ExpertTable,
        out: ViewMut<'b, f32>,
    ) -> ExpertLayer<'b> {
        ExpertLayer {
            x: self.input,
            rows: self.dead.len(),
            experts: self.experts,
            weights: self.weights,
            top_k: self.top_k,
            table,
            out,
        }
    }

    /// The same batch with its values in this process.
    fn here<'b>(
        &'b self,
        input: &'b [f32],
        experts: &'b [u32],
        weights: &'b [f32],
    ) -> ExpertBatch<'b> {
        ExpertBatch {
            layer: self.layer,
            input,
            hidden: self.hidden,
            experts,
            weights,
            top_k: self.top_k,
            dead: self.dead,
        }
    }
}
