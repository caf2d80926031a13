use foregate_kernels::{Norm, Ops, Oracle, Rope, RopeTable};

use crate::call::Call;
use crate::numbers::{EPS, Random, assert_close, bits};

fn frequencies(half: usize) -> Vec<f32> {
    (0..half)
        .map(|i| 10000_f32.powf(-(i as f32) / half as f32))
        .collect()
}

fn angles(positions: &[u32], inv_freq: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let count = positions.len() * inv_freq.len();
    let mut call = Call::new("fg_rope_angles");
    call.memory(positions);
    call.memory(inv_freq);
    let (cos, sin) = (call.output::<f32>(count), call.output::<f32>(count));
    call.value(inv_freq.len() as u32)
        .run([positions.len() as u32, 1, 1]);
    (call.read(cos), call.read(sin))
}

/// What the processor's table says, by the rotation of `(1, 0)`.
fn angles_of_the_processor(positions: &[u32], inv_freq: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (rows, half) = (positions.len(), inv_freq.len());
    let table = RopeTable::new(inv_freq, positions);
    let mut x = Vec::new();
    for _ in 0..rows {
        x.extend(vec![1.0; half]);
        x.extend(vec![0.0; half]);
    }
    Oracle
        .rope(Rope {
            x: &mut x,
            rows,
            heads: 1,
            head_dim: 2 * half,
            norm: None,
            clip: None,
            table: &table,
        })
        .unwrap();
    let rows = || x.chunks_exact(2 * half);
    (
        rows().flat_map(|r| r[..half].to_vec()).collect(),
        rows().flat_map(|r| r[half..].to_vec()).collect(),
    )
}

#[test]
fn angles_have_the_bits_of_the_processor() {
    let positions = [0, 1, 17, 511, 4095, 131_071, 1_000_000];
    for half in [1, 32, 200] {
        let inv_freq = frequencies(half);
        let (cos, sin) = angles(&positions, &inv_freq);
        let (want_cos, want_sin) = angles_of_the_processor(&positions, &inv_freq);
        assert_eq!(bits(&cos), bits(&want_cos));
        // A rotated zero may have the other sign.
        assert_eq!(sin, want_sin);
    }
}

struct Case {
    rows: usize,
    heads: usize,
    head_dim: usize,
    norm: Option<usize>,
    clip: Option<f32>,
}

fn run(case: &Case, x: &[f32], weight: &[f32], positions: &[u32]) -> Vec<f32> {
    let (cos, sin) = angles(positions, &frequencies(case.head_dim / 2));
    let mut call = Call::new("fg_rope");
    let out = call.memory(x);
    if case.norm.is_some() {
        call.memory(weight);
    } else {
        call.null();
    }
    call.value(case.norm.unwrap_or(1) as u32).value(1e-6_f32);
    call.value(case.clip.unwrap_or(-1.0));
    call.memory(&cos);
    call.memory(&sin);
    call.value(case.heads as u32).value(case.head_dim as u32);
    call.run([positions.len() as u32, 1, 1]);
    call.read(out)
}

#[test]
fn close_to_the_oracle_and_apart_from_other_rows() {
    let mut random = Random(21);
    let case = |rows, heads, head_dim, norm, clip| Case {
        rows,
        heads,
        head_dim,
        norm,
        clip,
    };
    for case in [
        case(1, 1, 2, None, None),
        case(3, 5, 64, None, Some(0.5)),
        case(2, 4, 128, Some(128), None),
        case(2, 3, 34, Some(34), Some(0.9)),
        case(2, 16, 64, Some(16 * 64), None),
        case(1, 3, 10, Some(15), Some(0.0)),
    ] {
        let width = case.heads * case.head_dim;
        let mut x = random.floats(case.rows * width);
        let weight = random.floats(case.norm.unwrap_or(1));
        let positions: Vec<u32> = (0..case.rows as u32).map(|r| 7 + r * 1013).collect();
        if case.rows == 3 {
            x[1] = f32::NAN;
        }
        let got = run(&case, &x, &weight, &positions);
        let table = RopeTable::new(&frequencies(case.head_dim / 2), &positions);
        let mut want = x.clone();
        Oracle
            .rope(Rope {
                x: &mut want,
                rows: case.rows,
                heads: case.heads,
                head_dim: case.head_dim,
                norm: case.norm.map(|_| Norm {
                    weight: &weight[..],
                    eps: 1e-6,
                }),
                clip: case.clip,
                table: &table,
            })
            .unwrap();
        let most = got.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        let bound = f64::from(most) * EPS * ((case.norm.unwrap_or(1) as f64).sqrt() + 16.0);
        assert_close(&got, &want, |_| bound);
        for row in 0..case.rows {
            let range = row * width..(row + 1) * width;
            let alone = run(&case, &x[range.clone()], &weight, &positions[row..=row]);
            assert_eq!(bits(&alone), bits(&got[range]));
        }
    }
}
