//! FP8 as DeepSeek-V3 has it: `weight` in e4m3 and `weight_scale_inv`, what a block is multiplied with
//! (the inverse of what it was divided by, so no reciprocal is taken).

use super::{SCALES, Source, Wrong, beside, tensor, widen};
use crate::header::Dtype;
use crate::index::Index;

pub(super) fn sources(
    name: &str,
    n: usize,
    k: usize,
    rows: usize,
    columns: usize,
) -> Vec<Source> {
    let blocks = [n.div_ceil(rows), k.div_ceil(columns)];
    vec![
        Source::new(name.to_owned(), &[Dtype::F8_E4M3], [n, k]),
        Source::new(beside(name, "weight_scale_inv"), SCALES, blocks),
    ]
}

pub(super) fn read(index: &Index, name: &str) -> Result<Vec<u8>, Wrong> {
    let weights = tensor(index, name)?.bytes;
    let scales = widen(&tensor(index, &beside(name, "weight_scale_inv"))?);
    let mut out = Vec::with_capacity(weights.len() + 4 * scales.len());
    out.extend_from_slice(weights);
    out.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
    Ok(out)
}
