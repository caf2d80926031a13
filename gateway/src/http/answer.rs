//! From deltas to an HTTP answer, whole or as events.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use futures::StreamExt;
use serde::Serialize;

use super::shape::{Shape, Usage, write};
use super::sse;
use crate::error::{ApiError, rate_limits};
use crate::generate::{Answer, Delta};
use crate::metrics::Call;
use crate::trace::Identity;

/// The ranks that took a request's sequences.
pub const WORKER: HeaderName = HeaderName::from_static("x-foregate-worker");
/// The routing decision.
pub const ROUTE: HeaderName = HeaderName::from_static("x-foregate-route");

/// Sends what was started, or why nothing was.
pub(super) async fn respond<S: Shape>(
    started: Result<(Answer, S), ApiError>,
    mut call: Call,
    identity: &Identity,
) -> Result<Response<Body>, ApiError> {
    match started {
        Ok((answer, shape)) if shape.stream() => Ok(events(answer, shape, call, identity)),
        Ok((answer, shape)) => {
            let whole = whole(answer, &shape, &mut call, identity).await;
            whole.inspect_err(|error| call.failed(error))
        }
        Err(error) => {
            call.failed(&error);
            Err(error)
        }
    }
}

/// Collects an answer.
async fn whole(
    mut answer: Answer,
    shape: &impl Shape,
    call: &mut Call,
    identity: &Identity,
) -> Result<Response<Body>, ApiError> {
    let mut choices: BTreeMap<usize, Delta> = BTreeMap::new();
    let mut usage = Usage {
        prompt: shape.prompt_tokens(),
        ..Usage::default()
    };
    while let Some(delta) = answer.deltas.next().await {
        let delta = delta?;
        if !delta.tokens.is_empty() {
            call.token();
        }
        usage.add(&delta, shape.n());
        choices
            .entry(delta.choice)
            .or_insert_with(|| Delta {
                choice: delta.choice,
                ..Delta::default()
            })
            .merge(delta);
    }
    let reasons: Vec<&str> = choices
        .values()
        .filter_map(|choice| choice.finish.as_ref().map(|finish| finish.reason))
        .collect();
    sse::record(call, identity, usage, &reasons);
    let choices: Vec<Delta> = choices.into_values().collect();
    let mut response = json_response(StatusCode::OK, &shape.whole(&choices, usage));
    placed(&answer, response.headers_mut());
    Ok(response)
}

/// Streams an answer.
fn events(
    answer: Answer,
    shape: impl Shape,
    call: Call,
    identity: &Identity,
) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    placed(&answer, response.headers_mut());
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies such as nginx keep events back without it.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    *response.body_mut() = sse::body(answer, shape, call, identity.clone());
    response
}

/// Headers that tell where an answer was made.
fn placed(answer: &Answer, headers: &mut HeaderMap) {
    let ranks: Vec<String> = answer.workers.iter().map(ToString::to_string).collect();
    rate_limits(&answer.standing, headers);
    for (name, text) in [(WORKER, ranks.join(",")), (ROUTE, answer.route.clone())] {
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(name, value);
        }
    }
}

/// A JSON answer.
pub(super) fn json_response(status: StatusCode, document: &impl Serialize) -> Response<Body> {
    let mut response = Response::new(Body::from(write(document, Vec::new())));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}
