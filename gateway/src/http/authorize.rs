//! Lets in who shows a key, where keys are wanted.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Response, header};
use axum::middleware::Next;
use axum::response::IntoResponse;
use tracing::Span;

use super::state::Gateway;
use crate::api_keys::Client;
use crate::error::ApiError;

/// Name of the key that a request showed.
#[derive(Debug, Clone)]
pub(super) struct Caller(pub(super) Client);

/// What kubelets and scrapers ask without a key; all else wants one, also what does not exist.
const OPEN: [&str; 3] = ["/health", "/ready", "/metrics"];

pub(super) async fn authorize(
    State(gateway): State<Arc<Gateway>>,
    mut request: Request,
    next: Next,
) -> Response<Body> {
    let Some(keys) = &gateway.api_keys else {
        return next.run(request).await;
    };
    if OPEN.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let Some(shown) = bearer(&request) else {
        return ApiError::no_key().into_response();
    };
    match keys.client(shown) {
        Some(client) => {
            Span::current().record("client.name", &*client);
            request.extensions_mut().insert(Caller(client));
            next.run(request).await
        }
        None => ApiError::wrong_key().into_response(),
    }
}

/// The key of an `Authorization: Bearer KEY`. The scheme's case does not matter.
fn bearer(request: &Request) -> Option<&str> {
    let value = request
        .headers()
        .get(header::AUTHORIZATION)?
        .to_str()
        .ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}
