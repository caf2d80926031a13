use foregate_kernels::{Arithmetic, Cpu, Dtype, Embed, MatMul, Matrix, Ops, quantize};
use proptest::prelude::*;

use super::{
    ARITHMETICS, FORMATS, assert_same_bits, cpus, cpus_of, judge, judge_both, numbers, pack,
    weight, wide,
};

pub(super) fn product(ops: &dyn Ops, x: &[f32], w: &Matrix, bias: Option<&[f32]>) -> Vec<f32> {
    let rows = if w.k() == 0 { 0 } else { x.len() / w.k() };
    let mut out = vec![f32::NAN; rows * w.n()];
    ops.matmul(MatMul {
        x,
        rows,
        w,
        bias,
        out: &mut out,
    })
    .unwrap();
    out
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop::sample::select(&FORMATS[..])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_shape(
        dtype in dtypes(),
        rows in 1_usize..40,
        n in 1_usize..150,
        k in 1_usize..150,
        biased: bool,
        seed: u64,
    ) {
        let k = if dtype == Dtype::Mxfp4 { k.next_multiple_of(2) } else { k };
        let (x, w) = (numbers(seed, rows * k), weight(dtype, seed ^ 1, n, k));
        let bias = numbers(seed ^ 2, n);
        let bias = biased.then_some(&bias[..]);
        let batches = judge_both(1e-5, "matmul", |ops| product(ops, &x, &w, bias));
        for (arithmetic, batch) in ARITHMETICS.into_iter().zip(batches) {
            let cpu = cpus_of(arithmetic).next().unwrap();
            for (row, want) in x.chunks_exact(k).zip(batch.chunks_exact(n)) {
                assert_same_bits(want, &product(cpu, row, &w, bias), "a row alone");
            }
        }
    }

    #[test]
    fn packing_is_exact(dtype in dtypes(), n in 0_usize..70, k in 0_usize..70, seed: u64) {
        let k = if dtype == Dtype::Mxfp4 { k.next_multiple_of(2) } else { k };
        let bytes = quantize(dtype, n, k, &numbers(seed, n * k)).unwrap();
        let cpu = Cpu::new(3);
        let parallel = cpu.pack(dtype, n, k, &bytes).unwrap();
        prop_assert_eq!(parallel.unpack().unwrap(), &bytes[..]);
        prop_assert_eq!(Matrix::pack(dtype, n, k, &bytes).unwrap().unpack().unwrap(), bytes);
    }
}

/// The documented order, spelled out: one chain of fused multiply-adds, then the bias. For bfloat16 the inputs are
/// rounded first, and of a pair the odd one comes first.
#[test]
fn an_element_is_one_chain() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let (rows, n, k) = (7, 37, 131);
        let (x, w, bias) = (numbers(1, rows * k), weight(dtype, 2, n, k), numbers(3, n));
        let got = judge(1e-5, "matmul", |ops| product(ops, &x, &w, Some(&bias)));
        let order: Vec<usize> = match dtype {
            Dtype::Bf16 => (0..k + 1).map(|i| i ^ 1).filter(|i| *i < k).collect(),
            _ => (0..k).collect(),
        };
        let mut weights = vec![0.0; k];
        for output in 0..n {
            w.row(output, &mut weights).unwrap();
            for row in 0..rows {
                let x = &x[row * k..(row + 1) * k];
                let mut acc = 0.0_f32;
                for k in &order {
                    acc = input(dtype, x[*k]).mul_add(weights[*k], acc);
                }
                let want = acc + bias[output];
                assert_eq!(
                    want.to_bits(),
                    got[row * n + output].to_bits(),
                    "{row} {output}"
                );
            }
        }
    }
}

/// What tiles make of inputs and weights: steps of 32, of each the even and the odd ones apart.
pub(super) fn tile_sum(x: &[f32], weights: &[f32]) -> f32 {
    let mut sum = 0.0;
    for (x, w) in x.chunks(32).zip(weights.chunks(32)) {
        let mut halves = [0.0_f32; 2];
        for (i, (x, w)) in x.iter().zip(w).enumerate() {
            halves[i % 2] = input(Dtype::Bf16, *x).mul_add(*w, halves[i % 2]);
        }
        sum += halves[0] + halves[1];
    }
    sum
}

/// The documented order of the other arithmetic, spelled out.
#[test]
fn an_element_of_tiles_is_a_sum_of_steps() {
    for k in [1, 2, 31, 32, 33, 64, 131] {
        let (rows, n) = (35, 75);
        let (x, w) = (numbers(1, rows * k), weight(Dtype::Bf16, 2, n, k));
        let bias = numbers(3, n);
        let [_, got] = judge_both(1e-5, "matmul", |ops| product(ops, &x, &w, Some(&bias)));
        let mut weights = vec![0.0; k];
        for output in 0..n {
            w.row(output, &mut weights).unwrap();
            for row in 0..rows {
                let x = &x[row * k..(row + 1) * k];
                let want = (tile_sum(x, &weights) + bias[output]).to_bits();
                assert_eq!(want, got[row * n + output].to_bits(), "{k}: {row} {output}");
            }
        }
    }
}

/// What follows a row or a panel of weights in memory is not read into its sums: it may be no number.
#[test]
fn a_neighbour_that_is_no_number_does_not_show() {
    for (rows, n, k) in [(3, 40, 5), (20, 40, 37)] {
        let mut x = numbers(20, rows * k);
        let mut values = numbers(21, n * k);
        // The first row of inputs and the outputs of the first panel are numbers, the next ones are not.
        x[k..].fill(f32::NAN);
        values[16 * k..].fill(f32::INFINITY);
        let w = pack(Dtype::Bf16, n, k, &values);
        for cpu in cpus() {
            let got = product(cpu, &x, &w, None);
            assert!(
                got[..16].iter().all(|x| x.is_finite()),
                "{}: {got:?}",
                cpu.path()
            );
            assert!(
                got[n..].iter().all(|x| x.is_nan()),
                "{}: {got:?}",
                cpu.path()
            );
        }
    }
}

/// An input as weights of a format meet it.
fn input(dtype: Dtype, x: f32) -> f32 {
    if wide(dtype) {
        x
    } else {
        half::bf16::from_f32(x).to_f32()
    }
}

/// The stated bound: rounding the inputs to bfloat16 costs each product at most 2⁻⁸ of itself.
#[test]
fn bfloat16_is_near_float32() {
    let (rows, n, k) = (9, 40, 515);
    let (x, w) = (numbers(10, rows * k), weight(Dtype::Bf16, 11, n, k));
    let both = judge_both(1e-5, "matmul", |ops| product(ops, &x, &w, None));
    let mut weights = vec![0.0; k];
    for output in 0..n {
        w.row(output, &mut weights).unwrap();
        for row in 0..rows {
            let terms = x[row * k..].iter().zip(&weights);
            let terms: Vec<f64> = terms.map(|(x, w)| f64::from(*x) * f64::from(*w)).collect();
            let (sum, sizes) = (
                terms.iter().sum::<f64>(),
                terms.iter().map(|t| t.abs()).sum::<f64>(),
            );
            // 2⁻⁸ for the inputs, and what the float32 sums of 515 terms may cost at most.
            let bound = sizes * (2.0_f64.powi(-8) + 515.0 * 2.0_f64.powi(-24));
            for (arithmetic, got) in ARITHMETICS.into_iter().zip(&both) {
                let off = (f64::from(got[row * n + output]) - sum).abs();
                assert!(
                    off <= bound,
                    "{arithmetic:?} {row} {output}: {off} > {bound}"
                );
            }
        }
    }
}

/// What is not finite, overflows or nearly vanishes: on every path as IEEE 754 has it.
#[test]
fn extreme_values_pass_through() {
    for dtype in FORMATS {
        let k = if dtype == Dtype::Mxfp4 { 10 } else { 9 };
        for (value, at) in [
            (f32::NAN, 0),
            (f32::INFINITY, 4),
            (f32::NEG_INFINITY, 5),
            (f32::MAX, 8),
        ] {
            let w = pack(dtype, 20, k, &vec![1.0; 20 * k]);
            let mut x = vec![1.0; k];
            x[at] = value;
            for cpu in cpus() {
                for got in product(cpu, &x, &w, None) {
                    let right = if value.is_nan() {
                        got.is_nan()
                    } else {
                        // To the nearest bfloat16 the greatest float32 is infinite.
                        got == input(dtype, value)
                    };
                    assert!(right, "{dtype} {value} on {}: {got}", cpu.path());
                }
            }
        }
    }
    for dtype in [Dtype::F32, Dtype::Bf16] {
        // Weights and inputs down to the smallest: at most what lies below 2⁻¹²⁶ is lost.
        let tiny: Vec<f32> = (0..33).map(|i| 2.0_f32.powi(-i - 100)).collect();
        let w = pack(dtype, 1, 33, &tiny);
        for x in [
            1.0,
            2.0_f32.powi(-20),
            2.0_f32.powi(-126),
            2.0_f32.powi(-140),
        ] {
            let want: f64 = tiny.iter().map(|t| f64::from(*t) * f64::from(x)).sum();
            for cpu in cpus() {
                let got = f64::from(product(cpu, &[x; 33], &w, None)[0]);
                assert!(
                    (got - want).abs() <= 66.0 * 2.0_f64.powi(-126),
                    "{x:e}: {got:e}"
                );
            }
        }
    }
}

/// Large enough for several threads and for several blocks of rows; odd sizes everywhere.
#[test]
fn batch_size_and_threads_do_not_show() {
    let (rows, n, k) = (203, 323, 129);
    let (x, w) = (numbers(4, rows * k), weight(Dtype::Bf16, 5, n, k));
    for arithmetic in ARITHMETICS {
        let build: fn(usize) -> Cpu = match arithmetic {
            Arithmetic::Chain => Cpu::new,
            Arithmetic::Tiles => Cpu::with_tiles_in_software,
        };
        let all = product(cpus_of(arithmetic).next().unwrap(), &x, &w, None);
        for threads in 1..=4 {
            let cpu = build(threads);
            assert_same_bits(&all, &product(&cpu, &x, &w, None), "threads");
            for batch in [1, 2, 3, 4, 5, 6, 7, 11, 13, 16, 17, 32, 33, 49, 96, 97] {
                let part = product(&cpu, &x[k..(1 + batch) * k], &w, None);
                assert_same_bits(&all[n..(1 + batch) * n], &part, "batch");
            }
        }
    }
}

#[test]
fn nothing_in_nothing_out() {
    let w = weight(Dtype::F32, 1, 5, 3);
    let none = judge(0.0, "no rows", |ops| product(ops, &[], &w, None));
    assert!(none.is_empty());
    let empty = Matrix::pack(Dtype::F32, 4, 0, &[]).unwrap();
    let zeros = judge(0.0, "no inputs", |ops| {
        let mut out = vec![f32::NAN; 8];
        ops.matmul(MatMul {
            x: &[],
            rows: 2,
            w: &empty,
            bias: None,
            out: &mut out,
        })
        .unwrap();
        out
    });
    assert_eq!(zeros, [0.0; 8]);
}

#[test]
fn an_embedding_is_the_row() {
    let table = weight(Dtype::Bf16, 6, 50, 33);
    let ids = [49, 0, 17, 17];
    let got = judge(0.0, "embed", |ops| {
        let mut out = vec![f32::NAN; ids.len() * 33];
        ops.embed(Embed {
            table: &table,
            ids: &ids,
            out: &mut out,
        })
        .unwrap();
        out
    });
    let mut row = [0.0; 33];
    for (id, got) in ids.iter().zip(got.chunks_exact(33)) {
        table.row(*id as usize, &mut row).unwrap();
        assert_same_bits(&row, got, "embed");
    }
}
