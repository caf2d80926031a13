//! Memory of a step that the next step uses again.

use foregate_kernels::RopeTable;

/// Activations of one step, grown to the largest batch seen.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// The residual stream, `rows × hidden`.
    pub(crate) stream: Vec<f32>,
    /// Normalised stream, `rows × hidden`.
    pub(crate) normed: Vec<f32>,
    /// What a block's half adds to the stream, `rows × hidden`.
    pub(crate) branch: Vec<f32>,
    /// A second branch to be added: the shared expert, `rows × hidden`.
    pub(crate) shared: Vec<f32>,
    /// Queries, keys, values, and the attention's result.
    pub(crate) query: Vec<f32>,
    pub(crate) key: Vec<f32>,
    pub(crate) value: Vec<f32>,
    pub(crate) attended: Vec<f32>,
    /// Angles of the rows' positions; away while a step has them.
    pub(crate) angles: RopeTable,
    /// Router logits, `rows × experts`.
    pub(crate) router: Vec<f32>,
    /// Shared expert's gate, one per row.
    pub(crate) gate: Vec<f32>,
    /// Chosen experts and weights, `rows × top_k`.
    pub(crate) chosen: Vec<u32>,
    pub(crate) weights: Vec<f32>,
    /// `0..rows`: every row, as the grouped feed-forward wants it.
    pub(crate) all_rows: Vec<u32>,
}

/// The buffer at exactly this length. What it holds is stale: every op overwrites all of its output.
pub(crate) fn sized(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.resize(length, 0.0);
    buffer
}
