//! A client that does as little as it can per event: what it costs is part of every way, and shares the cores with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use crate::bench::client::Lines;
use crate::bench::stub::NAME;

/// An answer that is silent for this long has failed.
const SILENCE: Duration = Duration::from_secs(30);

/// A request's body, made before its time begins.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    body: String,
    streamed: bool,
    tokens: u32,
}

impl Asked {
    pub(super) fn new(prompt: &str, tokens: u32, streamed: bool) -> Self {
        let body = json!({
            "model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": streamed,
        });
        Self {
            body: body.to_string(),
            streamed,
            tokens,
        }
    }
}

/// When what came of an answer, since it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Came {
    /// Events with text; none of a whole answer.
    pub(super) events: Vec<Duration>,
    /// The end.
    pub(super) total: Duration,
}

/// One or more servers that are asked in turn.
#[derive(Debug, Clone)]
pub(super) struct Client {
    http: reqwest::Client,
    urls: Arc<[String]>,
    next: Arc<AtomicUsize>,
}

impl Client {
    /// Of servers at `host:port`, of which there must be one.
    pub(super) fn new(addresses: &[String]) -> Self {
        let url = |address: &String| format!("http://{address}/v1/completions");
        Self {
            http: reqwest::Client::new(),
            urls: addresses.iter().map(url).collect(),
            next: Arc::default(),
        }
    }

    async fn send(&self, asked: &Asked) -> Result<reqwest::Response, String> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.urls.len().max(1);
        let request = self
            .http
            .post(&self.urls[turn])
            .header("content-type", "application/json")
            .body(asked.body.clone());
        let answer = timeout(SILENCE, request.send())
            .await
            .map_err(|_| "no answer".to_owned())?
            .map_err(|error| format!("connection: {error}"))?;
        match answer.status().is_success() {
            true => Ok(answer),
            false => {
                let status = answer.status();
                let text = answer.text().await.unwrap_or_default();
                Err(format!("HTTP {status}: {text}"))
            }
        }
    }

    /// Asks, and notes the moments.
    pub(super) async fn ask(&self, asked: &Asked) -> Result<Came, String> {
        let since = Instant::now();
        let answer = self.send(asked).await?;
        if !asked.streamed {
            let body = timeout(SILENCE, answer.bytes()).await;
            let body = body
                .map_err(|_| "the answer stands still".to_owned())?
                .map_err(|error| error.to_string())?;
            let total = since.elapsed();
            return match has_text(&body) {
                true => Ok(Came {
                    events: Vec::new(),
                    total,
                }),
                false => Err("the answer has no text".to_owned()),
            };
        }
        let mut came = Came::default();
        each_line(answer, |line| {
            let Some(data) = line.strip_prefix(b"data: ") else {
                return false;
            };
            if has_text(data) {
                came.events.push(since.elapsed());
            }
            data == b"[DONE]"
        })
        .await?;
        came.total = since.elapsed();
        match came.events.len() == asked.tokens as usize {
            true => Ok(came),
            false => Err(format!(
                "{} events with text for {} tokens",
                came.events.len(),
                asked.tokens
            )),
        }
    }

    /// Asks, and reads the answer's text.
    pub(super) async fn text(&self, asked: &Asked) -> Result<String, String> {
        let answer = self.send(asked).await?;
        let mut text = String::new();
        let mut take = |data: &[u8]| {
            if let Ok(data) = serde_json::from_slice::<Value>(data) {
                text.push_str(data["choices"][0]["text"].as_str().unwrap_or_default());
            }
        };
        if asked.streamed {
            each_line(answer, |line| {
                let data = line.strip_prefix(b"data: ").unwrap_or_default();
                take(data);
                data == b"[DONE]"
            })
            .await?;
        } else {
            take(&answer.bytes().await.map_err(|error| error.to_string())?);
        }
        Ok(text)
    }
}

/// Gives every line to `last`, until it says that this was the last.
async fn each_line(
    answer: reqwest::Response,
    mut last: impl FnMut(&[u8]) -> bool,
) -> Result<(), String> {
    let (mut bytes, mut lines) = (answer.bytes_stream(), Lines::default());
    let mut ended = false;
    // To the end of the body, not of the events: only then is the connection used again.
    while let Some(piece) = timeout(SILENCE, bytes.next())
        .await
        .map_err(|_| "the stream stands still".to_owned())?
    {
        lines.push(&piece.map_err(|error| format!("stream: {error}"))?);
        while let Some(line) = lines.next() {
            ended |= last(&line);
        }
    }
    match ended {
        true => Ok(()),
        false => Err("the stream ended without [DONE]".to_owned()),
    }
}

/// Whether an answer, or an event of it, brings text. Reading it as JSON would cost more than all else here.
fn has_text(data: &[u8]) -> bool {
    const FIELD: &[u8] = b"\"text\":";
    let Some(at) = data.windows(FIELD.len()).position(|part| part == FIELD) else {
        return false;
    };
    let rest = data[at + FIELD.len()..].trim_ascii_start();
    rest.starts_with(b"\"") && !rest.starts_with(b"\"\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_with_text_are_told_from_those_without() {
        for with in [
            r#"{"choices":[{"text":"a","index":0}]}"#,
            r#"{"choices": [{"index":0, "text": " \"" }]}"#,
        ] {
            assert!(has_text(with.as_bytes()), "{with}");
        }
        for without in [
            r#"{"choices":[{"text":"","finish_reason":"length"}]}"#,
            r#"{"choices":[{"text":null}]}"#,
            r#"{"choices":[],"usage":{}}"#,
            "[DONE]",
            "",
            r#""text":"#,
        ] {
            assert!(!has_text(without.as_bytes()), "{without}");
        }
    }
}
