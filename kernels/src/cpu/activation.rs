//! Elementwise operations.

use super::detect::Isa;
use super::exp::{sigmoid, silu};
use super::lanes::{Lanes, WIDTH, on_path};
use super::threads::{Parts, Threads};
use crate::ops::{Add, SigmoidScale, SiluMul};

/// Elements of one item of work.
const CHUNK: usize = 1 << 14;

/// # Safety
/// The processor has the instructions of `L`; both slices have the same length.
#[inline(always)]
unsafe fn add_kernel<L: Lanes>(x: &mut [f32], y: &[f32]) {
    let mut i = 0;
    while i < x.len() {
        let count = WIDTH.min(x.len() - i);
        // SAFETY: `count` values from `i` on are in range; the rest is the caller's promise.
        unsafe {
            let to = x.as_mut_ptr().add(i);
            let sum =
                L::load_first(to, count, 0.0).add(L::load_first(y.as_ptr().add(i), count, 0.0));
            sum.store_first(to, count);
        }
        i += WIDTH;
    }
}

/// # Safety
/// The processor has the instructions of `L`; both slices have the same length.
#[inline(always)]
unsafe fn silu_mul_kernel<L: Lanes>(gate: &mut [f32], up: &[f32]) {
    let mut i = 0;
    while i < gate.len() {
        let count = WIDTH.min(gate.len() - i);
        // SAFETY: `count` values from `i` on are in range; the rest is the caller's promise.
        unsafe {
            let to = gate.as_mut_ptr().add(i);
            let up = L::load_first(up.as_ptr().add(i), count, 0.0);
            silu(L::load_first(to, count, 0.0))
                .mul(up)
                .store_first(to, count);
        }
        i += WIDTH;
    }
}

/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
unsafe fn sigmoid_scale_kernel<L: Lanes>(x: &mut [f32], logit: f32) {
    let mut i = 0;
    while i < x.len() {
        let count = WIDTH.min(x.len() - i);
        // SAFETY: `count` values from `i` on are in range; the rest is the caller's promise.
        unsafe {
            let to = x.as_mut_ptr().add(i);
            let scale = sigmoid(L::splat(logit));
            L::load_first(to, count, 0.0)
                .mul(scale)
                .store_first(to, count);
        }
        i += WIDTH;
    }
}

on_path! {
    /// `x += y`.
    fn add_slice(x: &mut [f32], y: &[f32]) = add_kernel
}
on_path! {
    /// `gate = silu(gate) * up`.
    fn silu_mul_slice(gate: &mut [f32], up: &[f32]) = silu_mul_kernel
}
on_path! {
    /// `x *= sigmoid(logit)`.
    fn sigmoid_scale_row(x: &mut [f32], logit: f32) = sigmoid_scale_kernel
}

/// Runs a checked addition.
pub(super) fn add(isa: Isa, threads: &Threads, op: Add<'_>) {
    let Add { x, y } = op;
    let (len, x) = (x.len(), Parts::of(x));
    threads.run(len.div_ceil(CHUNK), &|item| {
        let from = item * CHUNK;
        // SAFETY: chunks do not overlap; both slices have the same length.
        unsafe { add_slice(isa, x.slice(from, CHUNK), &y[from..len.min(from + CHUNK)]) }
    });
}

/// Runs a checked gated activation.
pub(super) fn silu_mul(isa: Isa, threads: &Threads, op: SiluMul<'_>) {
    let SiluMul { gate, up } = op;
    let (len, gate) = (gate.len(), Parts::of(gate));
    threads.run(len.div_ceil(CHUNK), &|item| {
        let from = item * CHUNK;
        // SAFETY: chunks do not overlap; both slices have the same length.
        unsafe {
            silu_mul_slice(
                isa,
                gate.slice(from, CHUNK),
                &up[from..len.min(from + CHUNK)],
            )
        }
    });
}

/// Runs a checked scaling.
pub(super) fn sigmoid_scale(isa: Isa, op: SigmoidScale<'_>) {
    let SigmoidScale { x, logits, width } = op;
    for (row, logit) in x.chunks_exact_mut(width.max(1)).zip(logits) {
        // SAFETY: one row.
        unsafe { sigmoid_scale_row(isa, row, *logit) }
    }
}
