//! The seam between a model and its experts: a model never knows where they are.

use foregate_api::ids::LayerId;

/// One layer's rows on their way to experts.
#[derive(Debug)]
pub struct ExpertBatch<'a> {
    /// Which MoE layer.
    pub layer: LayerId,
    /// Normalised activations, `rows × hidden`, row-major.
    pub input: &'a [f32],
    /// Width of a row.
    pub hidden: usize,
    /// Chosen experts, `rows × top_k`, ascending within a row.
    pub experts: &'a [u32],
    /// Their weights, `rows × top_k`, in the order of `experts`.
    pub weights: &'a [f32],
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
}
