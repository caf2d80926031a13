//! Weights converted and quantised at load: what is in memory, what it costs, and that nothing but the
//! format decides about a bit.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use foregate_api::ids::{ExpertId, LayerId};
use foregate_api::model::Family;
use foregate_api::weights::{Part, PlainFormat, Quantization, WeightFormat, WeightSettings};
use foregate_checkpoint::tiny::Tiny;
use foregate_checkpoint::{Checkpoint, dtype, names};
use foregate_kernels::Cpu;
use foregate_models::ExpertWeights;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize_to_file};

use support::{Rig, bits, table};

const FAMILIES: [Family; 4] = [
    Family::Qwen3Moe,
    Family::Qwen2Moe,
    Family::Mixtral,
    Family::Olmoe,
];

/// Each with the mean distance of a logit from the float32 model's, as a share of the largest logit: about
/// twice of what was measured over the four families.
const QUANTIZATIONS: [(Quantization, f32); 4] = [
    (Quantization::Int8, 0.015),
    (Quantization::Int4, 0.15),
    (Quantization::Fp8, 0.05),
    (Quantization::Mxfp4, 0.2),
];

fn tiny(family: Family, format: WeightFormat) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new(family);
    tiny.format = format;
    tiny.write(dir.path()).unwrap();
    dir
}

fn quantised(quantization: Quantization) -> WeightSettings {
    WeightSettings {
        dtype: PlainFormat::Auto,
        quantization,
    }
}

fn converted(dtype: PlainFormat) -> WeightSettings {
    WeightSettings {
        dtype,
        quantization: Quantization::None,
    }
}

fn tokens() -> Vec<u32> {
    (0..20).map(|i| (i * 13 + 5) % 60 + 3).collect()
}

fn logits(rig: &mut Rig) -> Vec<f32> {
    let tokens = tokens();
    rig.walk(&tokens, &[tokens.len()], &table(0, tokens.len()))
        .logits
}

#[test]
fn quantised_models_stay_near_the_plain_one() {
    for family in FAMILIES {
        let dir = tiny(family, WeightFormat::Float32);
        let plain = logits(&mut Rig::open(dir.path()));
        let largest = plain.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
        for (quantization, bound) in QUANTIZATIONS {
            let mut rig = Rig::with(dir.path(), &quantised(quantization), Cpu::new(2));
            let found = logits(&mut rig);
            let apart = found
                .iter()
                .zip(&plain)
                .map(|(a, b)| (a - b).abs())
                .sum::<f32>()
                / found.len() as f32;
            assert!(
                apart > 0.0 && apart <= bound * largest,
                "{family:?} in {quantization:?}: logits apart {apart} of {largest}"
            );
        }
    }
}

#[test]
fn threads_do_not_change_a_bit_of_what_is_loaded() {
    let dir = tiny(Family::Qwen2Moe, WeightFormat::Bfloat16);
    for (quantization, _) in QUANTIZATIONS {
        let settings = quantised(quantization);
        let mut one = Rig::with(dir.path(), &settings, Cpu::new(1));
        let mut three = Rig::with(dir.path(), &settings, Cpu::new(3));
        assert_eq!(bits(&logits(&mut one)), bits(&logits(&mut three)));
        for layer in 0..3 {
            for expert in 0..8 {
                let hash = |rig: &Rig| {
                    let expert = rig.experts.expert(LayerId(layer), ExpertId(expert));
                    expert.unwrap().hash()
                };
                assert_eq!(hash(&one), hash(&three));
            }
        }
    }
}

#[test]
fn an_expert_travels_in_the_format_it_has_in_memory() {
    let dir = tiny(Family::Mixtral, WeightFormat::Bfloat16);
    let mut hashes = Vec::new();
    for (quantization, _) in QUANTIZATIONS {
        let checkpoint = Checkpoint::open_with(dir.path(), &quantised(quantization)).unwrap();
        let loaded = ExpertWeights::load(&checkpoint, LayerId(1), ExpertId(2)).unwrap();
        let sent = loaded.to_canonical().unwrap();
        assert_eq!(sent.len(), checkpoint.spec().expert_bytes());
        let received = ExpertWeights::from_canonical(checkpoint.spec(), &sent).unwrap();
        assert_eq!(received.hash(), loaded.hash());
        assert_eq!(received.to_canonical().unwrap(), sent);
        assert!(ExpertWeights::from_canonical(checkpoint.spec(), &sent[1..]).is_err());
        hashes.push(loaded.hash());
    }
    hashes.sort();
    hashes.dedup();
    assert_eq!(hashes.len(), QUANTIZATIONS.len());
}

#[test]
fn widening_and_rounding_are_exact() {
    let dir = tiny(Family::Olmoe, WeightFormat::Bfloat16);
    let wide = Checkpoint::open_with(dir.path(), &converted(PlainFormat::Float32)).unwrap();
    let same = Checkpoint::open(dir.path()).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let read = |checkpoint: &Checkpoint| {
        let bytes = checkpoint.matrix(Part::Attention, name, (32, 32), 2);
        bytes.unwrap().into_owned()
    };
    let (words, halves) = (read(&wide), read(&same));
    for (word, half) in words
        .as_chunks::<4>()
        .0
        .iter()
        .zip(halves.as_chunks::<2>().0)
    {
        assert_eq!(
            f32::from_le_bytes(*word),
            half::bf16::from_le_bytes(*half).to_f32()
        );
    }
    // Rounding what was widened gives back what was there.
    let dir = tiny(Family::Olmoe, WeightFormat::Float32);
    let narrow = converted(PlainFormat::Bfloat16);
    let found = read(&Checkpoint::open_with(dir.path(), &narrow).unwrap());
    assert_eq!(found, halves);
}

/// A bfloat16 model widened to float32 computes as Hugging Face transformers does with such weights: in
/// float32 throughout. A float32 file with the same numbers is that computation.
#[test]
fn a_widened_model_has_the_bits_of_a_float32_file() {
    let narrow = tiny(Family::Qwen3Moe, WeightFormat::Bfloat16);
    let wide = tempfile::tempdir().unwrap();
    let config = std::fs::read_to_string(narrow.path().join("config.json")).unwrap();
    let config = config.replace("bfloat16", "float32");
    std::fs::write(wide.path().join("config.json"), config).unwrap();
    let bytes = std::fs::read(narrow.path().join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let halves = view.data().as_chunks::<2>().0.iter();
            let words =
                halves.flat_map(|h| half::bf16::from_le_bytes(*h).to_f32().to_le_bytes());
            (name, view.shape().to_vec(), words.collect())
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, data)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), data).unwrap();
        (name, view)
    });
    serialize_to_file(views, None, &wide.path().join("model.safetensors")).unwrap();

    let settings = converted(PlainFormat::Float32);
    let widened = logits(&mut Rig::with(narrow.path(), &settings, Cpu::new(2)));
    let as_stored = logits(&mut Rig::open(narrow.path()));
    assert_eq!(bits(&widened), bits(&logits(&mut Rig::open(wide.path()))));
    assert_ne!(bits(&widened), bits(&as_stored));
}

#[test]
fn what_the_spec_says_of_memory_is_what_is_loaded() {
    for family in FAMILIES {
        let dir = tiny(family, WeightFormat::Bfloat16);
        let all = QUANTIZATIONS.map(|(quantization, _)| quantised(quantization));
        for settings in all.into_iter().chain([WeightSettings::default()]) {
            let checkpoint = Checkpoint::open_with(dir.path(), &settings).unwrap();
            let spec = checkpoint.spec();
            let (mut dense, mut experts) = (0, 0);
            for want in names::expected(spec) {
                match want.kind {
                    names::Kind::Vector => dense += 4 * want.shape[0],
                    names::Kind::Matrix(part) => {
                        let shape = (want.shape[0], want.shape[1]);
                        let bytes = checkpoint.matrix(part, &want.name, shape, 1).unwrap();
                        let format = spec.formats.of(part);
                        let kernels = dtype(format, shape.1).bytes(shape.0, shape.1);
                        assert_eq!(Some(bytes.len()), kernels, "{format}");
                        match part {
                            Part::Expert => experts += bytes.len(),
                            _ => dense += bytes.len(),
                        }
                    }
                }
            }
            assert_eq!(dense, spec.dense_bytes(), "{family:?} {settings:?}");
            let count = spec.moe_layers() * spec.experts;
            assert_eq!(experts, count * spec.expert_bytes());
        }
    }
}

#[test]
fn routers_and_an_embedding_of_its_own_are_not_quantised() {
    let dir = tiny(Family::Qwen2Moe, WeightFormat::Bfloat16);
    let settings = quantised(Quantization::Int8);
    let checkpoint = Checkpoint::open_with(dir.path(), &settings).unwrap();
    let formats = checkpoint.spec().formats;
    assert_eq!(formats.router, WeightFormat::Bfloat16);
    assert_eq!(formats.embedding, WeightFormat::Bfloat16);
    assert_eq!(formats.output, WeightFormat::Int8);
    assert_eq!(
        checkpoint.stored_format(Part::Output),
        WeightFormat::Bfloat16
    );
}
