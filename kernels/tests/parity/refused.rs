//! What does not fit is refused by name, on every implementation, before anything is written.

use foregate_kernels::{
    Add, Attention, Combine, Cpu, Dtype, Embed, ExpertFfn, ExpertGroup, Gate, KvCache, KvShape,
    KvWrite, LogSoftmax, MatMul, Norm, OpError, Ops, Oracle, PageMap, RmsNorm, Rope, RopeTable,
    SigmoidScale, SiluMul,
};

use super::weight;

#[track_caller]
fn refused(result: Result<(), OpError>, what: &str) {
    let error = result.unwrap_err().to_string();
    assert!(error.contains(what), "{error} does not name {what:?}");
}

fn each(check: impl Fn(&dyn Ops)) {
    check(&Oracle);
    check(&Cpu::new(1));
}

#[test]
fn dense_ops() {
    let w = weight(Dtype::F32, 1, 4, 3);
    each(|ops| {
        let matmul = |x: &[f32], rows, bias, wide| {
            let mut out = vec![7.0; wide];
            let result = ops.matmul(MatMul {
                x,
                rows,
                w: &w,
                bias,
                out: &mut out,
            });
            assert_eq!(out, vec![7.0; wide], "nothing is written");
            result
        };
        refused(matmul(&[0.0; 2], 1, None, 4), "matmul: x: want 3, got 2");
        refused(matmul(&[0.0; 3], 1, None, 3), "out");
        refused(matmul(&[0.0; 3], 1, Some(&[0.0; 3]), 4), "bias");
        refused(matmul(&[0.0; 3], usize::MAX, None, 4), "x");
        refused(
            ops.embed(Embed {
                table: &w,
                ids: &[4],
                out: &mut [0.0; 3],
            }),
            "id below",
        );
        refused(
            ops.embed(Embed {
                table: &w,
                ids: &[3],
                out: &mut [0.0; 4],
            }),
            "out",
        );
        refused(
            ops.add(Add {
                x: &mut [0.0; 2],
                y: &[0.0; 3],
            }),
            "y",
        );
        refused(
            ops.silu_mul(SiluMul {
                gate: &mut [0.0; 2],
                up: &[0.0; 3],
            }),
            "up",
        );
        let scale: SigmoidScale<'_> = SigmoidScale {
            x: &mut [0.0; 5],
            logits: &[0.0; 2],
            width: 2,
        };
        refused(ops.sigmoid_scale(scale), "x");
        let softmax = LogSoftmax {
            logits: &[0.0; 5],
            width: 2,
            out: &mut [0.0; 5],
        };
        refused(ops.log_softmax(softmax), "whole rows");
        let softmax = LogSoftmax {
            logits: &[],
            width: 0,
            out: &mut [],
        };
        refused(ops.log_softmax(softmax), "width");
        let weight = &[0.0; 3];
        let norm: RmsNorm<'_> = RmsNorm {
            x: &mut [0.0; 4],
            add: None,
            rows: 2,
            width: 2,
            weight,
            eps: 0.0,
            out: &mut [0.0; 4],
        };
        refused(ops.rms_norm(norm), "weight");
        let norm: RmsNorm<'_> = RmsNorm {
            x: &mut [0.0; 4],
            add: Some(&[0.0; 3]),
            rows: 2,
            width: 2,
            weight: &[0.0; 2],
            eps: 0.0,
            out: &mut [0.0; 4],
        };
        refused(ops.rms_norm(norm), "add");
        let table = &RopeTable::new(&[1.0], &[0]);
        let rope = |rows, head_dim, weight: Option<&[f32]>, clip| {
            ops.rope(Rope {
                x: &mut [0.0; 4],
                rows,
                heads: 1,
                head_dim,
                norm: weight.map(|weight| Norm { weight, eps: 0.0 }),
                clip,
                table,
            })
        };
        refused(rope(1, 4, None, None), "head_dim");
        refused(rope(2, 2, None, None), "angles");
        refused(rope(2, 2, Some(&[1.0; 3]), None), "norm");
        refused(rope(2, 2, Some(&[]), None), "norm");
        refused(rope(2, 2, None, Some(-1.0)), "clip");
        refused(rope(2, 2, None, Some(f32::NAN)), "clip");
    });
}

#[test]
fn expert_ops() {
    let (inner, hidden) = (weight(Dtype::F32, 1, 4, 3), weight(Dtype::F32, 1, 3, 4));
    each(|ops| {
        let group = ExpertGroup {
            gate: &inner,
            up: &inner,
            down: &hidden,
            rows: &[0],
            out_offset: 0,
        };
        let run = |groups: &[ExpertGroup<'_>]| {
            let (x, out) = (&[0.0; 6], &mut [0.0; 6]);
            ops.expert_ffn(ExpertFfn {
                x,
                hidden: 3,
                groups,
                out,
            })
        };
        assert_eq!(run(&[group]), Ok(()));
        refused(
            run(&[ExpertGroup {
                rows: &[2],
                ..group
            }]),
            "row index",
        );
        refused(
            run(&[ExpertGroup {
                down: &inner,
                ..group
            }]),
            "down",
        );
        refused(
            run(&[ExpertGroup {
                up: &hidden,
                ..group
            }]),
            "up",
        );
        refused(run(&[group, group]), "out_offset");
        refused(
            run(&[ExpertGroup {
                out_offset: 2,
                ..group
            }]),
            "too few rows",
        );
        refused(
            run(&[ExpertGroup {
                out_offset: usize::MAX,
                ..group
            }]),
            "too few rows",
        );
        let gate = |top_k, ids: &mut [u32]| {
            ops.gate(Gate {
                logits: &[0.0; 4],
                rows: 1,
                experts: 4,
                top_k,
                normalise: true,
                out_experts: ids,
                out_weights: &mut [0.0; 2],
            })
        };
        refused(gate(0, &mut []), "top_k");
        refused(gate(5, &mut [0; 5]), "top_k at most");
        refused(gate(2, &mut [0; 3]), "out_experts");
        let combine = |parts| {
            let (weights, out) = (&[1.0; 2], &mut [0.0; 3]);
            ops.combine(Combine {
                parts,
                weights,
                top_k: 2,
                width: 3,
                out,
            })
        };
        refused(combine(&[&[0.0; 3]]), "parts");
        refused(combine(&[&[0.0; 3], &[0.0; 2]]), "width of a part");
    });
}

#[test]
fn cache_ops() {
    let shape = KvShape {
        layers: 1,
        pages: 2,
        page_tokens: 4,
        kv_heads: 2,
        head_dim: 2,
        dtype: foregate_kernels::KvDtype::F32,
    };
    let mut kv = KvCache::new(shape).unwrap();
    let row = [0.0; 4];
    each(|ops| {
        let attend = |position, pages: &[u32], sequence, heads, layer| {
            let (q, mut out) = (vec![0.0; heads * 2], vec![0.0; heads * 2]);
            ops.attention(Attention {
                q: &q,
                heads,
                scale: 1.0,
                positions: &[position],
                pages: PageMap {
                    sequence_of_row: &[sequence],
                    tables: &[pages],
                },
                kv: &kv,
                layer,
                out: &mut out,
            })
        };
        assert_eq!(attend(7, &[1, 0], 0, 4, 0), Ok(()));
        refused(attend(8, &[1, 0], 0, 4, 0), "too few");
        refused(attend(u32::MAX, &[1, 0], 0, 4, 0), "too few");
        refused(attend(7, &[2, 0], 0, 4, 0), "page");
        refused(attend(7, &[1, 0], 1, 4, 0), "sequence of a row");
        refused(attend(7, &[1, 0], 0, 3, 0), "multiple");
        refused(attend(7, &[1, 0], 0, 0, 0), "heads");
        refused(attend(7, &[1, 0], 0, 4, 1), "layer");
    });
    let mut write = |position, table: &[u32], k: &[f32]| {
        let pages = PageMap {
            sequence_of_row: &[0],
            tables: &[table],
        };
        let (positions, kv) = (&[position][..], &mut kv);
        Cpu::new(1).kv_write(KvWrite {
            k,
            v: &row,
            positions,
            pages,
            kv,
            layer: 0,
        })
    };
    assert_eq!(write(5, &[9, 1], &row), Ok(()));
    refused(write(5, &[9, 2], &row), "page");
    refused(write(5, &[1], &row), "too few");
    refused(write(5, &[9, 1], &row[1..]), "k: want 4, got 3");
}
