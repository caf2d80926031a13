use super::*;

const PLAIN: [WeightFormat; 3] = [
    WeightFormat::Float32,
    WeightFormat::Bfloat16,
    WeightFormat::Float16,
];
const CODES: [WeightFormat; 4] = [
    WeightFormat::Int8,
    WeightFormat::Int4 { group: 64 },
    WeightFormat::Fp8 {
        rows: 128,
        columns: 128,
    },
    WeightFormat::Mxfp4,
];

fn weights(count: usize) -> Vec<u8> {
    (0..count)
        .map(|i| ((i * 37 % 211) as f32 - 100.0) / 64.0)
        .flat_map(f32::to_le_bytes)
        .collect()
}

fn run(conversion: Conversion, bytes: &[u8], threads: usize) -> Result<Vec<u8>, String> {
    conversion
        .run(Cow::Borrowed(bytes), threads)
        .map(Cow::into_owned)
}

fn from_float32(to: WeightFormat, n: usize, k: usize) -> Conversion {
    let from = WeightFormat::Float32;
    Conversion { n, k, from, to }
}

#[test]
fn the_same_format_is_not_copied() {
    for format in PLAIN {
        let (n, k) = (2, 3);
        let same = Conversion {
            n,
            k,
            from: format,
            to: format,
        };
        let bytes = [0; 24];
        assert!(matches!(
            same.run(Cow::Borrowed(&bytes), 2),
            Ok(Cow::Borrowed(_))
        ));
    }
}

/// Pieces are an implementation's business: the bytes are those of the whole matrix quantised at once.
#[test]
fn pieces_and_threads_do_not_show() {
    // More than one piece, and a last one that ends within a block of 128 rows.
    let (n, k) = (700, 900);
    let bytes = weights(n * k);
    let wide = widen(WeightFormat::Float32, &bytes);
    for to in CODES {
        let conversion = from_float32(to, n, k);
        assert!(conversion.piece_rows() < n, "{to}");
        let whole = quantize(dtype(to, k), n, k, &wide).unwrap();
        assert_eq!(whole.len(), to.matrix_bytes(n, k), "{to}");
        for threads in [1, 3] {
            assert!(run(conversion, &bytes, threads).unwrap() == whole, "{to}");
        }
    }
}

#[test]
fn halves_are_rounded_to_the_nearest_and_widened_exactly() {
    let bytes: Vec<u8> = [1.0_f32, 1.006, -2.5, 0.0]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    let to_bf16 = from_float32(WeightFormat::Bfloat16, 2, 2);
    let halves = run(to_bf16, &bytes, 1).unwrap();
    assert_eq!(
        widen(WeightFormat::Bfloat16, &halves),
        [1.0, 1.007_812_5, -2.5, 0.0]
    );
    let back = Conversion {
        from: WeightFormat::Bfloat16,
        to: WeightFormat::Float32,
        ..to_bf16
    };
    let wide = run(back, &halves, 1).unwrap();
    assert_eq!(
        widen(WeightFormat::Float32, &wide),
        [1.0, 1.007_812_5, -2.5, 0.0]
    );
}

#[test]
fn a_weight_beyond_the_format_is_an_error() {
    let bytes: Vec<u8> = [1.0_f32, 1e6]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    let error = run(from_float32(WeightFormat::Float16, 1, 2), &bytes, 1).unwrap_err();
    assert!(error.contains("1000000"), "{error}");
    assert!(run(from_float32(WeightFormat::Bfloat16, 1, 2), &bytes, 1).is_ok());
    // What was no number before is none after.
    let nan = f32::NAN.to_le_bytes();
    assert!(run(from_float32(WeightFormat::Float16, 1, 1), &nan, 1).is_ok());
    for to in CODES {
        let nan = [nan, nan].concat();
        assert!(run(from_float32(to, 1, 2), &nan, 1).is_err(), "{to}");
    }
}
