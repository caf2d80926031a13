//! Every op: against its definition within a tolerance, and with equal bits on every instruction path of one arithmetic,
//! for every number of threads, and for a row alone or in any batch.
#![expect(clippy::unwrap_used, reason = "a test ends at its first error")]

#[path = "parity/attention.rs"]
mod attention;
#[path = "parity/elementwise.rs"]
mod elementwise;
#[path = "parity/experts.rs"]
mod experts;
#[path = "parity/formats.rs"]
mod formats;
#[path = "parity/matmul.rs"]
mod matmul;
#[path = "parity/refused.rs"]
mod refused;

use std::sync::OnceLock;

use foregate_kernels::{Arithmetic, Cpu, Dtype, Matrix, Path, quantize};

/// Every path of this processor with 1 to 4 threads, and tiles in software; the first of an arithmetic is its reference
/// for bits.
fn cpus() -> &'static [Cpu] {
    static CPUS: OnceLock<Vec<Cpu>> = OnceLock::new();
    CPUS.get_or_init(|| {
        Path::present()
            .into_iter()
            .enumerate()
            .flat_map(|(i, path)| [(path, 1), (path, 2 + i % 3)])
            .map(|(path, threads)| Cpu::with_path(path, threads).unwrap())
            .chain((3..=4).map(Cpu::new))
            .chain([1, 3].map(Cpu::with_tiles_in_software))
            .collect()
    })
}

/// Both, in the order of [`judge_both`].
const ARITHMETICS: [Arithmetic; 2] = [Arithmetic::Chain, Arithmetic::Tiles];

/// Those of one arithmetic, first one with one thread.
fn cpus_of(arithmetic: Arithmetic) -> impl Iterator<Item = &'static Cpu> {
    cpus()
        .iter()
        .filter(move |cpu| cpu.path().arithmetic() == arithmetic)
}

/// Numbers from a seed, roughly normal, of standard deviation 1.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 24) as f32
    };
    (0..count)
        .map(|_| (uniform() + uniform() + uniform() + uniform() - 2.0) * 1.7)
        .collect()
}

/// Every format, those with blocks in the sizes that files have and in others.
const FORMATS: [Dtype; 13] = [
    Dtype::F32,
    Dtype::Bf16,
    Dtype::F16,
    Dtype::Int8,
    int4(32),
    int4(64),
    int4(128),
    int4(6),
    fp8(128, 128),
    fp8(5, 22),
    fp8(1, usize::MAX),
    fp8(usize::MAX, usize::MAX),
    Dtype::Mxfp4,
];

const fn int4(group: usize) -> Dtype {
    Dtype::Int4 { group }
}

const fn fp8(block_n: usize, block_k: usize) -> Dtype {
    Dtype::Fp8 { block_n, block_k }
}

/// Whether inputs stay float32 beside such weights.
const fn wide(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16)
}

/// Values rounded to a format.
fn pack(dtype: Dtype, n: usize, k: usize, values: &[f32]) -> Matrix {
    let bytes = quantize(dtype, n, k, values).unwrap();
    Matrix::pack(dtype, n, k, &bytes).unwrap()
}

/// A weight of deviation `1 / sqrt(k)`.
fn weight(dtype: Dtype, seed: u64, n: usize, k: usize) -> Matrix {
    let scale = 1.0 / (k.max(1) as f32).sqrt();
    let values: Vec<f32> = numbers(seed, n * k).iter().map(|v| v * scale).collect();
    pack(dtype, n, k, &values)
}

#[track_caller]
fn assert_same_bits(want: &[f32], got: &[f32], what: &str) {
    assert_eq!(want.len(), got.len(), "{what}");
    for (i, (want, got)) in want.iter().zip(got).enumerate() {
        assert_eq!(
            want.to_bits(),
            got.to_bits(),
            "{what}: element {i}: {want} and {got}"
        );
    }
}

#[track_caller]
fn assert_close(want: &[f32], got: &[f32], tolerance: f32, what: &str) {
    assert_eq!(want.len(), got.len(), "{what}");
    for (i, (want, got)) in want.iter().zip(got).enumerate() {
        let limit = tolerance * (1.0 + want.abs());
        assert!(
            (want - got).abs() <= limit,
            "{what}: element {i}: {want} and {got}"
        );
    }
}

/// Runs `op` on the oracle and on every processor: close to the first, equal among the others of one arithmetic. Returns
/// the common result of [`Arithmetic::Chain`].
#[track_caller]
fn judge(
    tolerance: f32,
    what: &str,
    mut op: impl FnMut(&dyn foregate_kernels::Ops) -> Vec<f32>,
) -> Vec<f32> {
    judge_both(tolerance, what, &mut op)[0].clone()
}

/// As [`judge`], with the results of both arithmetics, that of [`Arithmetic::Chain`] first.
#[track_caller]
fn judge_both(
    tolerance: f32,
    what: &str,
    mut op: impl FnMut(&dyn foregate_kernels::Ops) -> Vec<f32>,
) -> [Vec<f32>; 2] {
    let definition = op(&foregate_kernels::Oracle);
    ARITHMETICS.map(|arithmetic| {
        let mut reference: Option<Vec<f32>> = None;
        for cpu in cpus_of(arithmetic) {
            let got = op(cpu);
            let named = format!("{what} on {} with {} threads", cpu.path(), cpu.threads());
            match &reference {
                None => {
                    assert_close(&definition, &got, tolerance, &named);
                    reference = Some(got);
                }
                Some(reference) => assert_same_bits(reference, &got, &named),
            }
        }
        reference.unwrap()
    })
}
