//! Products with weights that are codes with scales.

use foregate_kernels::{Dtype, Embed, MatMul, Matrix, Ops, Oracle};

use crate::call::Call;
use crate::numbers::{EPS, Random, assert_close, bits, rounded, widened};

const TILES: [usize; 4] = [8, 16, 32, 64];

/// Number of a format in a launch, and what shares a scale.
fn format(dtype: Dtype, k: usize) -> (u32, u32, u32) {
    let size = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    match dtype {
        Dtype::Int8 => (1, 1, k as u32),
        Dtype::Int4 { group } => (2, 1, group as u32),
        Dtype::Fp8 { block_n, block_k } => (3, size(block_n), size(block_k)),
        Dtype::Mxfp4 => (4, 1, 32),
        Dtype::F32 | Dtype::Bf16 | Dtype::F16 => (0, 1, 1),
    }
}

/// Canonical bytes whose numbers are finite.
fn canonical(random: &mut Random, dtype: Dtype, n: usize, k: usize) -> Vec<u8> {
    let (_, block_n, block_k) = format(dtype, k);
    let blocks = n.div_ceil(block_n as usize) * k.div_ceil(block_k as usize);
    let codes = n * if matches!(dtype, Dtype::Int4 { .. } | Dtype::Mxfp4) {
        k.div_ceil(2)
    } else {
        k
    };
    let mut bytes: Vec<u8> = (0..codes).map(|_| random.next() as u8).collect();
    if matches!(dtype, Dtype::Int4 { .. }) && k % 2 == 1 {
        // Nothing stands beside the last code.
        for last in bytes.iter_mut().skip(k / 2).step_by(k.div_ceil(2)) {
            *last &= 0x0f;
        }
    }
    if matches!(dtype, Dtype::Fp8 { .. }) {
        bytes
            .iter_mut()
            .filter(|b| **b & 0x7f == 0x7f)
            .for_each(|b| *b = 0x42);
    }
    for _ in 0..blocks {
        if dtype == Dtype::Mxfp4 {
            bytes.push(120 + random.below(10) as u8);
        } else {
            bytes.extend((0.01 + random.float().abs()).to_le_bytes());
        }
    }
    if matches!(dtype, Dtype::Int4 { .. }) {
        bytes.extend((0..blocks).map(|_| random.below(17) as u8));
    }
    assert_eq!(dtype.bytes(n, k), Some(bytes.len()));
    bytes
}

fn product(
    dtype: Dtype,
    x: &[u16],
    w: &[u8],
    bias: Option<&[f32]>,
    n: usize,
    k: usize,
    tile: usize,
) -> Vec<f32> {
    let rows = x.len() / k;
    let mut call = Call::new(&format!("fg_gemm_coded_m{tile}"));
    call.memory(x);
    call.memory(w);
    let (format, block_n, block_k) = format(dtype, k);
    call.value(format).value(block_n).value(block_k);
    match bias {
        Some(bias) => drop(call.memory(bias)),
        None => call.null(),
    }
    let out = call.output::<f32>(rows * n);
    call.value(rows as u32).value(n as u32).value(k as u32);
    call.run([n.div_ceil(64) as u32, rows.div_ceil(tile) as u32, 1]);
    call.read(out)
}

const ALL: usize = usize::MAX;

fn formats() -> Vec<Dtype> {
    let fp8 = |block_n, block_k| Dtype::Fp8 { block_n, block_k };
    vec![
        Dtype::Int8,
        Dtype::Int4 { group: 32 },
        Dtype::Int4 { group: 128 },
        Dtype::Int4 { group: 16 },
        fp8(128, 128),
        fp8(1, ALL),
        fp8(ALL, ALL),
        fp8(24, 48),
        Dtype::Mxfp4,
    ]
}

#[test]
fn close_to_the_oracle_the_same_for_all_tiles_and_for_a_row_alone() {
    let mut random = Random(81);
    for dtype in formats() {
        // The last are rows that are no whole runs of 16 bytes, and scales at no multiple of 4.
        for (rows, n, k) in [
            (1, 5, 32),
            (9, 70, 192),
            (66, 130, 288),
            (3, 7, 150),
            (2, 3, 41),
        ] {
            if dtype == Dtype::Mxfp4 && k % 2 == 1 {
                continue;
            }
            let x = random.halves(rows * k);
            let bytes = canonical(&mut random, dtype, n, k);
            let bias = random.floats(n);
            let w = Matrix::pack(dtype, n, k, &bytes).unwrap();
            let wide = widened(&x);
            let mut want = vec![0.0; rows * n];
            Oracle
                .matmul(MatMul {
                    x: &wide,
                    rows,
                    w: &w,
                    bias: Some(&bias),
                    out: &mut want,
                })
                .unwrap();
            let got = product(dtype, &x, &bytes, Some(&bias), n, k, 8);
            let mut weights = vec![0.0; k];
            let sizes: Vec<f64> = (0..n)
                .map(|n| {
                    w.row(n, &mut weights).unwrap();
                    // |x| is at most 1.
                    weights.iter().map(|w| f64::from(w.abs())).sum()
                })
                .collect();
            assert_close(&got, &want, |i| {
                EPS * (k as f64 + 8.0) * (sizes[i % n] + 1.0)
            });
            for tile in TILES {
                let other = product(dtype, &x, &bytes, Some(&bias), n, k, tile);
                assert_eq!(bits(&other), bits(&got), "{dtype}, tile {tile}");
            }
            for row in [0, rows - 1] {
                let alone = product(
                    dtype,
                    &x[row * k..(row + 1) * k],
                    &bytes,
                    Some(&bias),
                    n,
                    k,
                    16,
                );
                assert_eq!(bits(&alone), bits(&got[row * n..(row + 1) * n]));
            }
        }
    }
}

#[test]
fn rows_of_an_embedding_are_exact() {
    let mut random = Random(83);
    let ids = [8_u32, 0, 3, 3];
    for dtype in formats() {
        for width in [70, 288, 41] {
            if dtype == Dtype::Mxfp4 && width % 2 == 1 {
                continue;
            }
            let bytes = canonical(&mut random, dtype, 9, width);
            let table = Matrix::pack(dtype, 9, width, &bytes).unwrap();
            let mut want = vec![0.0; ids.len() * width];
            Oracle
                .embed(Embed {
                    table: &table,
                    ids: &ids,
                    out: &mut want,
                })
                .unwrap();
            let mut call = Call::new("fg_embed_coded");
            call.memory(&bytes);
            let (format, block_n, block_k) = format(dtype, width);
            call.value(format).value(block_n).value(block_k);
            call.memory(&ids);
            let out = call.output::<f32>(want.len());
            call.value(9_u32).value(width as u32).run([4, 1, 1]);
            let got: Vec<f32> = call.read(out);
            assert_eq!(bits(&got), bits(&want), "{dtype} {width}");
        }
    }
}

#[test]
fn every_code_is_its_number() {
    // One row that is 1 at one input takes a column out of the weights, exactly.
    let fp8 = Dtype::Fp8 {
        block_n: 1,
        block_k: ALL,
    };
    for (dtype, codes) in [
        (Dtype::Int8, 256),
        (fp8, 256),
        (Dtype::Mxfp4, 16),
        (Dtype::Int4 { group: 32 }, 16),
    ] {
        let (n, k) = (codes, 32);
        let mut bytes: Vec<u8> = Vec::new();
        for code in 0..codes {
            match codes {
                256 => bytes.extend([code as u8; 32]),
                _ => bytes.extend([(code | code << 4) as u8; 16]),
            }
        }
        for output in 0..codes {
            match dtype {
                Dtype::Mxfp4 => bytes.push([0, 1, 127, 254, 255][output % 5]),
                _ => bytes.extend(0.75_f32.to_le_bytes()),
            }
        }
        if matches!(dtype, Dtype::Int4 { .. }) {
            bytes.extend((0..codes).map(|output| output as u8 + 1));
        }
        let w = Matrix::pack(dtype, n, k, &bytes).unwrap();
        let mut x = vec![0.0_f32; k];
        x[17] = 1.0;
        let got = product(dtype, &rounded(&x), &bytes, None, n, k, 8);
        let mut row = vec![0.0; k];
        for (output, got) in got.iter().enumerate() {
            w.row(output, &mut row).unwrap();
            let want = row[17];
            assert!(
                *got == want || got.is_nan() && want.is_nan(),
                "{dtype} {output}: {got}, {want}"
            );
        }
    }
}

/// Groups of slots, as the lists of a permutation.
struct Lists {
    offsets: Vec<u32>,
    group: Vec<u32>,
    first: Vec<u32>,
}

impl Lists {
    fn of(counts: &[u32], tile: u32) -> Self {
        let mut lists = Self {
            offsets: vec![0],
            group: vec![],
            first: vec![],
        };
        for (group, count) in (0..).zip(counts) {
            let start = *lists.offsets.last().unwrap();
            for first in (start..start + count).step_by(tile as usize) {
                lists.group.push(group);
                lists.first.push(first);
            }
            lists.offsets.push(start + count);
        }
        lists
    }

    fn give(&self, call: &mut Call) {
        call.memory(&self.offsets);
        call.memory(&self.group);
        call.memory(&self.first);
        call.memory(&[self.group.len() as u32]);
    }
}

#[test]
fn experts_are_the_linear_layers_that_they_are_made_of() {
    let mut random = Random(82);
    let (hidden, inner, counts) = (96, 64, [3_u32, 0, 9]);
    let slots = counts.iter().sum::<u32>() as usize;
    for dtype in [
        Dtype::Int8,
        Dtype::Int4 { group: 32 },
        Dtype::Fp8 {
            block_n: 32,
            block_k: 32,
        },
        Dtype::Mxfp4,
    ] {
        let mut all = |n, k| -> Vec<Vec<u8>> {
            (0..3)
                .map(|_| canonical(&mut random, dtype, n, k))
                .collect()
        };
        let (gate, up, down) = (all(inner, hidden), all(inner, hidden), all(hidden, inner));
        let x = random.halves(slots * hidden);
        for tile in TILES {
            let lists = Lists::of(&counts, tile as u32);
            let mut call = Call::new(&format!("fg_moe_gate_up_coded_m{tile}"));
            call.memory(&x);
            call.null();
            call.addresses(&gate);
            call.addresses(&up);
            let (number, block_n, block_k) = format(dtype, hidden);
            call.value(number).value(block_n).value(block_k);
            lists.give(&mut call);
            let out = call.output::<u16>(slots * inner);
            call.value(inner as u32).value(hidden as u32).run([2, 1, 1]);
            let middle: Vec<u16> = call.read(out);

            let mut call = Call::new(&format!("fg_moe_down_coded_m{tile}"));
            call.memory(&middle);
            call.addresses(&down);
            let (number, block_n, block_k) = format(dtype, inner);
            call.value(number).value(block_n).value(block_k);
            lists.give(&mut call);
            let out = call.output::<f32>(slots * hidden);
            call.value(hidden as u32).value(inner as u32).run([3, 1, 1]);
            let got: Vec<f32> = call.read(out);

            for expert in [0, 2] {
                let slots = lists.offsets[expert] as usize..lists.offsets[expert + 1] as usize;
                let x = &x[slots.start * hidden..slots.end * hidden];
                let g = product(dtype, x, &gate[expert], None, inner, hidden, 8);
                let u = product(dtype, x, &up[expert], None, inner, hidden, 8);
                let mut call = Call::new("fg_silu_mul");
                let activated = call.memory(&g);
                call.memory(&u);
                call.value(g.len() as u64).run([1, 1, 1]);
                let want = rounded(&call.read::<f32>(activated));
                assert_eq!(middle[slots.start * inner..slots.end * inner], want);
                let want = product(dtype, &want, &down[expert], None, hidden, inner, 8);
                assert_eq!(
                    bits(&got[slots.start * hidden..slots.end * hidden]),
                    bits(&want)
                );
            }
        }
    }
}
