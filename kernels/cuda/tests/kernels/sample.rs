use foregate_kernels::{LogSoftmax, Ops, Oracle, argmax};

use crate::call::Call;
use crate::numbers::{EPS, Random, assert_close, bits};

fn softmax(logits: &[f32], width: usize) -> Vec<f32> {
    let mut call = Call::new("fg_log_softmax");
    call.memory(logits);
    let out = call.output::<f32>(logits.len());
    call.value(width as u32)
        .run([(logits.len() / width) as u32, 1, 1]);
    call.read(out)
}

#[test]
fn log_probabilities_are_close_and_apart_from_other_rows() {
    let mut random = Random(31);
    for width in [1, 5, 300, 4096] {
        let mut logits: Vec<f32> = random.floats(4 * width).iter().map(|x| x * 20.0).collect();
        if width > 1 {
            logits[1] = f32::NEG_INFINITY;
            logits[3 * width] = f32::NAN;
        }
        let got = softmax(&logits, width);
        let mut want = vec![0.0; logits.len()];
        Oracle
            .log_softmax(LogSoftmax {
                logits: &logits,
                width,
                out: &mut want,
            })
            .unwrap();
        assert_close(&got, &want, |i| {
            16.0 * EPS * (40.0 + f64::from(want[i].abs()))
        });
        for row in 0..4 {
            let range = row * width..(row + 1) * width;
            assert_eq!(
                bits(&softmax(&logits[range.clone()], width)),
                bits(&got[range])
            );
        }
    }
}

#[test]
fn the_greatest_is_found_as_on_the_processor() {
    let mut random = Random(32);
    let mut rows: Vec<Vec<f32>> = Vec::new();
    for width in [1, 31, 256, 1000] {
        rows.push(vec![f32::NAN; width]);
        rows.push(vec![f32::NEG_INFINITY; width]);
        rows.push(vec![1.0; width]);
        for _ in 0..8 {
            // Few values, so that there are ties.
            let mut row: Vec<f32> = (0..width).map(|_| random.below(9) as f32).collect();
            row[random.below(width)] = f32::NAN;
            rows.push(row);
        }
    }
    for row in rows {
        let mut call = Call::new("fg_argmax");
        call.memory(&row);
        let out = call.output::<u32>(1);
        call.value(row.len() as u32).run([1, 1, 1]);
        assert_eq!(call.read::<u32>(out), [argmax(&row)], "{row:?}");
    }
}
