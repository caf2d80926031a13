//! Checkpoints in every format that is read, against transformers' float32 forward pass of the weights that
//! their tensors stand for (`fixtures/formats/generate.py` wrote both).
//!
//! Weights must be equal to the last bit. Logits may be apart by what rounding inputs to bfloat16 costs, which
//! products with quantised and bfloat16 weights do: at most 2⁻⁹ of an input, measured as at most 1.2 % of the largest logit.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};

use foregate_api::ids::{ExpertId, LayerId};
use foregate_api::weights::{Part, WeightFormat};
use foregate_checkpoint::{Checkpoint, dtype};
use foregate_kernels::Matrix;
use safetensors::SafeTensors;

use support::{Rig, bits, table};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/formats")
        .join(name)
}

/// The numbers of a tensor of float32.
fn floats(bytes: &[u8]) -> Vec<f32> {
    let words = bytes.as_chunks::<4>().0.iter();
    words.map(|word| f32::from_le_bytes(*word)).collect()
}

/// Canonical bytes, packed and unpacked by the kernels.
fn dequantised(
    format: WeightFormat,
    (n, k): (usize, usize),
    canonical: &[u8],
) -> (Vec<f32>, Vec<u8>) {
    let matrix = Matrix::pack(dtype(format, k), n, k, canonical).unwrap();
    let mut out = vec![0.0; n * k];
    for (row, out) in out.chunks_exact_mut(k).enumerate() {
        matrix.row(row, out).unwrap();
    }
    (out, matrix.unpack().unwrap())
}

/// One matrix by name, wherever the checkpoint keeps it.
fn canonical(checkpoint: &Checkpoint, name: &str, (n, k): (usize, usize)) -> (Part, Vec<u8>) {
    if !name.contains(".experts.1.") {
        let bytes = checkpoint.matrix(Part::Attention, name, (n, k), 2).unwrap();
        return (Part::Attention, bytes.into_owned());
    }
    let parts = checkpoint.expert(LayerId(0), ExpertId(1)).unwrap();
    let down = name.contains("down_proj") || name.contains("w2");
    let bytes = if down { parts.down } else { parts.up };
    (Part::Expert, bytes.into_owned())
}

/// Weights exactly, logits within `bound` of the largest.
fn check(name: &str, expert: WeightFormat, attention: WeightFormat, bound: f32) {
    let golden = std::fs::read(fixture(name).join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&golden).unwrap();
    let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
    let formats = checkpoint.spec().formats;
    assert_eq!(
        (formats.expert, formats.attention),
        (expert, attention),
        "{name}"
    );
    assert!(formats.router.is_plain() && formats.embedding.is_plain());
    let mut seen = 0;
    for (tensor, view) in golden.tensors() {
        let Some(weight) = tensor.strip_prefix("weight.") else {
            continue;
        };
        let shape = (view.shape()[0], view.shape()[1]);
        let (part, bytes) = canonical(&checkpoint, weight, shape);
        let (found, again) = dequantised(formats.of(part), shape, &bytes);
        assert_eq!(bits(&found), bits(&floats(view.data())), "{name}: {weight}");
        assert!(
            again == bytes,
            "{name}: {weight} comes back from the packed form"
        );
        seen += 1;
    }
    assert!(seen >= 2, "{name} has {seen} golden weights");

    let ids = golden.tensor("input_ids").unwrap();
    let ids: Vec<u32> = ids
        .data()
        .as_chunks::<8>()
        .0
        .iter()
        .map(|id| u32::try_from(i64::from_le_bytes(*id)).unwrap())
        .collect();
    let wanted = floats(golden.tensor("logits").unwrap().data());
    let mut rig = Rig::open(&fixture(name));
    let whole = rig.walk(&ids, &[ids.len()], &table(0, ids.len()));
    let largest = wanted.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
    let apart = whole
        .logits
        .iter()
        .zip(&wanted)
        .fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(
        apart <= bound * largest,
        "{name}: logits apart {apart} of {largest}"
    );
    // And however the prompt is cut, the bits are the same.
    let cut = rig.walk(&ids, &[5, 1, 9], &table(20, ids.len()));
    assert_eq!(bits(&cut.logits), bits(&whole.logits), "{name}");
}

/// What the rounding of inputs, keys, values and probabilities to bfloat16 may cost, of the largest logit.
const BF16_INPUTS: f32 = 0.03;

#[test]
fn float16() {
    let f16 = WeightFormat::Float16;
    check("float16", f16, f16, 2e-5);
}

#[test]
fn gptq_with_zero_points() {
    let int4 = WeightFormat::Int4 { group: 32 };
    check("gptq", int4, int4, BF16_INPUTS);
}

#[test]
fn gptq_v2_with_one_group_per_row() {
    let int4 = WeightFormat::Int4 {
        group: WeightFormat::WHOLE_ROW,
    };
    check("gptq_v2", int4, int4, BF16_INPUTS);
}

#[test]
fn awq() {
    let int4 = WeightFormat::Int4 { group: 32 };
    check("awq", int4, int4, BF16_INPUTS);
}

#[test]
fn fp8() {
    let fp8 = WeightFormat::Fp8 {
        rows: 128,
        columns: 128,
    };
    check("fp8", fp8, fp8, BF16_INPUTS);
}

#[test]
fn mxfp4() {
    check(
        "mxfp4",
        WeightFormat::Mxfp4,
        WeightFormat::Bfloat16,
        BF16_INPUTS,
    );
}
