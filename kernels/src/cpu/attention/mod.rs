//! Attention over the paged cache, and writing into it. Work is cut by runs of rows of one sequence and
//! by key/value head.

mod block;

use super::detect::Isa;
use super::threads::{Parts, Threads};
use crate::kv::KEYS;
use crate::ops::{Attention, KvWrite};
use block::{Head, QUERIES, Query, attend};

/// Rows of one sequence, one after the other.
struct Run {
    sequence: usize,
    rows: (usize, usize),
}

/// Cuts the rows where the sequence changes, and after `most` rows.
fn runs(sequence_of_row: &[u32], most: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (row, sequence) in sequence_of_row.iter().enumerate() {
        let sequence = *sequence as usize;
        match runs.last_mut() {
            Some(run) if run.sequence == sequence && row - run.rows.0 < most => {
                run.rows.1 = row + 1;
            }
            _ => runs.push(Run {
                sequence,
                rows: (row, row + 1),
            }),
        }
    }
    runs
}

/// Runs a checked attention.
pub(super) fn attention(isa: Isa, threads: &Threads, op: Attention<'_>) {
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
    let shape = kv.shape();
    let (dim, group) = (shape.head_dim, heads / shape.kv_heads);
    let out = Parts::of(out);
    let runs = runs(pages.sequence_of_row, (4 * QUERIES).div_ceil(group));
    // The last runs of a prompt see most keys: they go first.
    threads.run(runs.len() * shape.kv_heads, &|item| {
        let run = &runs[runs.len() - 1 - item / shape.kv_heads];
        let head = item % shape.kv_heads;
        let mut queries = Vec::with_capacity((run.rows.1 - run.rows.0) * group);
        let rows = run.rows.0..run.rows.1;
        for (row, position) in rows.clone().zip(&positions[rows]) {
            for query_head in head * group..(head + 1) * group {
                let at = (row * heads + query_head) * dim;
                // SAFETY: each query has a part of its own.
                let out = unsafe { out.slice(at, dim) };
                let keys = *position as usize + 1;
                queries.push(Query {
                    q: q[at..at + dim].as_ptr(),
                    keys,
                    out: out.as_mut_ptr(),
                });
            }
        }
        let pages = pages.tables[run.sequence];
        let head = Head {
            kv,
            layer,
            head,
            pages,
            scale,
            queries: &queries,
        };
        // SAFETY: the slices above have a head's width, the pages were checked, and the cache ends with
        // a vector of padding.
        unsafe { attend(isa, &head) }
    });
}

/// Runs a checked write.
pub(super) fn kv_write(op: KvWrite<'_>) {
    let KvWrite {
        k,
        v,
        positions,
        pages,
        kv,
        layer,
    } = op;
    let shape = kv.shape();
    let dim = shape.head_dim;
    for (row, position) in positions.iter().enumerate() {
        let table = pages.tables[pages.sequence_of_row[row] as usize];
        let page = table[*position as usize / shape.page_tokens] as usize;
        let slot = *position as usize % shape.page_tokens;
        for head in 0..shape.kv_heads {
            let from = (row * shape.kv_heads + head) * dim;
            let key = kv.key_start(layer, page, head) + slot / KEYS * KEYS * dim + slot % KEYS;
            let value = kv.value_start(layer, page, head) + slot * dim;
            let floats = kv.floats_mut();
            let lane = floats[key..].iter_mut().step_by(KEYS);
            for (to, from) in lane.zip(&k[from..from + dim]) {
                *to = *from;
            }
            floats[value..value + dim].copy_from_slice(&v[from..from + dim]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_with_their_sequence_or_their_length() {
        let rows: Vec<(usize, (usize, usize))> = runs(&[0, 0, 0, 1, 0, 0], 2)
            .iter()
            .map(|r| (r.sequence, r.rows))
            .collect();
        assert_eq!(rows, [(0, (0, 2)), (0, (2, 3)), (1, (3, 4)), (0, (4, 6))]);
        assert!(runs(&[], 2).is_empty());
    }
}
