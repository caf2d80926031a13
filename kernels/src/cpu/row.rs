//! A row of any length as vectors, padded at its end.

use super::lanes::{Lanes, WIDTH};

/// Sixteen values from `i` on, `pad` beyond the end.
///
/// # Safety
/// The processor has the instructions of `L`; `i` lies in the row.
#[inline(always)]
pub(super) unsafe fn load<L: Lanes>(x: &[f32], i: usize, pad: f32) -> L {
    // SAFETY: in range by the length; the instructions are the caller's promise.
    unsafe {
        if i + WIDTH <= x.len() {
            L::load(x.as_ptr().add(i))
        } else {
            L::load_first(x.as_ptr().add(i), x.len() - i, pad)
        }
    }
}

/// The greatest value of a row, minus infinity if it is empty.
///
/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn greatest<L: Lanes>(x: &[f32]) -> f32 {
    // SAFETY: `i` stays in the row; the instructions are the caller's promise.
    unsafe {
        let mut max = L::splat(f32::NEG_INFINITY);
        let mut i = 0;
        while i < x.len() {
            max = max.max(load::<L>(x, i, f32::NEG_INFINITY));
            i += WIDTH;
        }
        max.greatest()
    }
}
