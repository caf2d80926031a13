//! Attention over the paged cache, and writing into it.
//!
//! Keys are taken in splits of a fixed size, counted from position 0 of the sequence, and the results of the
//! splits are merged in ascending order (as in Flash-Decoding: Dao et al., 2023). So a long sequence can be shared
//! by threads, and who computed a split never shows. Work is cut by runs of rows of one sequence and by key/value
//! head, and by split where these are too few.

mod block;
mod stored;
mod tile;

use super::detect::Isa;
use super::threads::{Parts, Threads};
use crate::kv::{KEYS, KvDtype};
use crate::ops::{Attention, KvWrite};
use block::{QUERIES, SPLIT};
use stored::{Floats, Pairs, Stored};
use tile::{Job, attend, merge_splits};

/// Rows below which writing into the cache is not worth a second thread.
const FEW_ROWS: usize = 32;

/// Memory kept from call to call.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    runs: Vec<Run>,
    items: Vec<Item>,
    /// Results of single splits, see [`Job::partials`].
    partials: Vec<f32>,
}

/// Rows of one sequence, one after the other.
#[derive(Debug, Clone, Copy)]
struct Run {
    sequence: usize,
    rows: (usize, usize),
    /// Keys that its last row sees.
    keys: usize,
}

/// A piece of work: the queries of a run that read one key/value head, over all keys or one split of them.
#[derive(Debug, Clone, Copy)]
struct Item {
    run: Run,
    head: usize,
    split: Option<usize>,
}

/// Cuts the rows where the sequence changes, and after `most` rows.
fn cut(sequence_of_row: &[u32], positions: &[u32], most: usize, runs: &mut Vec<Run>) {
    runs.clear();
    for (row, (sequence, position)) in sequence_of_row.iter().zip(positions).enumerate() {
        let (sequence, keys) = (*sequence as usize, *position as usize + 1);
        match runs.last_mut() {
            Some(run) if run.sequence == sequence && row - run.rows.0 < most => {
                run.rows.1 = row + 1;
                run.keys = run.keys.max(keys);
            }
            _ => runs.push(Run {
                sequence,
                rows: (row, row + 1),
                keys,
            }),
        }
    }
}

/// Whether one item of a run and a head would keep a thread busy for more than half of its share.
fn too_few(runs: &[Run], heads: usize, threads: usize) -> bool {
    let cost = |run: &Run| run.keys * (run.rows.1 - run.rows.0);
    let greatest = runs.iter().map(cost).max().unwrap_or(0);
    let total: usize = runs.iter().map(cost).sum();
    greatest.saturating_mul(2 * threads) > total.saturating_mul(heads)
}

/// Fills `items`; the last runs of a prompt see most keys: they go first.
fn share(runs: &[Run], heads: usize, threads: usize, items: &mut Vec<Item>) {
    items.clear();
    let split = threads > 1 && too_few(runs, heads, threads);
    for run in runs.iter().rev() {
        let splits = run.keys.div_ceil(SPLIT);
        for head in 0..heads {
            let whole = Item {
                run: *run,
                head,
                split: None,
            };
            if split && splits > 1 {
                items.extend((0..splits).map(|split| Item {
                    split: Some(split),
                    ..whole
                }));
            } else {
                items.push(whole);
            }
        }
    }
}

/// Runs a checked attention.
pub(super) fn attention(isa: Isa, threads: &Threads, op: Attention<'_>, scratch: &mut Scratch) {
    let Attention {
        q,
        heads,
        scale,
        positions,
        pages,
        kv,
        layer,
        out,
    } = op;
    let kv_heads = kv.shape().kv_heads;
    let group = heads / kv_heads.max(1);
    let Scratch {
        runs,
        items,
        partials,
    } = scratch;
    let most = (4 * QUERIES).div_ceil(group.max(1));
    cut(pages.sequence_of_row, positions, most, runs);
    share(runs, kv_heads, threads.count(), items);
    let shared = items.iter().filter(|item| item.split.is_some());
    let splits = shared.map(|item| item.run.keys.div_ceil(SPLIT)).max();
    let mut job = Job {
        q,
        heads,
        scale,
        positions,
        pages,
        kv,
        layer,
        out: Parts::of(out),
        splits: splits.unwrap_or(0),
        partials: Parts::of(&mut []),
    };
    let needed = positions.len() * heads * job.splits * job.partial_floats();
    if partials.len() < needed {
        partials.resize(needed, 0.0);
    }
    job.partials = Parts::of(partials);
    // SAFETY: each item has results of its own, the pages were checked, and the cache ends with a vector of
    // padding.
    threads.run(items.len(), &|item| unsafe {
        attend(isa, &job, &items[item]);
    });
    if job.splits > 0 {
        let runs = &*runs;
        threads.run(runs.len() * kv_heads, &|item| {
            let (run, head) = (runs[item / kv_heads], item % kv_heads);
            if run.keys > SPLIT {
                // SAFETY: each run and head has results of its own, and all splits are done.
                unsafe { merge_splits(isa, &job, run, head) }
            }
        });
    }
}

/// Runs a checked write.
pub(super) fn kv_write(threads: &Threads, op: KvWrite<'_>) {
    match op.kv.shape().dtype {
        KvDtype::F32 => write::<Floats>(threads, op),
        KvDtype::Bf16 => write::<Pairs>(threads, op),
    }
}

fn write<F: Stored>(threads: &Threads, op: KvWrite<'_>) {
    let KvWrite {
        k,
        v,
        positions,
        pages,
        kv,
        layer,
    } = op;
    let shape = kv.shape();
    let (dim, heads) = (shape.head_dim, shape.kv_heads);
    let lines = dim.div_ceil(F::PER_WORD);
    let starts = kv.starts();
    let words = Parts::of(kv.words_mut());
    let head_of_all_rows = |head: usize| {
        for (row, position) in positions.iter().enumerate() {
            let table = pages.tables[pages.sequence_of_row[row] as usize];
            let page = table[*position as usize / shape.page_tokens] as usize;
            let slot = *position as usize % shape.page_tokens;
            let from = (row * heads + head) * dim;
            let key = starts.key(layer, page, head) + slot / KEYS * KEYS * lines;
            let value = starts.value(layer, page, head) + slot / F::PER_WORD * dim;
            // SAFETY: every head has words of its own, and one thread writes a head.
            let (group, line) =
                unsafe { (words.slice(key, lines * KEYS), words.slice(value, dim)) };
            F::write_key(&k[from..from + dim], slot % KEYS, group);
            F::write_value(&v[from..from + dim], slot, line);
        }
    };
    if positions.len() < FEW_ROWS {
        (0..heads).for_each(head_of_all_rows);
    } else {
        threads.run(heads, &head_of_all_rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_with_their_sequence_or_their_length() {
        let mut runs = Vec::new();
        cut(&[0, 0, 0, 1, 0, 0], &[7, 8, 9, 3, 10, 11], 2, &mut runs);
        let got: Vec<_> = runs.iter().map(|r| (r.sequence, r.rows, r.keys)).collect();
        let want = [
            (0, (0, 2), 9),
            (0, (2, 3), 10),
            (1, (3, 4), 4),
            (0, (4, 6), 12),
        ];
        assert_eq!(got, want);
        cut(&[], &[], 2, &mut runs);
        assert!(runs.is_empty());
    }

    #[test]
    fn long_sequences_are_shared_only_where_threads_would_wait() {
        let mut runs = Vec::new();
        let mut items = Vec::new();
        cut(&[0], &[3 * SPLIT as u32], 8, &mut runs);
        for (threads, heads, want) in [(1, 2, 2), (2, 4, 4), (4, 4, 16), (2, 1, 4)] {
            share(&runs, heads, threads, &mut items);
            assert_eq!(items.len(), want, "{threads} threads, {heads} heads");
        }
    }
}
