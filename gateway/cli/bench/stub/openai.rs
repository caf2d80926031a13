//! OpenAI's completions over HTTP, streamed and whole; what a gateway asks an engine when it starts; and the schedule.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::{StreamExt, stream};
use serde::Deserialize;
use serde_json::{Value, json};

use super::schedule::{Delays, Pace};
use super::{NAME, Script};

/// What is read of a request; a stub answers all alike.
#[derive(Debug, Deserialize)]
struct Ask {
    #[serde(default = "sixteen")]
    max_tokens: u32,
    #[serde(default)]
    stream: bool,
}

/// OpenAI's own default.
const fn sixteen() -> u32 {
    16
}

/// One back end.
pub(super) fn router(script: &Arc<Script>) -> Router {
    Router::new()
        .route("/v1/completions", post(complete))
        .route("/v1/models", get(models))
        .route("/health", get(async || StatusCode::OK))
        .route("/health_generate", get(async || StatusCode::OK))
        .route("/model_info", get(model))
        .route("/get_model_info", get(model))
        .route("/server_info", get(model))
        .route("/get_server_info", get(model))
        .route("/schedule", post(schedule))
        .with_state(Arc::clone(script))
}

async fn models() -> Json<Value> {
    Json(json!({"object": "list", "data": [{"id": NAME, "object": "model"}]}))
}

/// SGLang's names for what both of its pages tell.
async fn model(State(script): State<Arc<Script>>) -> Json<Value> {
    Json(json!({
        "model_path": script.model, "tokenizer_path": script.model, "is_generation": true,
        "served_model_name": NAME, "model_id": NAME,
    }))
}

/// Of all back ends: they share it.
async fn schedule(State(script): State<Arc<Script>>, Json(delays): Json<Delays>) -> StatusCode {
    script.schedule.set(delays);
    StatusCode::NO_CONTENT
}

async fn complete(State(script): State<Arc<Script>>, Json(ask): Json<Ask>) -> Response {
    let mut pace = script.schedule.begin(ask.max_tokens);
    if ask.stream {
        return streamed(script, pace);
    }
    pace.all().await;
    let text: String = (0..ask.max_tokens)
        .map(|index| script.token(index).1)
        .collect();
    Json(json!({
        "id": "cmpl-stub", "object": "text_completion", "created": 0, "model": NAME,
        "choices": [{"text": text, "index": 0, "logprobs": null, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": ask.max_tokens, "total_tokens": ask.max_tokens + 1},
    }))
    .into_response()
}

fn streamed(script: Arc<Script>, pace: Pace) -> Response {
    let events = stream::unfold((script, pace), |(script, mut pace)| async {
        let index = pace.next().await?;
        Some((event(script.token(index).1, false), (script, pace)))
    });
    let end = stream::iter([event("", true), "data: [DONE]\n\n".to_owned()]);
    let body = events.chain(end).map(Ok::<_, Infallible>);
    let kind = [(header::CONTENT_TYPE, "text/event-stream")];
    (kind, Body::from_stream(body)).into_response()
}

fn event(text: &str, last: bool) -> String {
    let reason = last.then_some("length");
    let event = json!({
        "id": "cmpl-stub", "object": "text_completion", "created": 0, "model": NAME,
        "choices": [{"text": text, "index": 0, "logprobs": null, "finish_reason": reason}],
    });
    format!("data: {event}\n\n")
}
