//! `quantization_config`: how the matrices of a checkpoint were quantised.
//!
//! It says how to read tensors, not which: which matrices are quantised is told by the tensors themselves
//! (`q_proj.qweight` or `q_proj.weight`), so a list of exempt modules has nothing to add but a
//! contradiction, and that is refused.

use serde_json::Value;

use foregate_api::weights::WeightFormat;

use super::SpecError;
use super::fields::{Fields, refuse, shorten};

const PATH: &str = "quantization_config.";
const REMEDY: &str = "use a checkpoint in float32, bfloat16, float16, GPTQ or AWQ int4, FP8 with blocks of 128 × 128, or MXFP4";
/// Group sizes of int4 that the kernels have.
const GROUPS: [i64; 3] = [32, 64, 128];

/// How the tensors of a quantised matrix are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// int4 along the inputs, zero points along the outputs.
    Gptq {
        /// Inputs of a group.
        group: u32,
        /// Zero points are stored less one, as all files before `gptq_v2` have them.
        zero_less_one: bool,
        /// Inputs may be out of order; then `g_idx` must be there, and say that they are not.
        reordered: bool,
    },
    /// int4 along the outputs, interleaved.
    Awq {
        /// Inputs of a group.
        group: u32,
    },
    /// e4m3 with a scale for each block.
    Fp8 {
        /// Outputs of a block.
        rows: u32,
        /// Inputs of a block.
        columns: u32,
    },
    /// e2m1 with a power of two for 32 inputs; only routed experts, all of a block in one tensor.
    Mxfp4,
}

impl Scheme {
    /// The format that a matrix has when it is read.
    #[must_use]
    pub const fn format(self) -> WeightFormat {
        match self {
            Self::Gptq { group, .. } | Self::Awq { group } => WeightFormat::Int4 { group },
            Self::Fp8 { rows, columns } => WeightFormat::Fp8 { rows, columns },
            Self::Mxfp4 => WeightFormat::Mxfp4,
        }
    }

    /// As `quant_method` has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gptq { .. } => "gptq",
            Self::Awq { .. } => "awq",
            Self::Fp8 { .. } => "fp8",
            Self::Mxfp4 => "mxfp4",
        }
    }
}

/// A quantised checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantized {
    /// How to read its tensors.
    pub scheme: Scheme,
    /// Modules that were left as they were.
    pub exempt: Vec<String>,
}

/// Reads the section, if there is one.
pub(super) fn read(fields: &mut Fields<'_>) -> Result<Option<Quantized>, SpecError> {
    let Some(value) = fields.value("quantization_config") else {
        return Ok(None);
    };
    if !value.is_object() {
        return Err(refuse(
            "quantization_config",
            format!("expected an object, found {}", shorten(value)),
            REMEDY,
        ));
    }
    let mut inner = Fields::nested(value, PATH);
    let (scheme, harmless) = match inner.required_text("quant_method")? {
        "gptq" => (gptq(&mut inner)?, GPTQ_HARMLESS),
        "awq" => (awq(&mut inner)?, AWQ_HARMLESS),
        "fp8" => (fp8(&mut inner)?, FP8_HARMLESS),
        "mxfp4" => (Scheme::Mxfp4, &["dequantize"][..]),
        other => {
            return Err(refuse(
                inner.name("quant_method"),
                format!("`{other}` is not supported"),
                REMEDY,
            ));
        }
    };
    let exempt = exempt(&mut inner)?;
    inner.finish(harmless)?;
    Ok(Some(Quantized { scheme, exempt }))
}

/// How the quantisation was searched for, and settings of other programs' kernels.
const GPTQ_HARMLESS: &[&str] = &[
    "act_group_aware",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "exllama_config",
    "hyb_act",
    "lm_head",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "mse",
    "pack_impl",
    "pad_token_id",
    "static_groups",
    "sym",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
];
const AWQ_HARMLESS: &[&str] = &[
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "modules_to_fuse",
];
/// `scale_fmt` tells how activations were scaled in training; here they stay bfloat16.
const FP8_HARMLESS: &[&str] = &["dequantize", "scale_fmt"];

fn gptq(fields: &mut Fields<'_>) -> Result<Scheme, SpecError> {
    four_bits(fields)?;
    only(fields, "pack_dtype", "int32")?;
    off(fields, "is_marlin_format")?;
    dynamic(fields)?;
    let old = fields.text("checkpoint_format")?;
    let zero_less_one = match old.or(fields.text("format")?).unwrap_or("gptq") {
        "gptq" => true,
        "gptq_v2" => false,
        other => {
            return Err(refuse(
                fields.name("checkpoint_format"),
                format!("`{other}` is not supported"),
                "use a checkpoint in the format `gptq` or `gptq_v2`",
            ));
        }
    };
    Ok(Scheme::Gptq {
        group: group(fields)?,
        zero_less_one,
        reordered: fields.flag("desc_act", false)?,
    })
}

fn awq(fields: &mut Fields<'_>) -> Result<Scheme, SpecError> {
    four_bits(fields)?;
    only(fields, "version", "gemm")?;
    only(fields, "format", "gemm")?;
    match fields.text("backend")? {
        None | Some("autoawq" | "auto") => {}
        Some(other) => {
            return Err(refuse(
                fields.name("backend"),
                format!("`{other}` is not supported"),
                "only `autoawq` is",
            ));
        }
    }
    if !fields.flag("zero_point", true)? {
        return Err(refuse(
            fields.name("zero_point"),
            "weights without zero points are not supported",
            REMEDY,
        ));
    }
    Ok(Scheme::Awq {
        group: group(fields)?,
    })
}

fn fp8(fields: &mut Fields<'_>) -> Result<Scheme, SpecError> {
    only(fields, "activation_scheme", "dynamic")?;
    only(fields, "fmt", "e4m3")?;
    only(fields, "expert_dtype", "fp8")?;
    const BLOCK: &str = "weight_block_size";
    match fields.value(BLOCK) {
        None => Err(refuse(
            fields.name(BLOCK),
            "missing: one scale for a whole matrix is not supported",
            "use a checkpoint with blocks of 128 × 128",
        )),
        Some(value) if *value == serde_json::json!([128, 128]) => Ok(Scheme::Fp8 {
            rows: 128,
            columns: 128,
        }),
        Some(value) => Err(refuse(
            fields.name(BLOCK),
            format!("{} is not supported", shorten(value)),
            "use a checkpoint with blocks of 128 × 128",
        )),
    }
}

fn four_bits(fields: &mut Fields<'_>) -> Result<(), SpecError> {
    match fields.required_size("bits", 64)? {
        4 => Ok(()),
        other => Err(refuse(
            fields.name("bits"),
            format!("{other} bits are not supported"),
            "use a checkpoint of 4 bits",
        )),
    }
}

fn group(fields: &mut Fields<'_>) -> Result<u32, SpecError> {
    let Some(value) = fields.value("group_size") else {
        return Err(fields.missing("group_size"));
    };
    match value.as_i64() {
        Some(-1) => Ok(WeightFormat::WHOLE_ROW),
        Some(group) if GROUPS.contains(&group) => {
            Ok(u32::try_from(group).unwrap_or(WeightFormat::WHOLE_ROW))
        }
        _ => Err(refuse(
            fields.name("group_size"),
            format!("{} is not supported", shorten(value)),
            "use a checkpoint with groups of 32, 64 or 128, or -1",
        )),
    }
}

/// Text that, if given, must be `wanted` in any case.
fn only(
    fields: &mut Fields<'_>,
    name: &'static str,
    wanted: &'static str,
) -> Result<(), SpecError> {
    match fields.text(name)? {
        Some(found) if !found.eq_ignore_ascii_case(wanted) => Err(refuse(
            fields.name(name),
            format!("`{found}` is not supported"),
            format!("only `{wanted}` is"),
        )),
        _ => Ok(()),
    }
}

fn off(fields: &mut Fields<'_>, name: &'static str) -> Result<(), SpecError> {
    if fields.flag(name, false)? {
        return Err(refuse(
            fields.name(name),
            "true is not supported",
            "use a checkpoint in the format `gptq`",
        ));
    }
    Ok(())
}

/// Rules per module: those that exempt modules (`-:`) are told by the tensors; others change the format.
fn dynamic(fields: &mut Fields<'_>) -> Result<(), SpecError> {
    let rules = fields.value("dynamic");
    let odd = match rules {
        None => None,
        Some(Value::Object(rules)) => {
            rules.keys().find(|rule| !rule.starts_with("-:")).cloned()
        }
        Some(other) => Some(shorten(other)),
    };
    match odd {
        None => Ok(()),
        Some(rule) => Err(refuse(
            fields.name("dynamic"),
            format!("the rule `{rule}` gives modules another format"),
            "only rules that exempt modules (`-:…`) are supported",
        )),
    }
}

fn exempt(fields: &mut Fields<'_>) -> Result<Vec<String>, SpecError> {
    const FIELD: &str = "modules_to_not_convert";
    let Some(value) = fields.value(FIELD) else {
        return Ok(Vec::new());
    };
    let names = |list: &Vec<Value>| {
        let name = |value: &Value| value.as_str().map(str::to_owned);
        list.iter().map(name).collect::<Option<Vec<_>>>()
    };
    value.as_array().and_then(names).ok_or_else(|| {
        refuse(
            fields.name(FIELD),
            format!("expected a list of names, found {}", shorten(value)),
            "restore config.json from the model's repository",
        )
    })
}
