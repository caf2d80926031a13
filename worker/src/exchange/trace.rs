//! Trace contexts of frames, and spans under them. Nothing here runs for a step that is not sampled.

use foregate_wire::frame::TraceContext;
use opentelemetry::Context;
use opentelemetry::trace::{
    SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState,
};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Makes `span` a child of a context that came from elsewhere.
pub(crate) fn adopt(span: &Span, parent: &TraceContext) {
    let context = SpanContext::new(
        TraceId::from_bytes(parent.trace_id),
        SpanId::from_bytes(parent.span_id),
        TraceFlags::new(parent.flags),
        true,
        TraceState::default(),
    );
    let parent = Context::new().with_remote_span_context(context);
    if let Err(error) = span.set_parent(parent) {
        tracing::trace!(%error, "span_without_parent");
    }
}

/// The context of a span, for whoever works on its behalf; `None` if nothing records it.
pub(crate) fn context_of(span: &Span) -> Option<TraceContext> {
    let context = span.context();
    let reference = context.span();
    let found = reference.span_context();
    found.is_valid().then(|| TraceContext {
        trace_id: found.trace_id().to_bytes(),
        span_id: found.span_id().to_bytes(),
        flags: found.trace_flags().to_u8(),
    })
}
