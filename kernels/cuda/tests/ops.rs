//! Ops on the device, through the emulator, against the oracle and the processor: the host side of each op, what it refuses,
//! and that nothing but the result is written. What each kernel computes is tested in `kernels.rs`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod emulated;

use std::sync::Arc;

use foregate_cuda::{Cuda, Staged};
use foregate_kernels::{
    Add, Attention, Cpu, Dtype, Embed, Executor, ExpertFfn, ExpertGroup, ExpertLayer,
    ExpertParts, Gate, KvCache, KvDtype, KvShape, KvWrite, LogSoftmax, MatMul, Matrix, Norm,
    OpError, Ops, Oracle, PageMap, RmsNorm, Rope, RopeTable, SigmoidScale, SiluMul, quantize,
};
use foregate_kernels::{Array, Combine};

use emulated::Emulated;

fn numbers(seed: u32, count: usize) -> Vec<f32> {
    let mut state = u64::from(seed) | 1 << 33;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            ((state >> 40) as f32 / (1 << 24) as f32) * 2.0 - 1.0
        })
        .collect()
}

fn device() -> (Cuda, Staged) {
    let cuda = Cuda::new(Arc::new(Emulated::new(256 << 20)));
    let staged = Staged::new(cuda.clone(), Cpu::new(1));
    (cuda, staged)
}

fn canonical(dtype: Dtype, seed: u32, n: usize, k: usize) -> Vec<u8> {
    quantize(dtype, n, k, &numbers(seed, n * k)).unwrap()
}

/// All formats, as checkpoints and conversions have them.
fn formats() -> Vec<Dtype> {
    let fp8 = |block_n, block_k| Dtype::Fp8 { block_n, block_k };
    vec![
        Dtype::F32,
        Dtype::F16,
        Dtype::Bf16,
        Dtype::Int8,
        Dtype::Int4 { group: 32 },
        Dtype::Int4 { group: 1 << 10 },
        fp8(128, 128),
        fp8(3, 16),
        Dtype::Mxfp4,
    ]
}

/// Whether products round their inputs to bfloat16.
fn rounds(dtype: Dtype) -> bool {
    !matches!(dtype, Dtype::F32 | Dtype::F16)
}

/// The same weight on the device and here.
fn weight(cuda: &Cuda, dtype: Dtype, seed: u32, n: usize, k: usize) -> (Matrix, Matrix) {
    let bytes = canonical(dtype, seed, n, k);
    let there = cuda.matrix(dtype, n, k, &bytes).unwrap();
    assert_eq!(there.unpack().unwrap(), bytes);
    (there, Matrix::pack(dtype, n, k, &bytes).unwrap())
}

/// Equal within a share of the largest value.
#[track_caller]
fn close(found: &[f32], wanted: &[f32], share: f32) {
    let scale = wanted.iter().fold(1e-6_f32, |most, v| most.max(v.abs()));
    for (at, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        assert!(
            (found - wanted).abs() <= share * scale,
            "at {at}: {found}, want {wanted}"
        );
    }
}

#[test]
fn products_are_those_of_the_oracle() {
    let (cuda, staged) = device();
    let sizes = [
        (1, 70, 64),
        (9, 64, 40),
        (33, 20, 24),
        (70, 65, 16),
        (130, 130, 8),
        (3, 5, 166),
        (2, 33, 160),
    ];
    for (dtype, (rows, n, k)) in formats()
        .into_iter()
        .flat_map(|dtype| sizes.map(|sizes| (dtype, sizes)))
    {
        let (there, here) = weight(&cuda, dtype, 1, n, k);
        let (x, bias) = (numbers(2, rows * k), numbers(3, n));
        let run = |ops: &dyn Ops, w: &Matrix, bias| {
            let mut out = vec![f32::NAN; rows * n];
            ops.matmul(MatMul {
                x: &x,
                rows,
                w,
                bias,
                out: &mut out,
            })
            .unwrap();
            out
        };
        for bias in [None, Some(&bias[..])] {
            let (found, wanted) = (run(&staged, &there, bias), run(&Oracle, &here, bias));
            close(&found, &wanted, 1e-5);
            if !rounds(dtype) {
                assert_eq!(
                    found,
                    run(&Cpu::new(1), &here, bias),
                    "the processor's bits"
                );
            }
        }
    }
}

/// A row alone, which a small tile computes, has the bits that it has among others.
#[test]
fn a_row_does_not_depend_on_its_batch() {
    let (cuda, staged) = device();
    let (rows, n, k) = (70, 66, 160);
    let x = numbers(2, rows * k);
    for dtype in formats() {
        let (w, _) = weight(&cuda, dtype, 1, n, k);
        let run = |x: &[f32]| {
            let rows = x.len() / k;
            let mut out = vec![f32::NAN; rows * n];
            staged
                .matmul(MatMul {
                    x,
                    rows,
                    w: &w,
                    bias: None,
                    out: &mut out,
                })
                .unwrap();
            out
        };
        let all = run(&x);
        for row in [0, 11, 69] {
            let alone = run(&x[row * k..(row + 1) * k]);
            assert_eq!(alone, all[row * n..(row + 1) * n], "{dtype} {row}");
        }
    }
}

#[test]
fn rows_of_tables_and_elementwise_ops() {
    let (cuda, staged) = device();
    for dtype in formats() {
        let width = if dtype == Dtype::Mxfp4 { 70 } else { 71 };
        let (there, here) = weight(&cuda, dtype, 5, 9, width);
        let run = |ops: &dyn Ops, table: &Matrix| {
            let mut out = vec![f32::NAN; 3 * width];
            ops.embed(Embed {
                table,
                ids: &[8, 0, 3],
                out: &mut out,
            })
            .unwrap();
            out
        };
        assert_eq!(run(&staged, &there), run(&Oracle, &here));
    }
    let y = numbers(7, 3 * 45);
    let both = |op: &dyn Fn(&dyn Ops, &mut [f32]), share| {
        let (mut found, mut wanted) = (numbers(6, 3 * 45), numbers(6, 3 * 45));
        op(&staged, &mut found);
        op(&Oracle, &mut wanted);
        close(&found, &wanted, share);
    };
    both(&|ops, x| ops.add(Add { x, y: &y }).unwrap(), 0.0);
    both(
        &|ops, gate| ops.silu_mul(SiluMul { gate, up: &y }).unwrap(),
        1e-6,
    );
    both(
        &|ops, x| {
            ops.sigmoid_scale(SigmoidScale {
                x,
                logits: &y[..3],
                width: 45,
            })
            .unwrap()
        },
        1e-6,
    );
    both(
        &|ops, x| {
            let logits = x.to_vec();
            ops.log_softmax(LogSoftmax {
                logits: &logits,
                width: 45,
                out: x,
            })
            .unwrap();
        },
        1e-6,
    );
    let weight = numbers(8, 45);
    for add in [None, Some(&y[..])] {
        both(
            &|ops, x| {
                let mut out = vec![f32::NAN; x.len()];
                let (rows, width, eps) = (3, 45, 1e-6);
                let norm: RmsNorm<'_> = RmsNorm {
                    x,
                    add,
                    rows,
                    width,
                    weight: &weight,
                    eps,
                    out: &mut out,
                };
                ops.rms_norm(norm).unwrap();
                for (x, out) in x.iter_mut().zip(out) {
                    *x += 3.0 * out;
                }
            },
            1e-6,
        );
    }
}

#[test]
fn rotation_and_choice() {
    let (_cuda, staged) = device();
    let table = RopeTable::new(&[1.0, 0.3, 0.1, 0.01], &[0, 9, 200]);
    let weight = numbers(9, 8);
    for (norm, clip) in [(false, None), (true, Some(0.7))] {
        let run = |ops: &dyn Ops| {
            let mut x = numbers(10, 3 * 2 * 8);
            ops.rope(Rope {
                x: &mut x,
                rows: 3,
                heads: 2,
                head_dim: 8,
                norm: norm.then_some(Norm {
                    weight: &weight,
                    eps: 1e-5,
                }),
                clip,
                table: &table,
            })
            .unwrap();
            x
        };
        close(&run(&staged), &run(&Oracle), 1e-6);
    }
    let logits = numbers(11, 7 * 20);
    for normalise in [false, true] {
        let run = |ops: &dyn Ops| {
            let (mut experts, mut weights) = (vec![u32::MAX; 7 * 3], vec![f32::NAN; 7 * 3]);
            ops.gate(Gate {
                logits: &logits,
                rows: 7,
                experts: 20,
                top_k: 3,
                normalise,
                out_experts: &mut experts,
                out_weights: &mut weights,
            })
            .unwrap();
            (experts, weights)
        };
        let (found, wanted) = (run(&staged), run(&Oracle));
        assert_eq!(found.0, wanted.0);
        close(&found.1, &wanted.1, 1e-6);
    }
}

/// Two sequences written in two steps, then read; the second is longer than a split.
fn attend(ops: &dyn Ops, kv: &mut KvCache, heads: usize) -> Vec<f32> {
    let shape = kv.shape();
    let long: Vec<u32> = (0..34).rev().collect();
    let tables: [&[u32]; 2] = [&[35, 34], &long];
    let width = shape.kv_heads * shape.head_dim;
    let rows: Vec<(u32, u32)> = (0..20)
        .map(|p| (0, p))
        .chain((0..530).map(|p| (1, p)))
        .collect();
    for (step, part) in rows.chunks(300).enumerate() {
        let sequence_of_row: Vec<u32> = part.iter().map(|row| row.0).collect();
        let positions: Vec<u32> = part.iter().map(|row| row.1).collect();
        for layer in 0..shape.layers {
            let seed = (10 * step + layer) as u32;
            let k = numbers(20 + seed, part.len() * width);
            let v = numbers(60 + seed, part.len() * width);
            let pages = PageMap {
                sequence_of_row: &sequence_of_row,
                tables: &tables,
            };
            let positions = &positions;
            ops.kv_write(KvWrite {
                k: &k,
                v: &v,
                positions,
                pages,
                kv,
                layer,
            })
            .unwrap();
        }
    }
    let positions = [19, 528, 529];
    let q = numbers(99, 3 * heads * shape.head_dim);
    let mut out = vec![f32::NAN; q.len()];
    ops.attention(Attention {
        q: &q,
        heads,
        scale: 0.3,
        positions: &positions,
        pages: PageMap {
            sequence_of_row: &[0, 1, 1],
            tables: &tables,
        },
        kv,
        layer: 1,
        out: &mut out,
    })
    .unwrap();
    out
}

#[test]
fn attention_over_pages_and_splits() {
    let (cuda, staged) = device();
    for (dtype, head_dim, share) in [
        (KvDtype::F32, 8, 1e-5),
        (KvDtype::Bf16, 16, 4e-3),
        (KvDtype::Bf16, 72, 4e-3),
        (KvDtype::Bf16, 136, 4e-3),
    ] {
        let shape = KvShape {
            layers: 2,
            pages: 36,
            page_tokens: 16,
            kv_heads: 2,
            head_dim,
            dtype,
        };
        let found = attend(&staged, &mut cuda.kv_cache(shape).unwrap(), 4);
        let wanted = attend(&Oracle, &mut KvCache::new(shape).unwrap(), 4);
        close(&found, &wanted, share);
    }
}

type Three = [(Matrix, Matrix); 3];

fn experts(cuda: &Cuda, dtype: Dtype, count: u32, hidden: usize, inner: usize) -> Vec<Three> {
    (0..count)
        .map(|e| {
            let seed = 100 + 3 * e;
            [
                weight(cuda, dtype, seed, inner, hidden),
                weight(cuda, dtype, seed + 1, inner, hidden),
                weight(cuda, dtype, seed + 2, hidden, inner),
            ]
        })
        .collect()
}

/// Rows of experts, with one that has none and a hole in the results.
#[test]
fn groups_of_experts() {
    let (cuda, staged) = device();
    let (hidden, inner) = (24, 40);
    for dtype in formats() {
        let experts = experts(&cuda, dtype, 3, hidden, inner);
        let x = numbers(30, 5 * hidden);
        for (lists, gap) in [
            (&[&[4_u32, 0, 2][..], &[], &[1, 4]][..], 0),
            (&[&[0, 1, 2, 3, 4], &[3], &[2]], 2),
            (&[&[0, 1, 2, 3, 4]], 0),
        ] {
            let run = |ops: &dyn Ops, side: fn(&(Matrix, Matrix)) -> &Matrix| {
                let mut out_offset = 0;
                let groups: Vec<ExpertGroup<'_>> = lists
                    .iter()
                    .zip(&experts)
                    .map(|(rows, [gate, up, down])| {
                        let group = ExpertGroup {
                            gate: side(gate),
                            up: side(up),
                            down: side(down),
                            rows,
                            out_offset,
                        };
                        out_offset += rows.len() + gap;
                        group
                    })
                    .collect();
                let mut out = vec![7.0; out_offset * hidden];
                let op: ExpertFfn<'_> = ExpertFfn {
                    x: &x,
                    hidden,
                    groups: &groups,
                    out: &mut out,
                };
                ops.expert_ffn(op).unwrap();
                out
            };
            let (found, wanted) = (run(&staged, |w| &w.0), run(&Oracle, |w| &w.1));
            let share = if rounds(dtype) { 5e-3 } else { 1e-5 };
            close(&found, &wanted, share);
        }
    }
}

/// A layer from a choice that is on the device gives the bits of its parts, done one after the other.
#[test]
fn a_layer_of_experts() {
    let (cuda, staged) = device();
    let (hidden, inner, top_k) = (24, 40, 2);
    for (dtype, rows) in formats()
        .into_iter()
        .flat_map(|dtype| [(dtype, 5), (dtype, 70)])
    {
        let weights = experts(&cuda, dtype, 6, hidden, inner);
        let parts: Vec<ExpertParts<'_>> = weights
            .iter()
            .map(|[gate, up, down]| ExpertParts {
                gate: &gate.0,
                up: &up.0,
                down: &down.0,
            })
            .collect();
        let table = cuda.expert_table(&parts).unwrap();
        // Expert 2 is chosen by nobody, expert 5 by everybody.
        let chosen: Vec<u32> = (0..rows).flat_map(|r| [[0, 1, 3, 4][r % 4], 5]).collect();
        let (x, sums) = (numbers(40, rows * hidden), numbers(41, rows * top_k));
        let mut out = Array::<f32>::default();
        cuda.expert_layer(ExpertLayer {
            x: Array::of(&cuda, "x", x.clone()).unwrap().view(),
            rows,
            experts: Array::of(&cuda, "experts", chosen.clone()).unwrap().view(),
            weights: Array::of(&cuda, "weights", sums.clone()).unwrap().view(),
            top_k,
            table: &table,
            out: out.sized(&cuda, "out", rows * hidden).unwrap(),
        })
        .unwrap();
        let mut found = vec![f32::NAN; rows * hidden];
        out.view().read(&mut found).unwrap();

        let mut results = vec![0.0; chosen.len() * hidden];
        for ((choice, expert), out) in chosen
            .iter()
            .enumerate()
            .zip(results.chunks_exact_mut(hidden))
        {
            let ExpertParts { gate, up, down } = parts[*expert as usize];
            let rows = [(choice / top_k) as u32];
            let groups = [ExpertGroup {
                gate,
                up,
                down,
                rows: &rows,
                out_offset: 0,
            }];
            staged
                .expert_ffn(ExpertFfn {
                    x: &x,
                    hidden,
                    groups: &groups,
                    out,
                })
                .unwrap();
        }
        let parts: Vec<&[f32]> = results.chunks_exact(hidden).collect();
        let mut wanted = vec![f32::NAN; rows * hidden];
        let (weights, width, out) = (&sums, hidden, &mut wanted);
        Cpu::new(1)
            .combine(Combine {
                parts: &parts,
                weights,
                top_k,
                width,
                out,
            })
            .unwrap();
        assert_eq!(found, wanted, "{dtype} {rows}");
    }
}

/// Groups that are whole rows have two lengths in one expert; two formats are refused.
#[test]
fn halves_of_an_expert_share_a_format_and_not_its_groups() {
    let (cuda, staged) = device();
    let (hidden, inner) = (24, 40);
    let part = |dtype, n, k| weight(&cuda, dtype, 7, n, k);
    let (gate, gate_here) = part(Dtype::Int4 { group: 24 }, inner, hidden);
    let (down, down_here) = part(Dtype::Int4 { group: 40 }, hidden, inner);
    let (other, _) = part(Dtype::Int8, hidden, inner);
    let x = numbers(30, 3 * hidden);
    let run = |ops: &dyn Ops, gate: &Matrix, down: &Matrix| {
        let mut out = vec![f32::NAN; 3 * hidden];
        let groups = [ExpertGroup {
            gate,
            up: gate,
            down,
            rows: &[0, 1, 2],
            out_offset: 0,
        }];
        let op: ExpertFfn<'_> = ExpertFfn {
            x: &x,
            hidden,
            groups: &groups,
            out: &mut out,
        };
        ops.expert_ffn(op).map(|()| out)
    };
    let found = run(&staged, &gate, &down).unwrap();
    close(&found, &run(&Oracle, &gate_here, &down_here).unwrap(), 5e-3);
    let error = run(&staged, &gate, &other).unwrap_err();
    assert!(matches!(error, OpError::Unsupported { .. }), "{error}");
    let parts = |down| ExpertParts {
        gate: &gate,
        up: &gate,
        down,
    };
    let table = cuda.expert_table(&[parts(&down), parts(&down)]).unwrap();
    assert_eq!(table.dtypes, Some([gate.dtype(), down.dtype()]));
    assert!(cuda.expert_table(&[parts(&down), parts(&other)]).is_err());
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_launched() {
    let (cuda, staged) = device();
    let (w, here) = weight(&cuda, Dtype::Bf16, 1, 4, 8);
    let matmul = |w: &Matrix, x: &[f32]| {
        let mut out = vec![0.0; 4];
        staged
            .matmul(MatMul {
                x,
                rows: 1,
                w,
                bias: None,
                out: &mut out,
            })
            .unwrap_err()
    };
    assert!(matches!(matmul(&w, &[0.0; 7]), OpError::Shape(_)));
    assert!(matches!(
        matmul(&here, &[0.0; 8]),
        OpError::OnHost {
            what: "the weight",
            ..
        }
    ));
    // Another device's weight.
    let (other, _) = device();
    let (foreign, _) = weight(&other, Dtype::Bf16, 1, 4, 8);
    assert!(matches!(
        matmul(&foreign, &[0.0; 8]),
        OpError::OnHost { .. }
    ));
    let error = cuda
        .matrix(Dtype::Int4 { group: 24 }, 1, 48, &[0; 34])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("int4-24") && error.contains("multiple of 16"),
        "{error}"
    );
    let shape = KvShape {
        layers: 1,
        pages: 1,
        page_tokens: 4,
        kv_heads: 1,
        head_dim: 512,
        dtype: KvDtype::F32,
    };
    assert!(matches!(
        cuda.kv_cache(shape),
        Err(OpError::Unsupported { .. })
    ));
    let huge = KvShape {
        pages: 1 << 20,
        head_dim: 64,
        ..shape
    };
    let error = cuda.kv_cache(huge).unwrap_err();
    assert!(
        matches!(error, OpError::NoMemory { what: "keys and values", free, .. } if free < 256 << 20),
        "{error}"
    );
    let logits = vec![0.0; 2000];
    let gate = staged.gate(Gate {
        logits: &logits,
        rows: 1,
        experts: 2000,
        top_k: 1,
        normalise: false,
        out_experts: &mut [0],
        out_weights: &mut [0.0],
    });
    assert!(matches!(gate, Err(OpError::Unsupported { op: "gate", .. })));
    assert_eq!(cuda.driver().name(), "emulated");
}

/// A failure names its call, and the device is done for.
#[test]
fn a_failed_kernel_is_told_by_the_next_read() {
    let emulated = Arc::new(Emulated::new(64 << 20));
    let cuda = Cuda::new(emulated.clone());
    let mut x = Array::of(&cuda, "x", vec![1.0_f32; 4]).unwrap();
    let y = Array::of(&cuda, "y", vec![2.0_f32; 4]).unwrap();
    emulated.fail_after(1);
    let mut add = || {
        cuda.add(Add {
            x: x.view_mut(),
            y: y.view(),
        })
    };
    add().unwrap();
    add().unwrap();
    let error = add().unwrap_err();
    assert!(
        matches!(
            &error,
            OpError::Device {
                call: "launch",
                code: 719,
                ..
            }
        ),
        "{error}"
    );
    assert!(
        error.to_string().contains("fg_add was told to fail"),
        "{error}"
    );
    assert!(x.view().read(&mut [0.0; 4]).is_err());
    assert!(cuda.free_memory().is_err());
}
