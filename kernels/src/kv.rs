//! Keys and values of all sequences, in pages.
//!
//! Layout in float32: `[page][layer]`, then all heads' keys, then all heads' values.
//! - keys of a head: `[ceil(page_tokens / 16)][head_dim][16 tokens]`, so that one vector is one dimension
//!   of 16 keys and a score needs no sum across lanes;
//! - values of a head: `[page_tokens][head_dim]`.
//!
//! A page is one contiguous range, and the memory of a page that was never written costs nothing.

use std::fmt;

use crate::error::ShapeError;

/// Keys beside each other in one vector.
pub(crate) const KEYS: usize = 16;

/// Sizes of a [`KvCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Attention layers.
    pub layers: usize,
    /// Pages.
    pub pages: usize,
    /// Tokens that a page holds, for all layers.
    pub page_tokens: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl KvShape {
    const fn key_floats(&self) -> Option<usize> {
        match (self.page_tokens.div_ceil(KEYS) * KEYS).checked_mul(self.head_dim) {
            Some(floats) => floats.checked_mul(self.kv_heads),
            None => None,
        }
    }

    fn page_floats(&self) -> Option<usize> {
        let values = self
            .page_tokens
            .checked_mul(self.head_dim)?
            .checked_mul(self.kv_heads)?;
        self.key_floats()?
            .checked_add(values)?
            .checked_mul(self.layers)
    }

    /// Bytes of one page over all layers; `None` when it does not fit a machine word.
    #[must_use]
    pub fn page_bytes(&self) -> Option<usize> {
        self.page_floats()?.checked_mul(4)
    }
}

/// Which page of which sequence each row of a step uses.
#[derive(Debug, Clone, Copy)]
pub struct PageMap<'a> {
    /// For each row the index of its sequence in `tables`.
    pub sequence_of_row: &'a [u32],
    /// For each sequence its pages in order of position: position `p` is slot `p % page_tokens` of page
    /// `table[p / page_tokens]`.
    pub tables: &'a [&'a [u32]],
}

/// Paged keys and values, float32.
pub struct KvCache {
    shape: KvShape,
    /// All pages, then one vector that may be read beyond the last value. `None` when there is no page.
    data: Option<memmap2::MmapMut>,
}

impl KvCache {
    /// Reserves address space for all pages; memory is taken when a page is first written.
    ///
    /// # Errors
    /// When the size does not fit a machine word or the system refuses it.
    pub fn new(shape: KvShape) -> Result<Self, ShapeError> {
        let got = shape.pages;
        let refused = || ShapeError::new("kv cache", "pages that fit in memory", 0, got);
        let bytes = shape
            .page_bytes()
            .and_then(|b| b.checked_mul(shape.pages))
            .ok_or_else(refused)?;
        let padded = bytes.checked_add(KEYS * 4).ok_or_else(refused)?;
        let data = if bytes == 0 {
            None
        } else {
            Some(
                memmap2::MmapOptions::new()
                    .len(padded)
                    .no_reserve_swap()
                    .map_anon()
                    .map_err(|_| refused())?,
            )
        };
        Ok(Self { shape, data })
    }

    /// Its sizes.
    #[must_use]
    pub const fn shape(&self) -> KvShape {
        self.shape
    }

    pub(crate) fn floats(&self) -> &[f32] {
        self.data.as_deref().map_or(&[], bytemuck::cast_slice)
    }

    pub(crate) fn floats_mut(&mut self) -> &mut [f32] {
        self.data
            .as_deref_mut()
            .map_or(&mut [], bytemuck::cast_slice_mut)
    }

    /// Start of the keys of a head in a page.
    pub(crate) fn key_start(&self, layer: usize, page: usize, head: usize) -> usize {
        let s = &self.shape;
        let per_head = s.page_tokens.div_ceil(KEYS) * KEYS * s.head_dim;
        self.block_start(layer, page) + head * per_head
    }

    /// Start of the values of a head in a page.
    pub(crate) fn value_start(&self, layer: usize, page: usize, head: usize) -> usize {
        let s = &self.shape;
        let keys = s.page_tokens.div_ceil(KEYS) * KEYS * s.head_dim * s.kv_heads;
        self.block_start(layer, page) + keys + head * s.page_tokens * s.head_dim
    }

    fn block_start(&self, layer: usize, page: usize) -> usize {
        let s = &self.shape;
        let tokens = s.page_tokens.div_ceil(KEYS) * KEYS + s.page_tokens;
        (page * s.layers + layer) * tokens * s.head_dim * s.kv_heads
    }

    /// Copies all layers of page `from` over page `to`.
    ///
    /// # Errors
    /// When a page does not exist.
    pub fn copy_page(&mut self, from: u32, to: u32) -> Result<(), ShapeError> {
        let pages = self.shape.pages;
        for page in [from, to] {
            if page as usize >= pages {
                return Err(ShapeError::new(
                    "copy_page",
                    "page below",
                    pages,
                    page as usize,
                ));
            }
        }
        let floats = self.block_start(0, 1);
        let start = from as usize * floats;
        self.floats_mut()
            .copy_within(start..start + floats, to as usize * floats);
        Ok(())
    }
}

impl fmt::Debug for KvCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvCache")
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape {
        layers: 2,
        pages: 3,
        page_tokens: 4,
        kv_heads: 2,
        head_dim: 8,
    };

    #[test]
    fn pages_do_not_overlap() {
        let kv = KvCache::new(SHAPE).unwrap();
        assert_eq!(kv.floats().len() * 4, SHAPE.page_bytes().unwrap() * 3 + 64);
        assert_eq!(kv.value_start(1, 2, 1) + 4 * 8, kv.floats().len() - KEYS);
        assert_eq!(kv.key_start(0, 1, 0), kv.value_start(1, 0, 1) + 4 * 8);
    }

    #[test]
    fn a_copied_page_is_equal_in_all_layers() {
        let mut kv = KvCache::new(SHAPE).unwrap();
        let floats = kv.block_start(0, 1);
        for (i, value) in kv.floats_mut()[..floats].iter_mut().enumerate() {
            *value = i as f32;
        }
        kv.copy_page(0, 2).unwrap();
        let pages: Vec<&[f32]> = kv.floats().chunks_exact(floats).collect();
        assert_eq!(pages[0], pages[2]);
        assert!(pages[1].iter().all(|v| *v == 0.0));
        assert!(kv.copy_page(0, 3).is_err());
    }

    #[test]
    fn unwritten_pages_cost_nothing_and_too_many_are_refused() {
        assert!(
            KvCache::new(KvShape {
                pages: 1 << 22,
                ..SHAPE
            })
            .is_ok()
        );
        assert!(
            KvCache::new(KvShape {
                pages: usize::MAX / 2,
                ..SHAPE
            })
            .is_err()
        );
    }
}
