//! A gated feed-forward: a dense block's second half, or a shared expert.

use foregate_kernels::{Executor, ExpertFfn, ExpertGroup, Matrix, OpError, View, ViewMut};

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
        executor: &dyn Executor,
        x: View<'_, f32>,
        rows: &[u32],
        out: ViewMut<'_, f32>,
    ) -> Result<(), OpError> {
        executor.expert_ffn(ExpertFfn {
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
