use foregate_kernels::{
    Combine, Dtype, ExpertFfn, ExpertGroup, Gate, MatMul, Matrix, Ops, SiluMul,
};
use proptest::prelude::*;

use super::{
    ARITHMETICS, FORMATS, assert_same_bits, cpus, cpus_of, fp8, int4, judge, judge_both,
    numbers, weight, wide,
};

struct Expert {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

fn experts(dtype: Dtype, count: u64, hidden: usize, inner: usize) -> Vec<Expert> {
    let one = |i: u64| Expert {
        gate: weight(dtype, 3 * i, inner, hidden),
        up: weight(dtype, 3 * i + 1, inner, hidden),
        down: weight(dtype, 3 * i + 2, hidden, inner),
    };
    (0..count).map(one).collect()
}

fn run(
    ops: &dyn Ops,
    experts: &[Expert],
    x: &[f32],
    hidden: usize,
    rows: &[Vec<u32>],
) -> Vec<f32> {
    let mut groups = Vec::new();
    let mut out_offset = 0;
    for (expert, rows) in experts.iter().zip(rows) {
        let (gate, up, down) = (&expert.gate, &expert.up, &expert.down);
        groups.push(ExpertGroup {
            gate,
            up,
            down,
            rows,
            out_offset,
        });
        out_offset += rows.len();
    }
    let mut out = vec![f32::NAN; out_offset * hidden];
    ops.expert_ffn(ExpertFfn {
        x,
        hidden,
        groups: &groups,
        out: &mut out,
    })
    .unwrap();
    out
}

/// Inner activations are rounded to the format of the weights: where two float32 lie on either side of a tie, they
/// come apart by one bfloat16.
const fn tolerance(dtype: Dtype) -> f32 {
    if wide(dtype) { 1e-5 } else { 3e-2 }
}

/// The same from single ops, to the bit.
#[test]
fn an_expert_is_two_products_an_activation_and_a_product() {
    for dtype in FORMATS {
        let (hidden, inner, rows) = (46, 84, 7);
        let expert = experts(dtype, 1, hidden, inner);
        let x = numbers(12, rows * hidden);
        let all: Vec<u32> = (0..rows as u32).collect();
        for cpu in cpus() {
            let product = |x: &[f32], w: &Matrix| {
                let mut out = vec![f32::NAN; rows * w.n()];
                let op: MatMul<'_> = MatMul {
                    x,
                    rows,
                    w,
                    bias: None,
                    out: &mut out,
                };
                cpu.matmul(op).unwrap();
                out
            };
            let (mut gate, up) = (product(&x, &expert[0].gate), product(&x, &expert[0].up));
            let op: SiluMul<'_> = SiluMul {
                gate: &mut gate,
                up: &up,
            };
            cpu.silu_mul(op).unwrap();
            let want = product(&gate, &expert[0].down);
            let got = run(cpu, &expert, &x, hidden, std::slice::from_ref(&all));
            assert_same_bits(&want, &got, cpu.path().name());
        }
    }
}

/// A checkpoint may have some of its weights in another format.
#[test]
fn formats_may_differ_inside_an_expert() {
    let (hidden, inner) = (22, 38);
    let formats = [
        Dtype::F32,
        Dtype::Bf16,
        int4(32),
        Dtype::F16,
        Dtype::Int8,
        fp8(16, 16),
        Dtype::Mxfp4,
    ];
    let mut experts = Vec::new();
    for i in 0..formats.len() {
        let of = |matrix: usize| formats[(i + matrix * (i + 1)) % formats.len()];
        experts.push(Expert {
            gate: weight(of(0), 3 * i as u64, inner, hidden),
            up: weight(of(1), 3 * i as u64 + 1, inner, hidden),
            down: weight(of(2), 3 * i as u64 + 2, hidden, inner),
        });
    }
    let x = numbers(13, 9 * hidden);
    let rows: Vec<Vec<u32>> = (0..7).map(|i| (0..=i).collect()).collect();
    judge(tolerance(Dtype::Bf16), "mixed", |ops| {
        run(ops, &experts, &x, hidden, &rows)
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn any_groups(
        dtype in prop::sample::select(&FORMATS[..]),
        hidden in 1_usize..50,
        inner in 1_usize..90,
        rows in prop::collection::vec(prop::collection::vec(0_u32..9, 0..20), 1..5),
        seed: u64,
    ) {
        let whole = if dtype == Dtype::Mxfp4 { 2 } else { 1 };
        let (hidden, inner) = (hidden.next_multiple_of(whole), inner.next_multiple_of(whole));
        let experts = experts(dtype, rows.len() as u64, hidden, inner);
        let x = numbers(seed, 9 * hidden);
        let both =
            judge_both(tolerance(dtype), "experts", |ops| run(ops, &experts, &x, hidden, &rows));
        for (arithmetic, all) in ARITHMETICS.into_iter().zip(both) {
            let mut out = all.chunks_exact(hidden);
            let cpu = cpus_of(arithmetic).next().unwrap();
            for (expert, rows) in experts.iter().zip(&rows) {
                for row in rows {
                    let alone = run(cpu, std::slice::from_ref(expert), &x, hidden, &[vec![*row]]);
                    assert_same_bits(out.next().unwrap(), &alone, "a row alone");
                }
            }
        }
    }

    #[test]
    fn any_gate(
        rows in 1_usize..80,
        experts in 1_usize..130,
        k in 1_usize..9,
        normalise: bool,
        coarse: bool,
        seed: u64,
    ) {
        let top_k = k.min(experts);
        let mut logits = numbers(seed, rows * experts);
        if coarse {
            // Many ties.
            logits.iter_mut().for_each(|l| *l = l.round());
        }
        let mut ids: Vec<Vec<u32>> = Vec::new();
        judge(1e-5, "gate", |ops| {
            let (mut chosen, mut weights) = (vec![0; rows * top_k], vec![0.0; rows * top_k]);
            let op: Gate<'_> = Gate {
                logits: &logits, rows, experts, top_k, normalise,
                out_experts: &mut chosen, out_weights: &mut weights,
            };
            ops.gate(op).unwrap();
            for row in chosen.chunks_exact(top_k) {
                assert!(row.is_sorted_by(|a, b| a < b), "ascending, each once: {row:?}");
            }
            ids.push(chosen);
            weights
        });
        // Logits that differ may have equal probabilities in float32; among paths there is no difference.
        prop_assert!(ids[1..].windows(2).all(|w| w[0] == w[1]));
        if coarse {
            prop_assert_eq!(&ids[0], &ids[1]);
        }
    }
}

/// Large enough for several threads: one busy expert beside idle ones.
#[test]
fn threads_and_batches_do_not_show() {
    let (hidden, inner) = (160, 208);
    let experts = experts(Dtype::Bf16, 4, hidden, inner);
    let x = numbers(7, 128 * hidden);
    let rows = [(0..128).collect(), vec![5], vec![], vec![6, 5, 127]];
    for arithmetic in ARITHMETICS {
        let mut cpus = cpus_of(arithmetic);
        let want = run(cpus.next().unwrap(), &experts, &x, hidden, &rows);
        for cpu in cpus {
            let got = run(cpu, &experts, &x, hidden, &rows);
            assert_same_bits(&want, &got, cpu.path().name());
            let alone = run(cpu, &experts[..1], &x, hidden, &[vec![77]]);
            assert_same_bits(&want[77 * hidden..78 * hidden], &alone, "a row alone");
        }
    }
}

/// Results need not begin at row 0 nor follow each other, and there may be none at all.
#[test]
fn rows_between_groups_stay_as_they_are() {
    let (hidden, inner) = (33, 40);
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let experts = experts(dtype, 3, hidden, inner);
        let x = numbers(14, 4 * hidden);
        let group = |i: usize, rows, out_offset| ExpertGroup {
            gate: &experts[i].gate,
            up: &experts[i].up,
            down: &experts[i].down,
            rows,
            out_offset,
        };
        let groups = [
            group(0, &[3, 1][..], 2),
            group(1, &[], 5),
            group(2, &[0], 7),
        ];
        for cpu in cpus() {
            let mut out = vec![f32::INFINITY; 9 * hidden];
            let run_in = |x: &[f32], groups: &[ExpertGroup<'_>], out: &mut [f32]| {
                cpu.expert_ffn(ExpertFfn {
                    x,
                    hidden,
                    groups,
                    out,
                })
                .unwrap();
            };
            run_in(&x, &groups, &mut out);
            for row in [0, 1, 4, 5, 6, 8] {
                assert_eq!(out[row * hidden..][..hidden], vec![f32::INFINITY; hidden]);
            }
            for (expert, row, at) in [(0, 3, 2), (0, 1, 3), (2, 0, 7)] {
                let one = std::slice::from_ref(&experts[expert]);
                let alone = run(cpu, one, &x, hidden, &[vec![row]]);
                assert_same_bits(&out[at * hidden..][..hidden], &alone, cpu.path().name());
            }
            run_in(&[], &groups[1..2], &mut out);
        }
    }
}

#[test]
fn a_combined_row_is_one_chain_in_the_given_order() {
    let (rows, top_k, width) = (5, 3, 37);
    let data = numbers(8, rows * top_k * width);
    let weights = numbers(9, rows * top_k);
    let mut parts: Vec<&[f32]> = data.chunks_exact(width).collect();
    parts[4] = &[];
    let got = judge(1e-6, "combine", |ops| {
        let mut out = vec![f32::NAN; rows * width];
        let op = Combine {
            parts: &parts,
            weights: &weights,
            top_k,
            width,
            out: &mut out,
        };
        ops.combine(op).unwrap();
        out
    });
    for row in 0..rows {
        for i in 0..width {
            let mut acc = 0.0_f32;
            for p in row * top_k..(row + 1) * top_k {
                if let Some(part) = parts[p].get(i) {
                    acc = weights[p].mul_add(*part, acc);
                }
            }
            assert_eq!(acc.to_bits(), got[row * width + i].to_bits());
        }
    }
}
