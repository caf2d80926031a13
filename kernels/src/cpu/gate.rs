//! Softmax over experts and the choice of the best.
#![expect(
    clippy::cast_possible_truncation,
    reason = "expert ids are 32 bits wide"
)]

use super::detect::Isa;
use super::exp::exp;
use super::lanes::{Lanes, WIDTH, on_path};
use super::row::{greatest, load};
use super::threads::Threads;
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
    let mut taken = vec![false; probabilities.len()];
    for slot in experts.iter_mut() {
        let mut best: Option<usize> = None;
        for (expert, p) in probabilities.iter().enumerate() {
            if !taken[expert] && best.is_none_or(|b| *p > probabilities[b]) {
                best = Some(expert);
            }
        }
        let best = best.unwrap_or(0);
        taken[best] = true;
        *slot = best as u32;
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

/// Runs a checked gate.
pub(super) fn gate(isa: Isa, threads: &Threads, op: Gate<'_>) {
    let Gate {
        logits,
        experts,
        top_k,
        normalise,
        out_experts,
        out_weights,
        ..
    } = op;
    let block = |logits: &[f32], ids: &mut [u32], weights: &mut [f32]| {
        let mut probabilities = vec![0.0; experts];
        let out = ids
            .chunks_exact_mut(top_k)
            .zip(weights.chunks_exact_mut(top_k));
        for (row, (ids, weights)) in logits.chunks_exact(experts).zip(out) {
            // SAFETY: both have one value per expert.
            unsafe { softmax(isa, row, &mut probabilities) }
            choose(&probabilities, ids, weights, normalise);
        }
    };
    // Each item takes its own three slices: a lock that nobody else ever wants.
    let items: Vec<_> = logits
        .chunks(ROWS * experts)
        .zip(
            out_experts
                .chunks_mut(ROWS * top_k)
                .zip(out_weights.chunks_mut(ROWS * top_k)),
        )
        .map(|(logits, (ids, weights))| std::sync::Mutex::new((logits, ids, weights)))
        .collect();
    threads.run(items.len(), &|item| {
        if let Ok(mut slices) = items[item].lock() {
            let (logits, ids, weights) = &mut *slices;
            block(logits, ids, weights);
        }
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
