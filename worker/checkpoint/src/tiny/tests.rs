use super::*;
use crate::Checkpoint;

const FAMILIES: [Family; 4] = [
    Family::Qwen3Moe,
    Family::Qwen2Moe,
    Family::Mixtral,
    Family::Olmoe,
];

#[test]
fn every_family_opens_in_one_file_and_in_shards_with_the_same_tensors() {
    for family in FAMILIES {
        for format in [WeightFormat::Float32, WeightFormat::Bfloat16] {
            let dir = tempfile::tempdir().unwrap();
            let mut tiny = Tiny::new(family);
            tiny.format = format;
            tiny.write(&dir.path().join("one")).unwrap();
            tiny.shards = 3;
            tiny.write(&dir.path().join("three")).unwrap();
            let one = Checkpoint::open(&dir.path().join("one")).unwrap();
            let three = Checkpoint::open(&dir.path().join("three")).unwrap();
            assert_eq!(one.spec(), three.spec());
            assert_eq!(one.spec().family, family);
            for want in crate::names::expected(one.spec()) {
                let (a, b) = (one.tensor(&want.name), three.tensor(&want.name));
                assert_eq!(a.unwrap().bytes, b.unwrap().bytes, "{}", want.name);
            }
        }
    }
}

#[test]
fn seeds_and_tensors_differ() {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new(Family::Mixtral);
    tiny.write(&dir.path().join("a")).unwrap();
    tiny.seed = 1;
    tiny.write(&dir.path().join("b")).unwrap();
    let a = Checkpoint::open(&dir.path().join("a")).unwrap();
    let b = Checkpoint::open(&dir.path().join("b")).unwrap();
    let up = |c: &Checkpoint, at: u32| {
        let parts = c.expert(
            foregate_api::ids::LayerId(0),
            foregate_api::ids::ExpertId(at),
        );
        parts.unwrap().up.to_vec()
    };
    assert_ne!(up(&a, 0), up(&b, 0));
    assert_ne!(up(&a, 0), up(&a, 1));
}

#[test]
fn weights_have_the_stated_mean_and_spread() {
    let want = crate::names::Expected {
        name: "x.gate.weight".to_owned(),
        shape: vec![100, 100],
        kind: crate::names::Kind::Matrix(foregate_api::weights::Part::Router),
    };
    let bytes = random::tensor(5, &want, WeightFormat::Float32);
    let values: Vec<f64> = bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|chunk| f64::from(f32::from_le_bytes(*chunk)))
        .collect();
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
    assert!(mean.abs() < 0.01, "{mean}");
    assert!((variance.sqrt() - 0.3).abs() < 0.01, "{variance}");
}

#[test]
fn the_benchmark_model_has_its_size() {
    let spec = Tiny::bench09().spec().unwrap();
    let bytes: usize = crate::names::expected(&spec)
        .iter()
        .map(|want| want.shape.iter().product::<usize>() * 2)
        .sum();
    assert_eq!(
        spec.layers * spec.experts * spec.expert_bytes(),
        1_610_612_736
    );
    assert!((1_700_000_000..1_900_000_000).contains(&bytes), "{bytes}");
}

#[test]
fn settings_that_describe_no_model_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new(Family::Olmoe);
    tiny.top_k = 9;
    let error = tiny.write(dir.path()).unwrap_err();
    assert!(error.to_string().contains("num_experts_per_tok"), "{error}");
}
