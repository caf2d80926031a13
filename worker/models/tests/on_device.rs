//! Every family on a device against the processor: the same host side and the same kernels as on a card, run by the
//! emulator.
//!
//! With float32 weights products are the same chains on both, so that only sums of norms and softmaxes differ: logits are
//! within 2e-5 of the largest logit. With bfloat16 weights and caches every product rounds its inputs, and a difference in
//! the last bit of a float32 can become one of a bfloat16 (2⁻⁸): within 0.01 of the largest logit, and the greedy tokens
//! are equal wherever the processor's two best logits are further apart than that.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../kernels/cuda/tests/emulated/mod.rs"]
mod emulated;
#[expect(dead_code, reason = "walks are for other tests")]
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use foregate_api::model::Family;
use foregate_api::weights::{PlainFormat, Quantization, WeightFormat, WeightSettings};
use foregate_checkpoint::Checkpoint;
use foregate_checkpoint::tiny::Tiny;
use foregate_cuda::{Cuda, Staged, cache_bytes};
use foregate_kernels::{Cpu, Executor, KvCache};
use foregate_models::{LocalExperts, Model, ModelError, StepBatch, StepOutput};

use emulated::Emulated;
use support::{PAGE_TOKENS, Rig, bits, step_with, table};

const FAMILIES: [&str; 4] = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"];
const PAGES: usize = 64;

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(family)
}

const fn quantised(quantization: Quantization) -> WeightSettings {
    WeightSettings {
        dtype: PlainFormat::Bfloat16,
        quantization,
    }
}

fn settings(dtype: PlainFormat) -> WeightSettings {
    WeightSettings {
        dtype,
        quantization: Quantization::None,
    }
}

struct Device {
    emulated: Arc<Emulated>,
    model: Model,
    experts: LocalExperts,
    kv: KvCache,
}

impl Device {
    fn open(dir: &Path, settings: &WeightSettings) -> Self {
        Self::try_open(dir, settings, 1 << 30).unwrap()
    }

    fn try_open(
        dir: &Path,
        settings: &WeightSettings,
        memory: usize,
    ) -> Result<Self, ModelError> {
        let checkpoint = Checkpoint::open_with(dir, settings).unwrap();
        let emulated = Arc::new(Emulated::new(memory));
        let cuda = Cuda::new(emulated.clone());
        let ops = Arc::new(Staged::new(cuda.clone(), Cpu::new(1)));
        let experts = LocalExperts::load_on(&checkpoint, &cuda, ops)?;
        let model = Model::load_on(&checkpoint, Arc::new(cuda.clone()), 1, |_, _| {})?;
        let kv = cuda.kv_cache(model.kv_shape(PAGES, PAGE_TOKENS))?;
        Ok(Self {
            emulated,
            model,
            experts,
            kv,
        })
    }

    fn step(&mut self, parts: &[(&[u32], usize, &[u32])]) -> StepOutput {
        step_with(&mut self.model, &mut self.kv, &mut self.experts, parts)
    }
}

fn prompt(length: u32, seed: u32) -> Vec<u32> {
    (0..length)
        .map(|i| (i * i * 7 + i * 13 + seed) % 60 + 3)
        .collect()
}

/// The two greatest values of a row, and where the greatest is.
fn best(row: &[f32]) -> (u32, f32) {
    let first = foregate_kernels::top_n(row, 2);
    (first[0].0, first[0].1 - first[1].1)
}

/// Largest difference, as a share of the largest value.
fn apart(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let scale = wanted.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
    let most = found
        .iter()
        .zip(wanted)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(
        found.iter().all(|v| v.is_finite()),
        "something was not written"
    );
    most / scale
}

/// Prefill of three sequences, then decode, on both; tokens are those that the processor chooses.
fn compare(family: &str, settings: &WeightSettings, tolerance: f32) {
    let mut cpu = Rig::with(&fixture(family), settings, Cpu::new(1));
    let mut device = Device::open(&fixture(family), settings);
    let vocab = cpu.model.spec().vocab;
    let mut sequences = [prompt(19, 1), prompt(1, 5), prompt(8, 11)];
    let tables: Vec<Vec<u32>> = (0..3).map(|s| table(s * 8, 32)).collect();
    let mut done = [0; 3];
    let (mut most, mut steps) = (0.0_f32, 0);
    for _ in 0..5 {
        let parts: Vec<(&[u32], usize, &[u32])> = (0..3)
            .map(|s| (&sequences[s][done[s]..], done[s], tables[s].as_slice()))
            .collect();
        let (wanted, found) = (cpu.step(&parts), device.step(&parts));
        most = most.max(apart(&found.logits, &wanted.logits));
        let mut last = 0;
        for s in 0..3 {
            last += sequences[s].len() - done[s];
            done[s] = sequences[s].len();
            let row = (last - 1) * vocab..last * vocab;
            let scale = wanted
                .logits
                .iter()
                .fold(0.0_f32, |most, v| most.max(v.abs()));
            let (token, margin) = best(&wanted.logits[row.clone()]);
            if margin > 2.0 * tolerance * scale {
                assert_eq!(best(&found.logits[row]).0, token, "{family}: greedy token");
                steps += 1;
            }
            sequences[s].push(token);
        }
        if settings.dtype == PlainFormat::Float32 {
            assert_eq!(found.routes, wanted.routes, "{family}: experts");
        }
    }
    assert!(
        most <= tolerance,
        "{family} {settings:?}: logits apart {most}"
    );
    assert!(
        steps >= 8,
        "{family} {settings:?}: only {steps} tokens could be compared"
    );
}

#[test]
fn float32_weights_give_the_logits_of_the_processor() {
    for family in FAMILIES {
        compare(family, &settings(PlainFormat::Float32), 2e-5);
    }
}

#[test]
fn bfloat16_weights_give_the_logits_of_the_processor() {
    for family in FAMILIES {
        compare(family, &settings(PlainFormat::Bfloat16), 0.01);
    }
}

const QUANTISED: [Quantization; 4] = [
    Quantization::Int8,
    Quantization::Int4,
    Quantization::Fp8,
    Quantization::Mxfp4,
];

#[test]
fn quantised_weights_give_the_logits_of_the_processor() {
    for quantization in QUANTISED {
        for family in FAMILIES {
            compare(family, &quantised(quantization), 0.01);
        }
    }
}

#[test]
fn checkpoints_give_the_logits_of_the_processor_in_the_format_that_they_have() {
    for name in ["fp8", "mxfp4", "awq", "gptq", "gptq_v2"] {
        let name = format!("formats/{name}");
        compare(&name, &WeightSettings::default(), 0.01);
    }
    compare("formats/float16", &WeightSettings::default(), 2e-5);
}

/// A row's logits have the same bits alone, in a batch, and however its prompt was cut.
#[test]
fn a_row_does_not_depend_on_its_batch() {
    let formats = QUANTISED.map(quantised);
    for (family, settings) in FAMILIES
        .iter()
        .map(|family| (*family, settings(PlainFormat::Bfloat16)))
        .chain(FAMILIES.into_iter().zip(formats))
    {
        let mut device = Device::open(&fixture(family), &settings);
        let vocab = device.model.spec().vocab;
        let (one, two) = (prompt(21, 3), prompt(9, 8));
        let whole = device.step(&[(&one, 0, &table(0, 24))]);
        let mut cut = Vec::new();
        for (start, end) in [(0, 1), (1, 8), (8, 20), (20, 21)] {
            let pages = table(16, 24);
            cut.extend(device.step(&[(&one[start..end], start, &pages)]).logits);
        }
        assert_eq!(bits(&cut), bits(&whole.logits), "{family}: cut");
        let both = device.step(&[(&two, 0, &table(32, 12)), (&one, 0, &table(40, 24))]);
        assert_eq!(
            bits(&both.logits[two.len() * vocab..]),
            bits(&whole.logits),
            "{family}: beside another"
        );
        let routes = both.routes.len() / 30 * 9;
        assert_eq!(both.routes[routes..], whole.routes, "{family}: experts");
    }
}

/// Nothing comes back to the host in a step but choices and logits.
#[test]
fn a_step_stays_on_the_device() {
    let mut device = Device::open(&fixture("qwen2_moe"), &settings(PlainFormat::Bfloat16));
    let tokens = prompt(5, 2);
    let pages = table(0, 8);
    device.step(&[(&tokens, 0, &pages)]);
    let before = device.emulated.reads();
    device.step(&[(&tokens[..1], 5, &pages)]);
    assert_eq!(device.emulated.reads() - before, 2);
    let launched = device.emulated.launches();
    for kernel in [
        "fg_moe_gate_up_bf16_m8",
        "fg_combine",
        "fg_attention_bf16_d64",
    ] {
        assert!(launched.contains_key(kernel), "{kernel} in {launched:?}");
    }
}

/// A sequence of two splits of the attention, and one of the first alone, in one step.
#[test]
fn positions_beyond_a_split_agree() {
    let mut tiny = Tiny::new(Family::Mixtral);
    tiny.format = WeightFormat::Float32;
    tiny.max_positions = 640;
    let dir = tempfile::tempdir().unwrap();
    tiny.write(dir.path()).unwrap();
    let settings = settings(PlainFormat::Float32);
    let mut cpu = Rig::with(dir.path(), &settings, Cpu::new(1));
    let mut device = Device::open(dir.path(), &settings);
    let shape = cpu.model.kv_shape(20, 32);
    cpu.kv = KvCache::new(shape).unwrap();
    device.kv = device.model.executor().kv_cache(shape).unwrap();
    let (long, short) = (prompt(530, 1), prompt(3, 4));
    let (long_pages, short_pages): (Vec<u32>, _) = ((1..18).rev().collect(), [19]);
    for parts in [
        &[
            (&long[..520], 0, &long_pages[..]),
            (&short[..2], 0, &short_pages[..]),
        ][..],
        &[
            (&short[2..], 2, &short_pages),
            (&long[520..521], 520, &long_pages),
        ],
    ] {
        let (wanted, found) = (cpu.step(parts), device.step(parts));
        let most = apart(&found.logits, &wanted.logits);
        assert!(most <= 2e-5, "apart {most}");
    }
    assert!(device.emulated.launches()["fg_attention_merge"] > 0);
}

#[test]
fn a_device_without_room_says_so() {
    let full = Device::try_open(
        &fixture("mixtral"),
        &settings(PlainFormat::Float32),
        200_000,
    );
    let text = full.err().unwrap().to_string();
    assert!(
        text.contains("no memory on the device for weights"),
        "{text}"
    );
}

#[test]
fn a_failed_kernel_fails_the_step_and_names_the_call() {
    let mut device = Device::open(&fixture("qwen3_moe"), &settings(PlainFormat::Bfloat16));
    device.emulated.fail_after(7);
    let batch = StepBatch {
        tokens: &[5],
        positions: &[0],
        sequence_of_row: &[0],
        page_tables: &[&[3]],
        logit_rows: &[0],
    };
    let mut out = StepOutput::default();
    let error = device
        .model
        .forward(&batch, &mut device.kv, &mut device.experts, &mut out)
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("launch failed with 719"), "{text}");
}

/// Plans of a card's memory reckon with the bytes of the specification.
#[test]
fn weights_take_the_bytes_of_their_format() {
    let mut reckoned = Vec::new();
    for quantization in [Quantization::None].into_iter().chain(QUANTISED) {
        let device = Device::open(&fixture("qwen2_moe"), &quantised(quantization));
        let spec = device.model.spec();
        let experts = spec.moe_layers() * spec.experts;
        let weights = spec.dense_bytes() + experts * spec.expert_bytes();
        let taken = device.emulated.used() - cache_bytes(device.kv.shape()).unwrap();
        // Beside weights there are the addresses of experts.
        assert_eq!(taken, weights + experts * 3 * 8, "{quantization}");
        reckoned.push(weights);
    }
    // bfloat16, then int8 and int4: less each time.
    assert!(reckoned[..3].is_sorted_by(|a, b| a > b), "{reckoned:?}");
}

/// All memory goes back with the model.
#[test]
fn memory_is_given_back() {
    let device = Device::open(&fixture("olmoe"), &settings(PlainFormat::Bfloat16));
    let emulated = Arc::clone(&device.emulated);
    assert!(emulated.used() > 100_000);
    drop(device);
    assert_eq!(emulated.used(), 0);
}
