//! One streamed completion of an OpenAI server, with the time of every token.

use std::fmt::{Display, Formatter};
use std::hash::{DefaultHasher, Hasher};
use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use crate::error::CliError;

/// A stream that is silent for this long has failed.
const SILENCE: Duration = Duration::from_secs(120);

/// A server under load.
#[derive(Debug, Clone)]
pub(super) struct Target {
    base: String,
    http: reqwest::Client,
    key: Option<String>,
}

/// What to complete.
#[derive(Debug, Clone)]
pub(super) enum Prompt {
    /// Text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// One completion to ask for.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) prompt: Prompt,
    /// Tokens of the answer.
    pub(super) max_tokens: u32,
    /// Ask to go on past the end of sequence: a field that OpenAI's own API does not have.
    pub(super) ignore_eos: bool,
}

/// What one request saw.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// Since the request was due, one per event with tokens.
    pub(super) events: Vec<Duration>,
    /// Until the end of the stream, since the request was due.
    pub(super) total: Duration,
    /// Tokens of the prompt.
    pub(super) prompt_tokens: u64,
    /// Tokens of the answer.
    pub(super) tokens: u64,
    /// The server said how many tokens there were.
    counted: bool,
    /// Of the answer's text.
    text: DefaultHasher,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// Its kind, such as `connection` or `HTTP 429`.
    pub(super) kind: String,
    /// What happened.
    pub(super) what: String,
}

impl Failure {
    pub(super) fn new(kind: &str, what: impl Into<String>) -> Self {
        Self {
            kind: kind.to_owned(),
            what: what.into(),
        }
    }

    fn silent(what: &str) -> Self {
        Self::new("time-out", format!("{what} for {} s", SILENCE.as_secs()))
    }

    fn stream(error: &dyn Display) -> Self {
        Self::new("stream", error.to_string())
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.kind, self.what)
    }
}

impl Seen {
    /// Milliseconds between every two events.
    pub(super) fn pauses(&self) -> impl Iterator<Item = f64> {
        let pairs = self.events.windows(2);
        pairs.map(|pair| pair[1].saturating_sub(pair[0]).as_secs_f64() * 1000.0)
    }

    /// Longest time between two events.
    pub(super) fn longest_pause(&self) -> Duration {
        let pairs = self.events.windows(2);
        pairs
            .map(|pair| pair[1].saturating_sub(pair[0]))
            .max()
            .unwrap_or_default()
    }

    /// A number for the answer's text: equal texts, equal numbers.
    pub(super) fn digest(&self) -> u64 {
        self.text.finish()
    }

    /// Until the first token; `None` if there was none.
    pub(super) fn first(&self) -> Option<Duration> {
        self.events.first().copied()
    }

    /// Mean time per token after the first; `None` for answers of less than two.
    pub(super) fn per_token(&self) -> Option<Duration> {
        let (first, last) = (self.events.first()?, self.events.last()?);
        let tokens = u32::try_from(self.tokens).ok()?.checked_sub(1)?;
        last.saturating_sub(*first).checked_div(tokens)
    }
}

impl Target {
    pub(super) fn new(url: &str) -> Result<Self, CliError> {
        if !url.starts_with("http://") {
            return Err(CliError::Usage(format!(
                "--url {url:?}: give the server's URL such as http://127.0.0.1:8000; https is not spoken here"
            )));
        }
        Ok(Self {
            // Servers are asked for /v1/…, whether or not the URL ends so.
            base: url.trim_end_matches('/').trim_end_matches("/v1").to_owned(),
            http: reqwest::Client::new(),
            key: None,
        })
    }

    /// Sends a key with every request.
    pub(super) fn with_key(mut self, key: Option<String>) -> Self {
        self.key = key;
        self
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
        let request = self.http.get(&url).timeout(Duration::from_secs(10));
        let answer = self
            .signed(request)
            .send()
            .await
            .map_err(failed)?
            .error_for_status()
            .map_err(failed)?;
        answer.text().await.map_err(failed)
    }

    fn signed(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Streams one completion greedily. Times count from `due`, when the request should have been sent: a
    /// client that comes late must not make the server look fast.
    pub(super) async fn complete(
        &self,
        model: &str,
        ask: &Ask,
        due: Instant,
    ) -> Result<Seen, Failure> {
        let url = format!("{}/v1/completions", self.base);
        let request = self.signed(self.http.post(url).json(&ask.body(model)));
        let answer = timeout(SILENCE, request.send())
            .await
            .map_err(|_| Failure::silent("no answer"))?
            .map_err(|error| Failure::new("connection", error.to_string()))?;
        if !answer.status().is_success() {
            let kind = format!("HTTP {}", answer.status().as_u16());
            return Err(Failure::new(&kind, answer.text().await.unwrap_or_default()));
        }
        let mut bytes = answer.bytes_stream();
        let (mut lines, mut seen) = (Lines::default(), Seen::default());
        loop {
            let piece = timeout(SILENCE, bytes.next())
                .await
                .map_err(|_| Failure::silent("the stream stands still"))?
                .ok_or_else(|| Failure::stream(&"it ended without [DONE]"))?
                .map_err(|error| Failure::stream(&error))?;
            let at = due.elapsed();
            lines.push(&piece);
            while let Some(line) = lines.next() {
                if seen.line(&line, at)? {
                    return seen.whole(due.elapsed());
                }
            }
        }
    }
}

impl Ask {
    fn body(&self, model: &str) -> Value {
        let mut body = json!({
            "model": model, "max_tokens": self.max_tokens, "temperature": 0,
            "stream": true, "stream_options": {"include_usage": true},
        });
        body["prompt"] = match &self.prompt {
            Prompt::Text(text) => json!(text),
            Prompt::Tokens(tokens) => json!(tokens),
        };
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        body
    }
}

/// Bytes of a stream as lines, however they are cut.
#[derive(Debug, Default)]
pub(super) struct Lines {
    bytes: Vec<u8>,
    /// Bytes before this have no line end.
    searched: usize,
}

impl Lines {
    pub(super) fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
    }

    /// The next whole line, without its end.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        let rest = &self.bytes[self.searched..];
        let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
            self.searched = self.bytes.len();
            return None;
        };
        let line: Vec<u8> = self.bytes.drain(..=self.searched + end).collect();
        self.searched = 0;
        Some(line.trim_ascii_end().to_vec())
    }
}

impl Seen {
    /// Takes one line; true at the end.
    fn line(&mut self, line: &[u8], at: Duration) -> Result<bool, Failure> {
        let Some(data) = line.strip_prefix(b"data:") else {
            return Ok(false);
        };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            return Ok(true);
        }
        let data: Value =
            serde_json::from_slice(data).map_err(|error| Failure::stream(&error))?;
        if data["error"].is_object() {
            return Err(Failure::new("error event", data["error"].to_string()));
        }
        if data["usage"].is_object() {
            self.counted = true;
            self.prompt_tokens = data["usage"]["prompt_tokens"].as_u64().unwrap_or(0);
            self.tokens = data["usage"]["completion_tokens"].as_u64().unwrap_or(0);
        }
        if gives_token(&data["choices"][0]) {
            self.text.write(
                data["choices"][0]["text"]
                    .as_str()
                    .unwrap_or_default()
                    .as_bytes(),
            );
            self.events.push(at);
        }
        Ok(false)
    }

    /// The request as a whole, at its end.
    fn whole(mut self, total: Duration) -> Result<Self, Failure> {
        if self.events.is_empty() {
            return Err(Failure::new("no token", "the answer had no token"));
        }
        self.total = total;
        if !self.counted {
            self.tokens = self.events.len() as u64;
        }
        Ok(self)
    }
}

/// Whether an event brought a token. A token without text does: it may be half a character, or the server has
/// no tokenizer. Only the last event of an answer may bring none, and then it names why the answer ended.
fn gives_token(choice: &Value) -> bool {
    let text = choice["text"].as_str();
    let ended = choice["finish_reason"].is_string();
    text.is_some_and(|text| !text.is_empty() || !ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Duration = Duration::from_millis(5);

    #[test]
    fn lines_come_whole_however_they_are_cut() {
        let text = b"data: 1\r\n\r\ndata: 2\n\n";
        for cut in 1..text.len() {
            let (mut lines, mut all) = (Lines::default(), Vec::new());
            for piece in text.chunks(cut) {
                lines.push(piece);
                while let Some(line) = lines.next() {
                    all.push(line);
                }
            }
            let want: [&[u8]; 4] = [b"data: 1", b"", b"data: 2", b""];
            assert_eq!(all, want, "{cut}");
        }
    }

    #[test]
    fn events_are_tokens_errors_or_the_end() {
        let mut seen = Seen::default();
        let mut take = |data: &str| seen.line(format!("data: {data}").as_bytes(), AT);
        assert_eq!(
            take(r#"{"choices":[{"text":"a","finish_reason":null}]}"#),
            Ok(false)
        );
        assert_eq!(
            take(r#"{"choices":[{"text":"","finish_reason":null}]}"#),
            Ok(false)
        );
        assert_eq!(
            take(r#"{"choices":[{"text":"","finish_reason":"length"}]}"#),
            Ok(false)
        );
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}"#;
        assert_eq!(take(usage), Ok(false));
        assert_eq!(take("[DONE]"), Ok(true));
        let error = take(r#"{"error":{"message":"busy"}}"#).unwrap_err();
        assert_eq!(error.kind, "error event");
        assert_eq!(take("{").unwrap_err().kind, "stream");
        let seen = seen.whole(AT * 2).unwrap();
        assert_eq!(
            (seen.events.len(), seen.tokens, seen.prompt_tokens),
            (2, 2, 7)
        );
    }

    #[test]
    fn a_server_that_does_not_count_has_its_events_counted() {
        let seen = Seen {
            events: vec![AT, AT * 2, AT * 5],
            ..Seen::default()
        };
        let seen = seen.whole(AT * 6).unwrap();
        assert_eq!(seen.tokens, 3);
        assert_eq!(seen.per_token(), Some(AT * 2));
        assert_eq!(Seen::default().whole(AT).unwrap_err().kind, "no token");
    }

    #[test]
    fn urls_may_end_in_v1_and_are_http() {
        for url in [
            "http://127.0.0.1:1",
            "http://127.0.0.1:1/",
            "http://127.0.0.1:1/v1/",
        ] {
            assert_eq!(Target::new(url).unwrap().base, "http://127.0.0.1:1");
        }
        assert!(Target::new("https://127.0.0.1:1").is_err());
    }
}
