//! Clients that stop in the middle, seen on the raw socket.

#![expect(clippy::unwrap_used, reason = "a test may end in a panic")]

mod support;

use std::time::Duration;

use serde_json::Value;
use support::{Cluster, config};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

async fn send(cluster: &Cluster, text: &str) -> TcpStream {
    let address = cluster.url.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    stream
}

/// Everything up to the end that the server makes; its clocks go on by themselves meanwhile.
async fn rest(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    timeout(Duration::from_secs(600), stream.read_to_string(&mut text))
        .await
        .unwrap()
        .unwrap();
    text
}

#[tokio::test]
async fn half_a_body_gets_408_and_loses_its_connection() {
    let cluster = Cluster::start(1, "x", config()).await;
    let half =
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"prompt\": ";
    let chunked = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{\"pro\r\n";
    for text in [half, chunked] {
        let mut stream = send(&cluster, text).await;
        tokio::time::pause();
        let answer = rest(&mut stream).await;
        tokio::time::resume();
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        let body = answer.split("\r\n\r\n").nth(1).unwrap();
        let document: Value = serde_json::from_str(body).unwrap();
        assert_eq!(document["error"]["type"], "invalid_request_error");
    }
    let metrics = cluster.get("/metrics").await.1;
    assert!(
        metrics.contains("foregate_gateway_rejected_total{reason=\"slow_body\"} 2"),
        "{metrics}"
    );
}

#[tokio::test]
async fn half_a_head_is_cut_while_the_gateway_serves() {
    let cluster = Cluster::start(1, "x", config()).await;
    let mut stream = send(&cluster, "POST /v1/completions HTTP/1.1\r\nhost").await;
    tokio::time::pause();
    assert_eq!(rest(&mut stream).await, "");
    tokio::time::resume();
    assert_eq!(cluster.get("/health").await.0, 200);
}
