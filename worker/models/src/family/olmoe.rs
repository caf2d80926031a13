//! OLMoE: queries and keys are normalised over the whole projection, then optionally clamped.

use foregate_checkpoint::names::of_block;

use crate::attention::{AfterProjection, QkNorm};
use crate::error::ModelError;
use crate::load::Loader;

/// One norm of `heads · head_dim` for queries, one of `kv_heads · head_dim` for keys.
pub(super) fn after_projection(
    loader: &mut Loader<'_>,
    block: usize,
) -> Result<AfterProjection, ModelError> {
    Ok(AfterProjection {
        norm: Some(QkNorm {
            query: loader.vector(&of_block(block, "self_attn.q_norm.weight"))?,
            key: loader.vector(&of_block(block, "self_attn.k_norm.weight"))?,
        }),
        clip: loader.spec().clip_qkv,
    })
}
