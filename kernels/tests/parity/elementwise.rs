use foregate_kernels::{
    Add, Cpu, LogSoftmax, Ops, RmsNorm, Rope, RopeTable, SigmoidScale, SiluMul,
};
use proptest::prelude::*;

use super::{assert_same_bits, judge, numbers};

fn norm(ops: &dyn Ops, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let (rows, width) = (x.len() / weight.len(), weight.len());
    let mut out = vec![f32::NAN; x.len()];
    ops.rms_norm(RmsNorm {
        x,
        rows,
        width,
        weight,
        eps: 1e-6,
        out: &mut out,
    })
    .unwrap();
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_norm(rows in 1_usize..20, width in 1_usize..200, seed: u64) {
        let (x, weight) = (numbers(seed, rows * width), numbers(seed ^ 1, width));
        let all = judge(1e-5, "norm", |ops| norm(ops, &x, &weight));
        let last = norm(&Cpu::new(1), &x[(rows - 1) * width..], &weight);
        assert_same_bits(&all[(rows - 1) * width..], &last, "a row alone");
    }

    #[test]
    fn any_rope(
        positions in prop::collection::vec(0_u32..100_000, 1..6),
        heads in 1_usize..5,
        half in 1_usize..40,
        seed: u64,
    ) {
        let inv_freq: Vec<f32> =
            (0..half).map(|i| 10_000_f32.powf(-(i as f32) / half as f32)).collect();
        let table = RopeTable::new(&inv_freq, &positions);
        let (rows, head_dim) = (positions.len(), 2 * half);
        let x = numbers(seed, rows * heads * head_dim);
        judge(1e-5, "rope", |ops| {
            let mut x = x.clone();
            ops.rope(Rope { x: &mut x, rows, heads, head_dim, table: &table }).unwrap();
            x
        });
    }

    #[test]
    fn any_activation(rows in 1_usize..6, width in 1_usize..70, wide in 1_f32..60.0, seed: u64) {
        let x: Vec<f32> = numbers(seed, rows * width).iter().map(|x| x * wide).collect();
        let y = numbers(seed ^ 1, rows * width);
        judge(1e-6, "silu_mul", |ops| {
            let mut gate = x.clone();
            ops.silu_mul(SiluMul { gate: &mut gate, up: &y }).unwrap();
            gate
        });
        judge(0.0, "add", |ops| {
            let mut x = x.clone();
            ops.add(Add { x: &mut x, y: &y }).unwrap();
            x
        });
        judge(1e-6, "sigmoid_scale", |ops| {
            let mut x = y.clone();
            let logits = &numbers(seed ^ 2, rows);
            ops.sigmoid_scale(SigmoidScale { x: &mut x, logits, width }).unwrap();
            x
        });
    }

    #[test]
    fn any_log_softmax(rows in 1_usize..5, width in 1_usize..3000, seed: u64) {
        let logits: Vec<f32> = numbers(seed, rows * width).iter().map(|x| x * 8.0).collect();
        let all = judge(1e-6, "log_softmax", |ops| {
            let mut out = vec![f32::NAN; logits.len()];
            ops.log_softmax(LogSoftmax { logits: &logits, width, out: &mut out }).unwrap();
            out
        });
        for row in all.chunks_exact(width) {
            let total: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
            assert!((total - 1.0).abs() < 1e-5, "{total}");
        }
    }
}

/// Large enough for several threads.
#[test]
fn long_ones_do_not_show_their_threads() {
    let (rows, width) = (150, 1000);
    let (x, weight) = (numbers(1, rows * width), numbers(2, width));
    let all = judge(1e-5, "norm", |ops| norm(ops, &x, &weight));
    let row = norm(&Cpu::new(1), &x[77 * width..78 * width], &weight);
    assert_same_bits(&all[77 * width..78 * width], &row, "a row alone");
    judge(1e-6, "silu_mul", |ops| {
        let mut gate = x.clone();
        ops.silu_mul(SiluMul {
            gate: &mut gate,
            up: &all,
        })
        .unwrap();
        gate
    });
}

#[test]
fn infinities_in_logits_are_no_nan() {
    let logits = [f32::NEG_INFINITY, 1.0, 2.0];
    let got = judge(1e-6, "log_softmax", |ops| {
        let mut out = vec![f32::NAN; 3];
        ops.log_softmax(LogSoftmax {
            logits: &logits,
            width: 3,
            out: &mut out,
        })
        .unwrap();
        // The judge compares by differences.
        assert_eq!(out[0], f32::NEG_INFINITY);
        out[1..].to_vec()
    });
    assert!(got.iter().all(|l| l.is_finite()));
}
