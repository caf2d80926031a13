//! `quantization_config`: what is read, and every refusal with its text.

use super::*;

fn quantized(section: Value) -> Result<Option<Quantized>, SpecError> {
    let config = with(qwen3(), "quantization_config", section);
    parse(config.to_string().as_bytes(), None).map(|config| config.quantized)
}

/// As AutoGPTQ and GPTQModel write it.
fn gptq() -> Value {
    json!({
        "bits": 4, "checkpoint_format": "gptq", "damp_percent": 0.01, "desc_act": false,
        "dynamic": null, "group_size": 128, "lm_head": false, "model_file_base_name": null,
        "meta": { "quantizer": ["gptqmodel:4.0.0"], "true_sequential": true },
        "pack_dtype": "int32", "quant_method": "gptq", "static_groups": false, "sym": true
    })
}

/// As AutoAWQ writes it.
fn awq() -> Value {
    json!({
        "backend": "autoawq", "bits": 4, "do_fuse": false, "exllama_config": null,
        "fuse_max_seq_len": null, "group_size": 128, "modules_to_fuse": null,
        "modules_to_not_convert": ["mlp.gate"], "quant_method": "awq", "version": "gemm",
        "zero_point": true
    })
}

/// As `Qwen/Qwen3-30B-A3B-FP8` has it.
fn fp8() -> Value {
    json!({
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
        "weight_block_size": [128, 128]
    })
}

/// As `openai/gpt-oss-20b` has it.
fn mxfp4() -> Value {
    json!({
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"
    })
}

#[test]
fn the_hubs_sections_are_understood() {
    let scheme = |section| quantized(section).unwrap().unwrap().scheme;
    let expected = Scheme::Gptq {
        group: 128,
        zero_less_one: true,
        reordered: false,
    };
    assert_eq!(scheme(gptq()), expected);
    let v2 = with(gptq(), "checkpoint_format", json!("gptq_v2"));
    let v2 = with(with(v2, "group_size", json!(-1)), "desc_act", json!(true));
    let expected = Scheme::Gptq {
        group: WeightFormat::WHOLE_ROW,
        zero_less_one: false,
        reordered: true,
    };
    assert_eq!(scheme(v2), expected);
    // Old files name no format.
    let old = without(gptq(), "checkpoint_format");
    assert_eq!(scheme(old), scheme(gptq()));
    assert_eq!(scheme(awq()), Scheme::Awq { group: 128 });
    let upper = with(awq(), "version", json!("GEMM"));
    assert_eq!(scheme(upper), Scheme::Awq { group: 128 });
    let (rows, columns) = (128, 128);
    assert_eq!(scheme(fp8()), Scheme::Fp8 { rows, columns });
    let scaled = with(fp8(), "scale_fmt", json!("ue8m0"));
    assert_eq!(scheme(scaled), Scheme::Fp8 { rows, columns });
    assert_eq!(scheme(mxfp4()), Scheme::Mxfp4);
    let exempt = quantized(fp8()).unwrap().unwrap().exempt;
    assert_eq!(exempt, ["lm_head", "model.layers.0.mlp.gate"]);
    assert_eq!(quantized(Value::Null).unwrap(), None);
}

#[test]
fn exempting_rules_are_fine() {
    let rules = json!({ "-:.*mlp\\.gate.*": {}, "-:lm_head": {} });
    assert!(quantized(with(gptq(), "dynamic", rules)).is_ok());
}

#[test]
fn every_other_variant_is_refused_with_its_field_and_a_remedy() {
    let cases = [
        (
            json!([]),
            "quantization_config`: expected an object, found []",
        ),
        (json!({}), "quant_method`: missing"),
        (
            json!({ "quant_method": "bitsandbytes" }),
            "quant_method`: `bitsandbytes` is not supported",
        ),
        (
            json!({ "quant_method": "compressed-tensors" }),
            "quant_method`: `compressed-tensors` is not supported",
        ),
        (
            with(gptq(), "bits", json!(8)),
            "bits`: 8 bits are not supported",
        ),
        (without(gptq(), "bits"), "bits`: missing"),
        (without(gptq(), "group_size"), "group_size`: missing"),
        (
            with(gptq(), "group_size", json!(16)),
            "group_size`: 16 is not supported",
        ),
        (
            with(gptq(), "group_size", json!("all")),
            "group_size`: \"all\" is not supported",
        ),
        (
            with(gptq(), "checkpoint_format", json!("marlin")),
            "checkpoint_format`: `marlin` is not supported",
        ),
        (
            with(gptq(), "is_marlin_format", json!(true)),
            "is_marlin_format`: true is not supported",
        ),
        (
            with(gptq(), "pack_dtype", json!("int64")),
            "pack_dtype`: `int64` is not supported; only `int32` is",
        ),
        (
            with(gptq(), "dynamic", json!({ "+:.*down.*": { "bits": 8 } })),
            "dynamic`: the rule `+:.*down.*` gives modules another format",
        ),
        (with(gptq(), "dynamic", json!(3)), "dynamic`: the rule `3`"),
        (
            with(gptq(), "desc_act", json!("no")),
            "desc_act`: expected true or false",
        ),
        (
            with(gptq(), "hadamard", json!(true)),
            "hadamard`: true is not known",
        ),
        (
            with(awq(), "version", json!("gemv")),
            "version`: `gemv` is not supported",
        ),
        (
            with(awq(), "backend", json!("llm-awq")),
            "backend`: `llm-awq` is not supported",
        ),
        (
            with(awq(), "zero_point", json!(false)),
            "zero_point`: weights without",
        ),
        (with(awq(), "bits", json!(3)), "bits`: 3 bits"),
        (
            with(fp8(), "fmt", json!("e5m2")),
            "fmt`: `e5m2` is not supported; only `e4m3` is",
        ),
        (
            with(fp8(), "activation_scheme", json!("static")),
            "activation_scheme`: `static` is not supported; only `dynamic` is",
        ),
        (
            with(fp8(), "weight_block_size", json!([1, 128])),
            "weight_block_size`: [1,128] is not supported",
        ),
        (
            without(fp8(), "weight_block_size"),
            "weight_block_size`: missing: one scale",
        ),
        (
            with(fp8(), "expert_dtype", json!("fp4")),
            "expert_dtype`: `fp4` is not",
        ),
        (
            with(fp8(), "modules_to_not_convert", json!("lm_head")),
            "modules_to_not_convert`: expected a list of names",
        ),
        (
            with(fp8(), "modules_to_not_convert", json!([1])),
            "modules_to_not_convert`: expected a list of names",
        ),
        (
            with(mxfp4(), "group_size", json!(16)),
            "group_size`: 16 is not known",
        ),
    ];
    for (section, wanted) in cases {
        let error = quantized(section.clone()).unwrap_err().to_string();
        assert!(error.contains("field `quantization_config"), "{error}");
        assert!(error.contains(wanted), "{section}: {error}");
        assert!(error.contains("; "), "no remedy: {error}");
    }
}

#[test]
fn float16_is_a_format() {
    for (field, config) in [
        (
            "torch_dtype",
            with(qwen3(), "torch_dtype", json!("float16")),
        ),
        (
            "dtype",
            with(without(qwen3(), "torch_dtype"), "dtype", json!("float16")),
        ),
    ] {
        let formats = parse_value(&config).unwrap().formats;
        assert_eq!(
            formats,
            WeightFormats::all(WeightFormat::Float16),
            "{field}"
        );
    }
    let odd = with(qwen3(), "torch_dtype", json!("float8"));
    let error = parse_value(&odd).unwrap_err().to_string();
    assert!(
        error.contains("`float8` are not supported; convert"),
        "{error}"
    );
}
