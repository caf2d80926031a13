//! Rotary position embedding: old spelling (`rope_theta`, `rope_scaling`) and new (`rope_parameters`).

use serde_json::Value;

use super::SpecError;
use super::fields::{Fields, refuse, shorten};

const REMEDY: &str = "only the plain rotary embedding (`default`) is supported";

/// The base frequency. Every kind of scaling is refused.
pub(super) fn theta(fields: &mut Fields<'_>, default: f64) -> Result<f64, SpecError> {
    let old = fields.positive("rope_theta")?;
    partial(fields)?;
    if let Some(scaling) = fields.value("rope_scaling") {
        section(scaling, "rope_scaling.")?;
    }
    let new = match fields.value("rope_parameters") {
        None => None,
        Some(parameters) => section(parameters, "rope_parameters.")?,
    };
    match (old, new) {
        (Some(old), Some(new)) if old.to_bits() != new.to_bits() => Err(refuse(
            "rope_parameters.rope_theta",
            format!("{new}, but `rope_theta` says {old}"),
            "keep the one the model was trained with",
        )),
        (old, new) => Ok(new.or(old).unwrap_or(default)),
    }
}

/// Checks one of the nested objects and returns its `rope_theta`.
fn section(value: &Value, path: &'static str) -> Result<Option<f64>, SpecError> {
    if !value.is_object() {
        return Err(refuse(
            path.trim_end_matches('.'),
            format!("expected an object, found {}", shorten(value)),
            REMEDY,
        ));
    }
    let mut inner = Fields::nested(value, path);
    for name in ["rope_type", "type"] {
        if let Some(kind) = inner.text(name)?
            && kind != "default"
        {
            return Err(refuse(
                inner.name(name),
                format!("rope type `{kind}` is not supported"),
                REMEDY,
            ));
        }
    }
    partial(&mut inner)?;
    let theta = inner.positive("rope_theta")?;
    inner.finish(&[])?;
    Ok(theta)
}

fn partial(fields: &mut Fields<'_>) -> Result<(), SpecError> {
    match fields.positive("partial_rotary_factor")? {
        Some(factor) if factor.to_bits() != 1.0_f64.to_bits() => Err(refuse(
            fields.name("partial_rotary_factor"),
            format!("{factor} is not supported"),
            "only rotation of the whole head (1.0) is supported",
        )),
        _ => Ok(()),
    }
}
