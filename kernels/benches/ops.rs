//! Time and bytes per second of the ops that decide a model's speed. `FILTER` of criterion picks some.
//!
//! Beside them `read` measures how fast this machine reads memory with the same threads: a product with one
//! row cannot be faster than its weights are read.
#![expect(clippy::unwrap_used, reason = "a bench ends at its first error")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use foregate_kernels::{
    Attention, Cpu, Dtype, ExpertFfn, ExpertGroup, KvCache, KvDtype, KvShape, MatMul, Matrix,
    Ops, PageMap, Path, quantize,
};

const K: usize = 1024;
const N: usize = 4096;

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn floats(count: usize) -> Vec<f32> {
    (0..count)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0)
        .collect()
}

fn weight(dtype: Dtype, n: usize, k: usize) -> Matrix {
    let bytes = quantize(dtype, n, k, &floats(n * k)).unwrap();
    Matrix::pack(dtype, n, k, &bytes).unwrap()
}

/// As many copies as it takes not to find the weights in a cache: they are used in turn.
fn copies(dtype: Dtype, n: usize, k: usize) -> Vec<Matrix> {
    let bytes = dtype.bytes(n, k).unwrap();
    let canonical = quantize(dtype, n, k, &floats(n * k)).unwrap();
    (0..(256_usize << 20).div_ceil(bytes))
        .map(|_| Matrix::pack(dtype, n, k, &canonical).unwrap())
        .collect()
}

fn read(c: &mut Criterion) {
    let words = vec![1_u64; 256 << 17];
    let mut group = c.benchmark_group("read");
    for threads in [1, threads()] {
        group.throughput(Throughput::Bytes(words.len() as u64 * 8));
        group.bench_function(BenchmarkId::from_parameter(threads), |b| {
            b.iter(|| {
                std::thread::scope(|scope| {
                    for part in words.chunks(words.len() / threads) {
                        scope.spawn(move || {
                            black_box(part.iter().fold(0, |a: u64, b| a ^ b));
                        });
                    }
                });
            });
        });
    }
}

fn matmul(c: &mut Criterion) {
    for dtype in [
        Dtype::Bf16,
        Dtype::F32,
        Dtype::F16,
        Dtype::Int8,
        Dtype::Int4 { group: 128 },
        Dtype::Int4 { group: 32 },
        Dtype::Fp8 {
            block_n: 128,
            block_k: 128,
        },
        Dtype::Mxfp4,
    ] {
        let weights = copies(dtype, N, K);
        for path in Path::present().into_iter().filter(|p| *p != Path::Portable) {
            let cpu = Cpu::with_path(path, threads()).unwrap();
            let mut group = c.benchmark_group(format!("matmul/{dtype}/{path}"));
            for rows in [1, 4, 8, 32, 512] {
                let (x, mut out) = (floats(rows * K), vec![0.0; rows * N]);
                let mut next = 0;
                group.throughput(if rows <= 4 {
                    Throughput::Bytes(weights[0].bytes() as u64)
                } else {
                    Throughput::Elements((2 * N * K * rows) as u64)
                });
                group.bench_function(BenchmarkId::from_parameter(rows), |b| {
                    b.iter(|| {
                        next = (next + 1) % weights.len();
                        let (x, w) = (&x[..], &weights[next]);
                        let op: MatMul<'_> = MatMul {
                            x,
                            rows,
                            w,
                            bias: None,
                            out: &mut out,
                        };
                        cpu.matmul(op).unwrap();
                    });
                });
            }
        }
    }
}

/// Experts of 1024 × 512, eight chosen of 64, one row each; then 512 rows.
fn expert_ffn(c: &mut Criterion) {
    let (hidden, inner, experts) = (1024, 512, 64);
    let make = |n, k| {
        (0..experts)
            .map(|_| weight(Dtype::Bf16, n, k))
            .collect::<Vec<_>>()
    };
    let (gate, up, down) = (
        make(inner, hidden),
        make(inner, hidden),
        make(hidden, inner),
    );
    let cpu = Cpu::new(threads());
    let mut bench = c.benchmark_group("expert_ffn");
    for rows in [1_usize, 8, 512] {
        let x = floats(rows * hidden);
        let mut out = vec![0.0; rows * 8 * hidden];
        let mut step = 0;
        if rows == 1 {
            bench.throughput(Throughput::Bytes((8 * 3 * hidden * inner * 2) as u64));
        } else {
            bench.throughput(Throughput::Elements((8 * rows * 6 * hidden * inner) as u64));
        }
        bench.bench_function(BenchmarkId::from_parameter(rows), |b| {
            b.iter(|| {
                step += 1;
                let mut chosen = vec![Vec::new(); experts];
                for row in 0..rows {
                    for i in 0..8 {
                        chosen[(step * 8 + row * 13 + i * 8 + i) % experts].push(row as u32);
                    }
                }
                let mut groups = Vec::new();
                let mut out_offset = 0;
                for (e, rows) in chosen.iter().enumerate().filter(|(_, r)| !r.is_empty()) {
                    let (gate, up, down) = (&gate[e], &up[e], &down[e]);
                    groups.push(ExpertGroup {
                        gate,
                        up,
                        down,
                        rows,
                        out_offset,
                    });
                    out_offset += rows.len();
                }
                let op: ExpertFfn<'_> = ExpertFfn {
                    x: &x,
                    hidden,
                    groups: &groups,
                    out: &mut out,
                };
                cpu.expert_ffn(op).unwrap();
            });
        });
    }
}

/// 16 query heads over 4 key/value heads of 64: one row with a long past, 32 sequences of 128 tokens that decode,
/// and a chunk of a prompt.
fn attention(c: &mut Criterion) {
    for (dtype, name) in [(KvDtype::F32, "float32"), (KvDtype::Bf16, "bfloat16")] {
        let shape = KvShape {
            layers: 1,
            pages: 256,
            page_tokens: 16,
            kv_heads: 4,
            head_dim: 64,
            dtype,
        };
        let kv = KvCache::new(shape).unwrap();
        let table: Vec<u32> = (0..256).collect();
        let heads = 16;
        let cpu = Cpu::new(threads());
        let mut group = c.benchmark_group(format!("attention/{name}"));
        for (sequences, rows, last) in [
            (1_usize, 1_usize, 1023_u32),
            (1, 1, 4095),
            (32, 32, 127),
            (1, 256, 1023),
        ] {
            let q = floats(rows * heads * 64);
            let mut out = vec![0.0; q.len()];
            let each = rows / sequences;
            let positions: Vec<u32> = (0..rows)
                .map(|row| last - (each - 1 - row % each) as u32)
                .collect();
            let sequence_of_row: Vec<u32> = (0..rows).map(|row| (row / each) as u32).collect();
            let tables: Vec<&[u32]> = (0..sequences).map(|s| &table[s * 8 % 256..]).collect();
            let keys: u64 = positions.iter().map(|p| u64::from(*p) + 1).sum();
            group.throughput(Throughput::Elements(keys * heads as u64 * 64 * 4));
            let name = format!("{sequences} sequences, {rows} rows to {last}");
            group.bench_function(name, |b| {
                b.iter(|| {
                    cpu.attention(Attention {
                        q: &q,
                        heads,
                        scale: 0.125,
                        positions: &positions,
                        pages: PageMap {
                            sequence_of_row: &sequence_of_row,
                            tables: &tables,
                        },
                        kv: &kv,
                        layer: 0,
                        out: &mut out,
                    })
                    .unwrap();
                });
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = read, matmul, expert_ffn, attention
}
criterion_main!(benches);
