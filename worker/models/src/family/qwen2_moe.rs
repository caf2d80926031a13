//! Qwen2-MoE: a shared expert beside the routed ones.

use foregate_api::weights::Part;
use foregate_checkpoint::names::{self, of_block};

use crate::error::ModelError;
use crate::load::Loader;
use crate::mixture::SharedExpert;

/// The shared expert and its one-output gate.
pub(super) fn shared_expert(
    loader: &mut Loader<'_>,
    block: usize,
) -> Result<Option<SharedExpert>, ModelError> {
    let spec = loader.spec();
    let Some(inner) = spec.shared_inner else {
        return Ok(None);
    };
    Ok(Some(SharedExpert {
        ffn: loader.ffn(&names::shared_expert(block), inner)?,
        gate: loader.matrix(
            Part::Router,
            &of_block(block, "mlp.shared_expert_gate.weight"),
            1,
            spec.hidden,
        )?,
    }))
}
