//! Quantised checkpoints that are not what they say. That they are read rightly is tested beside the models,
//! against what was written into them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use foregate_api::weights::{Quantization, WeightSettings};
use safetensors::tensor::TensorView;
use safetensors::{SafeTensors, serialize_to_file};
use serde_json::{Value, json};

use crate::header::Dtype;
use crate::{Checkpoint, CheckpointError};

type Parts = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../models/tests/fixtures/formats")
        .join(name)
}

/// Opens a fixture after a change of its configuration and its tensors, and reads all of it.
fn changed(
    name: &str,
    config: impl FnOnce(&mut Value),
    tensors: impl FnOnce(&mut Parts),
) -> Result<Checkpoint, CheckpointError> {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixture(name).join("config.json")).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    config(&mut value);
    std::fs::write(dir.path().join("config.json"), value.to_string()).unwrap();
    let bytes = std::fs::read(fixture(name).join("model.safetensors")).unwrap();
    let mut parts: Parts = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let shape = view.shape().to_vec();
            (name, (view.dtype(), shape, view.data().to_vec()))
        })
        .collect();
    tensors(&mut parts);
    let views = parts.iter().map(|(name, (dtype, shape, data))| {
        let view = TensorView::new(*dtype, shape.clone(), data).unwrap();
        (name, view)
    });
    serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(dir.path())?;
    let (spec, part) = (checkpoint.spec(), super::Part::Attention);
    let name = "model.layers.0.self_attn.k_proj.weight";
    let shape = (spec.kv_heads * spec.head_dim, spec.hidden);
    drop(checkpoint.matrix(part, name, shape, 1)?);
    Ok(checkpoint)
}

fn refused(
    name: &str,
    config: impl FnOnce(&mut Value),
    tensors: impl FnOnce(&mut Parts),
) -> String {
    changed(name, config, tensors).unwrap_err().to_string()
}

const NAME: &str = "model.layers.0.self_attn.k_proj";

fn of(suffix: &str) -> String {
    format!("{NAME}.{suffix}")
}

#[test]
fn the_fixtures_open() {
    for name in ["gptq", "gptq_v2", "awq", "fp8", "mxfp4", "float16"] {
        let opened = changed(name, |_| {}, |_| {});
        assert!(opened.is_ok(), "{name}: {opened:?}");
    }
}

#[test]
fn inputs_out_of_order_are_refused_by_tensor() {
    let error = refused(
        "gptq",
        |_| {},
        |parts| parts.get_mut(&of("g_idx")).unwrap().2[4] = 1,
    );
    assert!(error.contains(&of("g_idx")), "{error}");
    assert!(error.contains("input 1 is in group 1"), "{error}");
    assert!(error.contains("`desc_act`"), "{error}");
}

#[test]
fn an_order_that_is_announced_must_be_there() {
    let announce = |config: &mut Value| config["quantization_config"]["desc_act"] = json!(true);
    assert!(
        changed("gptq", announce, |_| {}).is_ok(),
        "the trivial order"
    );
    let error = refused("gptq", announce, |parts| {
        drop(parts.remove(&of("g_idx")));
    });
    assert!(error.contains(&of("g_idx")) && error.contains("found none"));
    // Without an order there is none.
    let quiet = changed(
        "gptq",
        |_| {},
        |parts| parts.retain(|name, _| !name.ends_with("g_idx")),
    );
    assert!(quiet.is_ok(), "{quiet:?}");
}

#[test]
fn every_tensor_of_a_matrix_is_needed() {
    for (name, suffix) in [
        ("gptq", "qzeros"),
        ("gptq", "scales"),
        ("awq", "qzeros"),
        ("awq", "scales"),
        ("fp8", "weight_scale_inv"),
    ] {
        let error = refused(name, |_| {}, |parts| drop(parts.remove(&of(suffix))));
        assert!(error.contains(&of(suffix)), "{name}: {error}");
        assert!(error.contains("found none"), "{name}: {error}");
    }
    let scales = "model.layers.1.mlp.experts.down_proj_scales";
    let error = refused("mxfp4", |_| {}, |parts| drop(parts.remove(scales)));
    assert!(error.contains(scales), "{error}");
}

#[test]
fn shapes_follow_the_configuration() {
    let error = refused(
        "awq",
        |config| config["quantization_config"]["group_size"] = json!(64),
        |_| {},
    );
    assert!(
        error.contains("qzeros") && error.contains("[1, "),
        "{error}"
    );
    let blocks = "model.layers.0.mlp.experts.gate_up_proj_blocks";
    let error = refused(
        "mxfp4",
        |_| {},
        |parts| parts.get_mut(blocks).unwrap().1 = vec![4, 64, 1, 32],
    );
    assert!(
        error.contains(blocks) && error.contains("[4, 64, 2, 16]"),
        "{error}"
    );
}

#[test]
fn biases_that_the_family_lacks_are_named() {
    let bias = "model.layers.0.mlp.experts.gate_up_proj_bias";
    let error = refused(
        "mxfp4",
        |_| {},
        |parts| {
            let bytes = vec![0; 4 * 64 * 2];
            parts.insert(bias.to_owned(), (Dtype::BF16, vec![4, 64], bytes));
        },
    );
    assert!(error.contains(bias), "{error}");
}

#[test]
fn a_part_has_one_format() {
    let error = refused(
        "fp8",
        |_| {},
        |parts| {
            let (dtype, _, data) = parts.get_mut(&of("weight")).unwrap();
            *dtype = Dtype::BF16;
            *data = [data.clone(), data.clone()].concat();
            parts.remove(&of("weight_scale_inv"));
        },
    );
    assert!(
        error.contains(NAME) && error.contains("bfloat16"),
        "{error}"
    );
    assert!(
        error.contains("attention") && error.contains("fp8"),
        "{error}"
    );
}

#[test]
fn an_exempt_module_is_plain() {
    let exempt = |config: &mut Value| {
        config["quantization_config"]["modules_to_not_convert"] = json!([NAME]);
    };
    let error = refused("awq", exempt, |_| {});
    assert!(error.contains(NAME), "{error}");
    assert!(error.contains("modules_to_not_convert"), "{error}");
}

/// A scheme in the configuration does not make tensors quantised.
#[test]
fn tensors_without_quantisation_stay_plain() {
    let plain = changed(
        "float16",
        |config| config["quantization_config"] = json!({ "quant_method": "mxfp4" }),
        |_| {},
    );
    let formats = plain.unwrap().spec().formats;
    assert_eq!(formats.expert, super::WeightFormat::Float16);
}

#[test]
fn quantised_tensors_without_a_configuration_are_refused() {
    for (name, says) in [("gptq", "found none"), ("fp8", "F8_E4M3")] {
        let error = refused(
            name,
            |config| config["quantization_config"] = Value::Null,
            |_| {},
        );
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn a_quantised_checkpoint_is_not_quantised_again() {
    let settings = WeightSettings {
        quantization: Quantization::Int8,
        ..WeightSettings::default()
    };
    let error = Checkpoint::open_with(&fixture("awq"), &settings).unwrap_err();
    let error = error.to_string();
    assert!(error.starts_with("quantization: int8, but "), "{error}");
    assert!(error.contains("already quantised (awq)"), "{error}");
}
