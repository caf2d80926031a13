//! What the two formats of keys and values do differently: how many values share a word, and how a word is
//! multiplied.

use crate::cpu::gemm::round_kernel;
use crate::cpu::lanes::Lanes;

/// A format of keys and values.
///
/// # Safety
/// Functions over [`Lanes`] must only be called on a processor with the instructions of `L`, with pointers that
/// are valid for what they say.
pub(super) trait Stored {
    /// Values that share a word: those that one step of a chain takes.
    const PER_WORD: usize;
    /// Sixteen words.
    type Line<L: Lanes>: Copy;

    /// Sixteen words.
    unsafe fn load<L: Lanes>(from: *const u32) -> Self::Line<L>;
    /// Where the words of line `line` of prepared values are.
    unsafe fn step<L: Lanes>(from: *const u32, line: usize) -> *const u32;
    /// Line `line` of prepared values, in all lanes.
    unsafe fn splat<L: Lanes>(from: *const u32, line: usize) -> Self::Line<L>;
    /// One step of a chain.
    unsafe fn add<L: Lanes>(acc: L, x: Self::Line<L>, w: Self::Line<L>) -> L;
    /// Prepares values to be splat; `to` has two words for each pair of them.
    unsafe fn prepare<L: Lanes>(from: &[f32], to: &mut [u32]);

    /// Copies the value of token `slot` (of the line that `from` starts with) to that of token `to_slot`.
    fn copy_value(from: &[u32], slot: usize, to: &mut [u32], to_slot: usize, dim: usize);
    /// Copies a line without the values of its second token.
    fn first_only(line: &[u32], to: &mut [u32]);
    /// Writes dimension by dimension: the key of token `slot` into its group of 16, lines of 16 words.
    fn write_key(key: &[f32], slot: usize, group: &mut [u32]);
    /// Writes the value of token `slot` into its line.
    fn write_value(value: &[f32], slot: usize, line: &mut [u32]);
}

/// One float32 a word.
pub(super) enum Floats {}

impl Stored for Floats {
    const PER_WORD: usize = 1;
    type Line<L: Lanes> = L;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u32) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load(from.cast()) }
    }

    #[inline(always)]
    unsafe fn step<L: Lanes>(from: *const u32, line: usize) -> *const u32 {
        // SAFETY: the caller's promise.
        unsafe { from.add(line) }
    }

    #[inline(always)]
    unsafe fn splat<L: Lanes>(from: *const u32, line: usize) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::splat(f32::from_bits(*from.add(line))) }
    }

    #[inline(always)]
    unsafe fn add<L: Lanes>(acc: L, x: L, w: L) -> L {
        // SAFETY: the caller's promise.
        unsafe { x.fma(w, acc) }
    }

    #[inline(always)]
    unsafe fn prepare<L: Lanes>(from: &[f32], to: &mut [u32]) {
        to[..from.len()].copy_from_slice(bytemuck::cast_slice(from));
    }

    fn copy_value(from: &[u32], _slot: usize, to: &mut [u32], _to_slot: usize, dim: usize) {
        to[..dim].copy_from_slice(&from[..dim]);
    }

    fn first_only(line: &[u32], to: &mut [u32]) {
        to[..line.len()].copy_from_slice(line);
    }

    fn write_key(key: &[f32], slot: usize, group: &mut [u32]) {
        for (to, from) in group[slot..].iter_mut().step_by(crate::kv::KEYS).zip(key) {
            *to = from.to_bits();
        }
    }

    fn write_value(value: &[f32], _slot: usize, line: &mut [u32]) {
        line.copy_from_slice(bytemuck::cast_slice(value));
    }
}

/// Two bfloat16 a word, the first in its lower half.
pub(super) enum Pairs {}

/// The half of a word that belongs to an even or an odd place.
#[inline(always)]
const fn half(place: usize) -> u32 {
    if place.is_multiple_of(2) {
        0x0000_ffff
    } else {
        0xffff_0000
    }
}

/// `value` in the half of an even or an odd place, the other half as it was.
#[inline(always)]
fn put(word: &mut u32, place: usize, value: f32) {
    let bits = u32::from(half::bf16::from_f32(value).to_bits());
    *word = *word & !half(place) | (bits | bits << 16) & half(place);
}

impl Stored for Pairs {
    const PER_WORD: usize = 2;
    type Line<L: Lanes> = L::Pairs;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u32) -> L::Pairs {
        // SAFETY: the caller's promise.
        unsafe { L::load_pairs(from.cast()) }
    }

    #[inline(always)]
    unsafe fn step<L: Lanes>(from: *const u32, line: usize) -> *const u32 {
        // SAFETY: the caller's promise.
        unsafe { from.add(line * L::PAIR_WORDS) }
    }

    #[inline(always)]
    unsafe fn splat<L: Lanes>(from: *const u32, line: usize) -> L::Pairs {
        // SAFETY: the caller's promise.
        unsafe { L::splat_pair(Self::step::<L>(from, line)) }
    }

    #[inline(always)]
    unsafe fn add<L: Lanes>(acc: L, x: L::Pairs, w: L::Pairs) -> L {
        // SAFETY: the caller's promise.
        unsafe { acc.dot(x, w) }
    }

    #[inline(always)]
    unsafe fn prepare<L: Lanes>(from: &[f32], to: &mut [u32]) {
        let words = from.len().div_ceil(2) * L::PAIR_WORDS;
        // SAFETY: slices check themselves.
        unsafe { round_kernel::<L>(from, &mut to[..words]) }
    }

    fn copy_value(from: &[u32], slot: usize, to: &mut [u32], to_slot: usize, dim: usize) {
        for (to, from) in to[..dim].iter_mut().zip(from) {
            let value = from >> (16 * (slot % 2)) & 0xffff;
            *to = *to & !half(to_slot) | (value | value << 16) & half(to_slot);
        }
    }

    fn first_only(line: &[u32], to: &mut [u32]) {
        for (to, from) in to.iter_mut().zip(line) {
            *to = from & half(0);
        }
    }

    fn write_key(key: &[f32], slot: usize, group: &mut [u32]) {
        for (d, value) in key.iter().enumerate() {
            put(&mut group[d / 2 * crate::kv::KEYS + slot], d, *value);
        }
    }

    fn write_value(value: &[f32], slot: usize, line: &mut [u32]) {
        for (word, value) in line.iter_mut().zip(value) {
            put(word, slot, *value);
        }
    }
}
