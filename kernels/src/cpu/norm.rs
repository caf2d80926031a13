//! Root mean square norm.

use super::detect::Isa;
use super::lanes::{Lanes, WIDTH, on_path};
use super::threads::{Parts, Threads};
use crate::ops::{Norm, RmsNorm};

/// Elements below which a second thread is not worth it.
const SMALL: usize = 1 << 15;

/// `x *= weight / root mean square of x`, for the first `weight.len()` values of both, and the result in `out`, which may be `x`.
///
/// # Safety
/// The processor has the instructions of `L`; `x` and `out` have the length of `weight`.
#[inline(always)]
pub(super) unsafe fn scale_kernel<L: Lanes>(x: *const f32, norm: Norm<'_>, out: *mut f32) {
    let width = norm.weight.len();
    // SAFETY: reads and writes stay within `width`; the rest is the caller's promise.
    unsafe {
        let mut squares = L::splat(0.0);
        let mut i = 0;
        while i < width {
            let x = L::load_first(x.add(i), WIDTH.min(width - i), 0.0);
            squares = x.fma(x, squares);
            i += WIDTH;
        }
        let inverse = L::splat(1.0 / (squares.sum() / width as f32 + norm.eps).sqrt());
        i = 0;
        while i < width {
            let count = WIDTH.min(width - i);
            let weight = L::load_first(norm.weight.as_ptr().add(i), count, 0.0);
            let value = weight.mul(L::load_first(x.add(i), count, 0.0).mul(inverse));
            value.store_first(out.add(i), count);
            i += WIDTH;
        }
    }
}

/// # Safety
/// The processor has the instructions of `L`; all slices have the length of the norm's weight, `add` that or none.
#[inline(always)]
unsafe fn row_kernel<L: Lanes>(x: &mut [f32], add: &[f32], norm: Norm<'_>, out: &mut [f32]) {
    // SAFETY: lengths are the caller's promise, as are the instructions.
    unsafe {
        let mut i = 0;
        while i < add.len() {
            let count = WIDTH.min(add.len() - i);
            let sum = L::load_first(x.as_ptr().add(i), count, 0.0).add(L::load_first(
                add.as_ptr().add(i),
                count,
                0.0,
            ));
            sum.store_first(x.as_mut_ptr().add(i), count);
            i += WIDTH;
        }
        scale_kernel::<L>(x.as_ptr(), norm, out.as_mut_ptr());
    }
}

on_path! {
    /// Norm of one row.
    fn row(x: &mut [f32], add: &[f32], norm: Norm<'_>, out: &mut [f32]) = row_kernel
}

/// Runs a checked norm.
pub(super) fn rms_norm(isa: Isa, threads: &Threads, op: RmsNorm<'_>) {
    let RmsNorm {
        x,
        add,
        rows,
        width,
        weight,
        eps,
        out,
    } = op;
    if width == 0 {
        return;
    }
    let norm: Norm<'_> = Norm { weight, eps };
    let (x, out) = (Parts::of(x), Parts::of(out));
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
            let add = add.map_or(&[][..], |add| &add[at..at + width]);
            // SAFETY: rows do not overlap, and all have the width of `weight`.
            unsafe {
                row(isa, x.slice(at, width), add, norm, out.slice(at, width));
            }
        }
    });
}
