//! Routes, bodies and answers.

mod admin;
mod answer;
mod authorize;
mod body;
mod chat;
mod chat_request;
mod completions;
mod completions_request;
mod defaults;
mod fields;
mod logprobs;
mod models;
mod route;
mod sampling;
mod shape;
mod sse;
mod state;
mod tokenize;
mod tokenize_request;
mod trace;
mod traffic;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Response;
use axum::middleware::{self, Next};
use axum::routing::{get, post};
use tracing::Instrument;

pub use answer::{ROUTE, WORKER};
pub use body::{Bodies, MAX_BODY};
pub use chat_request::{ChatRequest, parse_chat};
pub use completions_request::{CompletionsRequest, PromptInput, parse_completions};
pub use defaults::Defaults;
pub use state::Gateway;
pub use tokenize_request::{
    DetokenizeRequest, TokenizeInput, TokenizeRequest, parse_detokenize, parse_tokenize,
};

use crate::error::{ApiError, Rejection};
use crate::trace::Identity;

/// All routes.
pub fn router(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/version", get(admin::version))
        .route("/health", get(admin::health))
        .route("/ready", get(admin::ready))
        .route("/metrics", get(admin::metrics))
        .route("/debug/experts", get(admin::experts))
        .route("/debug/plan", get(admin::plan))
        .route("/debug/trace", get(trace::trace))
        .fallback(no_such_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(
            Arc::clone(&gateway),
            authorize::authorize,
        ))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&gateway),
            identify,
        ))
        .with_state(gateway)
}

/// Gives every request its identity and its span, every answer the headers that name them.
async fn identify(
    State(gateway): State<Arc<Gateway>>,
    mut request: Request,
    next: Next,
) -> Response<Body> {
    let identity = Identity::of(
        request.headers(),
        request.method().as_str(),
        request.uri().path(),
        &gateway.random,
    );
    request.extensions_mut().insert(identity.clone());
    let mut response = next.run(request).instrument(identity.span.clone()).await;
    identity
        .span
        .record("http.response.status_code", response.status().as_u16());
    identity.write_headers(response.headers_mut());
    if let Some(Rejection(reason)) = response.extensions().get() {
        gateway.metrics.rejected(reason);
    }
    response
}

async fn no_such_route(request: Request) -> ApiError {
    ApiError::no_such_route(request.method().as_str(), request.uri().path())
}

async fn method_not_allowed(request: Request) -> ApiError {
    ApiError::method_not_allowed(request.method().as_str(), request.uri().path())
}
