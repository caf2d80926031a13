//! The mix of texts shifts under load: the plan follows, the imbalance falls, and nobody notices.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failure here is the test's failure"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use foregate_harness::binary::Start;
use foregate_harness::client::Client;
use foregate_harness::manifest::ManifestFile;
use foregate_harness::repository;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

const BINARY: &str = env!("CARGO_BIN_EXE_foregate");
/// No stream may stand still for longer; a migration is meant to cost a step, a busy test machine more.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const CLIENTS: usize = 6;
const KINDS: [&str; 3] = ["prose", "python", "rust"];
const WINDOW_MS: u64 = 1000;
/// Time for the plan to follow a shift: a few windows.
const SETTLE: Duration = Duration::from_secs(5);
const MEASURE: Duration = Duration::from_secs(6);

/// Four workers with one spare slot each: the first placement, made without any load, fits no kind of text.
fn manifest(enabled: bool) -> ManifestFile {
    ManifestFile::demo(&format!(
        "  workers:\n    count: 4\n    redundantSlots: 1\n    kvMemory: 64Mi\n  balancing:\n    \
         enabled: {enabled}\n    windowMs: {WINDOW_MS}\n    threshold: 0.95\n    minRows: 128\n"
    ))
}

/// Streams of one kind of text, one after the other on every client, until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    clients: JoinSet<(usize, Duration)>,
}

impl Load {
    fn start(client: &Client, kind: &str) -> Self {
        let text =
            std::fs::read_to_string(repository(&format!("e2e/models/demo/heldout/{kind}.txt")));
        let text: Arc<[char]> = text.unwrap().chars().collect();
        let stop = Arc::new(AtomicBool::new(false));
        let mut clients = JoinSet::new();
        for number in 0..CLIENTS {
            let (client, text, stop) = (client.clone(), Arc::clone(&text), Arc::clone(&stop));
            clients.spawn(async move {
                let (mut streams, mut longest) = (0, Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    let at = (number * 977 + streams * 5003) % (text.len() - 300);
                    let prompt: String = text[at..at + 300].iter().collect();
                    longest = longest.max(stream(&client, &prompt).await);
                    streams += 1;
                }
                (streams, longest)
            });
        }
        Self { stop, clients }
    }

    /// Number of streams and the longest pause of any. A failed stream has panicked in its client.
    async fn end(mut self) -> (usize, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut streams, mut longest) = (0, Duration::ZERO);
        while let Some(client) = self.clients.join_next().await {
            let (more, pause) = client.expect("no request fails");
            streams += more;
            longest = longest.max(pause);
        }
        (streams, longest)
    }
}

async fn stream(client: &Client, prompt: &str) -> Duration {
    let body = json!({
        "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true},
    });
    let events = client.stream("/v1/completions", &body).await;
    let usage = &events.last().expect("events").data["usage"];
    assert_eq!(usage["completion_tokens"], 24, "{usage}");
    let pairs = events.windows(2);
    pairs
        .map(|pair| pair[1].at.saturating_sub(pair[0].at))
        .max()
        .unwrap_or_default()
}

fn epoch(experts: &Value) -> u64 {
    experts["active"]["epoch"]
        .as_u64()
        .expect("an active placement")
}

fn imbalance(experts: &Value) -> Option<f64> {
    let layers: Vec<f64> = experts["imbalance"]
        .as_array()?
        .iter()
        .filter_map(Value::as_f64)
        .collect();
    (!layers.is_empty()).then(|| layers.iter().sum::<f64>() / layers.len() as f64)
}

fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / figures.len().max(1) as f64
}

/// Loads a cluster with each kind in turn. Mean imbalance of each, from the moment on at which the plan could have
/// followed.
async fn shift(client: &Client) -> Vec<f64> {
    let mut means = Vec::new();
    for kind in KINDS {
        let load = Load::start(client, kind);
        sleep(SETTLE).await;
        let mut samples = Vec::new();
        let since = Instant::now();
        while since.elapsed() < MEASURE {
            samples.extend(imbalance(&client.json("/debug/experts").await));
            sleep(Duration::from_millis(500)).await;
        }
        let (streams, pause) = load.end().await;
        assert!(streams >= CLIENTS, "{kind}: {streams}");
        assert!(
            pause < LONGEST_PAUSE,
            "{kind}: a stream stood still for {pause:?}"
        );
        assert!(!samples.is_empty(), "{kind}: no load window");
        means.push(mean(&samples));
    }
    means
}

/// The same load on a cluster that may not move anything and on one that may.
async fn run(enabled: bool) -> (Vec<f64>, u64) {
    let manifest = manifest(enabled);
    let cluster = Start::up(BINARY, &["-f", manifest.argument()])
        .ready()
        .await;
    let client = Client::new(&cluster.url);
    let means = shift(&client).await;
    // The last window may still move a copy between two questions.
    client
        .until(
            "/metrics shows the epoch",
            Duration::from_secs(60),
            || async {
                let epoch = epoch(&client.json("/debug/experts").await);
                client.metric("foregate_gateway_epoch", "active").await == Some(epoch as f64)
            },
        )
        .await;
    let epoch = epoch(&client.json("/debug/experts").await);
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
    (means, epoch)
}

#[tokio::test]
async fn the_plan_follows_a_shifting_mix() {
    let (fixed, first) = run(false).await;
    assert_eq!(first, 1, "without balancing the first plan stays");
    let (moving, last) = run(true).await;
    assert!(
        last > KINDS.len() as u64,
        "the epoch rises with every shift: {last}"
    );
    // An imbalance of 1 is perfect; what is above it is what waiting costs.
    let (fixed_excess, excess) = (mean(&fixed) - 1.0, mean(&moving) - 1.0);
    assert!(
        excess < 0.75 * fixed_excess,
        "imbalance by kind without balancing {fixed:?}, with it {moving:?}"
    );
}
