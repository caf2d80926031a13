//! Causal attention of a few queries of one key/value head: online softmax over blocks of keys, after
//! Milakov and Gimelshein (Online normalizer calculation for softmax, 2018).
#![expect(
    clippy::needless_range_loop,
    reason = "indices of tiles with constant bounds unroll"
)]

use crate::cpu::exp::exp;
use crate::cpu::lanes::{Lanes, Tiles, WIDTH, on_path};
use crate::kv::{KEYS, KvCache};

/// Keys of a block.
pub(super) const BLOCK: usize = 2 * KEYS;
/// Queries of the largest tile.
pub(super) const QUERIES: usize = 8;

/// One query: its vector, how many keys it sees, and where its result goes.
#[derive(Clone, Copy)]
pub(super) struct Query {
    pub(super) q: *const f32,
    pub(super) keys: usize,
    pub(super) out: *mut f32,
}

/// Queries of one sequence that read the same key/value head.
pub(super) struct Head<'a> {
    pub(super) kv: &'a KvCache,
    pub(super) layer: usize,
    pub(super) head: usize,
    pub(super) pages: &'a [u32],
    pub(super) scale: f32,
    pub(super) queries: &'a [Query],
}

/// Memory of one thread's tile, reused over tiles.
struct Scratch {
    /// Weighted sums: `QUERIES ×` the head's width rounded up to whole vectors.
    acc: Vec<f32>,
    /// Keys of a block gathered from pages whose size is not a multiple of [`KEYS`].
    gathered: Vec<f32>,
    /// Scores, then probabilities.
    scores: [[f32; BLOCK]; QUERIES],
}

/// The keys and values of one block.
struct Keys {
    /// Two groups of 16 keys, each `[head_dim][16]`.
    groups: [*const f32; 2],
    /// One value vector per key.
    values: [*const f32; BLOCK],
}

impl Head<'_> {
    /// Where block `first..first + count` lies. A key that is not in the sequence repeats the last one.
    fn keys(&self, first: usize, count: usize, gathered: &mut [f32]) -> Keys {
        let shape = self.kv.shape();
        let (dim, tokens, floats) = (shape.head_dim, shape.page_tokens, self.kv.floats());
        let mut values = [std::ptr::null(); BLOCK];
        for (t, value) in values.iter_mut().enumerate() {
            let position = first + t.min(count - 1);
            let page = self.pages[position / tokens] as usize;
            let start = self.kv.value_start(self.layer, page, self.head);
            *value = floats[start + position % tokens * dim..].as_ptr();
        }
        let key = |t: usize| {
            let position = first + t.min(count - 1);
            let page = self.pages[position / tokens] as usize;
            let slot = position % tokens;
            let start = self.kv.key_start(self.layer, page, self.head);
            start + slot / KEYS * KEYS * dim + slot % KEYS
        };
        if tokens.is_multiple_of(KEYS) {
            let second = if count > KEYS { key(KEYS) } else { key(0) };
            let groups = [floats[key(0)..].as_ptr(), floats[second..].as_ptr()];
            return Keys { groups, values };
        }
        for t in 0..BLOCK {
            let (from, to) = (key(t), t / KEYS * KEYS * dim + t % KEYS);
            for d in 0..dim {
                gathered[to + d * KEYS] = floats[from + d * KEYS];
            }
        }
        Keys {
            groups: [gathered.as_ptr(), gathered[KEYS * dim..].as_ptr()],
            values,
        }
    }
}

/// Scores of `T` queries against a block: one chain over the dimensions per key, times the scale.
#[inline(always)]
unsafe fn scores<L: Lanes, const T: usize>(
    queries: &[Query; T],
    keys: &Keys,
    dim: usize,
    scale: f32,
    out: &mut [[f32; BLOCK]; QUERIES],
) {
    // SAFETY: queries and keys have `dim` values and `dim` vectors by the promise of `head_kernel`.
    unsafe {
        let mut acc = [[L::splat(0.0); 2]; T];
        for d in 0..dim {
            let first = L::load(keys.groups[0].add(d * KEYS));
            let second = L::load(keys.groups[1].add(d * KEYS));
            for t in 0..T {
                let q = L::splat(*queries[t].q.add(d));
                acc[t][0] = q.fma(first, acc[t][0]);
                acc[t][1] = q.fma(second, acc[t][1]);
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
#[inline(always)]
unsafe fn softmax<L: Lanes>(
    scores: &mut [f32; BLOCK],
    count: usize,
    run: &mut Running<L>,
) -> f32 {
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
        factor.array()[0]
    }
}

/// `acc = acc * factor`, then one fused multiply-add per key, for `C` vectors of `T` queries.
#[inline(always)]
unsafe fn weigh<L: Lanes, const T: usize, const C: usize>(
    acc: [*mut f32; T],
    factors: &[f32; T],
    probabilities: [*const f32; T],
    values: &[*const f32],
    at: usize,
) {
    // SAFETY: the pointers have `C` vectors from `at` on by the promise of `head_kernel`.
    unsafe {
        let mut sums = [[L::splat(0.0); C]; T];
        for t in 0..T {
            for c in 0..C {
                let sum = L::load(acc[t].add(at + c * WIDTH));
                sums[t][c] = sum.mul(L::splat(factors[t]));
            }
        }
        for (key, value) in values.iter().enumerate() {
            let mut vectors = [L::splat(0.0); C];
            for c in 0..C {
                vectors[c] = L::load(value.add(at + c * WIDTH));
            }
            for t in 0..T {
                let p = L::splat(*probabilities[t].add(key));
                for c in 0..C {
                    sums[t][c] = p.fma(vectors[c], sums[t][c]);
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
#[inline(always)]
unsafe fn weigh_all<L: Lanes, const T: usize, const C: usize>(
    acc: [*mut f32; T],
    factors: &[f32; T],
    probabilities: [*const f32; T],
    values: &[*const f32],
    vectors: usize,
) {
    let mut c = 0;
    while c < vectors {
        // SAFETY: the promise of `head_kernel`.
        unsafe {
            if c + C <= vectors {
                weigh::<L, T, C>(acc, factors, probabilities, values, c * WIDTH);
                c += C;
            } else {
                weigh::<L, T, 1>(acc, factors, probabilities, values, c * WIDTH);
                c += 1;
            }
        }
    }
}

/// `T` queries over all their keys.
#[inline(always)]
unsafe fn tile<L: Lanes, const T: usize, const C: usize>(
    head: &Head<'_>,
    queries: &[Query; T],
    scratch: &mut Scratch,
) {
    let dim = head.kv.shape().head_dim;
    let vectors = dim.div_ceil(WIDTH);
    let mut longest = 0;
    for query in queries {
        longest = longest.max(query.keys);
    }
    // SAFETY: `acc` has room for `QUERIES` heads; the rest is the promise of `head_kernel`.
    unsafe {
        scratch.acc.fill(0.0);
        let mut acc = [std::ptr::null_mut(); T];
        for t in 0..T {
            acc[t] = scratch.acc.as_mut_ptr().add(t * vectors * WIDTH);
        }
        let mut runs = [Running {
            max: f32::NEG_INFINITY,
            sum: L::splat(0.0),
        }; T];
        let mut first = 0;
        while first < longest {
            let keys = head.keys(first, BLOCK.min(longest - first), &mut scratch.gathered);
            scores::<L, T>(queries, &keys, dim, head.scale, &mut scratch.scores);
            let mut factors = [1.0; T];
            let mut counts = [0; T];
            let mut common = BLOCK;
            let mut probabilities = [std::ptr::null(); T];
            for t in 0..T {
                counts[t] = BLOCK.min(queries[t].keys.saturating_sub(first));
                common = common.min(counts[t]);
                factors[t] = softmax(&mut scratch.scores[t], counts[t], &mut runs[t]);
                probabilities[t] = scratch.scores[t].as_ptr();
            }
            let shared = &keys.values[..common];
            weigh_all::<L, T, C>(acc, &factors, probabilities, shared, vectors);
            for t in 0..T {
                if counts[t] > common {
                    let own = &keys.values[common..counts[t]];
                    let from = [probabilities[t].add(common)];
                    weigh_all::<L, 1, 1>([acc[t]], &[1.0], from, own, vectors);
                }
            }
            first += BLOCK;
        }
        for t in 0..T {
            let sum = L::splat(runs[t].sum.sum());
            for c in 0..vectors {
                let value = L::load(acc[t].add(c * WIDTH)).div(sum);
                let count = WIDTH.min(dim - c * WIDTH);
                value.store_first(queries[t].out.add(c * WIDTH), count);
            }
        }
    }
}

/// # Safety
/// The processor has the instructions of `L`; every query has a head's width of values to read and to
/// write; every key it sees lies in the pages; 16 floats can be read from any value vector on.
#[inline(always)]
unsafe fn head_kernel<L: Lanes>(head: &Head<'_>) {
    let dim = head.kv.shape().head_dim;
    let mut scratch = Scratch {
        acc: vec![0.0; QUERIES * dim.next_multiple_of(WIDTH)],
        gathered: vec![0.0; BLOCK * dim],
        scores: [[0.0; BLOCK]; QUERIES],
    };
    let wide = const { matches!(L::TILES, Tiles::Wide) };
    let mut rest = head.queries;
    // SAFETY: the caller's promise.
    unsafe {
        while let Some((eight, after)) = rest.split_first_chunk::<8>()
            && wide
        {
            tile::<L, 8, 2>(head, eight, &mut scratch);
            rest = after;
        }
        while let Some((four, after)) = rest.split_first_chunk::<4>()
            && wide
        {
            tile::<L, 4, 4>(head, four, &mut scratch);
            rest = after;
        }
        while let Some((two, after)) = rest.split_first_chunk::<2>() {
            tile::<L, 2, 2>(head, two, &mut scratch);
            rest = after;
        }
        if let [one] = rest {
            tile::<L, 1, 4>(head, &[*one], &mut scratch);
        }
    }
}

on_path! {
    /// All queries of one head, a tile at a time.
    pub(super) fn attend(head: &Head<'_>) = head_kernel
}
