//! Softmax over experts and the choice of the best.
#![expect(
    clippy::cast_possible_truncation,
    reason = "expert ids are 32 bits wide"
)]

use std::cell::RefCell;

use super::detect::Isa;
use super::exp::exp;
use super::lanes::{Lanes, WIDTH, on_path};
use super::row::{greatest, load};
use super::threads::{Parts, Threads};
use crate::ops::Gate;

/// Rows of one item of work.
const ROWS: usize = 32;

/// Softmax of one row into `out`: `exp(x - max)` divided by the sum, which runs in 16 lanes that are then
/// added pairwise.
///
/// # Safety
/// The processor has the instructions of `L`; both slices have the same length.
#[inline(always)]
unsafe fn softmax_kernel<L: Lanes>(x: &[f32], out: &mut [f32]) {
    let n = x.len();
    let pad = f32::NEG_INFINITY;
    // SAFETY: `count` values from `i` on are in range; the rest is the caller's promise.
    unsafe {
        let max = L::splat(greatest::<L>(x));
        let mut sum = L::splat(0.0);
        let mut i = 0;
        while i < n {
            let count = WIDTH.min(n - i);
            let e = exp(load::<L>(x, i, pad).sub(max));
            e.store_first(out.as_mut_ptr().add(i), count);
            sum = sum.add(e);
            i += WIDTH;
        }
        let sum = L::splat(sum.sum());
        i = 0;
        while i < n {
            let count = WIDTH.min(n - i);
            let p = L::load_first(out.as_ptr().add(i), count, 0.0).div(sum);
            p.store_first(out.as_mut_ptr().add(i), count);
            i += WIDTH;
        }
    }
}

on_path! {
    /// Softmax of one row.
    fn softmax(x: &[f32], out: &mut [f32]) = softmax_kernel
}

/// The `experts.len()` most probable, of equals the lower id, ascending by id. A row of NaN still names
/// experts that exist, each once.
fn choose(probabilities: &[f32], experts: &mut [u32], weights: &mut [f32], normalise: bool) {
    for slot in 0..experts.len() {
        let (taken, rest) = experts.split_at_mut(slot);
        let mut best: Option<usize> = None;
        for (expert, p) in probabilities.iter().enumerate() {
            let better = best.is_none_or(|b| *p > probabilities[b]);
            if better && !taken.contains(&(expert as u32)) {
                best = Some(expert);
            }
        }
        rest[0] = best.unwrap_or(0) as u32;
    }
    experts.sort_unstable();
    for (weight, expert) in weights.iter_mut().zip(&*experts) {
        *weight = probabilities[*expert as usize];
    }
    if normalise {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
    }
}

thread_local! {
    /// Each thread's probabilities of one row.
    static PROBABILITIES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Runs a checked gate.
pub(super) fn gate(isa: Isa, threads: &Threads, op: Gate<'_>) {
    let Gate {
        logits,
        rows,
        experts,
        top_k,
        normalise,
        out_experts,
        out_weights,
    } = op;
    let (ids, weights) = (Parts::of(out_experts), Parts::of(out_weights));
    threads.run(rows.div_ceil(ROWS), &|item| {
        PROBABILITIES.with_borrow_mut(|probabilities| {
            probabilities.resize(experts, 0.0);
            for row in item * ROWS..rows.min((item + 1) * ROWS) {
                // SAFETY: both have one value per expert.
                unsafe {
                    softmax(
                        isa,
                        &logits[row * experts..(row + 1) * experts],
                        probabilities,
                    );
                }
                // SAFETY: each row has choices of its own.
                let (ids, weights) = unsafe {
                    (
                        ids.slice(row * top_k, top_k),
                        weights.slice(row * top_k, top_k),
                    )
                };
                choose(probabilities, ids, weights, normalise);
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_go_to_the_lower_id_and_nan_names_real_experts() {
        let (mut ids, mut weights) = ([9; 2], [0.0; 2]);
        choose(&[0.2, 0.3, 0.3, 0.2], &mut ids, &mut weights, true);
        assert_eq!((ids, weights), ([1, 2], [0.5, 0.5]));
        choose(&[0.25; 4], &mut ids, &mut weights, false);
        assert_eq!((ids, weights), ([0, 1], [0.25, 0.25]));
        choose(&[f32::NAN; 4], &mut ids, &mut weights, true);
        assert_eq!(ids, [0, 1]);
    }
}
