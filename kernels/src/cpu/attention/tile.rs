//! The queries of one item of work, a tile at a time.
use std::cell::RefCell;

use super::block::{self, Head, Partial, QUERIES, SPLIT, Scratch};
use super::stored::{Floats, Pairs, Stored};
use super::{Item, Run};
use crate::cpu::lanes::{Lanes, Tiles, WIDTH, on_path};
use crate::cpu::threads::Parts;
use crate::kv::{KvCache, KvDtype, PageMap};

thread_local! {
    /// Each thread's memory: an item allocates nothing once a thread has seen the model.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What all items of an attention share.
pub(super) struct Job<'a> {
    pub(super) q: &'a [f32],
    pub(super) heads: usize,
    pub(super) scale: f32,
    pub(super) positions: &'a [u32],
    pub(super) pages: PageMap<'a>,
    pub(super) kv: &'a KvCache,
    pub(super) layer: usize,
    pub(super) out: Parts<f32>,
    /// Splits of the longest run that is shared, 0 if none is.
    pub(super) splits: usize,
    /// Results of single splits, `[row][query head][split]`: maximum (in a vector of its own), sum in sixteen
    /// lanes, values in whole vectors.
    pub(super) partials: Parts<f32>,
}

impl Job<'_> {
    fn dim(&self) -> usize {
        self.kv.shape().head_dim
    }

    fn group(&self) -> usize {
        self.heads / self.kv.shape().kv_heads
    }

    /// Floats of one result in [`Job::partials`].
    pub(super) fn partial_floats(&self) -> usize {
        2 * WIDTH + self.dim().next_multiple_of(WIDTH)
    }

    /// Query `index` of a run and a key/value head: its place in `rows × heads`, and the keys it sees.
    fn query(&self, run: Run, head: usize, index: usize) -> (usize, usize) {
        let row = run.rows.0 + index / self.group();
        let query_head = head * self.group() + index % self.group();
        let keys = self.positions[row] as usize + 1;
        (row * self.heads + query_head, keys)
    }

    /// The result of one split of the query at `place`.
    fn partial(&self, place: usize, split: usize) -> Parts<f32> {
        let floats = self.partial_floats();
        self.partials
            .part((place * self.splits + split) * floats, floats)
    }
}

/// `T` queries from `first` on, over the item's keys.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn tile<L: Lanes, F: Stored, const T: usize, const C: usize>(
    job: &Job<'_>,
    item: &Item,
    first: usize,
    scratch: &mut Scratch,
) {
    let dim = job.dim();
    let whole = dim.next_multiple_of(WIDTH);
    let (mut places, mut seen) = ([0; T], [0; T]);
    let mut queries = [std::ptr::null(); T];
    for t in 0..T {
        (places[t], seen[t]) = job.query(item.run, item.head, first + t);
        let to = &mut scratch.queries[t * (dim + 2)..(t + 1) * (dim + 2)];
        let from = &job.q[places[t] * dim..(places[t] + 1) * dim];
        // SAFETY: slices check themselves; the instructions are the caller's promise.
        unsafe { F::prepare::<L>(from, to) }
        queries[t] = to.as_ptr();
    }
    let head = Head {
        kv: job.kv,
        layer: job.layer,
        head: item.head,
        pages: job.pages.tables[item.run.sequence],
        scale: job.scale,
    };
    let longest = seen.iter().copied().max().unwrap_or(0);
    // SAFETY: the caller's promise; every query has a result of its own.
    unsafe {
        if let Some(split) = item.split {
            let range = (split * SPLIT, (split + 1) * SPLIT);
            let results = block::split::<L, F, T, C>(&head, &queries, &seen, range, scratch);
            for t in 0..T {
                if seen[t] > range.0 {
                    let partial = job.partial(places[t], split).whole();
                    partial[0] = results[t].0;
                    results[t].1.store(partial[WIDTH..].as_mut_ptr());
                    partial[2 * WIDTH..]
                        .copy_from_slice(&scratch.split[t * whole..(t + 1) * whole]);
                }
            }
            return;
        }
        let range = (0, SPLIT);
        let mut totals = block::split::<L, F, T, C>(&head, &queries, &seen, range, scratch);
        std::mem::swap(&mut scratch.split, &mut scratch.total);
        for from in (SPLIT..longest).step_by(SPLIT) {
            let range = (from, from + SPLIT);
            let results = block::split::<L, F, T, C>(&head, &queries, &seen, range, scratch);
            for t in 0..T {
                if seen[t] > from {
                    let values = t * whole..(t + 1) * whole;
                    let mut total = Partial {
                        max: totals[t].0,
                        sum: totals[t].1,
                        values: &mut scratch.total[values.clone()],
                    };
                    let (max, sum) = results[t];
                    block::merge(&mut total, max, sum, &scratch.split[values]);
                    totals[t] = (total.max, total.sum);
                }
            }
        }
        for t in 0..T {
            let values = &scratch.total[t * whole..(t + 1) * whole];
            block::finish(totals[t].1, values, job.out.slice(places[t] * dim, dim));
        }
    }
}

/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn tiles<L: Lanes, F: Stored>(job: &Job<'_>, item: &Item, scratch: &mut Scratch) {
    let wide = const { matches!(L::TILES, Tiles::Wide) };
    let queries = (item.run.rows.1 - item.run.rows.0) * job.group();
    scratch.reserve(job.dim());
    let mut first = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while wide && first + QUERIES <= queries {
            tile::<L, F, 8, 2>(job, item, first, scratch);
            first += QUERIES;
        }
        while wide && first + 4 <= queries {
            tile::<L, F, 4, 4>(job, item, first, scratch);
            first += 4;
        }
        while first + 2 <= queries {
            tile::<L, F, 2, 2>(job, item, first, scratch);
            first += 2;
        }
        if first < queries {
            tile::<L, F, 1, 4>(job, item, first, scratch);
        }
    }
}

/// # Safety
/// The processor has the instructions of `L`; every key that a query sees lies in the pages; 16 words can be
/// read from any value on; no other item has the same results.
#[inline(always)]
unsafe fn item_kernel<L: Lanes>(job: &Job<'_>, item: &Item) {
    // Taken and put back, not lent to a closure: that would be compiled without the instructions of `L`.
    let mut scratch = SCRATCH.take();
    // SAFETY: the caller's promise.
    unsafe {
        match job.kv.shape().dtype {
            KvDtype::F32 => tiles::<L, Floats>(job, item, &mut scratch),
            KvDtype::Bf16 => tiles::<L, Pairs>(job, item, &mut scratch),
        }
    }
    SCRATCH.set(scratch);
}

/// # Safety
/// As for [`item_kernel`]; all splits of the run are done.
#[inline(always)]
unsafe fn merge_kernel<L: Lanes>(job: &Job<'_>, run: Run, head: usize) {
    let dim = job.dim();
    for index in 0..(run.rows.1 - run.rows.0) * job.group() {
        let (place, keys) = job.query(run, head, index);
        // SAFETY: the caller's promise; a partial has these parts.
        unsafe {
            let (state, values) = job.partial(place, 0).whole().split_at_mut(2 * WIDTH);
            let mut total = Partial {
                max: state[0],
                sum: L::load(state[WIDTH..].as_ptr()),
                values,
            };
            for split in 1..keys.div_ceil(SPLIT) {
                let partial = job.partial(place, split).whole();
                let sum = L::load(partial[WIDTH..].as_ptr());
                block::merge(&mut total, partial[0], sum, &partial[2 * WIDTH..]);
            }
            block::finish(total.sum, total.values, job.out.slice(place * dim, dim));
        }
    }
}

on_path! {
    /// All queries of an item.
    pub(super) fn attend(job: &Job<'_>, item: &Item) = item_kernel
}
on_path! {
    /// The splits of all queries of a run and a head.
    pub(super) fn merge_splits(job: &Job<'_>, run: Run, head: usize) = merge_kernel
}
