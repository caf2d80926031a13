use foregate_kernels::{Cpu, Dtype, Embed, MatMul, Matrix, Ops};
use proptest::prelude::*;

use super::{assert_same_bits, judge, numbers, weight, weight_bytes};

fn product(ops: &dyn Ops, x: &[f32], w: &Matrix, bias: Option<&[f32]>) -> Vec<f32> {
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
    prop_oneof![Just(Dtype::F32), Just(Dtype::Bf16)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_shape(
        dtype in dtypes(),
        rows in 1_usize..24,
        n in 1_usize..150,
        k in 1_usize..70,
        biased: bool,
        seed: u64,
    ) {
        let (x, w) = (numbers(seed, rows * k), weight(dtype, seed ^ 1, n, k));
        let bias = numbers(seed ^ 2, n);
        let bias = biased.then_some(&bias[..]);
        let batch = judge(1e-5, "matmul", |ops| product(ops, &x, &w, bias));
        let cpu = Cpu::new(1);
        for (row, want) in x.chunks_exact(k).zip(batch.chunks_exact(n)) {
            assert_same_bits(want, &product(&cpu, row, &w, bias), "a row alone");
        }
    }

    #[test]
    fn packing_is_exact(dtype in dtypes(), n in 0_usize..70, k in 0_usize..70, seed: u64) {
        let bytes = weight_bytes(dtype, &numbers(seed, n * k));
        let cpu = Cpu::new(3);
        let parallel = cpu.pack(dtype, n, k, &bytes).unwrap();
        prop_assert_eq!(parallel.unpack(), &bytes[..]);
        prop_assert_eq!(Matrix::pack(dtype, n, k, &bytes).unwrap().unpack(), bytes);
    }
}

/// The documented order, spelled out: one chain of fused multiply-adds, then the bias.
#[test]
fn an_element_is_one_chain() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let (rows, n, k) = (7, 37, 131);
        let (x, w, bias) = (numbers(1, rows * k), weight(dtype, 2, n, k), numbers(3, n));
        let got = judge(1e-5, "matmul", |ops| product(ops, &x, &w, Some(&bias)));
        let mut weights = vec![0.0; k];
        for output in 0..n {
            w.row(output, &mut weights).unwrap();
            for row in 0..rows {
                let mut acc = 0.0_f32;
                for (x, w) in x[row * k..(row + 1) * k].iter().zip(&weights) {
                    acc = x.mul_add(*w, acc);
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

/// Large enough for several threads and for several blocks of rows; odd sizes everywhere.
#[test]
fn batch_size_and_threads_do_not_show() {
    let (rows, n, k) = (203, 323, 129);
    let (x, w) = (numbers(4, rows * k), weight(Dtype::Bf16, 5, n, k));
    let fast = Cpu::new(1);
    let all = product(&fast, &x, &w, None);
    for threads in 1..=4 {
        let cpu = Cpu::new(threads);
        assert_same_bits(&all, &product(&cpu, &x, &w, None), "threads");
        for batch in [1, 2, 3, 4, 5, 6, 7, 11, 13, 96, 97] {
            let part = product(&cpu, &x[k..(1 + batch) * k], &w, None);
            assert_same_bits(&all[n..(1 + batch) * n], &part, "batch");
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
