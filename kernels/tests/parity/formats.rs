//! Formats of codes: what a code is, what a product with them is, and what rounding to them costs.

use foregate_kernels::{Cpu, Dtype, Matrix, quantize};
use proptest::prelude::*;

use super::matmul::{product, tile_sum};
use super::{
    ARITHMETICS, FORMATS, assert_same_bits, cpus, cpus_of, fp8, int4, judge_both, numbers,
    weight,
};

fn floats(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn bf16(x: f32) -> f32 {
    half::bf16::from_f32(x).to_f32()
}

/// Every code, taken out by an input that is one alone: exact on every path, at every place of a unit and of a panel.
#[test]
fn every_code_is_exact() {
    let (n, k) = (37, 64);
    let bytes: Vec<u8> = (0..n * k).map(|i| (i * 89 % 256) as u8).collect();
    let nibbles = &bytes[..n * k / 2];
    let zeros: Vec<u8> = (0..2 * n).map(|i| (i % 17) as u8).collect();
    for (dtype, canonical) in [
        (Dtype::Int8, [&bytes[..], &floats(&vec![1.0; n])].concat()),
        (
            int4(32),
            [nibbles, &floats(&vec![1.0; 2 * n]), &zeros].concat(),
        ),
        (fp8(n, k), [&bytes[..], &floats(&[1.0])].concat()),
        (Dtype::Mxfp4, [nibbles, &vec![127; 2 * n]].concat()),
    ] {
        let w = Matrix::pack(dtype, n, k, &canonical).unwrap();
        // NaN at one input would be NaN in every product.
        let mut rows = vec![vec![0.0; k]; n];
        for (n, row) in rows.iter_mut().enumerate() {
            w.row(n, row).unwrap();
        }
        let mut x = vec![0.0; k * k];
        for input in 0..k {
            x[input * k + input] = 1.0;
        }
        for cpu in cpus() {
            let got = product(cpu, &x, &w, None);
            for (input, out) in got.chunks_exact(n).enumerate() {
                for (output, got) in out.iter().enumerate() {
                    let row = &rows[output];
                    let right = if row.iter().any(|w| w.is_nan()) {
                        got.is_nan()
                    } else {
                        *got == row[input]
                    };
                    assert!(right, "{dtype} {output} {input} on {}: {got}", cpu.path());
                }
            }
        }
        if dtype == Dtype::Int8 {
            let all: std::collections::BTreeSet<i32> =
                rows.iter().flatten().map(|w| *w as i32).collect();
            assert_eq!(all.len(), 256);
        }
    }
}

/// e4m3 without its two codes that are no numbers, which would hide the others of their row.
#[test]
fn every_number_of_e4m3_is_exact() {
    let codes: Vec<u8> = (0..=255).filter(|c| c & 0x7f != 0x7f).collect();
    let k = codes.len();
    let dtype = fp8(1, 1000);
    let w = Matrix::pack(dtype, 1, k, &[&codes[..], &floats(&[2.0])].concat()).unwrap();
    let mut row = vec![0.0; k];
    w.row(0, &mut row).unwrap();
    for (code, value) in codes.iter().zip(&row) {
        let (e, m) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        let size = if e == 0 {
            m * 2.0_f32.powi(-9)
        } else {
            (1.0 + m / 8.0) * 2.0_f32.powi(e - 7)
        };
        let want = if *code < 128 { size } else { -size };
        assert_eq!(*value, 2.0 * want, "{code:#x}");
    }
    for input in 0..k {
        let mut x = vec![0.0; k];
        x[input] = 1.0;
        for cpu in cpus() {
            assert_eq!(product(cpu, &x, &w, None), [row[input]], "{}", codes[input]);
        }
    }
}

/// The documented order, spelled out: per group one chain over pairs, the odd input first; then its total. By tiles: per
/// run of at most 256 inputs of a group what tiles make of it; then its total.
#[test]
fn a_group_is_one_chain_and_its_total_one_more_step() {
    groups_of(141);
    groups_of(530);
}

fn groups_of(k: usize) {
    let (rows, n) = (8, 37);
    let (x, bias) = (numbers(1, rows * k), numbers(3, n));
    for dtype in FORMATS {
        let (block_n, group) = match dtype {
            Dtype::F32 | Dtype::Bf16 | Dtype::F16 | Dtype::Mxfp4 => continue,
            Dtype::Int8 => (1, k),
            Dtype::Int4 { group } => (1, group),
            Dtype::Fp8 { block_n, block_k } => (block_n, block_k.min(k)),
        };
        let w = weight(dtype, 2, n, k);
        let canonical = w.unpack().unwrap();
        let groups = k.div_ceil(group);
        let width = if matches!(dtype, Dtype::Int4 { .. }) {
            k.div_ceil(2)
        } else {
            k
        };
        let (scales, zeros) = canonical[n * width..].split_at(n.div_ceil(block_n) * groups * 4);
        let scales = Dtype::F32.widen(scales).unwrap();
        let code = |n: usize, k: usize| match dtype {
            Dtype::Int4 { .. } => {
                let code = canonical[n * width + k / 2] >> (k % 2 * 4) & 15;
                f32::from(code) - f32::from(zeros[n * groups + k / group])
            }
            Dtype::Int8 => f32::from(canonical[n * width + k] as i8),
            _ => {
                let mut row = vec![0.0; k + 1];
                let one = fp8(1, usize::MAX);
                let codes = &canonical[n * width..=n * width + k];
                let row_of_ones =
                    Matrix::pack(one, 1, k + 1, &[codes, &floats(&[1.0])].concat());
                row_of_ones.unwrap().row(0, &mut row).unwrap();
                row[k]
            }
        };
        let [chains, tiles] =
            judge_both(1e-5, "matmul", |ops| product(ops, &x, &w, Some(&bias)));
        for output in 0..n {
            let codes: Vec<f32> = (0..k).map(|k| code(output, k)).collect();
            for row in 0..rows {
                let x = &x[row * k..(row + 1) * k];
                let (mut total, mut by_tiles) = (0.0_f32, 0.0_f32);
                for g in 0..groups {
                    let inputs = g * group..k.min((g + 1) * group);
                    let scale = scales[output / block_n * groups + g];
                    for first in inputs.clone().step_by(256) {
                        let run = first..inputs.end.min(first + 256);
                        let sum = tile_sum(&x[run.clone()], &codes[run]);
                        by_tiles = sum.mul_add(scale, by_tiles);
                    }
                    let mut chain = 0.0_f32;
                    for i in (0..inputs.len().next_multiple_of(2)).map(|i| i ^ 1) {
                        if i < inputs.len() {
                            let k = inputs.start + i;
                            chain = bf16(x[k]).mul_add(codes[k], chain);
                        }
                    }
                    total = chain.mul_add(scale, total);
                }
                for (want, got) in [(total, &chains), (by_tiles, &tiles)] {
                    let want = want + bias[output];
                    let got = got[row * n + output];
                    assert_eq!(want.to_bits(), got.to_bits(), "{dtype} {row} {output}");
                }
            }
        }
    }
}

/// Scales that are zero, negative, huge, tiny or no numbers: as IEEE 754 has it, on every path.
#[test]
fn any_scale_passes_through() {
    let (n, k) = (18, 8);
    let x = numbers(5, 7 * k);
    for scale in [
        0.0,
        -0.5,
        f32::MAX,
        f32::from_bits(1),
        f32::INFINITY,
        f32::NAN,
    ] {
        let codes: Vec<u8> = (0..n * k).map(|i| 1 + (i % 100) as u8).collect();
        let zeros = vec![8; n];
        let scales = floats(&vec![scale; n]);
        for (dtype, bytes) in [
            (Dtype::Int8, [&codes[..], &scales].concat()),
            (fp8(1, k), [&codes[..], &scales].concat()),
            (int4(8), [&codes[..n * k / 2], &scales, &zeros].concat()),
        ] {
            let w = Matrix::pack(dtype, n, k, &bytes).unwrap();
            let ones = match dtype {
                Dtype::Int4 { .. } => {
                    [&codes[..n * k / 2], &floats(&vec![1.0; n]), &zeros].concat()
                }
                _ => [&codes[..], &floats(&vec![1.0; n])].concat(),
            };
            let ones = Matrix::pack(dtype, n, k, &ones).unwrap();
            for cpu in cpus() {
                let plain = product(cpu, &x, &ones, None);
                for (chain, got) in plain.iter().zip(product(cpu, &x, &w, None)) {
                    let want = chain.mul_add(scale, 0.0);
                    let right = want == got || want.is_nan() && got.is_nan();
                    assert!(right, "{dtype} {scale:e} on {}: {got:e}", cpu.path());
                }
            }
        }
    }
    for (scale, want) in [
        (0, 2.0_f32.powi(-126)),
        (254, f32::INFINITY),
        (255, f32::NAN),
    ] {
        let codes = vec![0x44; n * k / 2];
        let w = Matrix::pack(Dtype::Mxfp4, n, k, &[codes, vec![scale; n]].concat()).unwrap();
        let mut x = vec![0.0; k];
        x[3] = 1.0;
        for cpu in cpus() {
            for got in product(cpu, &x, &w, None) {
                assert!(
                    want == got || want.is_nan() && got.is_nan(),
                    "{scale}: {got:e}"
                );
            }
        }
    }
}

/// Large enough for several threads and for several blocks of rows; odd sizes everywhere.
#[test]
fn batch_size_and_threads_do_not_show() {
    let (rows, n, k) = (98, 83, 330);
    let x = numbers(4, rows * k);
    for dtype in FORMATS {
        let w = weight(dtype, 5, n, k);
        for arithmetic in ARITHMETICS {
            let all = product(cpus_of(arithmetic).next().unwrap(), &x, &w, None);
            for cpu in cpus_of(arithmetic).skip(1) {
                let what = format!("{dtype} on {}", cpu.path());
                assert_same_bits(&all, &product(cpu, &x, &w, None), &what);
                for batch in [1, 2, 3, 4, 5, 6, 7, 13, 97] {
                    let part = product(cpu, &x[k..(1 + batch) * k], &w, None);
                    assert_same_bits(&all[n..(1 + batch) * n], &part, &what);
                }
            }
        }
    }
}

/// What [`Dtype`] says that rounding costs: of a weight, or of the weights that share its scale.
fn check_error(dtype: Dtype, n: usize, k: usize, weights: &[f32]) -> Result<(), TestCaseError> {
    let bytes = quantize(dtype, n, k, weights).unwrap();
    prop_assert_eq!(Some(bytes.len()), dtype.bytes(n, k));
    prop_assert_eq!(&Cpu::new(3).quantize(dtype, n, k, weights).unwrap(), &bytes);
    let matrix = Matrix::pack(dtype, n, k, &bytes).unwrap();
    let mut got = vec![0.0; n * k];
    for (n, row) in got.chunks_exact_mut(k).enumerate() {
        matrix.row(n, row).unwrap();
    }
    let (block_n, group) = match dtype {
        Dtype::Int4 { group } => (1, group),
        Dtype::Fp8 { block_n, block_k } => (block_n, block_k),
        Dtype::Mxfp4 => (1, 32),
        Dtype::F32 | Dtype::Bf16 | Dtype::F16 | Dtype::Int8 => (1, k),
    };
    // What the arithmetic of the scales may add.
    let slack = 1.0 + 2.0_f64.powi(-12);
    let block = |i: usize| (i / k / block_n, i % k / group);
    for i in 0..n * k {
        let (w, off) = (
            f64::from(weights[i]),
            f64::from(got[i]) - f64::from(weights[i]),
        );
        let peers = (0..n * k).filter(|j| block(*j) == block(i));
        let most = || {
            peers
                .clone()
                .fold(0.0, |m, j| f64::max(m, f64::from(weights[j].abs())))
        };
        let bound = match dtype {
            Dtype::F32 => 0.0,
            Dtype::Bf16 => w.abs() / 256.0,
            Dtype::F16 => f64::max(w.abs() / 2048.0, 2.0_f64.powi(-25)),
            Dtype::Int8 => most() / 254.0,
            Dtype::Fp8 { .. } => f64::max(w.abs() / 16.0, most() / f64::from(1 << 18)),
            Dtype::Mxfp4 => f64::max(w.abs() / 4.0, most() / 16.0),
            Dtype::Int4 { .. } => {
                let (mut low, mut high, mut squares) = (0.0, 0.0, 0.0);
                for j in peers.clone() {
                    let w = f64::from(weights[j]);
                    (low, high) = (f64::min(low, w), f64::max(high, w));
                    squares += (f64::from(got[j]) - w).powi(2);
                }
                let root = (squares / peers.count() as f64).sqrt();
                let limit = (high - low) / 30.0 * slack;
                prop_assert!(root <= limit, "{} of {}: {} > {}", i, dtype, root, limit);
                continue;
            }
        };
        prop_assert!(
            off.abs() <= bound * slack,
            "{} of {}: {} of {}",
            off,
            dtype,
            w,
            bound
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn rounding_costs_what_is_stated(
        dtype in prop::sample::select(&FORMATS[..]),
        n in 1_usize..20,
        k in 1_usize..80,
        offset in prop::sample::select(&[0.0_f32, 3.0, -3.0][..]),
        size in prop::sample::select(&[1.0_f32, 1e-3, 300.0][..]),
        seed: u64,
    ) {
        let k = if dtype == Dtype::Mxfp4 { k.next_multiple_of(2) } else { k };
        let mut weights = numbers(seed, n * k);
        for (i, w) in weights.iter_mut().enumerate() {
            // Some rows far smaller than their neighbours.
            *w = (*w + offset) * size * [1.0, 1.0, 1e-2][i / k % 3];
        }
        check_error(dtype, n, k, &weights)?;
    }
}

#[test]
fn weights_without_a_scale_become_zero() {
    for dtype in FORMATS {
        let weights = [-1e-43; 34];
        for weights in [&weights[..], &[0.0; 34]] {
            let bytes = quantize(dtype, 1, 34, weights).unwrap();
            let w = Matrix::pack(dtype, 1, 34, &bytes).unwrap();
            let mut row = vec![f32::NAN; 34];
            w.row(0, &mut row).unwrap();
            assert!(row.iter().all(|w| w.abs() <= 1e-43), "{dtype}: {row:?}");
        }
    }
}

#[test]
fn what_cannot_be_rounded_is_refused_by_name() {
    let refused = |dtype, n, k, weights: &[f32], what: &str| {
        let error = quantize(dtype, n, k, weights).unwrap_err().to_string();
        assert!(error.contains(what), "{error} does not name {what:?}");
    };
    refused(Dtype::Int8, 2, 2, &[0.0; 3], "weights: want 4, got 3");
    refused(Dtype::Mxfp4, 1, 3, &[0.0; 3], "inputs of mxfp4");
    refused(int4(3), 1, 3, &[0.0; 3], "group of int4");
    let bad = [0.0, 1.0, f32::INFINITY, f32::NAN];
    for dtype in [Dtype::Int8, int4(2), fp8(1, 2), Dtype::Mxfp4] {
        refused(dtype, 2, 2, &bad, "not finite: want 4, got 2");
    }
    let row = Dtype::F16.widen(&quantize(Dtype::F16, 2, 2, &bad).unwrap());
    assert!(row.unwrap()[3].is_nan());
}
