//! The caller's trace, from gRPC metadata to a span.

use foregate_wire::tonic::metadata::MetadataMap;
use opentelemetry::global;
use opentelemetry::propagation::Extractor;
use tracing::{Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::sequence::Request;

struct Metadata<'a>(&'a MetadataMap);

impl Extractor for Metadata<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0
            .keys()
            .filter_map(|key| match key {
                foregate_wire::tonic::metadata::KeyRef::Ascii(key) => Some(key.as_str()),
                foregate_wire::tonic::metadata::KeyRef::Binary(_) => None,
            })
            .collect()
    }
}

/// The span of a request on this worker, a child of the caller's.
pub(super) fn request_span(metadata: &MetadataMap, request: &Request) -> Span {
    let parent = global::get_text_map_propagator(|map| map.extract(&Metadata(metadata)));
    let span = info_span!(
        "generate",
        request_id = request.id,
        prompt_tokens = request.prompt_len,
        resumed_tokens = request.tokens.len() - request.prompt_len,
        max_tokens = request.max_tokens,
    );
    // Fails only when no trace exporter is installed or the span is filtered out.
    span.set_parent(parent).ok();
    span
}
