//! Every field of a `GenerateRequest`, checked once.

use foregate_wire::generation::{ExpertHint, GenerateRequest, Sampling as WireSampling};

use crate::engine::RequestLimits;
use crate::sampler::Sampling;
use crate::scheduler::Hint;
use crate::sequence::Request;

/// Most bytes of a request's id.
const MAX_ID: usize = 256;
/// Most `stop_token_ids`.
const MAX_STOPS: usize = 256;
/// Most best tokens per position.
const MAX_LOGPROBS: u32 = 20;
/// Most entries of `logit_bias`.
const MAX_BIASES: usize = 1024;
/// Most bytes of a hint.
const MAX_HINT: usize = 4096;
/// Longest deadline: a week.
const MAX_DEADLINE_MS: u64 = 7 * 24 * 3600 * 1000;

/// A field that is out of its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {what}")]
pub struct FieldError {
    /// Its name in `generation.proto`.
    pub field: &'static str,
    /// What is wrong and what would be right.
    pub what: String,
}

fn require(
    holds: bool,
    field: &'static str,
    what: impl FnOnce() -> String,
) -> Result<(), FieldError> {
    if holds {
        Ok(())
    } else {
        Err(FieldError {
            field,
            what: what(),
        })
    }
}

/// The request as the engine takes it.
///
/// # Errors
/// Names the first field that is out of its range.
pub fn validate(
    message: GenerateRequest,
    limits: &RequestLimits,
) -> Result<Request, FieldError> {
    // Without `..`: a new field must be looked at here.
    let GenerateRequest {
        request_id,
        token_ids,
        prompt_len,
        max_tokens,
        min_tokens,
        ignore_eos,
        stop_token_ids,
        sampling,
        logprobs,
        prompt_logprobs,
        return_routed_experts,
        deadline_ms,
        expert_hint,
    } = message;
    require(request_id.len() <= MAX_ID, "request_id", || {
        format!("{} bytes, at most {MAX_ID}", request_id.len())
    })?;
    check_tokens("token_ids", &token_ids, limits)?;
    check_lengths(token_ids.len(), prompt_len, max_tokens, limits)?;
    require(min_tokens <= max_tokens, "min_tokens", || {
        format!("{min_tokens}, at most max_tokens ({max_tokens})")
    })?;
    require(stop_token_ids.len() <= MAX_STOPS, "stop_token_ids", || {
        format!("{} ids, at most {MAX_STOPS}", stop_token_ids.len())
    })?;
    check_tokens("stop_token_ids", &stop_token_ids, limits)?;
    check_best("logprobs", logprobs)?;
    check_best("prompt_logprobs", prompt_logprobs)?;
    require(
        (1..=MAX_DEADLINE_MS).contains(&deadline_ms),
        "deadline_ms",
        || format!("{deadline_ms}, must be in 1..={MAX_DEADLINE_MS}"),
    )?;
    let Some(sampling) = sampling else {
        return Err(FieldError {
            field: "sampling",
            what: "missing; send one with temperature 0 for greedy".to_owned(),
        });
    };
    let eos = limits.eos.iter().copied().filter(|_| !ignore_eos);
    Ok(Request {
        id: request_id,
        tokens: token_ids,
        prompt_len: prompt_len as usize,
        max_tokens: max_tokens as usize,
        min_tokens: min_tokens as usize,
        stop_tokens: eos.chain(stop_token_ids).collect(),
        sampling: check_sampling(sampling, limits)?,
        logprobs: logprobs.map(|best| best as usize),
        prompt_logprobs: prompt_logprobs.map(|best| best as usize),
        routed_experts: return_routed_experts,
        hint: expert_hint
            .map(|hint| check_hint(hint, limits))
            .transpose()?,
    })
}

fn check_hint(hint: ExpertHint, limits: &RequestLimits) -> Result<Hint, FieldError> {
    let ExpertHint { layers, roots } = hint;
    let ascending = layers.windows(2).all(|pair| pair[0] < pair[1]);
    let known = layers
        .last()
        .is_some_and(|last| (*last as usize) < limits.moe_layers);
    require(ascending && known, "expert_hint.layers", || {
        format!(
            "must be ascending MoE layers below {}, at least one",
            limits.moe_layers
        )
    })?;
    let entries = layers.len() * limits.experts;
    let fits = roots.len() == entries && entries <= MAX_HINT;
    require(fits, "expert_hint.roots", || {
        format!(
            "{} bytes, must be one for each of {} layers × {} experts, at most {MAX_HINT}",
            roots.len(),
            layers.len(),
            limits.experts
        )
    })?;
    Ok(Hint { layers, roots })
}

fn check_tokens(
    field: &'static str,
    tokens: &[u32],
    limits: &RequestLimits,
) -> Result<(), FieldError> {
    let outside = tokens.iter().find(|token| **token as usize >= limits.vocab);
    require(outside.is_none(), field, || {
        let token = outside.copied().unwrap_or_default();
        format!(
            "{token} is not in the vocabulary of {} tokens",
            limits.vocab
        )
    })
}

fn check_lengths(
    tokens: usize,
    prompt_len: u32,
    max_tokens: u32,
    limits: &RequestLimits,
) -> Result<(), FieldError> {
    require(tokens > 0, "token_ids", || {
        "empty, at least one token".to_owned()
    })?;
    let prompt = prompt_len as usize;
    require((1..=tokens).contains(&prompt), "prompt_len", || {
        format!("{prompt}, must be in 1..={tokens}, the number of token_ids")
    })?;
    require(tokens - prompt <= max_tokens as usize, "max_tokens", || {
        format!(
            "{max_tokens}, but token_ids has {} answer tokens already",
            tokens - prompt
        )
    })?;
    let most = limits.max_model_len;
    require(prompt <= most, "prompt_len", || {
        format!("{prompt}, the model takes at most {most} tokens")
    })?;
    require(max_tokens as usize <= most - prompt, "max_tokens", || {
        format!("{max_tokens} after a prompt of {prompt} tokens, together at most {most}")
    })
}

fn check_best(field: &'static str, best: Option<u32>) -> Result<(), FieldError> {
    require(best.is_none_or(|best| best <= MAX_LOGPROBS), field, || {
        format!("{}, at most {MAX_LOGPROBS}", best.unwrap_or_default())
    })
}

fn check_sampling(
    message: WireSampling,
    limits: &RequestLimits,
) -> Result<Sampling, FieldError> {
    let WireSampling {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        seed,
    } = message;
    // Comparisons are false for NaN.
    let number = |field, value: f32, holds: bool, range: &str| {
        require(value.is_finite() && holds, field, || {
            format!("{value}, must be {range}")
        })
    };
    number(
        "sampling.temperature",
        temperature,
        temperature >= 0.0,
        "0 or more",
    )?;
    number(
        "sampling.top_p",
        top_p,
        top_p > 0.0 && top_p <= 1.0,
        "above 0, at most 1",
    )?;
    number(
        "sampling.min_p",
        min_p,
        (0.0..=1.0).contains(&min_p),
        "in [0, 1]",
    )?;
    let repetition = repetition_penalty > 0.0 && repetition_penalty <= 100.0;
    let field = "sampling.repetition_penalty";
    number(
        field,
        repetition_penalty,
        repetition,
        "above 0, at most 100",
    )?;
    let additive = -2.0..=2.0;
    let presence = additive.contains(&presence_penalty);
    number(
        "sampling.presence_penalty",
        presence_penalty,
        presence,
        "in [-2, 2]",
    )?;
    let frequency = additive.contains(&frequency_penalty);
    number(
        "sampling.frequency_penalty",
        frequency_penalty,
        frequency,
        "in [-2, 2]",
    )?;
    require(
        logit_bias.len() <= MAX_BIASES,
        "sampling.logit_bias",
        || format!("{} entries, at most {MAX_BIASES}", logit_bias.len()),
    )?;
    let ids: Vec<u32> = logit_bias.keys().copied().collect();
    check_tokens("sampling.logit_bias", &ids, limits)?;
    for bias in logit_bias.values() {
        let holds = (-100.0..=100.0).contains(bias);
        number("sampling.logit_bias", *bias, holds, "in [-100, 100]")?;
    }
    Ok(Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias: logit_bias.into_iter().collect(),
        seed,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn limits() -> RequestLimits {
        RequestLimits {
            vocab: 100,
            max_model_len: 50,
            kv_tokens: 1000,
            moe_layers: 3,
            experts: 4,
            eos: vec![2],
        }
    }

    #[test]
    fn a_hint_is_of_this_model() {
        let with = |layers: &[u32], roots: usize| {
            let message = GenerateRequest {
                expert_hint: Some(ExpertHint {
                    layers: layers.to_vec(),
                    roots: vec![7; roots],
                }),
                ..good()
            };
            validate(message, &limits())
        };
        assert_eq!(with(&[0, 2], 8).unwrap().hint.unwrap().layers, [0, 2]);
        for (layers, roots) in [(&[][..], 0), (&[3], 4), (&[1, 1], 8), (&[2, 0], 8)] {
            let error = with(layers, roots).unwrap_err();
            assert_eq!(error.field, "expert_hint.layers", "{layers:?}");
        }
        assert_eq!(with(&[0, 2], 7).unwrap_err().field, "expert_hint.roots");
    }

    fn good() -> GenerateRequest {
        GenerateRequest {
            request_id: "r".to_owned(),
            token_ids: vec![1, 2, 3],
            prompt_len: 3,
            max_tokens: 10,
            stop_token_ids: vec![7],
            sampling: Some(WireSampling {
                top_p: 1.0,
                repetition_penalty: 1.0,
                ..WireSampling::default()
            }),
            deadline_ms: 1000,
            ..GenerateRequest::default()
        }
    }

    #[test]
    fn a_good_request_passes() {
        let request = validate(good(), &limits()).unwrap();
        assert_eq!(request.stop_tokens, BTreeSet::from([2, 7]));
        assert_eq!(request.sampling, Sampling::greedy());
        let message = GenerateRequest {
            ignore_eos: true,
            ..good()
        };
        let request = validate(message, &limits()).unwrap();
        assert_eq!(request.stop_tokens, BTreeSet::from([7]));
    }

    fn refused(change: impl FnOnce(&mut GenerateRequest)) -> String {
        let mut message = good();
        change(&mut message);
        validate(message, &limits()).unwrap_err().field.to_owned()
    }

    fn refused_sampling(change: impl FnOnce(&mut WireSampling)) -> String {
        refused(|message| change(message.sampling.as_mut().unwrap()))
    }

    #[test]
    fn every_field_is_named_when_it_is_wrong() {
        assert_eq!(refused(|m| m.request_id = "x".repeat(257)), "request_id");
        assert_eq!(refused(|m| m.token_ids.clear()), "token_ids");
        assert_eq!(refused(|m| m.token_ids[1] = 100), "token_ids");
        assert_eq!(refused(|m| m.prompt_len = 0), "prompt_len");
        assert_eq!(refused(|m| m.prompt_len = 4), "prompt_len");
        assert_eq!(refused(|m| m.token_ids = vec![1; 51]), "max_tokens");
        assert_eq!(
            refused(|m| {
                m.token_ids = vec![1; 51];
                m.prompt_len = 51;
            }),
            "prompt_len"
        );
        assert_eq!(refused(|m| m.max_tokens = 48), "max_tokens");
        assert_eq!(refused(|m| m.max_tokens = u32::MAX), "max_tokens");
        assert_eq!(
            refused(|m| {
                m.prompt_len = 1;
                m.max_tokens = 1;
            }),
            "max_tokens"
        );
        assert_eq!(refused(|m| m.min_tokens = 11), "min_tokens");
        assert_eq!(
            refused(|m| m.stop_token_ids = vec![0; 257]),
            "stop_token_ids"
        );
        assert_eq!(refused(|m| m.stop_token_ids = vec![100]), "stop_token_ids");
        assert_eq!(refused(|m| m.logprobs = Some(21)), "logprobs");
        assert_eq!(refused(|m| m.prompt_logprobs = Some(21)), "prompt_logprobs");
        assert_eq!(refused(|m| m.deadline_ms = 0), "deadline_ms");
        assert_eq!(refused(|m| m.deadline_ms = u64::MAX), "deadline_ms");
        assert_eq!(refused(|m| m.sampling = None), "sampling");
    }

    #[test]
    fn every_sampling_field_is_named_when_it_is_wrong() {
        for bad in [f32::NAN, f32::INFINITY, -0.5] {
            assert_eq!(
                refused_sampling(|s| s.temperature = bad),
                "sampling.temperature"
            );
        }
        for bad in [f32::NAN, 0.0, 1.5] {
            assert_eq!(refused_sampling(|s| s.top_p = bad), "sampling.top_p");
        }
        for bad in [f32::NAN, -0.1, 1.1] {
            assert_eq!(refused_sampling(|s| s.min_p = bad), "sampling.min_p");
        }
        for bad in [f32::NAN, 0.0, -1.0, 101.0] {
            let field = refused_sampling(|s| s.repetition_penalty = bad);
            assert_eq!(field, "sampling.repetition_penalty");
        }
        for bad in [f32::NAN, -2.1, 2.1] {
            let field = refused_sampling(|s| s.presence_penalty = bad);
            assert_eq!(field, "sampling.presence_penalty");
            let field = refused_sampling(|s| s.frequency_penalty = bad);
            assert_eq!(field, "sampling.frequency_penalty");
            let field = refused_sampling(|s| {
                s.logit_bias.insert(1, bad * 100.0);
            });
            assert_eq!(field, "sampling.logit_bias");
        }
        let field = refused_sampling(|s| {
            s.logit_bias.insert(100, 1.0);
        });
        assert_eq!(field, "sampling.logit_bias");
        let field = refused_sampling(|s| s.logit_bias.extend((0..1025).map(|id| (id, 0.0))));
        assert_eq!(field, "sampling.logit_bias");
    }

    #[test]
    fn a_resumed_request_may_be_complete() {
        let message = GenerateRequest {
            prompt_len: 1,
            max_tokens: 2,
            ..good()
        };
        let request = validate(message, &limits()).unwrap();
        assert_eq!((request.prompt_len, request.tokens.len()), (1, 3));
    }
}
