//! The identity of a request: `x-request-id` and W3C trace context, in and out.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use foregate_wire::tonic::metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue};
use opentelemetry::propagation::{Extractor, Injector};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::error::clip;
use crate::random::Random;
use crate::traffic::Tenant;

/// `x-request-id`.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// `traceparent` of W3C Trace Context, level 1.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The identity of one request; travels with it as a request extension.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The client's id if it gave a usable one, else a new one.
    pub request_id: String,
    /// The `traceparent` to hand on where no tracer is installed.
    pub traceparent: String,
    /// The request's span.
    pub span: Span,
    /// Whose request it is, once that is known.
    pub tenant: Option<Tenant>,
}

struct Incoming<'a>(&'a HeaderMap);

impl Extractor for Incoming<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

#[derive(Default)]
struct Outgoing(Vec<(String, String)>);

impl Injector for Outgoing {
    fn set(&mut self, key: &str, value: String) {
        self.0.push((key.to_owned(), value));
    }
}

impl Identity {
    /// Reads a request's headers and opens its span.
    #[must_use]
    pub fn of(headers: &HeaderMap, method: &str, path: &str, random: &Random) -> Self {
        let request_id = headers
            .get(&REQUEST_ID)
            .and_then(|value| value.to_str().ok())
            .filter(|id| valid_id(id))
            .map_or_else(|| random.hex128(), str::to_owned);
        let traceparent = headers
            .get(&TRACEPARENT)
            .and_then(|value| value.to_str().ok())
            .filter(|value| valid_traceparent(value))
            .map_or_else(
                // Not sampled: nobody asked for the trace; the id still joins logs.
                || format!("00-{}-{:016x}-00", random.hex128(), random.next() | 1),
                str::to_owned,
            );
        let span = tracing::info_span!(
            "http.request",
            otel.kind = "server",
            http.request.method = method,
            // A path may be as long as a request's headers.
            url.path = clip(path, 1024),
            http.response.status_code = tracing::field::Empty,
            request.id = request_id,
            client.name = tracing::field::Empty,
            foregate.tenant = tracing::field::Empty,
            gen_ai.operation.name = tracing::field::Empty,
            gen_ai.request.model = tracing::field::Empty,
            gen_ai.request.max_tokens = tracing::field::Empty,
            gen_ai.request.temperature = tracing::field::Empty,
            gen_ai.request.top_p = tracing::field::Empty,
            gen_ai.usage.input_tokens = tracing::field::Empty,
            gen_ai.usage.output_tokens = tracing::field::Empty,
            gen_ai.response.finish_reasons = tracing::field::Empty,
            gen_ai.latency.time_to_first_token = tracing::field::Empty,
        );
        let parent = opentelemetry::global::get_text_map_propagator(|propagator| {
            propagator.extract(&Incoming(headers))
        });
        // Without a tracing layer there is no parent to set, and nothing to report.
        let _no_layer = span.set_parent(parent);
        Self {
            request_id,
            traceparent,
            span,
            tenant: None,
        }
    }

    /// The same request as one of `tenant`.
    #[must_use]
    pub fn of_tenant(&self, tenant: Tenant) -> Self {
        self.span.record("foregate.tenant", &*tenant);
        Self {
            tenant: Some(tenant),
            ..self.clone()
        }
    }

    /// Trace context of `span` as key and value pairs; the incoming one where no tracer is installed.
    fn context_of(&self, span: &Span) -> Vec<(String, String)> {
        let mut outgoing = Outgoing::default();
        opentelemetry::global::get_text_map_propagator(|propagator| {
            propagator.inject_context(&span.context(), &mut outgoing);
        });
        if !outgoing.0.iter().any(|(key, _)| key == "traceparent") {
            outgoing
                .0
                .push(("traceparent".into(), self.traceparent.clone()));
        }
        outgoing.0
    }

    /// Puts id and trace context into an answer.
    pub fn write_headers(&self, headers: &mut HeaderMap) {
        if let Ok(value) = HeaderValue::from_str(&self.request_id) {
            headers.insert(REQUEST_ID, value);
        }
        for (key, value) in self.context_of(&self.span) {
            if let (Ok(key), Ok(value)) =
                (HeaderName::try_from(key), HeaderValue::try_from(value))
            {
                headers.insert(key, value);
            }
        }
    }

    /// Puts id and trace context into a call to a worker.
    pub fn write_metadata(&self, span: &Span, metadata: &mut MetadataMap) {
        let mut pairs = self.context_of(span);
        pairs.push(("x-request-id".into(), self.request_id.clone()));
        for (key, value) in pairs {
            let key = key.parse::<MetadataKey<Ascii>>();
            let value = value.parse::<MetadataValue<Ascii>>();
            if let (Ok(key), Ok(value)) = (key, value) {
                metadata.insert(key, value);
            }
        }
    }
}

/// At most 128 visible ASCII characters, so that it can stand in a header, a log line and a path.
fn valid_id(id: &str) -> bool {
    (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

/// `00-<32 hex>-<16 hex>-<2 hex>`, lower case, neither id all zero.
fn valid_traceparent(value: &str) -> bool {
    let parts: Vec<&str> = value.split('-').collect();
    let hex = |text: &str, length: usize| {
        text.len() == length
            && text
                .bytes()
                .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    };
    let real = |text: &str| text.bytes().any(|byte| byte != b'0');
    match parts.as_slice() {
        [version, trace, span, flags] => {
            *version == "00"
                && hex(trace, 32)
                && real(trace)
                && hex(span, 16)
                && real(span)
                && hex(flags, 2)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_taken_if_they_are_usable() {
        assert!(valid_id("req-1/ä".replace('ä', "a").as_str()));
        assert!(!valid_id(""));
        assert!(!valid_id("two words"));
        assert!(!valid_id(&"x".repeat(129)));
    }

    #[test]
    fn traceparents_are_checked() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert!(valid_traceparent(good));
        assert!(!valid_traceparent(&good.replace("4bf9", "4BF9")));
        assert!(!valid_traceparent(
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01"
        ));
        assert!(!valid_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-01"));
    }
}
