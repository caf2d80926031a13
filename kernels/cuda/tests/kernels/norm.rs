use foregate_kernels::{Ops, Oracle, RmsNorm};

use crate::call::Call;
use crate::numbers::{EPS, Random, assert_close, bits, rounded};

struct Case {
    x: Vec<f32>,
    add: Option<Vec<f32>>,
    weight: Vec<f32>,
    width: usize,
}

/// The new `x`, the output, the output rounded.
fn run(case: &Case) -> (Vec<f32>, Vec<f32>, Vec<u16>) {
    let rows = case.x.len() / case.width;
    let mut call = Call::new("fg_rms_norm");
    let x = call.memory(&case.x);
    match &case.add {
        Some(add) => drop(call.memory(add)),
        None => call.null(),
    }
    call.memory(&case.weight);
    call.value(1e-6_f32);
    let out = call.output::<f32>(case.x.len());
    let half = call.output::<u16>(case.x.len());
    call.value(case.width as u32).run([rows as u32, 1, 1]);
    (call.read(x), call.read(out), call.read(half))
}

#[test]
fn close_to_the_oracle_and_apart_from_other_rows() {
    let mut random = Random(11);
    for (rows, width) in [(1, 1), (3, 64), (2, 255), (5, 2048)] {
        for residual in [false, true] {
            let mut case = Case {
                x: random.floats(rows * width),
                add: residual.then(|| random.floats(rows * width)),
                weight: random.floats(width),
                width,
            };
            if rows == 5 {
                (case.x[7], case.x[width + 1]) = (f32::NAN, f32::INFINITY);
            }
            let (x, out, half) = run(&case);
            let (mut want_x, mut want) = (case.x.clone(), vec![0.0; rows * width]);
            Oracle
                .rms_norm(RmsNorm {
                    x: &mut want_x,
                    add: case.add.as_deref(),
                    rows,
                    width,
                    weight: &case.weight,
                    eps: 1e-6,
                    out: &mut want,
                })
                .unwrap();
            assert_eq!(
                bits(&x[2 * width.min(x.len() / 2)..]),
                bits(&want_x[2 * width.min(x.len() / 2)..])
            );
            // Each lane's chain and the tree are below width roundings, halved by the root.
            let most = (width as f64).sqrt() + 8.0;
            assert_close(&out, &want, |i| {
                most * EPS * f64::from(want[i].abs()) + 1e-30
            });
            for (half, out) in half.iter().zip(&out) {
                assert!(out.is_nan() || *half == rounded(&[*out])[0]);
            }
            for row in 0..rows {
                let range = row * width..(row + 1) * width;
                let alone = run(&Case {
                    x: case.x[range.clone()].to_vec(),
                    add: case.add.as_ref().map(|add| add[range.clone()].to_vec()),
                    weight: case.weight.clone(),
                    width,
                });
                assert_eq!(bits(&alone.1), bits(&out[range]));
            }
        }
    }
}

#[test]
fn either_output_may_be_left_out() {
    let (x, weight) = (vec![1.0_f32; 40], vec![2.0_f32; 40]);
    for floats in [false, true] {
        let mut call = Call::new("fg_rms_norm");
        call.memory(&x);
        call.null();
        call.memory(&weight);
        call.value(0.0_f32);
        let out = floats.then(|| call.output::<f32>(40));
        if !floats {
            call.null();
        }
        let half = (!floats).then(|| call.output::<u16>(40));
        if floats {
            call.null();
        }
        call.value(40_u32).run([1, 1, 1]);
        if let Some(out) = out {
            assert_eq!(call.read::<f32>(out), vec![2.0; 40]);
        }
        if let Some(half) = half {
            assert_eq!(call.read::<u16>(half), vec![0x4000; 40]);
        }
    }
}
