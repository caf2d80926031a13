//! The four families against the answers of their own implementation in Hugging Face transformers,
//! computed in float32 (`golden.safetensors` beside each fixture: teacher-forced logits, greedy
//! continuation, chosen experts).
//!
//! Tolerances: 2e-4 on log-probabilities (the stated contract), and 2e-5 of the largest logit on the
//! logits themselves, which is what two float32 computations that differ only in the order of their sums keep
//! (measured: 5e-6 in absolute terms).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use support::{Rig, bits, table};

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(family)
}

fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (at, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = at;
        }
    }
    best as u32
}

struct Golden {
    ids: Vec<u32>,
    greedy: Vec<u32>,
    logits: Vec<f32>,
    /// MoE layer → `tokens × top_k`.
    routers: BTreeMap<usize, Vec<u32>>,
}

impl Golden {
    fn load(family: &str) -> Self {
        let bytes = std::fs::read(fixture(family).join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ints = |name: &str| -> Vec<u32> {
            let view = file.tensor(name).unwrap();
            let (chunks, rest) = view.data().as_chunks::<8>();
            assert!(rest.is_empty());
            chunks
                .iter()
                .map(|chunk| u32::try_from(i64::from_le_bytes(*chunk)).unwrap())
                .collect()
        };
        let routers = file
            .names()
            .into_iter()
            .filter_map(|name| Some((name.strip_prefix("router.")?.parse().ok()?, ints(name))))
            .collect();
        let logits = file.tensor("logits").unwrap();
        Self {
            ids: ints("input_ids"),
            greedy: ints("greedy"),
            logits: logits
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|chunk| f32::from_le_bytes(*chunk))
                .collect(),
            routers,
        }
    }
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|v| f64::from(v - most).exp()).sum();
    row.iter().map(|v| f64::from(v - most) - sum.ln()).collect()
}

fn worst(found: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    found
        .iter()
        .zip(wanted)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max)
}

fn check(family: &str) {
    let golden = Golden::load(family);
    let mut rig = Rig::open(&fixture(family));
    let (vocab, top_k, layers) = {
        let spec = rig.model.spec();
        (spec.vocab, spec.top_k, spec.moe_layers())
    };
    let pages = table(3, golden.greedy.len());
    let whole = rig.walk(&golden.ids, &[golden.ids.len()], &pages);

    let scale = golden
        .logits
        .iter()
        .fold(0.0_f32, |most, v| most.max(v.abs()));
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|v| f64::from(*v)).collect() };
    let apart = worst(&wide(&whole.logits), &wide(&golden.logits));
    let mut apart_log: f64 = 0.0;
    for (found, wanted) in whole
        .logits
        .chunks_exact(vocab)
        .zip(golden.logits.chunks_exact(vocab))
    {
        apart_log = apart_log.max(worst(&log_softmax(found), &log_softmax(wanted)));
    }
    assert!(
        apart_log <= 2e-4,
        "{family}: log-probabilities apart {apart_log}"
    );
    assert!(
        apart <= 2e-5 * f64::from(scale),
        "{family}: logits apart {apart}"
    );

    assert_eq!(golden.routers.len(), layers);
    for (layer, wanted) in &golden.routers {
        let found: Vec<u32> = whole
            .routes
            .chunks_exact(layers * top_k)
            .flat_map(|row| &row[layer * top_k..(layer + 1) * top_k])
            .copied()
            .collect();
        assert_eq!(&found, wanted, "{family}: experts of layer {layer}");
    }

    // However the prompt is cut, and one token at a time, the bits are the same.
    for chunks in [&[1][..], &[7], &[16, 3, 1], &[39, 1], &[5, 32]] {
        let cut = rig.walk(&golden.ids, chunks, &table(20, golden.greedy.len()));
        assert_eq!(
            bits(&cut.logits),
            bits(&whole.logits),
            "{family} in {chunks:?}"
        );
        assert_eq!(cut.routes, whole.routes, "{family} in {chunks:?}");
    }

    // Greedy continuation on the cache of the whole walk.
    let mut tokens = golden.ids.clone();
    let mut last = whole.logits[whole.logits.len() - vocab..].to_vec();
    while tokens.len() < golden.greedy.len() {
        tokens.push(argmax(&last));
        let at = tokens.len() - 1;
        last = rig.step(&[(&tokens[at..], at, &pages)]).logits;
    }
    assert_eq!(tokens, golden.greedy, "{family}: greedy continuation");
}

#[test]
fn qwen3_moe() {
    check("qwen3_moe");
}

#[test]
fn qwen2_moe() {
    check("qwen2_moe");
}

#[test]
fn mixtral() {
    check("mixtral");
}

#[test]
fn olmoe() {
    check("olmoe");
}
