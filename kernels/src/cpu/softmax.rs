//! Log-probabilities over a vocabulary.
#![expect(
    clippy::cast_possible_truncation,
    reason = "float64 sums are rounded to float32 once"
)]

use super::detect::Isa;
use super::exp::exp;
use super::lanes::{Lanes, WIDTH, on_path};
use super::row::{greatest, load};
use super::threads::{Parts, Threads};
use crate::ops::LogSoftmax;

/// Vectors whose exponentials are added in float32 before the sum goes on in float64.
const VECTORS: usize = 64;

/// # Safety
/// The processor has the instructions of `L`; both slices have the same length.
#[inline(always)]
unsafe fn row_kernel<L: Lanes>(x: &[f32], out: &mut [f32]) {
    let n = x.len();
    let pad = f32::NEG_INFINITY;
    // SAFETY: `count` values from `i` on are in range; the rest is the caller's promise.
    unsafe {
        let center = L::splat(greatest::<L>(x));
        let mut sum = 0.0_f64;
        let mut i = 0;
        while i < n {
            let mut lanes = L::splat(0.0);
            let end = n.min(i + VECTORS * WIDTH);
            while i < end {
                lanes = lanes.add(exp(load::<L>(x, i, pad).sub(center)));
                i += WIDTH;
            }
            sum += f64::from(lanes.sum());
        }
        let log_sum = L::splat(sum.ln() as f32);
        i = 0;
        while i < n {
            let count = WIDTH.min(n - i);
            let value = load::<L>(x, i, pad).sub(center).sub(log_sum);
            value.store_first(out.as_mut_ptr().add(i), count);
            i += WIDTH;
        }
    }
}

on_path! {
    /// Log-probabilities of one row.
    fn row(x: &[f32], out: &mut [f32]) = row_kernel
}

/// Runs a checked log-softmax.
pub(super) fn log_softmax(isa: Isa, threads: &Threads, op: LogSoftmax<'_>) {
    let LogSoftmax { logits, width, out } = op;
    let out = Parts::of(out);
    threads.run(logits.len() / width, &|r| {
        let at = r * width;
        // SAFETY: rows do not overlap.
        unsafe { row(isa, &logits[at..at + width], out.slice(at, width)) }
    });
}
