//! A gateway over real sockets: fake workers that speak the real gRPC protocol, the in-memory store, a client.
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    missing_docs,
    missing_debug_implementations,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::allow_attributes,
    reason = "shared by tests, each of which uses its part"
)]

mod fake;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use foregate_api::ids::{Epoch, ExpertId, Rank};
use foregate_api::load::{EngineLoad, LoadWindow};
use foregate_api::manifest::RoutingPolicy;
use foregate_api::member::{Member, Phase};
use foregate_api::model::{Family, ModelSpec};
use foregate_api::node::GatewayConfig;
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_api::weights::{WeightFormat, WeightFormats};
use foregate_store::coord::Coord;
use foregate_store::kv::Lease;
use foregate_store::memory::MemoryStore;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

pub use fake::{Worker, experts_of, logprob_of};

pub const LAYERS: usize = 2;
pub const EXPERTS: usize = 8;
pub const TOP_K: usize = 2;
/// Longest wait for what must happen. Long: it ends a test that fails, and no machine is too slow to pass.
pub const PATIENCE: Duration = Duration::from_secs(120);
pub const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../e2e/models/demo");

pub fn model() -> ModelSpec {
    ModelSpec {
        family: Family::Qwen3Moe,
        formats: WeightFormats::all(WeightFormat::Float32),
        vocab: 4096,
        hidden: 16,
        layers: LAYERS,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        max_positions: 2048,
        rope_theta: 1e4,
        norm_eps: 1e-6,
        qkv_bias: false,
        clip_qkv: None,
        tied_embeddings: true,
        dense_inner: 0,
        moe_blocks: vec![true; LAYERS],
        experts: EXPERTS,
        top_k: TOP_K,
        expert_inner: 8,
        norm_top_k: true,
        shared_inner: None,
        eos: vec![0],
        bos: None,
    }
}

pub fn member(rank: u32, rpc: &str, phase: Phase) -> Member {
    Member {
        rank: Rank(rank),
        incarnation: u64::from(rank) + 100,
        rpc: rpc.to_owned(),
        exchange: format!("local:{rank}"),
        domain: String::new(),
        slots: EXPERTS as u32,
        phase,
        model: model(),
        cpu_path: "portable".into(),
        kv_pages: 128,
        page_tokens: 16,
    }
}

pub fn placement(epoch: u64, ranks: u32) -> Placement {
    let ranks: Vec<Rank> = (0..ranks).map(Rank).collect();
    let slots: Vec<Vec<ExpertId>> = ranks
        .iter()
        .map(|_| (0..EXPERTS as u32).map(ExpertId).collect())
        .collect();
    Placement {
        epoch: Epoch(epoch),
        parent: Epoch(epoch - 1),
        reason: if epoch == 1 {
            Reason::Initial
        } else {
            Reason::Move
        },
        layers: (0..LAYERS)
            .map(|_| LayerPlacement::from_slots(&ranks, slots.clone(), EXPERTS))
            .collect(),
        ranks,
        balance_before: 1.0,
        balance_after: 1.0,
    }
}

pub fn window(rank: u32, sequence: u64, engine: EngineLoad) -> LoadWindow {
    LoadWindow {
        rank: Rank(rank),
        epoch: Epoch(1),
        sequence,
        span_ms: 2000,
        gate: vec![
            (0..EXPERTS as u64)
                .map(|expert| expert + u64::from(rank))
                .collect();
            LAYERS
        ],
        served: vec![10 * (u64::from(rank) + 1); LAYERS],
        engine,
    }
}

pub fn config() -> GatewayConfig {
    GatewayConfig {
        listen: "127.0.0.1:0".into(),
        model_dir: DEMO.into(),
        served_names: vec!["demo".into(), "alias".into()],
        max_model_len: 1024,
        routing: RoutingPolicy::LeastLoaded,
        max_in_flight: 16,
        max_queued: 16,
        queue_timeout_ms: 60_000,
        request_timeout_ms: 60_000,
        forecast_ms: None,
        expert_hints: false,
        traffic: foregate_api::traffic::Traffic::default(),
        api_keys: None,
    }
}

/// A gateway with its workers.
pub struct Cluster {
    pub url: String,
    pub workers: Vec<Worker>,
    pub coord: Coord,
    pub lease: Arc<dyn Lease>,
    pub shutdown: CancellationToken,
    pub registry: prometheus::Registry,
    pub client: reqwest::Client,
    pub running: tokio::task::JoinHandle<Result<(), foregate_gateway::GatewayError>>,
}

impl Cluster {
    /// `count` ready workers that all answer `answer`, an active placement, a gateway.
    pub async fn start(count: u32, answer: &str, config: GatewayConfig) -> Self {
        let cluster = Self::bare(count, answer, config).await;
        cluster.enter().await;
        cluster
    }

    /// Registers the workers, and activates a placement.
    pub async fn enter(&self) {
        for (rank, worker) in self.workers.iter().enumerate() {
            let member = member(rank as u32, &worker.address, Phase::Ready);
            self.coord
                .register(&member, self.lease.as_ref())
                .await
                .unwrap();
        }
        self.activate(1, None).await;
        self.wait_ready().await;
    }

    /// The same, with nothing in the store.
    pub async fn bare(count: u32, answer: &str, config: GatewayConfig) -> Self {
        let workers: Vec<Worker> = (0..count).map(|_| Worker::start()).collect();
        let ids = ids(answer);
        for worker in &workers {
            worker.behaviour.answer.lock().unwrap().clone_from(&ids);
        }
        let store: Arc<dyn foregate_store::kv::Store> = Arc::new(MemoryStore::new());
        let coord = Coord::new(Arc::clone(&store), "test");
        let lease = store.lease(Duration::from_secs(3600)).await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shutdown = CancellationToken::new();
        let registry = prometheus::Registry::new();
        let deps = foregate_gateway::Deps {
            keys: None,
            cluster: "test".into(),
            config,
            listener,
            store,
            registry: registry.clone(),
            trial: foregate_gateway::Trial::default(),
            shutdown: shutdown.clone(),
        };
        #[expect(clippy::disallowed_methods, reason = "the test holds the handle")]
        let running = tokio::spawn(foregate_gateway::run(deps));
        Self {
            url,
            workers,
            coord,
            lease,
            shutdown,
            registry,
            client: reqwest::Client::new(),
            running,
        }
    }

    pub async fn activate(&self, epoch: u64, seen: Option<u64>) {
        let plan = placement(epoch, self.workers.len().max(1) as u32);
        assert!(self.coord.propose(&plan, seen).await.unwrap());
        assert!(self.coord.activate(&plan, seen).await.unwrap());
    }

    pub async fn wait_ready(&self) {
        self.eventually("readiness", async || self.get("/ready").await.0 == 200)
            .await;
    }

    /// Waits until `holds`. That must last: what comes and goes may do so between two looks.
    pub async fn eventually(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let looks = async {
            while !holds().await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let seen = tokio::time::timeout(PATIENCE, looks).await;
        assert!(seen.is_ok(), "{what} did not happen");
    }

    /// Makes every stream wait after so many tokens, until it is let go by 0.
    pub fn hold_after(&self, tokens: u32) {
        for worker in &self.workers {
            worker.behaviour.hold_after.send_replace(tokens);
        }
    }

    /// Waits until `/metrics` has this text.
    pub async fn shows(&self, text: &str) {
        self.eventually(text, async || self.get("/metrics").await.1.contains(text))
            .await;
    }

    /// Waits until no worker has an open stream.
    pub async fn idle(&self) {
        self.eventually("the streams' end", async || {
            let open = |worker: &Worker| worker.behaviour.open.load(Ordering::SeqCst);
            self.workers.iter().all(|worker| open(worker) == 0)
        })
        .await;
    }

    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.client
            .post(format!("{}{path}", self.url))
            .json(body)
            .send()
            .await
            .unwrap()
    }

    pub async fn json(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body).await;
        let status = response.status();
        let document: Value = response.json().await.unwrap();
        assert_eq!(status, 200, "{document}");
        document
    }

    pub async fn get(&self, path: &str) -> (u16, String) {
        let response = self
            .client
            .get(format!("{}{path}", self.url))
            .send()
            .await
            .unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// The events of a stream, without `[DONE]`, and whether that came last.
    pub async fn stream(&self, path: &str, body: &Value) -> (Vec<Value>, bool) {
        let response = self.post(path, body).await;
        assert_eq!(response.status(), 200);
        let kind = response.headers()["content-type"]
            .to_str()
            .unwrap()
            .to_owned();
        assert!(kind.starts_with("text/event-stream"), "{kind}");
        events(&response.text().await.unwrap())
    }
}

/// Lets so much time go by at once for everything on this thread: the test, its client and the gateway.
pub async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// Reads server-sent events strictly.
pub fn events(text: &str) -> (Vec<Value>, bool) {
    assert!(text.ends_with("\n\n"), "a stream ends with a whole event");
    let mut documents = Vec::new();
    let mut done = false;
    for event in text.split_terminator("\n\n") {
        if event.starts_with(':') {
            continue;
        }
        assert!(!done, "nothing follows [DONE]");
        let data = event.strip_prefix("data: ").expect("every line is data");
        if data == "[DONE]" {
            done = true;
        } else {
            documents.push(serde_json::from_str(data).unwrap());
        }
    }
    (documents, done)
}

/// `body` with the fields of `extra` put over its own.
pub fn with(mut body: Value, extra: &Value) -> Value {
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// The text of a choice of `/v1/completions`, put together from a stream's events.
pub fn text_of(events: &[Value], index: usize) -> String {
    events
        .iter()
        .map(|event| &event["choices"][0])
        .filter(|choice| choice["index"] == index)
        .filter_map(|choice| choice["text"].as_str())
        .collect()
}

/// A header of an answer that must have it.
pub fn header(response: &reqwest::Response, name: &str) -> String {
    response.headers()[name].to_str().unwrap().to_owned()
}

/// Ids of a text by the demonstration model's tokenizer.
pub fn ids(text: &str) -> Vec<u32> {
    let prompter = foregate_gateway::prompt::Prompter::load(DEMO.as_ref()).unwrap();
    prompter.encode("prompt", text, false).unwrap()
}
