//! One streamed completion, with the time of every token.

use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use crate::error::CliError;

/// A stream that is silent for this long has failed.
const SILENCE: Duration = Duration::from_secs(120);

/// A gateway under load.
#[derive(Debug, Clone)]
pub(super) struct Target {
    base: String,
    http: reqwest::Client,
}

/// What one request saw.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// Since the request, one per event with tokens.
    pub(super) events: Vec<Duration>,
    /// Until the end of the stream.
    pub(super) total: Duration,
    /// Tokens of the prompt.
    pub(super) prompt_tokens: u64,
    /// Tokens of the answer.
    pub(super) tokens: u64,
}

impl Seen {
    /// Longest time between two events.
    pub(super) fn longest_pause(&self) -> Duration {
        let pairs = self.events.windows(2);
        pairs
            .map(|pair| pair[1].saturating_sub(pair[0]))
            .max()
            .unwrap_or_default()
    }
}

impl Target {
    pub(super) fn new(url: &str) -> Result<Self, CliError> {
        if !url.starts_with("http://") {
            return Err(CliError::Usage(format!(
                "--url {url:?}: give the gateway's URL such as http://127.0.0.1:8000"
            )));
        }
        Ok(Self {
            base: url.trim_end_matches('/').to_owned(),
            http: reqwest::Client::new(),
        })
    }

    /// The main model's name; fails if nobody is there.
    pub(super) async fn model(&self) -> Result<String, CliError> {
        let models = self.json("/v1/models").await?;
        models["data"][0]["id"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| CliError::Runtime(format!("{}/v1/models lists no model", self.base)))
    }

    /// GETs JSON.
    pub(super) async fn json(&self, path: &str) -> Result<Value, CliError> {
        let text = self.text(path).await?;
        serde_json::from_str(&text)
            .map_err(|error| CliError::runtime(&format!("{}{path}", self.base), &error))
    }

    /// GETs text.
    pub(super) async fn text(&self, path: &str) -> Result<String, CliError> {
        let url = format!("{}{path}", self.base);
        let failed = |error: reqwest::Error| CliError::runtime(&url, &error);
        let request = self.http.get(&url).timeout(Duration::from_secs(10)).send();
        let answer = request
            .await
            .map_err(failed)?
            .error_for_status()
            .map_err(failed)?;
        answer.text().await.map_err(failed)
    }

    /// Streams one completion greedily to exactly `max_tokens`.
    pub(super) async fn complete(
        &self,
        model: &str,
        prompt: &str,
        max_tokens: u32,
    ) -> Result<Seen, String> {
        let body = json!({
            "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
        });
        let since = Instant::now();
        let request = self
            .http
            .post(format!("{}/v1/completions", self.base))
            .json(&body);
        let answer = timeout(SILENCE, request.send())
            .await
            .map_err(|_| "no answer".to_owned())?
            .map_err(|error| error.to_string())?;
        if !answer.status().is_success() {
            let status = answer.status();
            return Err(format!(
                "{status}: {}",
                answer.text().await.unwrap_or_default()
            ));
        }
        let mut bytes = answer.bytes_stream();
        let (mut buffer, mut seen) = (Vec::new(), Seen::default());
        loop {
            let piece = timeout(SILENCE, bytes.next())
                .await
                .map_err(|_| "the stream stands still".to_owned())?
                .ok_or("the stream ended without [DONE]")?
                .map_err(|error| error.to_string())?;
            buffer.extend_from_slice(&piece);
            while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = buffer.drain(..end + 2).collect();
                if seen.event(&event, since.elapsed())? {
                    seen.total = since.elapsed();
                    return Ok(seen);
                }
            }
        }
    }
}

impl Seen {
    /// Takes one event; true at the end.
    fn event(&mut self, event: &[u8], at: Duration) -> Result<bool, String> {
        let Some(data) = event.trim_ascii().strip_prefix(b"data: ") else {
            return Ok(false);
        };
        if data == b"[DONE]" {
            return Ok(true);
        }
        let data: Value = serde_json::from_slice(data).map_err(|error| error.to_string())?;
        if let Some(error) = data.get("error") {
            return Err(error.to_string());
        }
        if data["usage"].is_object() {
            self.prompt_tokens = data["usage"]["prompt_tokens"].as_u64().unwrap_or(0);
            self.tokens = data["usage"]["completion_tokens"].as_u64().unwrap_or(0);
        }
        if data["choices"][0]["text"]
            .as_str()
            .is_some_and(|text| !text.is_empty())
        {
            self.events.push(at);
        }
        Ok(false)
    }
}
