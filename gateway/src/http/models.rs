//! `GET /v1/models` and `GET /v1/models/{name}`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{Response, StatusCode};
use serde_json::{Value, json};

use super::answer::json_response;
use super::state::Gateway;
use crate::error::ApiError;

fn card(gateway: &Gateway, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": gateway.clock.unix_seconds(),
        "owned_by": "foregate",
        "root": gateway.main_name(),
        "parent": null,
        "max_model_len": gateway.max_model_len(),
    })
}

pub(super) async fn list(State(gateway): State<Arc<Gateway>>) -> Response<Body> {
    let cards: Vec<Value> = gateway
        .config
        .served_names
        .iter()
        .map(|name| card(&gateway, name))
        .collect();
    json_response(StatusCode::OK, &json!({ "object": "list", "data": cards }))
}

pub(super) async fn one(
    State(gateway): State<Arc<Gateway>>,
    Path(name): Path<String>,
) -> Result<Response<Body>, ApiError> {
    let name = gateway.model_name(Some(&name))?;
    Ok(json_response(StatusCode::OK, &card(&gateway, &name)))
}
