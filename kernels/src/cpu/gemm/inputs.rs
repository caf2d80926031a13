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
}

/// Words of a row of `k` inputs for weights of a format.
pub(super) fn width(isa: Isa, dtype: Dtype, k: usize) -> usize {
    if dtype.rounds_inputs() {
        // SAFETY: no pointers are passed.
        k.div_ceil(2) * unsafe { pair_words(isa) }
    } else {
        k
    }
}

/// Prepares inputs for weights of a format. `to` has the [`width`] of `from`; only the end of a row may have an odd
/// number of inputs.
pub(super) fn prepare(isa: Isa, dtype: Dtype, from: &[f32], to: &mut [u32]) {
    if dtype.rounds_inputs() {
        // SAFETY: slices check themselves.
        unsafe { round(isa, from, to) }
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
    let width = width(isa, dtype, k);
    if !dtype.rounds_inputs() {
        return Rows {
            words: bytemuck::cast_slice(x),
            width,
            chosen: None,
        };
    }
    let rows = x.len() / k.max(1);
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
            prepare(isa, dtype, &x[row * k..(row + 1) * k], to);
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
unsafe fn round_kernel<L: Lanes>(from: &[f32], to: &mut [u32]) {
    let (pairs, last) = from.as_chunks::<2>();
    let rest = last.first().map(|x| nearest(*x));
    if L::PAIR_WORDS == 1 {
        let (head, tail) = to.split_at_mut(pairs.len());
        for (pair, word) in pairs.iter().zip(head) {
            *word = nearest(pair[0]) | nearest(pair[1]) << 16;
        }
        if let (Some(rest), Some(word)) = (rest, tail.first_mut()) {
            *word = rest;
        }
    } else {
        let (head, tail) = to.split_at_mut(2 * pairs.len());
        for (x, word) in from.iter().zip(head) {
            *word = nearest(*x) << 16;
        }
        if let (Some(rest), [even, odd]) = (rest, tail) {
            (*even, *odd) = (rest << 16, 0);
        }
    }
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
    fn pair_words() -> usize = pair_words_kernel
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
