//! One request, one trace: spans of gateway, worker, exchange and experts at a real OTLP receiver; metrics too.
#![expect(clippy::panic, reason = "a failure here is the test's failure")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use foregate_harness::binary::Start;
use foregate_harness::client::Client;
use foregate_harness::otlp::{Receiver, Span};
use foregate_harness::{on_path, skip};
use serde_json::json;

const BINARY: &str = env!("CARGO_BIN_EXE_foregate");

fn start(receiver: &Receiver, more: &[&str]) -> Start {
    Start::up(BINARY, more)
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.url)
        .env("OTEL_TRACES_SAMPLER", "always_on")
        .env("OTEL_BSP_SCHEDULE_DELAY", "200")
        .env("OTEL_METRIC_EXPORT_INTERVAL", "300")
}

/// Spans by trace.
fn traces(spans: Vec<Span>) -> BTreeMap<String, Vec<Span>> {
    let mut traces: BTreeMap<String, Vec<Span>> = BTreeMap::new();
    for span in spans {
        traces.entry(span.trace.clone()).or_default().push(span);
    }
    traces
}

fn named(spans: &[Span], part: &str) -> bool {
    spans.iter().any(|span| span.name.contains(part))
}

/// A trace is whole if every span but one has its parent in it.
fn connected(spans: &[Span]) -> bool {
    let ids: BTreeSet<_> = spans.iter().map(|span| &span.id).collect();
    spans
        .iter()
        .filter(|span| !ids.contains(&span.parent))
        .count()
        == 1
}

async fn one_trace(receiver: &Receiver, more: &[&str]) -> Vec<Span> {
    let cluster = start(receiver, more).ready().await;
    let client = Client::new(&cluster.url);
    let body = json!({"prompt": "And the LORD said", "max_tokens": 4, "temperature": 0});
    drop(client.ok("/v1/completions", &body).await);
    // The drain flushes what is left.
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
    let traces = traces(receiver.spans());
    let found = traces.into_values().find(|spans| named(spans, "exchange"));
    found.unwrap_or_else(|| panic!("no trace with an exchange span: {:#?}", receiver.spans()))
}

#[tokio::test]
async fn tasks_join_one_trace_and_push_metrics() {
    let receiver = Receiver::start().await;
    let spans = one_trace(&receiver, &[]).await;
    let names: BTreeSet<_> = spans.iter().map(|span| span.name.clone()).collect();
    for part in ["http.request", "generate", "exchange", "experts"] {
        assert!(
            names.iter().any(|name| name.contains(part)),
            "no {part} in {names:?}"
        );
    }
    assert!(connected(&spans), "{spans:#?}");
    let metrics = receiver.metrics();
    for name in [
        "vllm:prompt_tokens_total",
        "foregate_operator_leader",
        "foregate_worker_epoch",
    ] {
        assert!(
            metrics.iter().any(|(_, got)| got == name),
            "no {name} pushed"
        );
    }
}

#[tokio::test]
async fn processes_join_one_trace() {
    if on_path("etcd").is_none() {
        return skip("no etcd on PATH");
    }
    let receiver = Receiver::start().await;
    let spans = one_trace(&receiver, &["--processes"]).await;
    let services: BTreeSet<_> = spans.iter().map(|span| span.service.as_str()).collect();
    assert!(services.contains("foregate-gateway"), "{services:?}");
    assert!(services.contains("foregate-worker"), "{services:?}");
    assert!(connected(&spans), "{spans:#?}");
}

/// A receiver that is away costs nothing but its spans.
#[tokio::test]
async fn a_receiver_that_is_away_changes_nothing() {
    let start = Start::up(BINARY, &[]).env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9");
    let cluster = start.ready().await;
    let client = Client::new(&cluster.url);
    let body = json!({"prompt": "And the LORD said", "max_tokens": 4, "temperature": 0});
    drop(client.ok("/v1/completions", &body).await);
    let (status, stderr) = tokio::time::timeout(Duration::from_secs(30), cluster.stop())
        .await
        .unwrap_or_else(|_| panic!("the flush has no end"));
    assert!(status.success(), "{status}\n{stderr}");
}
