//! The tokens that begin and end a sequence. `generation_config.json` speaks first, as in transformers.

use serde_json::Value;

use super::SpecError;
use super::fields::{Fields, refuse, shorten};

/// Special tokens of a model.
pub(super) struct Tokens {
    pub(super) eos: Vec<u32>,
    pub(super) bos: Option<u32>,
}

/// Reads both files; ids must lie in the vocabulary.
pub(super) fn read(
    config: &mut Fields<'_>,
    generation: Option<&Value>,
    vocab: usize,
) -> Result<Tokens, SpecError> {
    let mut generation = generation.map(|value| Fields::nested(value, ""));
    let mut pick = |name: &'static str| {
        let own = config.value(name);
        match generation.as_mut().and_then(|fields| fields.value(name)) {
            Some(first) => ids(&format!("{name} of generation_config.json"), first, vocab),
            None => own.map_or(Ok(Vec::new()), |own| ids(name, own, vocab)),
        }
    };
    let eos = pick("eos_token_id")?;
    let bos = pick("bos_token_id")?;
    Ok(Tokens {
        eos,
        bos: bos.first().copied(),
    })
}

fn ids(name: &str, value: &Value, vocab: usize) -> Result<Vec<u32>, SpecError> {
    let list = match value {
        Value::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    };
    list.iter()
        .map(|value| {
            value
                .as_u64()
                .filter(|id| usize::try_from(*id).is_ok_and(|id| id < vocab))
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| {
                    refuse(
                        name,
                        format!("{} is no token of a vocabulary of {vocab}", shorten(value)),
                        "give one token id or a list of them",
                    )
                })
        })
        .collect()
}
