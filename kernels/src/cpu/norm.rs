//! Root mean square norm.

use super::detect::Isa;
use super::lanes::{Lanes, WIDTH, on_path};
use super::threads::{Parts, Threads};
use crate::ops::RmsNorm;

/// Elements below which a second thread is not worth it.
const SMALL: usize = 1 << 15;

/// # Safety
/// The processor has the instructions of `L`; all slices have the length of `weight`.
#[inline(always)]
unsafe fn row_kernel<L: Lanes>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    // SAFETY: reads and writes stay within `width`; the rest is the caller's promise.
    unsafe {
        let mut squares = L::splat(0.0);
        let mut i = 0;
        while i < width {
            let x = first::<L>(x, i);
            squares = x.fma(x, squares);
            i += WIDTH;
        }
        let inverse = L::splat(1.0 / (squares.sum() / width as f32 + eps).sqrt());
        i = 0;
        while i < width {
            let value = first::<L>(weight, i).mul(first::<L>(x, i).mul(inverse));
            value.store_first(out.as_mut_ptr().add(i), WIDTH.min(width - i));
            i += WIDTH;
        }
    }
}

/// Sixteen values from `i` on, zero beyond the end.
#[inline(always)]
unsafe fn first<L: Lanes>(x: &[f32], i: usize) -> L {
    // SAFETY: in range by the length; the instructions are the caller's promise.
    unsafe {
        if i + WIDTH <= x.len() {
            L::load(x.as_ptr().add(i))
        } else {
            L::load_first(x.as_ptr().add(i), x.len() - i, 0.0)
        }
    }
}

on_path! {
    /// Norm of one row.
    fn row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = row_kernel
}

/// Runs a checked norm.
pub(super) fn rms_norm(isa: Isa, threads: &Threads, op: RmsNorm<'_>) {
    let RmsNorm {
        x,
        rows,
        width,
        weight,
        eps,
        out,
    } = op;
    if width == 0 {
        return;
    }
    let out = Parts::of(out);
    let each = (SMALL / 2).div_ceil(width);
    let items = if rows * width < SMALL {
        1
    } else {
        rows.div_ceil(each)
    };
    let step = if items == 1 { rows } else { each };
    threads.run(items, &|item| {
        for r in item * step..rows.min((item + 1) * step) {
            let at = r * width;
            // SAFETY: rows do not overlap, and all have the width of `weight`.
            unsafe {
                row(isa, &x[at..at + width], weight, eps, out.slice(at, width));
            }
        }
    });
}
