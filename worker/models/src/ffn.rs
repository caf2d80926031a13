//! A gated feed-forward: a dense block's second half, or a shared expert.

use foregate_kernels::{ExpertFfn, ExpertGroup, Matrix, Ops, ShapeError};

/// `down(silu(gate · x) * (up · x))`.
#[derive(Debug)]
pub(crate) struct Ffn {
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) down: Matrix,
}

impl Ffn {
    /// All rows through one feed-forward.
    pub(crate) fn run(
        &self,
        ops: &dyn Ops,
        x: &[f32],
        rows: &[u32],
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        ops.expert_ffn(ExpertFfn {
            x,
            hidden: self.down.n(),
            groups: &[ExpertGroup {
                gate: &self.gate,
                up: &self.up,
                down: &self.down,
                rows,
                out_offset: 0,
            }],
            out,
        })
    }
}
