//! Keys and values of all sequences, in pages.
//!
//! A cache is made of words of 32 bits; a word holds one float32, or two bfloat16 that a product takes
//! together ([`KvDtype`]). Layout: `[page][layer]`, then all heads' keys, then all heads' values.
//! - keys of a head: `[ceil(page_tokens / 16)][lines][16 tokens]`, where a line is one dimension (float32) or
//!   two that follow each other (bfloat16), so that one vector is the same part of 16 keys and a score needs
//!   no sum across lanes;
//! - values of a head: `[lines][head_dim]`, where a line is one token (float32) or two that follow each other
//!   (bfloat16).
//!
//! A page is one contiguous range, and the memory of a page that was never written costs nothing.

use std::fmt;

use crate::error::ShapeError;
use crate::place::Region;

/// Keys beside each other in one vector.
pub(crate) const KEYS: usize = 16;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KvDtype {
    /// IEEE single precision: exactly what was computed.
    F32,
    /// bfloat16: rounded once when written, to nearest, ties to even. Queries and probabilities that meet
    /// them are rounded too.
    Bf16,
}

impl KvDtype {
    /// Bytes of one value.
    #[must_use]
    pub const fn bytes(self) -> usize {
        4 / self.per_word()
    }

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }

    /// Values that share a word.
    pub(crate) const fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
        }
    }
}

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
    /// Format of keys and values.
    pub dtype: KvDtype,
}

impl KvShape {
    /// Words of one head's keys in one page of one layer.
    fn key_words(&self) -> Option<usize> {
        let tokens = self.page_tokens.checked_next_multiple_of(KEYS)?;
        tokens.checked_mul(self.head_dim.div_ceil(self.dtype.per_word()))
    }

    /// Words of one head's values in one page of one layer.
    fn value_words(&self) -> Option<usize> {
        let lines = self.page_tokens.div_ceil(self.dtype.per_word());
        lines.checked_mul(self.head_dim)
    }

    fn page_words(&self) -> Option<usize> {
        self.key_words()?
            .checked_add(self.value_words()?)?
            .checked_mul(self.kv_heads)?
            .checked_mul(self.layers)
    }

    /// Bytes of one page over all layers; `None` when it does not fit a machine word.
    #[must_use]
    pub fn page_bytes(&self) -> Option<usize> {
        self.page_words()?.checked_mul(4)
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

/// Where the words of a head start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Starts {
    layers: usize,
    heads: usize,
    /// Words of one head's keys in one page of one layer.
    keys: usize,
    /// The same for its values.
    values: usize,
}

impl Starts {
    fn of(shape: KvShape) -> Option<Self> {
        Some(Self {
            layers: shape.layers,
            heads: shape.kv_heads,
            keys: shape.key_words()?,
            values: shape.value_words()?,
        })
    }

    pub(crate) const fn key(self, layer: usize, page: usize, head: usize) -> usize {
        self.block(layer, page) + head * self.keys
    }

    pub(crate) const fn value(self, layer: usize, page: usize, head: usize) -> usize {
        self.block(layer, page) + self.heads * self.keys + head * self.values
    }

    const fn block(self, layer: usize, page: usize) -> usize {
        (page * self.layers + layer) * (self.keys + self.values) * self.heads
    }
}

/// Paged keys and values.
pub struct KvCache {
    shape: KvShape,
    starts: Starts,
    data: Data,
}

/// Where the pages are.
enum Data {
    /// There is no page.
    Nowhere,
    /// All pages, then one vector that may be read beyond the last value.
    Host(memmap2::MmapMut),
    Device(Box<dyn Region>),
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
            Data::Nowhere
        } else {
            Data::Host(memory(padded).map_err(|_| refused())?)
        };
        Ok(Self {
            shape,
            starts: Starts::of(shape).ok_or_else(refused)?,
            data,
        })
    }

    /// A cache whose pages a device has, laid out as the device wants it.
    ///
    /// # Errors
    /// When a page's size does not fit a machine word.
    pub fn on_device(shape: KvShape, region: Box<dyn Region>) -> Result<Self, ShapeError> {
        let refused = || ShapeError::new("kv cache", "size of a page", usize::MAX, 0);
        Ok(Self {
            shape,
            starts: Starts::of(shape).ok_or_else(refused)?,
            data: Data::Device(region),
        })
    }

    /// The device's memory that it is in, if it is on one.
    #[must_use]
    pub fn region(&self) -> Option<&dyn Region> {
        match &self.data {
            Data::Device(region) => Some(&**region),
            Data::Nowhere | Data::Host(_) => None,
        }
    }

    /// Its sizes.
    #[must_use]
    pub const fn shape(&self) -> KvShape {
        self.shape
    }

    /// All words.
    pub(crate) fn words(&self) -> &[u32] {
        match &self.data {
            Data::Host(map) => bytemuck::cast_slice(map),
            Data::Nowhere | Data::Device(_) => &[],
        }
    }

    /// All words; a float32 is its bits, of two bfloat16 the first is the lower half.
    pub(crate) fn words_mut(&mut self) -> &mut [u32] {
        match &mut self.data {
            Data::Host(map) => bytemuck::cast_slice_mut(map),
            Data::Nowhere | Data::Device(_) => &mut [],
        }
    }

    /// Where heads start.
    pub(crate) const fn starts(&self) -> Starts {
        self.starts
    }

    /// First word of the keys of a head in a page.
    pub(crate) const fn key_start(&self, layer: usize, page: usize, head: usize) -> usize {
        self.starts.key(layer, page, head)
    }

    /// First word of the values of a head in a page.
    pub(crate) const fn value_start(&self, layer: usize, page: usize, head: usize) -> usize {
        self.starts.value(layer, page, head)
    }

    /// Copies all layers of page `from` over page `to`, in this process's memory.
    ///
    /// # Errors
    /// When a page does not exist, or a device has it.
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
        let words = self.starts.block(0, 1);
        if self.region().is_some() {
            return Err(ShapeError::new(
                "copy_page",
                "words in this process",
                words,
                0,
            ));
        }
        let start = from as usize * words;
        self.words_mut()
            .copy_within(start..start + words, to as usize * words);
        Ok(())
    }
}

/// Zeroed memory, in huge pages where the system has them: a head's part of a page of tokens is a few kilobytes, and a
/// long sequence would miss the translation cache at each.
fn memory(bytes: usize) -> std::io::Result<memmap2::MmapMut> {
    let map = memmap2::MmapOptions::new()
        .len(bytes)
        .no_reserve_swap()
        .map_anon()?;
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        tracing::debug!(%error, "no huge pages");
    }
    Ok(map)
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
        dtype: KvDtype::F32,
    };
    const HALF: KvShape = KvShape {
        dtype: KvDtype::Bf16,
        ..SHAPE
    };

    #[test]
    fn pages_do_not_overlap() {
        for (shape, value) in [(SHAPE, 4 * 8), (HALF, 2 * 8)] {
            let kv = KvCache::new(shape).unwrap();
            assert_eq!(kv.words().len() * 4, shape.page_bytes().unwrap() * 3 + 64);
            assert_eq!(kv.value_start(1, 2, 1) + value, kv.words().len() - KEYS);
            assert_eq!(kv.key_start(0, 1, 0), kv.value_start(1, 0, 1) + value);
        }
        let (whole, half) = (SHAPE.page_bytes().unwrap(), HALF.page_bytes().unwrap());
        assert_eq!(whole, 2 * half);
    }

    #[test]
    fn a_copied_page_is_equal_in_all_layers() {
        for shape in [SHAPE, HALF] {
            let mut kv = KvCache::new(shape).unwrap();
            let words = kv.starts.block(0, 1);
            for (value, i) in kv.words_mut()[..words].iter_mut().zip(1..) {
                *value = i;
            }
            kv.copy_page(0, 2).unwrap();
            let pages: Vec<&[u32]> = kv.words().chunks_exact(words).collect();
            assert_eq!(pages[0], pages[2]);
            assert!(pages[1].iter().all(|v| *v == 0));
            assert!(kv.copy_page(0, 3).is_err());
        }
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
