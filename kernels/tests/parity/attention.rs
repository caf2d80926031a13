use foregate_kernels::{
    Attention, Cpu, KvCache, KvDtype, KvShape, KvWrite, Ops, Oracle, PageMap,
};
use proptest::prelude::*;

use super::{assert_close, assert_same_bits, cpus, judge, numbers};

#[derive(Debug, Clone, Copy)]
struct Shape {
    tokens: usize,
    page_tokens: usize,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    dtype: KvDtype,
}

/// Rows of queries, keys and values of one sequence.
struct Sequence {
    shape: Shape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Sequence {
    fn new(shape: Shape, seed: u64) -> Self {
        let kv = shape.tokens * shape.kv_heads * shape.head_dim;
        let q = numbers(seed, kv * shape.group);
        Self {
            shape,
            q,
            k: numbers(seed ^ 1, kv),
            v: numbers(seed ^ 2, kv),
        }
    }

    /// Writes and attends in chunks of the given lengths, over and over, into scattered pages of a cache
    /// that is full of NaN.
    fn run(&self, ops: &dyn Ops, chunks: &[usize]) -> Vec<f32> {
        let s = self.shape;
        let pages = s.tokens.div_ceil(s.page_tokens);
        let mut kv = dirty(ops, s, pages + 2);
        let table: Vec<u32> = (0..pages as u32).rev().map(|p| p + 1).collect();
        let mut out = vec![f32::NAN; self.q.len()];
        let (mut from, mut chunks) = (0, chunks.iter().cycle());
        while from < s.tokens {
            let to = s.tokens.min(from + chunks.next().unwrap());
            self.step(ops, &mut kv, &table, from..to, &mut out);
            from = to;
        }
        out
    }

    fn step(
        &self,
        ops: &dyn Ops,
        kv: &mut KvCache,
        table: &[u32],
        rows: std::ops::Range<usize>,
        out: &mut [f32],
    ) {
        let s = self.shape;
        let positions: Vec<u32> = rows.clone().map(|r| r as u32).collect();
        let sequence_of_row = vec![0; positions.len()];
        let pages = PageMap {
            sequence_of_row: &sequence_of_row,
            tables: &[table],
        };
        let (narrow, wide) = (s.kv_heads * s.head_dim, s.kv_heads * s.group * s.head_dim);
        let (k, v) = (
            &self.k[rows.start * narrow..rows.end * narrow],
            &self.v[rows.start * narrow..rows.end * narrow],
        );
        let layer = 1;
        ops.kv_write(KvWrite {
            k,
            v,
            positions: &positions,
            pages,
            kv,
            layer,
        })
        .unwrap();
        let range = rows.start * wide..rows.end * wide;
        let attention: Attention<'_> = Attention {
            q: &self.q[range.clone()],
            heads: s.kv_heads * s.group,
            scale: 1.0 / (s.head_dim as f32).sqrt(),
            positions: &positions,
            pages,
            kv,
            layer,
            out: &mut out[range],
        };
        ops.attention(attention).unwrap();
    }
}

/// A cache whose every place holds NaN: reading a place that was not written shows.
fn dirty(ops: &dyn Ops, s: Shape, pages: usize) -> KvCache {
    let (kv_heads, head_dim) = (s.kv_heads, s.head_dim);
    let page_tokens = s.page_tokens;
    let mut kv = KvCache::new(KvShape {
        layers: 2,
        pages,
        page_tokens,
        kv_heads,
        head_dim,
        dtype: s.dtype,
    })
    .unwrap();
    let table: Vec<u32> = (0..pages as u32).collect();
    let positions: Vec<u32> = (0..(pages * page_tokens) as u32).collect();
    let nan = vec![f32::NAN; positions.len() * kv_heads * head_dim];
    let sequence_of_row = vec![0; positions.len()];
    let pages = PageMap {
        sequence_of_row: &sequence_of_row,
        tables: &[&table],
    };
    for layer in 0..2 {
        let (k, v) = (&nan[..], &nan[..]);
        ops.kv_write(KvWrite {
            k,
            v,
            positions: &positions,
            pages,
            kv: &mut kv,
            layer,
        })
        .unwrap();
    }
    kv
}

fn dtypes() -> impl Strategy<Value = KvDtype> {
    prop_oneof![Just(KvDtype::F32), Just(KvDtype::Bf16)]
}

/// Error against sums in float64. With bfloat16 the definition rounds keys, values and queries as the ops do, but
/// not probabilities: each is off by at most 2^-8, and so is their mean of values below 1.
const fn bound(dtype: KvDtype) -> f32 {
    match dtype {
        KvDtype::F32 => 1e-5,
        KvDtype::Bf16 => 4e-3,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_shape_any_chunks(
        tokens in 1_usize..100,
        page_tokens in prop_oneof![Just(1_usize), Just(10), Just(16), Just(24), Just(32), Just(48)],
        kv_heads in 1_usize..4,
        group in 1_usize..6,
        head_dim in prop_oneof![Just(4_usize), Just(8), Just(16), Just(24), Just(64), Just(80)],
        chunks in prop::collection::vec(1_usize..40, 1..4),
        dtype in dtypes(),
        seed: u64,
    ) {
        let shape = Shape { tokens, page_tokens, kv_heads, group, head_dim, dtype };
        let sequence = Sequence::new(shape, seed);
        let chunked = judge(bound(dtype), "attention", |ops| sequence.run(ops, &chunks));
        let cpu = Cpu::new(2);
        assert_same_bits(&chunked, &sequence.run(&cpu, &[tokens]), "whole prompt");
        assert_same_bits(&chunked, &sequence.run(&cpu, &[1]), "one by one");
        let other = Shape { page_tokens: page_tokens + 7, ..shape };
        let other = Sequence { shape: other, ..sequence };
        assert_same_bits(&chunked, &other.run(&cpu, &chunks), "other pages");
    }
}

/// Several sequences in one step give what each gives alone, in any order of rows.
#[test]
fn sequences_do_not_see_each_other() {
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        each_alone(dtype);
    }
}

fn each_alone(dtype: KvDtype) {
    let shape = Shape {
        tokens: 70,
        page_tokens: 16,
        kv_heads: 2,
        group: 4,
        head_dim: 32,
        dtype,
    };
    let (a, b) = (Sequence::new(shape, 1), Sequence::new(shape, 5));
    let width = shape.kv_heads * shape.group * shape.head_dim;
    for cpu in cpus() {
        let mut kv = dirty(cpu, shape, 12);
        let tables: [&[u32]; 2] = [&[1, 3, 5, 7, 9], &[2, 4, 6, 8, 10]];
        let mut alone = vec![vec![f32::NAN; a.q.len()]; 2];
        for ((sequence, table), out) in [&a, &b].into_iter().zip(tables).zip(&mut alone) {
            sequence.step(cpu, &mut kv, table, 0..70, out);
        }
        // Rows: position 69 of b, 3 of a, 68 and 69 of a, 40 of b.
        let rows = [(1, 69), (0, 3), (0, 68), (0, 69), (1, 40)];
        let sequence_of_row = rows.map(|(s, _)| s as u32);
        let positions = rows.map(|(_, p)| p as u32);
        let q: Vec<f32> = rows
            .iter()
            .flat_map(|(s, p)| [&a, &b][*s].q[p * width..(p + 1) * width].to_vec())
            .collect();
        let mut out = vec![f32::NAN; q.len()];
        let op: Attention<'_> = Attention {
            q: &q,
            heads: shape.kv_heads * shape.group,
            scale: 1.0 / 32_f32.sqrt(),
            positions: &positions,
            pages: PageMap {
                sequence_of_row: &sequence_of_row,
                tables: &tables,
            },
            kv: &kv,
            layer: 1,
            out: &mut out,
        };
        cpu.attention(op).unwrap();
        for ((s, p), got) in rows.iter().zip(out.chunks_exact(width)) {
            assert_same_bits(&alone[*s][p * width..(p + 1) * width], got, "mixed batch");
        }
    }
}

/// Scores far apart: the running maximum moves late and by much.
#[test]
fn a_late_maximum() {
    let shape = Shape {
        tokens: 90,
        page_tokens: 16,
        kv_heads: 1,
        group: 1,
        head_dim: 16,
        dtype: KvDtype::F32,
    };
    let mut sequence = Sequence::new(shape, 3);
    for (position, key) in sequence.k.chunks_exact_mut(16).enumerate() {
        key.iter_mut().for_each(|k| *k *= position as f32);
    }
    let got = judge(1e-4, "late maximum", |ops| sequence.run(ops, &[90]));
    assert_close(&got, &sequence.run(&Cpu::new(1), &[7]), 0.0, "late maximum");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    /// Sequences of several splits: the bits do not depend on threads, chunks or neighbours.
    #[test]
    fn splits_do_not_show(
        tokens in 500_usize..1200,
        kv_heads in 1_usize..3,
        group in 1_usize..5,
        chunk in 1_usize..600,
        dtype in dtypes(),
        seed: u64,
    ) {
        let (page_tokens, head_dim) = (32, 24);
        let shape = Shape { tokens, page_tokens, kv_heads, group, head_dim, dtype };
        let sequence = Sequence::new(shape, seed);
        let whole = sequence.run(&Cpu::new(1), &[tokens]);
        // Chunks, then the last tokens one by one: single rows are what threads share.
        let chunks: Vec<usize> = std::iter::repeat_n(chunk, (tokens - 3) / chunk)
            .chain(std::iter::once((tokens - 3) % chunk))
            .filter(|c| *c > 0)
            .chain([1, 1, 1])
            .collect();
        for threads in [2, 3] {
            let cpu = Cpu::new(threads);
            assert_same_bits(&whole, &sequence.run(&cpu, &chunks), "threads");
        }
        for cpu in cpus() {
            assert_same_bits(&whole, &sequence.run(cpu, &chunks), "paths");
        }
        let oracle = sequence.run(&Oracle, &[tokens]);
        assert_close(&whole, &oracle, bound(dtype), "splits");
    }
}
