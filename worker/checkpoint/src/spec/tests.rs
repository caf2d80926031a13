use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::json;

use super::*;

mod quantization;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

fn parse_value(config: &Value) -> Result<ModelSpec, SpecError> {
    parse(config.to_string().as_bytes(), None).map(|config| config.spec)
}

/// `Qwen/Qwen3-30B-A3B`.
fn qwen3() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 151_643, "decoder_sparse_step": 1,
        "eos_token_id": 151_645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40_960, "max_window_layers": 48, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
        "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151_936
    })
}

/// `Qwen/Qwen1.5-MoE-A2.7B`.
fn qwen2() -> Value {
    json!({
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151_643, "eos_token_id": 151_643, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
        "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "sliding_window": 32_768,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.39.0.dev0", "use_cache": true, "use_sliding_window": false,
        "vocab_size": 151_936, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4,
        "num_experts": 60, "norm_topk_prob": false, "output_router_logits": false,
        "router_aux_loss_coef": 0.001
    })
}

/// `mistralai/Mixtral-8x7B-v0.1`.
fn mixtral() -> Value {
    json!({
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32_768, "model_type": "mixtral",
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
        "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32_000
    })
}

/// `allenai/OLMoE-1B-7B-0924`.
fn olmoe() -> Value {
    json!({
        "architectures": ["OlmoeForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "clip_qkv": null, "eos_token_id": 50_279,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe",
        "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "output_router_logits": false, "pad_token_id": 1, "rms_norm_eps": 1e-5,
        "rope_scaling": null, "rope_theta": 10_000.0, "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 50_304
    })
}

fn all() -> [Value; 4] {
    [qwen3(), qwen2(), mixtral(), olmoe()]
}

fn with(mut config: Value, name: &str, value: Value) -> Value {
    config[name] = value;
    config
}

fn without(mut config: Value, name: &str) -> Value {
    config.as_object_mut().unwrap().remove(name);
    config
}

#[test]
fn the_hubs_models_are_understood() {
    let qwen3 = parse_value(&qwen3()).unwrap();
    assert_eq!(qwen3.family, Family::Qwen3Moe);
    assert_eq!((qwen3.heads * qwen3.head_dim, qwen3.hidden), (4096, 2048));
    assert_eq!(
        (qwen3.moe_layers(), qwen3.experts, qwen3.top_k),
        (48, 128, 8)
    );
    assert!(qwen3.norm_top_k && !qwen3.qkv_bias);
    assert_eq!(qwen3.eos, [151_645]);

    let qwen2 = parse_value(&qwen2()).unwrap();
    assert_eq!(qwen2.shared_inner, Some(5632));
    assert!(qwen2.qkv_bias && !qwen2.norm_top_k);
    assert_eq!(qwen2.head_dim, 128);

    let mixtral = parse_value(&mixtral()).unwrap();
    assert!(mixtral.norm_top_k);
    assert_eq!((mixtral.experts, mixtral.expert_inner), (8, 14336));
    assert_eq!(mixtral.rope_theta, 1e6);
    assert_eq!((mixtral.bos, mixtral.eos.as_slice()), (Some(1), &[2][..]));

    let olmoe = parse_value(&olmoe()).unwrap();
    assert_eq!(
        (olmoe.experts, olmoe.expert_inner, olmoe.clip_qkv),
        (64, 1024, None)
    );
    assert_eq!(olmoe.formats, WeightFormats::all(WeightFormat::Bfloat16));
    assert_eq!((olmoe.bos, olmoe.eos.as_slice()), (None, &[50_279][..]));
}

#[test]
fn every_fixture_and_the_demonstration_model_are_understood() {
    for dir in [
        "worker/models/tests/fixtures/qwen3_moe",
        "worker/models/tests/fixtures/qwen2_moe",
        "worker/models/tests/fixtures/mixtral",
        "worker/models/tests/fixtures/olmoe",
        "e2e/models/demo",
    ] {
        let dir = repository(dir);
        let read = |name| std::fs::read(dir.join(name)).unwrap();
        let generation = read("generation_config.json");
        let spec = parse(&read("config.json"), Some(&generation)).unwrap().spec;
        assert!(spec.moe_layers() == spec.layers, "{}", dir.display());
    }
}

#[test]
fn absent_fields_take_the_familys_defaults() {
    let bare = |family: &str| {
        json!({
            "model_type": family, "vocab_size": 100, "hidden_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 16, "num_experts": 8,
            "num_experts_per_tok": 2
        })
    };
    let qwen2 = parse_value(&bare("qwen2_moe")).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.norm_top_k && !qwen2.tied_embeddings);
    assert_eq!((qwen2.shared_inner, qwen2.expert_inner), (Some(5632), 1408));
    assert_eq!((qwen2.kv_heads, qwen2.head_dim), (16, 4));
    assert_eq!((qwen2.norm_eps, qwen2.rope_theta), (1e-6, 1e4));
    let qwen3 = parse_value(&bare("qwen3_moe")).unwrap();
    assert!(!qwen3.norm_top_k && !qwen3.qkv_bias);
    assert_eq!((qwen3.kv_heads, qwen3.expert_inner), (4, 768));
    let olmoe = parse_value(&bare("olmoe")).unwrap();
    assert_eq!(
        (olmoe.kv_heads, olmoe.norm_eps, olmoe.rope_theta),
        (16, 1e-5, 1e4)
    );
    let mixtral = parse_value(&bare("mixtral")).unwrap();
    assert_eq!(
        (mixtral.kv_heads, mixtral.norm_eps, mixtral.rope_theta),
        (8, 1e-5, 1e6)
    );
    assert_eq!(mixtral.max_positions, 131_072);
    assert_eq!(mixtral.formats, WeightFormats::all(WeightFormat::Float32));
    assert!(mixtral.eos.is_empty());
}

#[test]
fn both_spellings_mean_the_same() {
    for config in all() {
        let old = parse_value(&config).unwrap();
        let theta = config["rope_theta"].clone();
        let new = with(
            without(without(config.clone(), "rope_theta"), "rope_scaling"),
            "rope_parameters",
            json!({ "rope_theta": theta, "rope_type": "default" }),
        );
        let dtype = new["torch_dtype"].clone();
        let mut new = with(without(new, "torch_dtype"), "dtype", dtype);
        for (one, other) in [
            ("num_experts", "num_local_experts"),
            ("num_local_experts", "num_experts"),
        ] {
            if let Some(count) = config.get(one) {
                new = with(without(new, one), other, count.clone());
            }
        }
        assert_eq!(parse_value(&new).unwrap(), old);
    }
}

#[test]
fn sparse_and_dense_blocks() {
    let config = with(
        with(qwen2(), "decoder_sparse_step", json!(2)),
        "mlp_only_layers",
        json!([3]),
    );
    let blocks = parse_value(&config).unwrap().moe_blocks;
    assert_eq!(&blocks[..6], [false, true, false, false, false, true]);
}

#[test]
fn end_tokens_come_from_the_generation_config_first() {
    let config = mixtral().to_string();
    let read = |generation: Value| {
        let generation = generation.to_string();
        parse(config.as_bytes(), Some(generation.as_bytes()))
            .unwrap()
            .spec
    };
    let both = read(json!({ "eos_token_id": [7, 9], "do_sample": true, "temperature": 0.6 }));
    assert_eq!((both.eos.as_slice(), both.bos), (&[7, 9][..], Some(1)));
    assert_eq!(read(json!({ "bos_token_id": 5 })).bos, Some(5));
    assert_eq!(read(json!({ "eos_token_id": null })).eos, [2]);
    let wrong = parse(config.as_bytes(), Some(br#"{"eos_token_id": 32000}"#)).unwrap_err();
    assert!(
        wrong
            .to_string()
            .contains("eos_token_id of generation_config.json"),
        "{wrong}"
    );
}

#[test]
fn windows_that_cut_nothing_off_are_fine() {
    let long = with(mixtral(), "sliding_window", json!(32_768));
    assert!(parse_value(&long).is_ok());
    let off = with(qwen2(), "sliding_window", json!(16));
    assert!(parse_value(&off).is_ok());
    let longer = with(qwen2(), "use_sliding_window", json!(true));
    assert!(parse_value(&longer).is_ok());
}

#[test]
fn neutral_values_of_unsupported_fields_are_fine() {
    for (name, value) in [
        ("attention_bias", json!(false)),
        ("rope_scaling", json!({ "type": "default" })),
        ("partial_rotary_factor", json!(1.0)),
        ("quantization_config", Value::Null),
        ("_name_or_path", json!("somewhere")),
        ("router_jitter_noise", json!(0.0)),
        ("some_future_field", Value::Null),
    ] {
        for config in all() {
            let config = with(config, name, value.clone());
            assert!(
                parse_value(&config).is_ok(),
                "{name}: {:?}",
                parse_value(&config)
            );
        }
    }
    // As `Qwen/Qwen3-Coder-30B-A3B-Instruct` has them.
    let coder = with(qwen3(), "qkv_bias", json!(false));
    let coder = with(coder, "shared_expert_intermediate_size", json!(0));
    assert!(parse_value(&with(coder, "use_qk_norm", json!(true))).is_ok());
    let types = vec!["full_attention"; 24];
    assert!(parse_value(&with(qwen2(), "layer_types", json!(types))).is_ok());
}

#[test]
fn what_would_change_the_computation_is_refused_by_name() {
    let base = all();
    let cases: Vec<(usize, &str, Value, &str)> = vec![
        (0, "model_type", json!("deepseek_v3"), "model_type"),
        (0, "model_type", json!(3), "model_type"),
        (0, "hidden_act", json!("gelu"), "hidden_act"),
        (0, "attention_bias", json!(true), "attention_bias"),
        (3, "attention_bias", json!(true), "attention_bias"),
        (
            0,
            "quantization_config",
            json!({ "bits": 4 }),
            "quantization_config.quant_method",
        ),
        (0, "auto_map", json!({ "AutoModel": "x.py" }), "auto_map"),
        (
            0,
            "rope_scaling",
            json!({ "rope_type": "yarn", "factor": 4.0 }),
            "rope_scaling.rope_type",
        ),
        (
            0,
            "rope_scaling",
            json!({ "type": "linear" }),
            "rope_scaling.type",
        ),
        (
            0,
            "rope_scaling",
            json!({ "factor": 2.0 }),
            "rope_scaling.factor",
        ),
        (0, "rope_scaling", json!("yarn"), "rope_scaling"),
        (
            0,
            "rope_parameters",
            json!({ "rope_type": "llama3" }),
            "rope_parameters.rope_type",
        ),
        (
            0,
            "rope_parameters",
            json!({ "rope_theta": 5.0 }),
            "rope_parameters.rope_theta",
        ),
        (
            0,
            "rope_parameters",
            json!({ "full_attention": {} }),
            "rope_parameters.full_attention",
        ),
        (
            0,
            "partial_rotary_factor",
            json!(0.5),
            "partial_rotary_factor",
        ),
        (0, "rope_theta", json!(-1.0), "rope_theta"),
        (0, "torch_dtype", json!("float64"), "torch_dtype"),
        (0, "dtype", json!("float32"), "dtype"),
        (0, "num_local_experts", json!(64), "num_experts"),
        (0, "num_experts", json!(0), "num_experts"),
        (0, "num_experts", json!(65_536), "num_experts"),
        (0, "num_experts_per_tok", json!(129), "num_experts_per_tok"),
        (0, "num_key_value_heads", json!(5), "num_key_value_heads"),
        (0, "head_dim", json!(127), "head_dim"),
        (0, "hidden_size", json!(-4), "hidden_size"),
        (0, "hidden_size", json!(1e30), "hidden_size"),
        (
            0,
            "num_hidden_layers",
            json!(1_000_000_000_u64),
            "num_hidden_layers",
        ),
        (0, "vocab_size", Value::Null, "vocab_size"),
        (0, "mlp_only_layers", json!([48]), "mlp_only_layers"),
        (0, "mlp_only_layers", json!("none"), "mlp_only_layers"),
        (0, "decoder_sparse_step", json!(49), "mlp_only_layers"),
        (2, "sliding_window", json!(4096), "sliding_window"),
        (
            1,
            "layer_types",
            json!(["sliding_attention"]),
            "layer_types",
        ),
        (3, "clip_qkv", json!(0.0), "clip_qkv"),
        (3, "rms_norm_eps", json!("small"), "rms_norm_eps"),
        (0, "eos_token_id", json!(151_936), "eos_token_id"),
        (0, "eos_token_id", json!([1, "x"]), "eos_token_id"),
        (0, "norm_topk_prob", json!(1), "norm_topk_prob"),
        (0, "n_group", json!(4), "n_group"),
        (0, "logit_scale", json!(0.5), "logit_scale"),
        (2, "qkv_bias", json!(true), "qkv_bias"),
        (0, "qkv_bias", json!(true), "qkv_bias"),
        (0, "use_qk_norm", json!(false), "use_qk_norm"),
        (
            0,
            "shared_expert_intermediate_size",
            json!(64),
            "shared_expert_intermediate_size",
        ),
    ];
    for (at, name, value, field) in cases {
        let result = parse_value(&with(base[at].clone(), name, value.clone()));
        match result {
            Err(SpecError::Field {
                field: named,
                remedy,
                ..
            }) => {
                assert_eq!(named, field, "{name} = {value}");
                assert!(!remedy.is_empty());
            }
            other => panic!("{name} = {value}: {other:?}"),
        }
    }
}

#[test]
fn windows_in_force_are_refused() {
    let config = with(
        with(qwen2(), "use_sliding_window", json!(true)),
        "sliding_window",
        json!(4096),
    );
    let error = parse_value(&config).unwrap_err().to_string();
    assert!(error.contains("sliding_window"), "{error}");
    assert!(error.contains("not supported"), "{error}");
}

#[test]
fn other_kinds_of_files_are_refused() {
    for bytes in [&b""[..], b"[]", b"3", b"{", b"\xff\xfe", b"null", b"{}{}"] {
        assert!(matches!(parse(bytes, None), Err(SpecError::NotJson { .. })));
        let config = qwen3().to_string();
        assert!(parse(config.as_bytes(), Some(bytes)).is_err());
    }
    assert!(matches!(parse(b"{}", None), Err(SpecError::Field { .. })));
}

/// Any JSON, biased to the field names that are read.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0_u64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,12}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _parsed = parse(&bytes, Some(&bytes));
    }

    #[test]
    fn no_values_panic(
        family in 0_usize..4,
        changes in prop::collection::vec((0_usize..60, any_value()), 0..6),
        generation in any_value(),
    ) {
        let mut config = all()[family].clone();
        let names: Vec<String> = all()
            .iter()
            .flat_map(|config| config.as_object().unwrap().keys().cloned().collect::<Vec<_>>())
            .chain(["rope_parameters", "layer_types", "dtype", "quantization_config"].map(str::to_owned))
            .collect();
        for (at, value) in changes {
            config[names[at % names.len()].as_str()] = value;
        }
        if let Ok(Config { spec, .. }) = from_values(&config, Some(&generation)) {
            // What is accepted has consistent sizes and cannot overflow when its tensors are listed.
            prop_assert_eq!(spec.moe_blocks.len(), spec.layers);
            prop_assert!(spec.heads.is_multiple_of(spec.kv_heads));
            prop_assert!(spec.top_k <= spec.experts);
            prop_assert!(spec.heads.checked_mul(spec.head_dim).is_some());
        }
    }
}
