//! Clients that ask again and again while a test does something to the cluster, and what they saw.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use foregate_harness::cluster::{Cluster, awaited};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

/// Different prompts; each has one right answer.
const PROMPTS: usize = 6;
/// Tokens of an answer.
const TOKENS: usize = 48;
/// Clients at a time.
const CLIENTS: usize = 3;
/// Longest wait for the next token: beyond it a request counts as failed.
const STILL: Duration = Duration::from_secs(60);

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// Which prompt.
    pub(crate) prompt: usize,
    /// From the load's start.
    pub(crate) begun: Duration,
    /// From the request's start to its first token.
    pub(crate) first: Option<Duration>,
    /// Longest time between two tokens.
    pub(crate) gap: Duration,
    /// Its tokens, or why it failed.
    pub(crate) end: Result<Vec<u64>, String>,
}

/// Clients at work.
#[derive(Debug)]
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Asked>>>,
    thread: JoinHandle<()>,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) asked: Vec<Asked>,
}

impl Load {
    /// Starts clients of the gateways at `url`.
    pub(crate) fn start(cluster: &'static Cluster, url: &str) -> Self {
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let clients = Clients {
            url: format!("{url}/v1/completions"),
            http: reqwest::Client::new(),
            next: AtomicUsize::new(0),
            since: Instant::now(),
            stop: Arc::clone(&stop),
            asked: Arc::clone(&asked),
        };
        let thread = std::thread::spawn(move || cluster.in_network(|| clients.work()));
        Self {
            stop,
            asked,
            thread,
        }
    }

    /// Waits until so many more requests have ended.
    pub(crate) fn await_more(&self, requests: usize) {
        let goal = self.asked.lock().unwrap().len() + requests;
        awaited(&format!("{requests} more requests"), STILL, || {
            let ended = self.asked.lock().unwrap().len();
            (ended >= goal)
                .then_some(())
                .ok_or_else(|| format!("{ended} of {goal}"))
        });
    }

    /// Lets requests under way end, and returns all.
    pub(crate) fn stop(self) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        Outcome { asked }
    }
}

impl Outcome {
    /// Every request got all its tokens, and each prompt has always the same answer as in `reference`.
    ///
    /// # Panics
    /// With the first that did not.
    pub(crate) fn assert_as(&self, reference: &[Vec<u64>]) {
        for (n, asked) in self.asked.iter().enumerate() {
            let at = asked.begun;
            match &asked.end {
                Ok(tokens) => assert_eq!(
                    tokens, &reference[asked.prompt],
                    "request {n}, {at:?} after the start, prompt {}",
                    asked.prompt
                ),
                Err(why) => panic!("request {n}, {at:?} after the start, failed: {why}"),
            }
        }
    }

    pub(crate) fn summary(&self) -> Value {
        let failed = self.asked.iter().filter(|asked| asked.end.is_err()).count();
        let most = |of: &dyn Fn(&Asked) -> Option<Duration>| {
            let most = self.asked.iter().filter_map(of).max();
            most.map_or(0.0, |most| most.as_secs_f64())
        };
        json!({
            "requests": self.asked.len(),
            "failed": failed,
            "longest_time_to_first_token_s": most(&|asked| asked.first),
            "longest_gap_s": most(&|asked| Some(asked.gap)),
        })
    }
}

/// The right answers: each prompt asked alone.
pub(crate) fn reference(cluster: &Cluster, url: &str) -> Vec<Vec<u64>> {
    let url = format!("{url}/v1/completions");
    cluster.in_network(|| {
        runtime().block_on(async {
            let http = reqwest::Client::new();
            let mut answers = Vec::new();
            for prompt in 0..PROMPTS {
                let asked = ask(&http, &url, prompt, Instant::now()).await;
                answers.push(asked.end.unwrap());
            }
            answers
        })
    })
}

struct Clients {
    url: String,
    http: reqwest::Client,
    next: AtomicUsize,
    since: Instant,
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Clients {
    fn work(&self) {
        let clients = (0..CLIENTS).map(|_| self.client());
        runtime().block_on(futures::future::join_all(clients));
    }

    async fn client(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let prompt = self.next.fetch_add(1, Ordering::Relaxed) % PROMPTS;
            let asked = ask(&self.http, &self.url, prompt, self.since).await;
            let failed = asked.end.is_err();
            self.asked.lock().unwrap().push(asked);
            if failed {
                // Not a storm of refusals.
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

async fn ask(http: &reqwest::Client, url: &str, prompt: usize, since: Instant) -> Asked {
    let begun = Instant::now();
    let mut asked = Asked {
        prompt,
        begun: begun - since,
        first: None,
        gap: Duration::ZERO,
        end: Ok(Vec::new()),
    };
    let ids: Vec<usize> = (0..8).map(|i| 5 + prompt * 97 + i * 13).collect();
    let body = json!({
        "model": "demo", "prompt": ids, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true,
        "stream": true, "return_token_ids": true,
    });
    let mut last = begun;
    let read = read(http, url, &body, |came| {
        let now = Instant::now();
        if asked.first.is_none() {
            asked.first = Some(now - begun);
        } else {
            asked.gap = asked.gap.max(now - last);
        }
        last = now;
        if let Ok(tokens) = &mut asked.end {
            tokens.extend(came);
        }
    });
    let read = read.await;
    let count = asked.end.as_ref().map_or(0, Vec::len);
    match read {
        Err(why) => asked.end = Err(format!("{why}, after {count} tokens")),
        Ok(()) if count != TOKENS => asked.end = Err(format!("{count} of {TOKENS} tokens")),
        Ok(()) => {}
    }
    asked
}

/// Reads a stream of tokens up to `[DONE]`.
async fn read(
    http: &reqwest::Client,
    url: &str,
    body: &Value,
    mut came: impl FnMut(Vec<u64>),
) -> Result<(), String> {
    let answer = timeout(STILL, http.post(url).json(body).send()).await;
    let answer = answer.map_err(|_| format!("no answer within {STILL:?}"))?;
    let answer = answer.map_err(|error| format!("{error:?}"))?;
    let status = answer.status();
    if !status.is_success() {
        let text = answer.text().await.unwrap_or_default();
        return Err(format!("{status}: {text}"));
    }
    let mut bytes = answer.bytes_stream();
    let mut buffer = Vec::new();
    loop {
        let piece = timeout(STILL, bytes.next()).await;
        let piece = piece.map_err(|_| format!("no token within {STILL:?}"))?;
        let piece = piece.ok_or("the stream ended without [DONE]")?;
        buffer.extend_from_slice(&piece.map_err(|error| format!("{error:?}"))?);
        while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = buffer.drain(..end + 2).collect();
            let event = String::from_utf8(event).map_err(|error| error.to_string())?;
            let Some(data) = event.trim_end().strip_prefix("data: ") else {
                continue;
            };
            if data == "[DONE]" {
                return Ok(());
            }
            let data: Value = serde_json::from_str(data).map_err(|error| error.to_string())?;
            if data.get("error").is_some() {
                return Err(data.to_string());
            }
            let ids = data["choices"][0]["token_ids"].as_array();
            let ids: Vec<u64> = ids
                .into_iter()
                .flatten()
                .filter_map(Value::as_u64)
                .collect();
            if !ids.is_empty() {
                came(ids);
            }
        }
    }
}
