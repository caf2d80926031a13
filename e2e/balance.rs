//! The mix of texts shifts under load: the plan follows, the imbalance falls, and nobody notices.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failure here is the test's failure"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use foregate_harness::binary::{Foregate, Start};
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
const PATIENCE: Duration = Duration::from_secs(60);

fn manifest() -> ManifestFile {
    ManifestFile::demo(
        "  workers:\n    count: 4\n    redundantSlots: 1\n    kvMemory: 64Mi\n  balancing:\n    \
         windowMs: 1000\n    threshold: 0.95\n    minRows: 128\n",
    )
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

/// Imbalance before and after the plan changed.
#[derive(Debug, Default)]
struct Seen {
    before: Vec<f64>,
    after: Vec<f64>,
    epoch: u64,
}

/// Samples until the epoch has risen above `from` and then for some windows more.
async fn follow(client: &Client, from: u64) -> Seen {
    let since = Instant::now();
    let mut seen = Seen::default();
    while seen.after.len() < 16 {
        let experts = client.json("/debug/experts").await;
        seen.epoch = epoch(&experts);
        if let Some(imbalance) = imbalance(&experts) {
            let side = if seen.epoch > from {
                &mut seen.after
            } else {
                &mut seen.before
            };
            side.push(imbalance);
        }
        assert!(
            since.elapsed() < PATIENCE,
            "the plan does not change: {seen:?}"
        );
        sleep(Duration::from_millis(500)).await;
    }
    seen
}

fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / figures.len().max(1) as f64
}

async fn shift(cluster: &Foregate) {
    let client = Client::new(&cluster.url);
    let (mut from, mut fell) = (1, Vec::new());
    for kind in ["prose", "rust", "markdown"] {
        let load = Load::start(&client, kind);
        let seen = follow(&client, from).await;
        let (streams, pause) = load.end().await;
        assert!(streams >= CLIENTS, "{kind}: {streams}");
        assert!(
            pause < LONGEST_PAUSE,
            "{kind}: a stream stood still for {pause:?}"
        );
        // What the plan in force met when the mix shifted, against the second half of what came after.
        let worst = seen.before.iter().copied().fold(1.0, f64::max);
        let settled = mean(&seen.after[seen.after.len() / 2..]);
        if worst > 1.1 {
            fell.push(kind);
            assert!(settled < worst, "{kind}: imbalance did not fall: {seen:?}");
        }
        from = seen.epoch;
    }
    assert!(
        !fell.is_empty(),
        "no phase began unbalanced, so nothing was shown"
    );
    let moved = client
        .metric("foregate_gateway_epoch_changes_total", "")
        .await;
    assert!(
        moved.is_some_and(|changes| changes >= 3.0),
        "/metrics shows the changes: {moved:?}"
    );
    let active = client.metric("foregate_gateway_epoch", "active").await;
    assert!(
        active.is_some_and(|epoch| epoch >= 4.0),
        "/metrics shows the epoch: {active:?}"
    );
}

#[tokio::test]
async fn the_plan_follows_a_shifting_mix() {
    let manifest = manifest();
    let cluster = Start::up(BINARY, &["-f", manifest.argument()])
        .ready()
        .await;
    shift(&cluster).await;
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
}
