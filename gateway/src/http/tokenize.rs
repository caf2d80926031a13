//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response, StatusCode};
use serde_json::{Value, json};

use super::answer::json_response;
use super::body::Received;
use super::logprobs::Labels;
use super::state::Gateway;
use super::tokenize_request::{TokenizeInput, parse_detokenize, parse_tokenize};
use crate::error::ApiError;

pub(super) async fn tokenize(
    State(gateway): State<Arc<Gateway>>,
    request: Request<Body>,
) -> Result<Response<Body>, ApiError> {
    let Received { bytes, room: _room } = gateway.bodies.receive(request).await?;
    gateway.digest(bytes, encode).await
}

fn encode(gateway: &Gateway, body: &[u8]) -> Result<Response<Body>, ApiError> {
    let asked = parse_tokenize(body)?;
    gateway.model_name(asked.model.as_deref())?;
    let (param, text) = match asked.input {
        TokenizeInput::Prompt(text) => ("prompt", text),
        TokenizeInput::Chat {
            messages,
            add_generation_prompt,
            template_variables,
        } => {
            let text = gateway.prompter.render(
                &messages,
                add_generation_prompt,
                &template_variables,
                gateway.clock.unix_seconds(),
            )?;
            ("messages", text)
        }
    };
    let ids = gateway.encode(param, &text, asked.add_special_tokens)?;
    let strings = if asked.return_token_strs {
        let labels = Labels::new(gateway.prompter.clone(), false);
        ids.iter()
            .map(|id| Value::from(labels.label(*id)))
            .collect()
    } else {
        Value::Null
    };
    let document = json!({
        "count": ids.len(),
        "max_model_len": gateway.max_model_len(),
        "tokens": ids,
        "token_strs": strings,
    });
    Ok(json_response(StatusCode::OK, &document))
}

pub(super) async fn detokenize(
    State(gateway): State<Arc<Gateway>>,
    request: Request<Body>,
) -> Result<Response<Body>, ApiError> {
    let Received { bytes, room: _room } = gateway.bodies.receive(request).await?;
    gateway.digest(bytes, decode).await
}

fn decode(gateway: &Gateway, body: &[u8]) -> Result<Response<Body>, ApiError> {
    let asked = parse_detokenize(body)?;
    gateway.model_name(asked.model.as_deref())?;
    gateway.check_ids("tokens", &asked.tokens)?;
    let text = gateway.prompter.decode("tokens", &asked.tokens, false)?;
    Ok(json_response(StatusCode::OK, &json!({ "prompt": text })))
}
