use std::collections::BTreeMap;

use foregate_api::model::Family;
use safetensors::tensor::TensorView;
use safetensors::{SafeTensors, serialize_to_file};

use super::*;
use crate::header::Dtype;
use crate::tiny::Tiny;

type Parts = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Writes a tiny model, lets `change` have its tensors, and opens what came of it.
fn changed(change: impl FnOnce(&mut Parts)) -> Result<Checkpoint, CheckpointError> {
    let dir = tempfile::tempdir().unwrap();
    Tiny::new(Family::Qwen2Moe).write(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let mut parts: Parts = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let shape = view.shape().to_vec();
            (name, (view.dtype(), shape, view.data().to_vec()))
        })
        .collect();
    change(&mut parts);
    let views = parts.iter().map(|(name, (dtype, shape, data))| {
        let view = TensorView::new(*dtype, shape.clone(), data).unwrap();
        (name, view)
    });
    serialize_to_file(views, None, &path).unwrap();
    Checkpoint::open(dir.path())
}

fn refused(change: impl FnOnce(&mut Parts)) -> String {
    changed(change).unwrap_err().to_string()
}

const DOWN: &str = "model.layers.1.mlp.experts.5.down_proj.weight";

#[test]
fn a_missing_tensor_is_named() {
    let error = refused(|parts| drop(parts.remove(DOWN)));
    assert!(
        error.contains(DOWN) && error.contains("found none"),
        "{error}"
    );
    assert!(error.contains("[32, 24]"), "{error}");
}

#[test]
fn a_misshapen_tensor_is_named() {
    let error = refused(|parts| parts.get_mut(DOWN).unwrap().1.reverse());
    assert!(
        error.contains(DOWN) && error.contains("[24, 32]"),
        "{error}"
    );
}

#[test]
fn a_foreign_format_is_named() {
    let error = refused(|parts| {
        let (dtype, _, data) = parts.get_mut(DOWN).unwrap();
        *dtype = Dtype::F16;
        data.truncate(data.len() / 2);
    });
    assert!(error.contains(DOWN) && error.contains("F16"), "{error}");
}

#[test]
fn a_foreign_tensor_is_named() {
    let extra = "model.layers.7.input_layernorm.weight";
    let error = refused(|parts| {
        let copy = parts["model.norm.weight"].clone();
        parts.insert(extra.to_owned(), copy);
    });
    assert!(error.contains(extra), "{error}");
}

#[test]
fn old_rotary_buffers_and_norms_of_another_format_are_fine() {
    let opened = changed(|parts| {
        let copy = parts["model.norm.weight"].clone();
        parts.insert(
            "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(),
            copy,
        );
        let (dtype, _, data) = parts.get_mut("model.norm.weight").unwrap();
        *dtype = Dtype::BF16;
        data.truncate(data.len() / 2);
    });
    assert!(opened.is_ok(), "{opened:?}");
}

#[test]
fn an_expert_is_its_three_matrices() {
    let checkpoint = changed(|_| {}).unwrap();
    let parts = checkpoint.expert(LayerId(1), ExpertId(5)).unwrap();
    let canonical = parts.to_canonical();
    assert_eq!(canonical.len(), checkpoint.spec().expert_bytes());
    assert!(canonical.ends_with(checkpoint.tensor(DOWN).unwrap().bytes));
    assert_eq!(parts.hash(), crate::ExpertHash::of(&canonical));
    assert_ne!(
        parts.hash(),
        checkpoint.expert(LayerId(0), ExpertId(5)).unwrap().hash()
    );
    assert!(checkpoint.expert(LayerId(1), ExpertId(8)).is_err());
    assert!(checkpoint.expert(LayerId(3), ExpertId(0)).is_err());
}

#[test]
fn moe_layers_are_counted_without_dense_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new(Family::Qwen3Moe);
    tiny.set
        .insert("mlp_only_layers".to_owned(), serde_json::json!([0]));
    tiny.write(dir.path()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let parts = checkpoint.expert(LayerId(0), ExpertId(0)).unwrap();
    let name = "model.layers.1.mlp.experts.0.up_proj.weight";
    assert_eq!(parts.up, checkpoint.tensor(name).unwrap().bytes);
    assert!(checkpoint.expert(LayerId(2), ExpertId(0)).is_err());
}

#[test]
fn missing_and_damaged_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(open().contains("config.json"), "{}", open());
    Tiny::new(Family::Olmoe).write(dir.path()).unwrap();
    let weights = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    assert!(
        open().contains("model.safetensors") && open().contains("tensor"),
        "{}",
        open()
    );
    std::fs::write(&weights, b"").unwrap();
    assert!(open().contains("0 bytes"), "{}", open());
    std::fs::remove_file(&weights).unwrap();
    assert!(
        open().contains("neither model.safetensors nor"),
        "{}",
        open()
    );
    std::fs::write(dir.path().join("generation_config.json"), b"[]").unwrap();
    assert!(open().contains("generation_config.json"), "{}", open());
}

#[test]
fn shard_lists_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new(Family::Mixtral);
    tiny.shards = 2;
    tiny.write(dir.path()).unwrap();
    assert!(Checkpoint::open(dir.path()).is_ok());
    let list = dir.path().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&list).unwrap();
    let with = |text: String| {
        std::fs::write(&list, text).unwrap();
        Checkpoint::open(dir.path()).unwrap_err().to_string()
    };
    let outside = with(text.replace("model-00001-of", "../model-00001-of"));
    assert!(outside.contains("not a file name"), "{outside}");
    let swapped = text
        .replace("00001-of", "x-of")
        .replace("00002-of", "00001-of")
        .replace("x-of", "00002-of");
    assert!(with(swapped).contains("is not in"));
    let missing = with(text.replace("model-00002-of", "model-00003-of"));
    assert!(
        missing.contains("model-00003-of-00002.safetensors"),
        "{missing}"
    );
    assert!(with("{}".to_owned()).contains("weight_map"));
    std::fs::write(&list, &text).unwrap();
    let copy = |from: &str, to: &str| {
        std::fs::copy(dir.path().join(from), dir.path().join(to)).unwrap();
    };
    copy(
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    );
    let twice = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(
        twice.contains("00001-of") && twice.contains("00002-of"),
        "{twice}"
    );
}
