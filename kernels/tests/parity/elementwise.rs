use foregate_kernels::{
    Add, Cpu, LogSoftmax, Norm, Ops, RmsNorm, Rope, RopeTable, SigmoidScale, SiluMul,
};
use proptest::prelude::*;

use super::{assert_same_bits, judge, numbers};

/// The sum of `x` and `add`, followed by its norm.
fn norm(ops: &dyn Ops, x: &[f32], add: Option<&[f32]>, weight: &[f32]) -> Vec<f32> {
    let (rows, width) = (x.len() / weight.len(), weight.len());
    let (mut x, mut out) = (x.to_vec(), vec![f32::NAN; x.len()]);
    ops.rms_norm(RmsNorm {
        x: &mut x,
        add,
        rows,
        width,
        weight,
        eps: 1e-6,
        out: &mut out,
    })
    .unwrap();
    x.extend(out);
    x
}

/// Rows with the norm, the clip and the angles of a rotation.
struct Turn {
    positions: Vec<u32>,
    heads: usize,
    half: usize,
    weight: Option<Vec<f32>>,
    clip: Option<f32>,
}

impl Turn {
    fn run(
        &self,
        ops: &dyn Ops,
        x: &[f32],
        weight: Option<&[f32]>,
        clip: Option<f32>,
    ) -> Vec<f32> {
        let half = self.half;
        let inv_freq: Vec<f32> = (0..half)
            .map(|i| 10_000_f32.powf(-(i as f32) / half as f32))
            .collect();
        let mut x = x.to_vec();
        ops.rope(Rope {
            x: &mut x,
            rows: self.positions.len(),
            heads: self.heads,
            head_dim: 2 * half,
            norm: weight.map(|weight| Norm { weight, eps: 1e-6 }),
            clip,
            table: &RopeTable::new(&inv_freq, &self.positions),
        })
        .unwrap();
        x
    }

    fn at_once(&self, ops: &dyn Ops, x: &[f32]) -> Vec<f32> {
        self.run(ops, x, self.weight.as_deref(), self.clip)
    }

    fn step_by_step(&self, ops: &dyn Ops, x: &[f32]) -> Vec<f32> {
        let mut x = x.to_vec();
        if let Some(weight) = &self.weight {
            x = norm(ops, &x, None, weight).split_off(x.len());
        }
        if let Some(clip) = self.clip {
            x.iter_mut().for_each(|x| *x = x.clamp(-clip, clip));
        }
        self.run(ops, &x, None, None)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_norm(rows in 1_usize..20, width in 1_usize..200, branch: bool, seed: u64) {
        let (x, weight) = (numbers(seed, rows * width), numbers(seed ^ 1, width));
        let branch = branch.then(|| numbers(seed ^ 2, rows * width));
        let all = judge(1e-5, "norm", |ops| norm(ops, &x, branch.as_deref(), &weight));
        let last = (rows - 1) * width;
        let of_last = branch.as_ref().map(|branch| &branch[last..]);
        let alone = norm(&Cpu::new(1), &x[last..], of_last, &weight);
        assert_same_bits(&all[rows * width + last..], &alone[width..], "a row alone");
        assert_same_bits(&all[last..rows * width], &alone[..width], "its sum");
    }

    #[test]
    fn any_rope(
        positions in prop::collection::vec(0_u32..100_000, 1..6),
        heads in 1_usize..5,
        half in 1_usize..40,
        normed in 0_u8..3,
        clip in prop::option::of(0.0_f32..2.0),
        seed: u64,
    ) {
        let row = heads * 2 * half;
        let weight = match normed {
            0 => None,
            1 => Some(numbers(seed ^ 1, 2 * half)),
            _ => Some(numbers(seed ^ 1, row)),
        };
        let x = numbers(seed, positions.len() * row);
        let turn = Turn { positions, heads, half, weight, clip };
        let fused = judge(1e-5, "rope", |ops| turn.at_once(ops, &x));
        let apart = turn.step_by_step(&Cpu::new(1), &x);
        assert_same_bits(&fused, &apart, "norm, clip and rotation apart");
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
    let all = judge(1e-5, "norm", |ops| norm(ops, &x, None, &weight)).split_off(x.len());
    let row = norm(&Cpu::new(1), &x[77 * width..78 * width], None, &weight).split_off(width);
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
