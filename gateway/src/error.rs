//! Errors as clients see them: OpenAI's shape, the field by name, the remedy in words.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use serde_json::{Value, json};

use crate::traffic::Standing;

/// An error answer. `kind` is OpenAI's `error.type`, `code` its `error.code`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// `error.type`.
    pub kind: &'static str,
    /// `error.code`.
    pub code: Option<&'static str>,
    /// The field the error is about, as a path such as `messages[0].role`.
    pub param: Option<String>,
    /// What is wrong and what to do.
    pub message: String,
    /// Seconds for `Retry-After`.
    pub retry_after: Option<u32>,
    /// What is left of the tenant's minute.
    pub standing: Option<Box<Standing>>,
    /// Whether the answer says how to show a key.
    pub wants_key: bool,
    /// For `rejected_total{reason}`; one of a fixed few words.
    pub reason: &'static str,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        reason: &'static str,
        message: String,
    ) -> Self {
        Self {
            status,
            kind,
            code: None,
            param: None,
            message,
            retry_after: None,
            standing: None,
            wants_key: false,
            reason,
        }
    }

    /// 400: a field has a value that cannot be used.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            "invalid",
            message.into(),
        );
        error.param = Some(param.into());
        error
    }

    /// 400: a field (or one of its values) is known to others and not served here.
    pub fn unsupported(param: impl Into<String>, what: impl AsRef<str>) -> Self {
        let param = param.into();
        let mut error = Self::invalid(param, what.as_ref());
        error.code = Some("unsupported_parameter");
        error.reason = "unsupported";
        error
    }

    /// 400: the body is no JSON object.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            "malformed",
            message.into(),
        )
    }

    /// 415: the body is compressed.
    pub fn encoded(encoding: &str) -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            "malformed",
            format!(
                "content-encoding {} is not served: send the body as it is",
                clip(encoding, 64)
            ),
        )
    }

    /// 400: prompt and answer do not fit the model.
    pub fn too_long(param: &str, message: String) -> Self {
        let mut error = Self::invalid(param, message);
        error.code = Some("context_length_exceeded");
        error.reason = "too_long";
        error
    }

    /// 400: a worker found fault with the request; its words name the field.
    #[must_use]
    pub fn refused_by_worker(what: &str) -> Self {
        let mut error = Self::malformed(format!("the worker refused the request: {what}"));
        error.reason = "refused_by_worker";
        error
    }

    fn unauthorized(code: Option<&'static str>, message: &str) -> Self {
        let mut error = Self::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            "unauthorized",
            message.to_owned(),
        );
        error.code = code;
        error.wants_key = true;
        error
    }

    /// 401: no key is shown.
    #[must_use]
    pub fn no_key() -> Self {
        let what = "no API key is shown: send it as `Authorization: Bearer KEY`";
        Self::unauthorized(None, what)
    }

    /// 401: nobody has the key that is shown.
    #[must_use]
    pub fn wrong_key() -> Self {
        let what =
            "the API key is not known here: check it, or ask who runs this server for one";
        Self::unauthorized(Some("invalid_api_key"), what)
    }

    /// 404: no such model.
    pub fn no_such_model(asked: &str, served: &[String]) -> Self {
        let mut error = Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            "unknown_model",
            format!(
                "the model `{}` does not exist here; served: {}",
                clip(asked, 200),
                served.join(", ")
            ),
        );
        error.code = Some("model_not_found");
        error.param = Some("model".into());
        error
    }

    /// 404: no such route.
    pub fn no_such_route(method: &str, path: &str) -> Self {
        let mut error = Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            "unknown_route",
            format!("unknown request URL: {method} {}", clip(path, 200)),
        );
        error.code = Some("unknown_url");
        error
    }

    /// 405: the route exists, not for this method.
    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            "unknown_route",
            format!("method {method} is not allowed for {}", clip(path, 200)),
        )
    }

    /// 413: the body is larger than `limit` bytes.
    pub fn too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            "too_large",
            format!("the request body is larger than {} MiB", limit >> 20),
        )
    }

    /// 408: the body did not arrive in time.
    pub fn slow_body(seconds: u64) -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            "slow_body",
            format!("the request body did not arrive within {seconds} s"),
        )
    }

    /// 429 with `Retry-After`.
    pub fn overloaded(
        reason: &'static str,
        message: impl Into<String>,
        retry_after: u64,
    ) -> Self {
        let mut error = Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_error",
            reason,
            message.into(),
        );
        error.code = Some("overloaded");
        error.retry_after = Some(whole_seconds(retry_after));
        error
    }

    /// 429: a tenant has used its minute.
    pub fn rate_limited(
        reason: &'static str,
        message: impl Into<String>,
        retry_after: Option<u64>,
    ) -> Self {
        let mut error = Self::overloaded(reason, message, 1);
        error.code = Some("rate_limit_exceeded");
        error.retry_after = retry_after.map(whole_seconds);
        error
    }

    /// 503 with `Retry-After`.
    pub fn unavailable(reason: &'static str, message: impl Into<String>) -> Self {
        let mut error = Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "service_unavailable_error",
            reason,
            message.into(),
        );
        error.retry_after = Some(1);
        error
    }

    /// 503 with `Retry-After`: a deadline that cannot be kept, said before anything was computed.
    pub fn unreachable(
        reason: &'static str,
        message: impl Into<String>,
        retry_after: u64,
    ) -> Self {
        let mut error = Self::unavailable(reason, message);
        error.code = Some(reason);
        error.retry_after = Some(whole_seconds(retry_after));
        error
    }

    /// 504: the request's time is over.
    pub fn deadline(milliseconds: u64) -> Self {
        let mut error = Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout_error",
            "deadline",
            format!("the request did not finish within {milliseconds} ms"),
        );
        error.code = Some("deadline_exceeded");
        error
    }

    /// 502: a worker answered what it must not.
    pub fn upstream(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_GATEWAY,
            "upstream_error",
            "upstream",
            message.into(),
        )
    }

    /// 500: a fault of the gateway itself.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal_error",
            "internal",
            message.into(),
        )
    }

    /// The body of the answer, also sent as an event when a stream fails.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({ "error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.to_json().to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(standing) = &self.standing {
            rate_limits(standing, headers);
        }
        if self.wants_key {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(Rejection(self.reason));
        response
    }
}

/// At least one: clients that are told 0 come back at once.
fn whole_seconds(seconds: u64) -> u32 {
    u32::try_from(seconds.max(1)).unwrap_or(u32::MAX)
}

/// What is left of a tenant's minute, as clients of OpenAI read it. Without limits there are no headers.
pub(crate) fn rate_limits(standing: &Standing, headers: &mut HeaderMap) {
    for (level, limit, remaining, reset) in [
        (
            standing.requests,
            "x-ratelimit-limit-requests",
            "x-ratelimit-remaining-requests",
            "x-ratelimit-reset-requests",
        ),
        (
            standing.tokens,
            "x-ratelimit-limit-tokens",
            "x-ratelimit-remaining-tokens",
            "x-ratelimit-reset-tokens",
        ),
    ] {
        let Some(level) = level else { continue };
        headers.insert(limit, HeaderValue::from(level.limit));
        headers.insert(remaining, HeaderValue::from(level.remaining));
        if let Ok(reset_in) = HeaderValue::try_from(go_duration(level.reset)) {
            headers.insert(reset, reset_in);
        }
    }
}

/// `850ms`, `1.5s`, `6m0s`: durations as OpenAI writes them.
fn go_duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 1.0 {
        return format!("{}ms", time.as_millis());
    }
    if seconds < 60.0 {
        let text = format!("{seconds:.3}");
        return format!("{}s", text.trim_end_matches('0').trim_end_matches('.'));
    }
    let whole = time.as_secs();
    format!("{}m{}s", whole / 60, whole % 60)
}

/// Marks an error answer with the word under which it is counted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rejection(pub(crate) &'static str);

/// At most `limit` bytes of client text for a message, cut at a character.
pub(crate) fn clip(text: &str, limit: usize) -> &str {
    let mut end = limit.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_openai_writes_them() {
        for (ms, text) in [
            (0, "0ms"),
            (850, "850ms"),
            (1000, "1s"),
            (1500, "1.5s"),
            (59_999, "59.999s"),
            (360_000, "6m0s"),
            (3_725_000, "62m5s"),
        ] {
            assert_eq!(go_duration(Duration::from_millis(ms)), text);
        }
    }
}
