//! What differs between the families; one file each.
//!
//! Names, shapes and defaults differ as well, but those are the checkpoint's business: here is only what
//! the forward pass does differently.

mod olmoe;
mod qwen2_moe;
mod qwen3_moe;

use foregate_api::model::Family;

use crate::attention::AfterProjection;
use crate::error::ModelError;
use crate::load::Loader;
use crate::mixture::SharedExpert;

/// What stands between projection and rotation in a block's attention. Mixtral and Qwen2-MoE have
/// nothing there (the latter's bias belongs to the projection).
pub(crate) fn after_projection(
    loader: &mut Loader<'_>,
    block: usize,
) -> Result<AfterProjection, ModelError> {
    match loader.spec().family {
        Family::Qwen3Moe => qwen3_moe::after_projection(loader, block),
        Family::Olmoe => olmoe::after_projection(loader, block),
        Family::Qwen2Moe | Family::Mixtral => Ok(AfterProjection::default()),
    }
}

/// The expert that all rows of a block go through, if the family has one.
pub(crate) fn shared_expert(
    loader: &mut Loader<'_>,
    block: usize,
) -> Result<Option<SharedExpert>, ModelError> {
    match loader.spec().family {
        Family::Qwen2Moe => qwen2_moe::shared_expert(loader, block),
        Family::Qwen3Moe | Family::Mixtral | Family::Olmoe => Ok(None),
    }
}
