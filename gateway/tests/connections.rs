//! Clients that stop in the middle, seen on the raw socket.

#![expect(clippy::unwrap_used, reason = "a test may end in a panic")]

mod support;

use std::time::Duration;

use serde_json::Value;
use support::{Cluster, PATIENCE, config, pass};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

async fn send(cluster: &Cluster, text: &str) -> TcpStream {
    let address = cluster.url.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    stream
}

/// Everything up to the end that the server makes.
async fn rest(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut text))
        .await
        .unwrap()
        .unwrap();
    text
}

/// An answer on a connection of its own: those of the cluster's client were idle for too long as well.
async fn get(cluster: &Cluster, path: &str) -> String {
    let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    rest(&mut send(cluster, &head).await).await
}

#[tokio::test]
async fn half_a_body_gets_408_and_loses_its_connection() {
    let cluster = Cluster::start(1, "x", config()).await;
    const GO_ON: &str = "HTTP/1.1 100 Continue\r\n\r\n";
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n";
    let half = "content-length: 100\r\n\r\n{\"prompt\": ";
    let chunked = "transfer-encoding: chunked\r\n\r\n5\r\n{\"pro\r\n";
    for body in [half, chunked] {
        let mut stream = send(&cluster, &format!("{head}{body}")).await;
        // The server says so when it begins to read the body; from then on its clock runs.
        let mut go_on = [0; GO_ON.len()];
        stream.read_exact(&mut go_on).await.unwrap();
        assert_eq!(go_on, GO_ON.as_bytes());
        pass(Duration::from_secs(60)).await;
        let answer = rest(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        let body = answer.split("\r\n\r\n").nth(1).unwrap();
        let document: Value = serde_json::from_str(body).unwrap();
        assert_eq!(document["error"]["type"], "invalid_request_error");
    }
    let metrics = get(&cluster, "/metrics").await;
    assert!(
        metrics.contains("foregate_gateway_rejected_total{reason=\"slow_body\"} 2"),
        "{metrics}"
    );
}

#[tokio::test]
async fn half_a_head_is_cut_while_the_gateway_serves() {
    let cluster = Cluster::start(1, "x", config()).await;
    let mut stream = send(&cluster, "POST /v1/completions HTTP/1.1\r\nhost").await;
    // A later answer shows that the server has taken the silent connection too.
    assert_eq!(cluster.get("/health").await.0, 200);
    pass(Duration::from_secs(75)).await;
    assert_eq!(rest(&mut stream).await, "");
    let answer = get(&cluster, "/health").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}
