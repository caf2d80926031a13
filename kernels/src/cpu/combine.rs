//! Sums of experts' results, in a fixed order.

use super::detect::Isa;
use super::lanes::{Lanes, WIDTH, on_path};
use super::threads::{Parts, Threads};
use crate::ops::Combine;

/// Multiply-adds below which a second thread is not worth it.
const SMALL: usize = 1 << 16;

/// # Safety
/// The processor has the instructions of `L`; a part is empty or has the length of `out`.
#[inline(always)]
unsafe fn row_kernel<L: Lanes>(parts: &[&[f32]], weights: &[f32], out: &mut [f32]) {
    let width = out.len();
    let mut i = 0;
    while i < width {
        let count = WIDTH.min(width - i);
        // SAFETY: `count` values from `i` on are in range of every part that is not empty.
        unsafe {
            let mut acc = L::splat(0.0);
            for p in 0..parts.len() {
                if !parts[p].is_empty() {
                    let part = parts[p].as_ptr().add(i);
                    let part = if count == WIDTH {
                        L::load(part)
                    } else {
                        L::load_first(part, count, 0.0)
                    };
                    acc = L::splat(weights[p]).fma(part, acc);
                }
            }
            acc.store_first(out.as_mut_ptr().add(i), count);
        }
        i += WIDTH;
    }
}

on_path! {
    /// Sum of one row.
    fn row(parts: &[&[f32]], weights: &[f32], out: &mut [f32]) = row_kernel
}

/// Runs a checked sum.
pub(super) fn combine(isa: Isa, threads: &Threads, op: Combine<'_>) {
    let Combine {
        parts,
        weights,
        top_k,
        width,
        out,
    } = op;
    let rows = out.len() / width;
    let each = (SMALL / 2).div_ceil(width * top_k);
    let step = if rows * width * top_k < SMALL {
        rows.max(1)
    } else {
        each
    };
    let out = Parts::of(out);
    threads.run(rows.div_ceil(step), &|item| {
        for r in item * step..rows.min((item + 1) * step) {
            let chosen = r * top_k..(r + 1) * top_k;
            // SAFETY: rows do not overlap; the parts' widths were checked.
            unsafe {
                let out = out.slice(r * width, width);
                row(isa, &parts[chosen.clone()], &weights[chosen], out);
            }
        }
    });
}
