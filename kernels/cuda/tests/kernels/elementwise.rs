use foregate_kernels::{Add, Dtype, Embed, Matrix, Ops, Oracle, SigmoidScale, SiluMul};

use crate::call::{Call, bytes_of};
use crate::numbers::{EPS, Random, assert_close, bits, rounded, widened};

/// Values that spoil sums, among ordinary ones.
fn with_oddities(mut values: Vec<f32>) -> Vec<f32> {
    let odd = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        -0.0,
        1e-40,
        3e38,
    ];
    for (value, odd) in values.iter_mut().step_by(3).zip(odd) {
        *value = odd;
    }
    values
}

#[test]
fn add_is_exact_for_any_grid() {
    let mut random = Random(1);
    for (count, blocks) in [(1, 1), (1000, 2), (513, 7)] {
        let (x, y) = (with_oddities(random.floats(count)), random.floats(count));
        let mut want = x.clone();
        Oracle
            .add(Add {
                x: &mut want,
                y: &y,
            })
            .unwrap();
        let mut call = Call::new("fg_add");
        let out = call.memory(&x);
        call.memory(&y);
        call.value(count as u64).run([blocks, 1, 1]);
        assert_eq!(bits(&call.read(out)), bits(&want));
    }
}

#[test]
fn activations_are_close() {
    let mut random = Random(2);
    let gate: Vec<f32> = random.floats(700).iter().map(|x| x * 30.0).collect();
    let gate = with_oddities(gate);
    let up = random.floats(700);
    let mut want = gate.clone();
    Oracle
        .silu_mul(SiluMul {
            gate: &mut want,
            up: &up,
        })
        .unwrap();
    let mut call = Call::new("fg_silu_mul");
    let out = call.memory(&gate);
    call.memory(&up);
    call.value(700_u64).run([2, 1, 1]);
    let got: Vec<f32> = call.read(out);
    assert_close(&got, &want, |i| {
        16.0 * EPS * f64::from(want[i].abs()) + 1e-37
    });

    let (rows, width) = (3, 333);
    let (x, logits) = (
        with_oddities(random.floats(rows * width)),
        vec![0.5, -20.0, 90.0],
    );
    let mut want = x.clone();
    Oracle
        .sigmoid_scale(SigmoidScale {
            x: &mut want,
            logits: &logits,
            width,
        })
        .unwrap();
    let mut call = Call::new("fg_sigmoid_scale");
    let out = call.memory(&x);
    call.memory(&logits);
    call.value(width as u32).run([rows as u32, 1, 1]);
    assert_close(&call.read(out), &want, |i| {
        16.0 * EPS * f64::from(want[i].abs()) + 1e-37
    });
}

#[test]
fn rounding_is_that_of_the_processor() {
    let mut random = Random(3);
    let mut x = with_oddities(random.floats(600));
    // Ties, to even both ways.
    x.extend([
        f32::from_bits(0x3f80_8000),
        f32::from_bits(0x3f81_8000),
        f32::MAX,
    ]);
    let mut call = Call::new("fg_round_bf16");
    call.memory(&x);
    let out = call.output::<u16>(x.len());
    call.value(x.len() as u64).run([1, 1, 1]);
    let got: Vec<u16> = call.read(out);
    let want = rounded(&x);
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!(
            got == want || x[i].is_nan() && widened(&[*got])[0].is_nan(),
            "{}",
            x[i]
        );
    }
}

#[test]
fn rows_are_taken_by_index() {
    let mut random = Random(4);
    for width in [1, 70, 300] {
        let table = random.floats(9 * width);
        let index = [8_u32, 0, 3, 3];
        let want: Vec<f32> = index
            .iter()
            .flat_map(|i| table[*i as usize * width..][..width].to_vec())
            .collect();
        for kernel in ["fg_gather_rows", "fg_embed_f32"] {
            let mut call = Call::new(kernel);
            call.memory(&table);
            call.memory(&index);
            let out = call.output::<f32>(4 * width);
            call.value(width as u32).run([4, 1, 1]);
            assert_eq!(call.read::<f32>(out), want);
        }
        let half = rounded(&table);
        let matrix = Matrix::pack(Dtype::Bf16, 9, width, &bytes_of(&half)).unwrap();
        let mut want = vec![0.0; 4 * width];
        Oracle
            .embed(Embed {
                table: &matrix,
                ids: &index,
                out: &mut want,
            })
            .unwrap();
        let mut call = Call::new("fg_embed_bf16");
        call.memory(&half);
        call.memory(&index);
        let out = call.output::<f32>(4 * width);
        call.value(width as u32).run([4, 1, 1]);
        assert_eq!(call.read::<f32>(out), want);
    }
}

#[test]
fn every_half_is_its_number() {
    let width = 1 << 16;
    let halves: Vec<u16> = (0..=u16::MAX).collect();
    let mut call = Call::new("fg_embed_f16");
    call.memory(&halves);
    call.memory(&[0_u32]);
    let out = call.output::<f32>(width);
    call.value(width as u32).run([1, 1, 1]);
    for (half, got) in halves.iter().zip(call.read::<f32>(out)) {
        let want = half::f16::from_bits(*half).to_f32();
        assert!(
            got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
            "{half:#06x}: {got}, want {want}"
        );
    }
}
