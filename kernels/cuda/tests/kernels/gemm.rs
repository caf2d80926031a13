use foregate_kernels::{Dtype, MatMul, Matrix, Ops, Oracle};

use crate::call::{Call, bytes_of};
use crate::numbers::{EPS, Random, assert_close, bits, widened};

pub(crate) const TILES: [usize; 5] = [8, 16, 32, 64, 128];

struct Case {
    x: Vec<u16>,
    w: Vec<u16>,
    bias: Option<Vec<f32>>,
    rows: usize,
    n: usize,
    k: usize,
}

impl Case {
    fn random(random: &mut Random, rows: usize, n: usize, k: usize) -> Self {
        Self {
            x: random.halves(rows * k),
            w: random.halves(n * k),
            bias: n.is_multiple_of(2).then(|| random.floats(n)),
            rows,
            n,
            k,
        }
    }

    fn run(&self, tile: usize) -> Vec<f32> {
        let mut call = Call::new(&format!("fg_gemm_bf16_m{tile}"));
        call.memory(&self.x);
        call.memory(&self.w);
        match &self.bias {
            Some(bias) => drop(call.memory(bias)),
            None => call.null(),
        }
        let out = call.output::<f32>(self.rows * self.n);
        call.value(self.rows as u32)
            .value(self.n as u32)
            .value(self.k as u32);
        let side = if tile == 128 { 128 } else { 64 };
        call.run([
            self.n.div_ceil(side) as u32,
            self.rows.div_ceil(tile) as u32,
            1,
        ]);
        call.read(out)
    }

    fn row(&self, row: usize) -> Self {
        Self {
            x: self.x[row * self.k..(row + 1) * self.k].to_vec(),
            w: self.w.clone(),
            bias: self.bias.clone(),
            rows: 1,
            ..*self
        }
    }
}

/// Float32 sums of `k` products, in any order: `k` roundings of what the absolute values sum to.
fn assert_product(got: &[f32], x: &[f32], w: &[f32], w_packed: &Matrix, bias: Option<&[f32]>) {
    let (n, k) = (w_packed.n(), w_packed.k());
    let rows = got.len() / n;
    let mut want = vec![0.0; rows * n];
    Oracle
        .matmul(MatMul {
            x,
            rows,
            w: w_packed,
            bias,
            out: &mut want,
        })
        .unwrap();
    assert_close(got, &want, |i| {
        let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
        let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from((x * w).abs())).sum();
        let bias = bias.map_or(0.0, |b| f64::from(b[i % n].abs()));
        EPS * (k as f64 + 4.0) * sum + 2.0 * EPS * (sum + bias) + 1e-37
    });
}

#[test]
fn close_to_the_oracle_the_same_for_all_tiles_and_for_a_row_alone() {
    let mut random = Random(51);
    for (rows, n, k) in [
        (1, 1, 1),
        (1, 64, 64),
        (3, 70, 72),
        (9, 130, 200),
        (17, 31, 100), // rows of no whole run of 8
        (66, 65, 328),
        (130, 129, 40),
        (2, 8, 1024),
    ] {
        let case = Case::random(&mut random, rows, n, k);
        let got = case.run(8);
        let w = Matrix::pack(Dtype::Bf16, n, k, &bytes_of(&case.w)).unwrap();
        assert_product(
            &got,
            &widened(&case.x),
            &widened(&case.w),
            &w,
            case.bias.as_deref(),
        );
        for tile in TILES {
            assert_eq!(
                bits(&case.run(tile)),
                bits(&got),
                "{rows} × {n} × {k}, tile {tile}"
            );
        }
        for row in [0, rows / 2, rows - 1] {
            let alone = case.row(row).run(8);
            assert_eq!(bits(&alone), bits(&got[row * n..(row + 1) * n]));
        }
    }
}

#[test]
fn what_is_not_a_number_stays_in_its_row_and_its_output() {
    let mut random = Random(52);
    let (rows, n, k) = (19, 70, 88);
    let mut case = Case::random(&mut random, rows, n, k);
    let clean = case.run(16);
    case.x[3 * k + 87] = 0x7fc0; // NaN
    case.x[5 * k] = 0x7f80; // infinity
    case.w[9 * k + 40] = 0x7fc0;
    for tile in TILES {
        let got = case.run(tile);
        for (i, (got, clean)) in got.iter().zip(&clean).enumerate() {
            let (row, output) = (i / n, i % n);
            if row == 3 || output == 9 {
                assert!(got.is_nan());
            } else if row == 5 {
                assert!(!got.is_finite());
            } else {
                assert_eq!(got.to_bits(), clean.to_bits());
            }
        }
    }
}

#[test]
fn float32_weights_are_one_chain_per_output() {
    let mut random = Random(53);
    for (rows, n, k) in [(1, 1, 1), (33, 65, 70), (2, 128, 256)] {
        let (x, w) = (random.floats(rows * k), random.floats(n * k));
        let bias = random.floats(n);
        let mut call = Call::new("fg_gemm_f32");
        call.memory(&x);
        call.memory(&w);
        call.memory(&bias);
        let out = call.output::<f32>(rows * n);
        call.value(rows as u32).value(n as u32).value(k as u32);
        call.run([n.div_ceil(32) as u32, rows.div_ceil(32) as u32, 1]);
        let got: Vec<f32> = call.read(out);
        let packed = Matrix::pack(Dtype::F32, n, k, &bytes_of(&w)).unwrap();
        assert_product(&got, &x, &w, &packed, Some(&bias));
        for (i, got) in got.iter().enumerate() {
            let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
            let chain = x
                .iter()
                .zip(w)
                .fold(0.0_f32, |sum, (x, w)| x.mul_add(*w, sum));
            assert_eq!(got.to_bits(), (chain + bias[i % n]).to_bits());
        }
    }
}

#[test]
fn float16_weights_are_widened_and_computed_like_float32() {
    let mut random = Random(54);
    for (rows, n, k) in [(1, 1, 1), (33, 65, 70), (2, 128, 256)] {
        let x = random.floats(rows * k);
        let w: Vec<u16> = random
            .floats(n * k)
            .iter()
            .map(|w| half::f16::from_f32(*w).to_bits())
            .collect();
        let mut call = Call::new("fg_gemm_f16");
        call.memory(&x);
        call.memory(&w);
        call.null();
        let out = call.output::<f32>(rows * n);
        call.value(rows as u32).value(n as u32).value(k as u32);
        call.run([n.div_ceil(32) as u32, rows.div_ceil(32) as u32, 1]);
        let got: Vec<f32> = call.read(out);
        for (i, got) in got.iter().enumerate() {
            let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
            let chain = x.iter().zip(w).fold(0.0_f32, |sum, (x, w)| {
                x.mul_add(half::f16::from_bits(*w).to_f32(), sum)
            });
            assert_eq!(got.to_bits(), chain.to_bits());
        }
    }
}
