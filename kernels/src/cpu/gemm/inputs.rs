//! Rows of inputs in the words that the innermost product reads: float32 as it is; bfloat16, rounded once, in
//! pairs of an even and an odd input, packed into a word or widened into two, as the instruction path wants it.

use super::super::detect::Isa;
use super::super::lanes::{Lanes, on_path};
use super::super::threads::{Parts, Threads};
use super::SMALL;
use crate::dtype::Dtype;

/// Rows of prepared inputs, or some of them by index.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) words: &'a [u32],
    /// Words of a row.
    pub(super) width: usize,
    pub(super) chosen: Option<&'a [u32]>,
}

impl Rows<'_> {
    /// The first words of `count` (at most `N`) rows from `row` on.
    pub(super) fn pointers<const N: usize>(&self, row: usize, count: usize) -> [*const u32; N] {
        let mut rows = [std::ptr::null(); N];
        for (i, pointer) in rows.iter_mut().enumerate().take(count) {
            let row = self.chosen.map_or(row + i, |c| c[row + i] as usize);
            *pointer = self.words[row * self.width..(row + 1) * self.width].as_ptr();
        }
        rows
    }

    /// The first word of `count` rows from `row` on that are not chosen by index, and the bytes from one to the next.
    pub(super) fn evenly_spaced(&self, row: usize, count: usize) -> (*const u8, usize) {
        assert!(self.chosen.is_none(), "tiles take rows that are in order");
        let words = &self.words[row * self.width..(row + count) * self.width];
        (words.as_ptr().cast(), self.width * 4)
    }
}

/// Words of a row of `k` inputs for weights of a format.
pub(super) fn width(isa: Isa, dtype: Dtype, k: usize) -> usize {
    if dtype.rounds_inputs() {
        let words = if isa.tiles().is_some() {
            1
        } else {
            // SAFETY: no pointers are passed.
            unsafe { pair_words(isa) }
        };
        k.div_ceil(2) * words
    } else {
        k
    }
}

/// Prepares inputs for weights of a format. `to` has the [`width`] of `from`; only the end of a row may have an odd
/// number of inputs.
pub(super) fn prepare(isa: Isa, dtype: Dtype, from: &[f32], to: &mut [u32]) {
    if dtype.rounds_inputs() {
        // SAFETY: slices check themselves.
        unsafe {
            if isa.tiles().is_some() {
                round_packed(isa, from, to);
            } else {
                round(isa, from, to);
            }
        }
    } else {
        to.copy_from_slice(bytemuck::cast_slice(from));
    }
}

/// All rows of `x` (of `k` inputs) for weights of a format; `kept` is memory for those that have to be prepared.
pub(super) fn rows<'a>(
    isa: Isa,
    threads: &Threads,
    dtype: Dtype,
    (x, k): (&'a [f32], usize),
    kept: &'a mut Vec<u32>,
) -> Rows<'a> {
    let count = x.len() / k.max(1);
    rows_in_order(isa, threads, dtype, (x, k), (count, &|row| row), kept)
}

/// As [`rows`], but `count` rows, of which row `i` is row `order(i)` of `x` if it has to be prepared.
pub(super) fn rows_in_order<'a>(
    isa: Isa,
    threads: &Threads,
    dtype: Dtype,
    (x, k): (&'a [f32], usize),
    (rows, order): (usize, &(dyn Fn(usize) -> usize + Sync)),
    kept: &'a mut Vec<u32>,
) -> Rows<'a> {
    let width = width(isa, dtype, k);
    if !dtype.rounds_inputs() {
        return Rows {
            words: bytemuck::cast_slice(x),
            width,
            chosen: None,
        };
    }
    if kept.len() < rows * width {
        kept.resize(rows * width, 0);
    }
    let words = Parts::of(&mut kept[..rows * width]);
    // So many rows that they are worth a thread.
    let step = (SMALL / k.max(1)).clamp(1, rows.max(1));
    threads.run(rows.div_ceil(step), &|item| {
        for row in item * step..rows.min((item + 1) * step) {
            // SAFETY: each row is written once.
            let to = unsafe { words.slice(row * width, width) };
            let from = order(row) * k;
            prepare(isa, dtype, &x[from..from + k], to);
        }
    });
    Rows {
        words: &kept[..rows * width],
        width,
        chosen: None,
    }
}

/// bfloat16 bits nearest to a float32, ties to even; what is not a number stays so.
#[inline(always)]
fn nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    if x.is_nan() { quiet } else { rounded }
}

/// # Safety
/// None: it has no pointers.
#[inline(always)]
pub(in crate::cpu) unsafe fn round_kernel<L: Lanes>(from: &[f32], to: &mut [u32]) {
    if L::PAIR_WORDS == 1 {
        // SAFETY: as for this function.
        return unsafe { round_packed_kernel::<L>(from, to) };
    }
    let (_, last) = from.as_chunks::<2>();
    let (head, tail) = to.split_at_mut(from.len() - last.len());
    for (x, word) in from.iter().zip(head) {
        *word = nearest(*x) << 16;
    }
    if let ([rest], [even, odd]) = (last, tail) {
        (*even, *odd) = (nearest(*rest) << 16, 0);
    }
}

/// # Safety
/// None: it has no pointers.
#[inline(always)]
unsafe fn round_packed_kernel<L: Lanes>(from: &[f32], to: &mut [u32]) {
    let (pairs, last) = from.as_chunks::<2>();
    let (head, tail) = to.split_at_mut(pairs.len());
    for (pair, word) in pairs.iter().zip(head) {
        *word = nearest(pair[0]) | nearest(pair[1]) << 16;
    }
    if let ([rest], Some(word)) = (last, tail.first_mut()) {
        *word = nearest(*rest);
    }
}

on_path! {
    /// As [`round`], always in pairs of one word: rows of tiles.
    fn round_packed(from: &[f32], to: &mut [u32]) = round_packed_kernel
}

on_path! {
    /// Rounds inputs to bfloat16; the missing half of a last pair becomes zero.
    fn round(from: &[f32], to: &mut [u32]) = round_kernel
}

/// # Safety
/// None: it has no pointers.
#[inline(always)]
const unsafe fn pair_words_kernel<L: Lanes>() -> usize {
    L::PAIR_WORDS
}

on_path! {
    /// Words of a prepared pair.
    pub(super) fn pair_words() -> usize = pair_words_kernel
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_ieee() {
        let mut bits = 1_u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = f32::from_bits(bits);
            let want = half::bf16::from_f32(x);
            let got = half::bf16::from_bits(nearest(x) as u16);
            assert!(got.to_bits() == want.to_bits(), "{x:e}: {got} and {want}");
        }
    }
}
