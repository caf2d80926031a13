//! An HTTP and SSE client that shows what came, and when.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use reqwest::{Response, StatusCode};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};

/// Longest wait for anything.
const WAIT: Duration = Duration::from_secs(120);

/// A client of one gateway.
#[derive(Debug, Clone)]
pub struct Client {
    base: String,
    http: reqwest::Client,
}

/// One SSE event with the time since the request.
#[derive(Debug, Clone)]
pub struct Event {
    /// When it came.
    pub at: Duration,
    /// Its data.
    pub data: Value,
}

impl Client {
    /// A client of the gateway under this URL.
    #[must_use]
    pub fn new(base: &str) -> Self {
        Self {
            base: base.trim_end_matches('/').to_owned(),
            http: reqwest::Client::new(),
        }
    }

    /// The same, which shows a key with each request.
    ///
    /// # Panics
    /// If the key cannot stand in a header.
    #[must_use]
    pub fn with_key(base: &str, key: &str) -> Self {
        let value = format!("Bearer {key}").parse().expect("a header's value");
        let headers = [(reqwest::header::AUTHORIZATION, value)];
        let http = reqwest::Client::builder().default_headers(headers.into_iter().collect());
        Self {
            http: http.build().expect("a client"),
            ..Self::new(base)
        }
    }

    /// Host and port.
    #[must_use]
    pub fn address(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    /// POSTs bytes as they are.
    ///
    /// # Panics
    /// If there is no answer in time.
    pub async fn raw(&self, path: &str, content_type: &str, body: Vec<u8>) -> Response {
        let request = self
            .http
            .post(format!("{}{path}", self.base))
            .header("content-type", content_type)
            .body(body);
        timeout(WAIT, request.send())
            .await
            .unwrap_or_else(|_| panic!("{path}: no answer"))
            .unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Status of a body that the server may refuse before it has read it; `None` if it closed the connection.
    pub async fn refused(&self, path: &str, body: Vec<u8>) -> Option<StatusCode> {
        let request = self.http.post(format!("{}{path}", self.base)).body(body);
        let answer = timeout(WAIT, request.send()).await.ok()?;
        answer.ok().map(|answer| answer.status())
    }

    /// POSTs JSON and returns status and JSON.
    ///
    /// # Panics
    /// If there is no JSON answer in time.
    pub async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let answer = self
            .raw(path, "application/json", body.to_string().into_bytes())
            .await;
        let status = answer.status();
        let text = answer.text().await.expect("a body");
        let json = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{path}: {status} {error}: {text}"));
        (status, json)
    }

    /// POSTs JSON and returns the answer, which must be 200.
    ///
    /// # Panics
    /// If it is not.
    pub async fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body).await;
        assert_eq!(status, StatusCode::OK, "{path}: {answer}");
        answer
    }

    /// POSTs JSON and reads the events up to `[DONE]`.
    ///
    /// # Panics
    /// If the answer is no complete event stream.
    pub async fn stream(&self, path: &str, body: &Value) -> Vec<Event> {
        self.watched_stream(path, body, || ()).await
    }

    /// Like [`Client::stream`], and calls `started` once, when the first event has come.
    ///
    /// # Panics
    /// If the answer is no complete event stream.
    pub async fn watched_stream(
        &self,
        path: &str,
        body: &Value,
        started: impl FnOnce(),
    ) -> Vec<Event> {
        let mut started = Some(started);
        let since = Instant::now();
        let answer = self
            .raw(path, "application/json", body.to_string().into_bytes())
            .await;
        let status = answer.status();
        assert_eq!(
            status,
            StatusCode::OK,
            "{}",
            answer.text().await.unwrap_or_default()
        );
        let mut bytes = answer.bytes_stream();
        let (mut buffer, mut events) = (Vec::new(), Vec::new());
        loop {
            let piece = timeout(WAIT, bytes.next())
                .await
                .unwrap_or_else(|_| panic!("{path}: the stream stands still"))
                .unwrap_or_else(|| panic!("{path}: ended without [DONE] after {events:?}"))
                .unwrap_or_else(|error| panic!("{path}: {error} after {events:?}"));
            buffer.extend_from_slice(&piece);
            while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = buffer.drain(..end + 2).collect();
                let event = String::from_utf8(event).expect("events are UTF-8");
                let Some(data) = event.trim_end().strip_prefix("data: ") else {
                    continue;
                };
                if data == "[DONE]" {
                    return events;
                }
                events.push(Event {
                    at: since.elapsed(),
                    data: serde_json::from_str(data).expect("data is JSON"),
                });
                if let Some(started) = started.take() {
                    started();
                }
            }
        }
    }

    /// GETs text with its status.
    ///
    /// # Panics
    /// If there is no answer in time.
    pub async fn get(&self, path: &str) -> (StatusCode, String) {
        let request = self.http.get(format!("{}{path}", self.base));
        let answer = timeout(WAIT, request.send())
            .await
            .unwrap_or_else(|_| panic!("{path}: no answer"))
            .unwrap_or_else(|error| panic!("{path}: {error}"));
        (answer.status(), answer.text().await.expect("a body"))
    }

    /// GETs JSON, which must be 200.
    ///
    /// # Panics
    /// If it is not.
    pub async fn json(&self, path: &str) -> Value {
        let (status, text) = self.get(path).await;
        assert_eq!(status, StatusCode::OK, "{path}: {text}");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}"))
    }

    /// The series of /metrics: name with labels → value.
    ///
    /// # Panics
    /// If /metrics is no Prometheus text.
    pub async fn metrics(&self) -> BTreeMap<String, f64> {
        let (status, text) = self.get("/metrics").await;
        assert_eq!(status, StatusCode::OK, "{text}");
        text.lines()
            .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').expect("name and value");
                (name.to_owned(), value.parse().expect("a number"))
            })
            .collect()
    }

    /// Sum of the series of one metric whose labels contain `label`.
    ///
    /// # Panics
    /// If /metrics is no Prometheus text.
    pub async fn metric(&self, name: &str, label: &str) -> Option<f64> {
        let all = self.metrics().await;
        let mut found = all
            .iter()
            .filter(|(series, _)| {
                series.split('{').next() == Some(name) && series.contains(label)
            })
            .map(|(_, value)| *value)
            .peekable();
        found.peek()?;
        Some(found.sum())
    }

    /// Asks until `done` says yes; the deadline names what was waited for.
    ///
    /// # Panics
    /// If that takes too long.
    pub async fn until<F>(&self, what: &str, limit: Duration, mut done: impl FnMut() -> F)
    where
        F: Future<Output = bool>,
    {
        let since = Instant::now();
        while !done().await {
            assert!(since.elapsed() < limit, "{what}: not within {limit:?}");
            sleep(Duration::from_millis(100)).await;
        }
    }
}
