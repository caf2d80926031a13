//! Causal attention of a few queries of one key/value head over one split of the keys: online softmax over
//! blocks, after Milakov and Gimelshein (Online normalizer calculation for softmax, 2018).
#![expect(
    clippy::needless_range_loop,
    reason = "indices of tiles with constant bounds unroll"
)]

use super::stored::Stored;
use crate::cpu::exp::exp;
use crate::cpu::lanes::{Lanes, WIDTH};
use crate::kv::{KEYS, KvCache};

/// Keys of a block.
pub(super) const BLOCK: usize = 2 * KEYS;
/// Keys of a split: what one partial result covers, counted from position 0 of the sequence.
pub(super) const SPLIT: usize = 16 * BLOCK;
/// Blocks between the one that is computed and the one that is asked for: a head's part of a page is so small that the
/// processor, left alone, would notice each only when it is there.
const AHEAD: usize = 2;
/// Words of a cache line.
const CACHE_LINE: usize = 16;
/// Queries of the largest tile.
pub(super) const QUERIES: usize = 8;

/// Where the keys and values of a head of one sequence lie.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    pub(super) kv: &'a KvCache,
    pub(super) layer: usize,
    pub(super) head: usize,
    pub(super) pages: &'a [u32],
    pub(super) scale: f32,
}

/// What a query has over some of its keys: the greatest score, and relative to it the sum of the weights in
/// sixteen lanes, and the weighted sum of the values.
pub(super) struct Partial<'a, L> {
    pub(super) max: f32,
    pub(super) sum: L,
    /// The head's width rounded up to whole vectors.
    pub(super) values: &'a mut [f32],
}

/// Memory of one thread, reused over tiles.
#[derive(Default)]
pub(super) struct Scratch {
    /// Weighted sums of a split and of all splits so far, `QUERIES ×` a head's whole vectors each.
    pub(super) split: Vec<f32>,
    pub(super) total: Vec<f32>,
    /// Prepared queries.
    pub(super) queries: Vec<u32>,
    /// Prepared probabilities of a block.
    weights: Vec<u32>,
    /// Keys and values of a block gathered from pages whose size is not a multiple of [`KEYS`].
    keys: Vec<u32>,
    values: Vec<u32>,
    /// The last line of values of a query whose keys end within it.
    last: Vec<u32>,
}

impl Scratch {
    /// Grows to a head's width.
    pub(super) fn reserve(&mut self, dim: usize) {
        let whole = dim.next_multiple_of(WIDTH);
        for sums in [&mut self.split, &mut self.total] {
            sums.resize(QUERIES * whole, 0.0);
        }
        self.queries.resize(QUERIES * (dim + 2), 0);
        self.weights.resize(QUERIES * BLOCK, 0);
        self.keys.resize(BLOCK * dim.next_multiple_of(2), 0);
        // A vector may be read from any value on.
        self.values.resize(BLOCK * dim + WIDTH, 0);
        self.last.resize(whole + WIDTH, 0);
    }
}

/// The keys and values of one block.
struct Keys {
    /// Two groups of 16 keys: lines of 16 words.
    groups: [*const u32; 2],
    /// Lines of values; how many keys share one is the format's.
    values: [*const u32; BLOCK],
}

/// Where block `first..first + count` lies. A key that is not in the sequence repeats the last group, a value
/// the last line.
fn keys<F: Stored>(head: &Head<'_>, first: usize, count: usize, scratch: &mut Scratch) -> Keys {
    let shape = head.kv.shape();
    let (dim, tokens, words) = (shape.head_dim, shape.page_tokens, head.kv.words());
    let lines = dim.div_ceil(F::PER_WORD);
    let start = |t: usize| {
        let position = first + t;
        (head.pages[position / tokens] as usize, position % tokens)
    };
    let mut values = [std::ptr::null(); BLOCK];
    if tokens.is_multiple_of(KEYS) {
        let mut groups = [std::ptr::null(); 2];
        for (g, group) in groups.iter_mut().enumerate() {
            // A group of keys lies in one page, its lines of values one after the other.
            let (page, slot) = start(if g * KEYS < count { g * KEYS } else { 0 });
            let keys = head.kv.key_start(head.layer, page, head.head) + slot * lines;
            *group = words[keys..].as_ptr();
            let first = head.kv.value_start(head.layer, page, head.head);
            let first = &words[first + slot / F::PER_WORD * dim..];
            let there = count.saturating_sub(g * KEYS).div_ceil(F::PER_WORD).max(1) - 1;
            let of_group = KEYS / F::PER_WORD;
            for (line, value) in values[g * of_group..][..of_group].iter_mut().enumerate() {
                *value = first[line.min(there) * dim..].as_ptr();
            }
        }
        return Keys { groups, values };
    }
    for t in 0..count {
        let (page, slot) = start(t);
        let key = head.kv.key_start(head.layer, page, head.head);
        let (from, to) = (
            key + slot / KEYS * KEYS * lines + slot % KEYS,
            t / KEYS * KEYS * lines + t % KEYS,
        );
        for line in 0..lines {
            scratch.keys[to + line * KEYS] = words[from + line * KEYS];
        }
        let value = head.kv.value_start(head.layer, page, head.head);
        F::copy_value(
            &words[value + slot / F::PER_WORD * dim..],
            slot,
            &mut scratch.values[t / F::PER_WORD * dim..],
            t,
            dim,
        );
    }
    for (line, value) in values.iter_mut().enumerate().take(BLOCK / F::PER_WORD) {
        let line = line.min((count - 1) / F::PER_WORD);
        *value = scratch.values[line * dim..].as_ptr();
    }
    Keys {
        groups: [scratch.keys.as_ptr(), scratch.keys[KEYS * lines..].as_ptr()],
        values,
    }
}

/// Asks for the keys and values of block `first..first + count`.
///
/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
unsafe fn prefetch<L: Lanes, F: Stored>(head: &Head<'_>, first: usize, count: usize) {
    let shape = head.kv.shape();
    let (dim, tokens, words) = (shape.head_dim, shape.page_tokens, head.kv.words());
    if !tokens.is_multiple_of(KEYS) {
        return;
    }
    let (key_words, value_words) = (
        KEYS * dim.div_ceil(F::PER_WORD),
        KEYS.div_ceil(F::PER_WORD) * dim,
    );
    for position in (first..first + count).step_by(KEYS) {
        let (page, group) = (
            head.pages[position / tokens] as usize,
            position % tokens / KEYS,
        );
        let keys = head.kv.key_start(head.layer, page, head.head) + group * key_words;
        let values = head.kv.value_start(head.layer, page, head.head) + group * value_words;
        for (start, length) in [(keys, key_words), (values, value_words)] {
            for word in (start..start + length).step_by(CACHE_LINE) {
                // SAFETY: a prefetch of any address has no effect that shows.
                unsafe { L::prefetch(words.as_ptr().wrapping_add(word).cast()) }
            }
        }
    }
}

/// Scores of `T` queries against a block: one chain over the dimensions per key, times the scale.
///
/// # Safety
/// The processor has the instructions of `L`; queries and groups of keys have `lines` lines.
#[inline(always)]
unsafe fn scores<L: Lanes, F: Stored, const T: usize>(
    queries: &[*const u32; T],
    keys: &Keys,
    lines: usize,
    scale: f32,
    out: &mut [[f32; BLOCK]; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[L::splat(0.0); 2]; T];
        for line in 0..lines {
            let first = F::load::<L>(keys.groups[0].add(line * KEYS));
            let second = F::load::<L>(keys.groups[1].add(line * KEYS));
            for t in 0..T {
                let q = F::splat::<L>(queries[t], line);
                acc[t][0] = F::add::<L>(acc[t][0], q, first);
                acc[t][1] = F::add::<L>(acc[t][1], q, second);
            }
        }
        let scale = L::splat(scale);
        for t in 0..T {
            acc[t][0].mul(scale).store(out[t].as_mut_ptr());
            acc[t][1].mul(scale).store(out[t].as_mut_ptr().add(WIDTH));
        }
    }
}

/// Running maximum and sum of a query.
#[derive(Clone, Copy)]
struct Running<L> {
    max: f32,
    sum: L,
}

/// Scores of a block to probabilities relative to the new maximum; returns the factor of what was summed
/// before.
///
/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
unsafe fn softmax<L: Lanes>(
    scores: &mut [f32; BLOCK],
    count: usize,
    run: &mut Running<L>,
) -> L {
    for score in &mut scores[count..] {
        *score = f32::NEG_INFINITY;
    }
    // SAFETY: the block has two vectors.
    unsafe {
        let (low, high) = (scores.as_mut_ptr(), scores.as_mut_ptr().add(WIDTH));
        let greatest = L::load(low).max(L::load(high)).greatest();
        let max = if greatest > run.max {
            greatest
        } else {
            run.max
        };
        let center = L::splat(max);
        let first = exp(L::load(low).sub(center));
        let second = exp(L::load(high).sub(center));
        first.store(low);
        second.store(high);
        let factor = exp(L::splat(run.max - max));
        run.sum = run.sum.fma(factor, first.add(second));
        run.max = max;
        factor
    }
}

/// `acc = acc * factor`, then one step of the chain per line of values, for `C` vectors of `T` queries.
///
/// # Safety
/// The processor has the instructions of `L`; all pointers have `C` vectors from `at` on, and a weight per line.
#[inline(always)]
unsafe fn weigh<L: Lanes, F: Stored, const T: usize, const C: usize>(
    acc: [*mut f32; T],
    factors: &[L; T],
    weights: [*const u32; T],
    values: &[*const u32],
    at: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[L::splat(0.0); C]; T];
        for t in 0..T {
            for c in 0..C {
                let sum = L::load(acc[t].add(at + c * WIDTH));
                sums[t][c] = sum.mul(factors[t]);
            }
        }
        for (line, value) in values.iter().enumerate() {
            let mut vectors = [F::load::<L>(value.add(at)); C];
            for c in 1..C {
                vectors[c] = F::load::<L>(value.add(at + c * WIDTH));
            }
            for t in 0..T {
                let p = F::splat::<L>(weights[t], line);
                for c in 0..C {
                    sums[t][c] = F::add::<L>(sums[t][c], p, vectors[c]);
                }
            }
        }
        for t in 0..T {
            for c in 0..C {
                sums[t][c].store(acc[t].add(at + c * WIDTH));
            }
        }
    }
}

/// [`weigh`] over all `vectors` of a head, `C` at a time.
///
/// # Safety
/// As for [`weigh`], for all vectors.
#[inline(always)]
unsafe fn weigh_all<L: Lanes, F: Stored, const T: usize, const C: usize>(
    acc: [*mut f32; T],
    factors: &[L; T],
    weights: [*const u32; T],
    values: &[*const u32],
    vectors: usize,
) {
    let mut c = 0;
    while c < vectors {
        // SAFETY: the caller's promise.
        unsafe {
            if c + C <= vectors {
                weigh::<L, F, T, C>(acc, factors, weights, values, c * WIDTH);
                c += C;
            } else {
                weigh::<L, F, T, 1>(acc, factors, weights, values, c * WIDTH);
                c += 1;
            }
        }
    }
}

/// What a query sees of a block beyond the whole lines that all queries of its tile see.
///
/// # Safety
/// As for [`weigh_all`]; the query has `count` keys in this block.
#[inline(always)]
unsafe fn weigh_rest<L: Lanes, F: Stored>(
    acc: *mut f32,
    weights: *const u32,
    keys: &Keys,
    (common, count): (usize, usize),
    dim: usize,
    last: &mut [u32],
) {
    let vectors = dim.div_ceil(WIDTH);
    let whole = count / F::PER_WORD;
    // SAFETY: the caller's promise; `last` has whole vectors.
    unsafe {
        let own = &keys.values[common..whole];
        let from = [F::step::<L>(weights, common)];
        weigh_all::<L, F, 1, 1>([acc], &[L::splat(1.0)], from, own, vectors);
        if whole * F::PER_WORD < count {
            // The line's other value belongs to a later token, or to nobody.
            let line = std::slice::from_raw_parts(keys.values[whole], dim);
            F::first_only(line, last);
            let from = [F::step::<L>(weights, whole)];
            weigh_all::<L, F, 1, 1>([acc], &[L::splat(1.0)], from, &[last.as_ptr()], vectors);
        }
    }
}

/// `T` queries over the keys of one split: their sums go to `scratch.split`.
///
/// # Safety
/// The processor has the instructions of `L`; the queries are prepared, every key they see lies in the pages,
/// and 16 words can be read from any value on.
#[inline(always)]
pub(super) unsafe fn split<L: Lanes, F: Stored, const T: usize, const C: usize>(
    head: &Head<'_>,
    queries: &[*const u32; T],
    seen: &[usize; T],
    (from, to): (usize, usize),
    scratch: &mut Scratch,
) -> [(f32, L); T] {
    let dim = head.kv.shape().head_dim;
    let vectors = dim.div_ceil(WIDTH);
    let longest = to.min(seen.iter().copied().max().unwrap_or(0));
    // SAFETY: the sums have room for `QUERIES` heads; the rest is the caller's promise.
    unsafe {
        scratch.split.fill(0.0);
        let mut acc = [std::ptr::null_mut(); T];
        let mut weights = [std::ptr::null(); T];
        for t in 0..T {
            acc[t] = scratch.split.as_mut_ptr().add(t * vectors * WIDTH);
        }
        let mut runs = [Running {
            max: f32::NEG_INFINITY,
            sum: L::splat(0.0),
        }; T];
        let mut first = from;
        while first < longest {
            let keys = keys::<F>(head, first, BLOCK.min(longest - first), scratch);
            let later = first + AHEAD * BLOCK;
            if later < longest {
                prefetch::<L, F>(head, later, BLOCK.min(longest - later));
            }
            let mut block = [[0.0; BLOCK]; T];
            scores::<L, F, T>(
                queries,
                &keys,
                dim.div_ceil(F::PER_WORD),
                head.scale,
                &mut block,
            );
            let mut factors = [L::splat(1.0); T];
            let mut counts = [0; T];
            let mut common = BLOCK;
            for t in 0..T {
                counts[t] = BLOCK.min(seen[t].saturating_sub(first));
                common = common.min(counts[t]);
                if counts[t] > 0 {
                    factors[t] = softmax(&mut block[t], counts[t], &mut runs[t]);
                }
                let to = &mut scratch.weights[t * BLOCK..(t + 1) * BLOCK];
                F::prepare::<L>(&block[t], to);
                weights[t] = to.as_ptr();
            }
            let common = common / F::PER_WORD;
            weigh_all::<L, F, T, C>(acc, &factors, weights, &keys.values[..common], vectors);
            for t in 0..T {
                if counts[t] > common * F::PER_WORD {
                    let rest = (common, counts[t]);
                    weigh_rest::<L, F>(acc[t], weights[t], &keys, rest, dim, &mut scratch.last);
                }
            }
            first += BLOCK;
        }
        let mut results = [(f32::NEG_INFINITY, L::splat(0.0)); T];
        for t in 0..T {
            results[t] = (runs[t].max, runs[t].sum);
        }
        results
    }
}

/// Adds the result over a later split: both are brought to the greater maximum.
///
/// # Safety
/// The processor has the instructions of `L`; both have as many values.
#[inline(always)]
pub(super) unsafe fn merge<L: Lanes>(
    total: &mut Partial<'_, L>,
    max: f32,
    sum: L,
    values: &[f32],
) {
    // SAFETY: whole vectors of both; the instructions are the caller's promise.
    unsafe {
        let center = if max > total.max { max } else { total.max };
        let old = exp(L::splat(total.max - center));
        let new = exp(L::splat(max - center));
        total.max = center;
        total.sum = total.sum.fma(old, sum.mul(new));
        for i in (0..total.values.len()).step_by(WIDTH) {
            let to = total.values.as_mut_ptr().add(i);
            let added = L::load(values.as_ptr().add(i)).mul(new);
            L::load(to).fma(old, added).store(to);
        }
    }
}

/// Divides by the sum of the weights.
///
/// # Safety
/// The processor has the instructions of `L`; `values` has the length of `out`, in whole vectors.
#[inline(always)]
pub(super) unsafe fn finish<L: Lanes>(sum: L, values: &[f32], out: &mut [f32]) {
    // SAFETY: `values` has whole vectors; the rest is the caller's promise.
    unsafe {
        let sum = L::splat(sum.sum());
        for i in (0..out.len()).step_by(WIDTH) {
            let value = L::load(values.as_ptr().add(i)).div(sum);
            value.store_first(out.as_mut_ptr().add(i), WIDTH.min(out.len() - i));
        }
    }
}
