//! Memory of a step that the next step uses again.

use foregate_kernels::{Array, Placed, RopeTable};

/// Activations of one step, where they are computed, grown to the largest batch seen.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// The residual stream, `rows × hidden`.
    pub(crate) stream: Array<f32>,
    /// Normalised stream, `rows × hidden`.
    pub(crate) normed: Array<f32>,
    /// What a block's half adds to the stream, `rows × hidden`.
    pub(crate) branch: Array<f32>,
    /// A second branch to be added: the shared expert, `rows × hidden`.
    pub(crate) shared: Array<f32>,
    /// Queries, keys, values, and the attention's result.
    pub(crate) query: Array<f32>,
    pub(crate) key: Array<f32>,
    pub(crate) value: Array<f32>,
    pub(crate) attended: Array<f32>,
    /// Angles of the rows' positions; away while a step has them.
    pub(crate) angles: RopeTable,
    /// What the layers of a step read again, where it is computed; away while a step has it.
    pub(crate) placed: Placed,
    /// Router logits, `rows × experts`.
    pub(crate) router: Array<f32>,
    /// Shared expert's gate, one per row.
    pub(crate) gate: Array<f32>,
    /// Chosen experts, `moe_layers × rows × top_k`: a device is asked for all layers' at once.
    pub(crate) chosen: Array<u32>,
    /// Their weights in one layer, `rows × top_k`.
    pub(crate) weights: Array<f32>,
    /// The choices and logits that came from a device.
    pub(crate) routes: Vec<u32>,
    pub(crate) logits: Array<f32>,
    /// `0..rows`: every row, as the grouped feed-forward wants it.
    pub(crate) all_rows: Vec<u32>,
}
