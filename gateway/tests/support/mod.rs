//! A gateway over real sockets: fake workers that speak the real gRPC protocol, the in-memory store, a client.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::allow_attributes,
    reason = "shared by tests, each of which uses its part"
)]

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use foregate_api::ids::{Epoch, ExpertId, Rank};
use foregate_api::load::{EngineLoad, LoadWindow};
use foregate_api::manifest::RoutingPolicy;
use foregate_api::member::{Member, Phase};
use foregate_api::model::{Family, ModelSpec, WeightFormat};
use foregate_api::node::GatewayConfig;
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_store::coord::Coord;
use foregate_store::kv::Lease;
use foregate_store::memory::MemoryStore;
use foregate_wire::generation::generate_event::Event;
use foregate_wire::generation::generation_server::{Generation, GenerationServer};
use foregate_wire::generation::{
    FinishReason, Finished, GenerateEvent, GenerateRequest, Prefilled, RoutedExperts, Token,
    TokenInfo, TokenLogprob,
};
use foregate_wire::tonic::{Request, Response, Status};
use futures::Stream;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

pub const LAYERS: usize = 2;
pub const EXPERTS: usize = 8;
pub const TOP_K: usize = 2;
pub const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../e2e/models/demo");

/// What a fake worker does and saw.
#[derive(Debug, Default)]
pub struct Behaviour {
    /// The tokens of every answer, from index 0.
    pub answer: Mutex<Vec<u32>>,
    /// Tokens after which a stream breaks; 0: never. Counted over one stream.
    pub break_after: AtomicU32,
    /// Break by ending the stream instead of an error.
    pub end_quietly: AtomicBool,
    /// Answer RESOURCE_EXHAUSTED.
    pub busy: AtomicBool,
    /// Answer INVALID_ARGUMENT.
    pub refuse: AtomicBool,
    /// Milliseconds before each token.
    pub pace_ms: AtomicU32,
    /// Requests, in order.
    pub seen: Mutex<Vec<GenerateRequest>>,
    /// Metadata of requests, in order.
    pub metadata: Mutex<Vec<BTreeMap<String, String>>>,
    /// Streams that are open.
    pub open: AtomicU32,
}

/// A fake worker on a runtime of its own, so that dropping it cuts its sockets as a kill would.
pub struct Worker {
    pub behaviour: Arc<Behaviour>,
    pub address: String,
    kill: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Worker {
    pub fn start() -> Self {
        let behaviour = Arc::new(Behaviour::default());
        let kill = CancellationToken::new();
        let (send, receive) = std::sync::mpsc::channel();
        let service = GenerationServer::new(Fake(Arc::clone(&behaviour)));
        let killed = kill.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                send.send(listener.local_addr().unwrap().to_string())
                    .unwrap();
                let router = foregate_wire::serve::server().add_service(service);
                let serving =
                    foregate_wire::serve::serve(router, listener, CancellationToken::new());
                tokio::select! {
                    _ = serving => {}
                    () = killed.cancelled() => {}
                }
            });
            runtime.shutdown_background();
        });
        Self {
            behaviour,
            address: receive.recv().unwrap(),
            kill,
            thread: Some(thread),
        }
    }

    /// Cuts every connection at once.
    pub fn kill(&mut self) {
        self.kill.cancel();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    pub fn requests(&self) -> Vec<GenerateRequest> {
        self.behaviour.seen.lock().unwrap().clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Fake(Arc<Behaviour>);

/// Counts open streams.
struct OpenStream(Arc<Behaviour>);

impl OpenStream {
    fn new(behaviour: &Arc<Behaviour>) -> Self {
        behaviour.open.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(behaviour))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Experts of a position: a function of position and token, so that a resumed report can be compared.
pub fn experts_of(position: usize, token: u32) -> Vec<u32> {
    (0..LAYERS as u32)
        .flat_map(|layer| {
            let first = (token + layer) % 4;
            [first, 4 + (position as u32 + layer) % 4]
        })
        .collect()
}

fn routed(ids: &[u32], from: usize) -> RoutedExperts {
    RoutedExperts {
        tokens: ids.len() as u32,
        layers: LAYERS as u32,
        top_k: TOP_K as u32,
        experts: ids
            .iter()
            .enumerate()
            .flat_map(|(at, id)| experts_of(from + at, *id))
            .collect(),
    }
}

/// The logprob that the fake gives a token.
pub fn logprob_of(id: u32) -> f32 {
    -0.25 - (id % 16) as f32 / 8.0
}

fn info(id: u32, top: u32) -> TokenInfo {
    TokenInfo {
        chosen: Some(TokenLogprob {
            id,
            logprob: logprob_of(id),
            rank: 1,
        }),
        top: (0..top)
            .map(|rank| TokenLogprob {
                id: id + rank,
                logprob: logprob_of(id) - rank as f32,
                rank: rank + 1,
            })
            .collect(),
    }
}

/// The histogram that the fake reports: every token goes to the expert `id / 100 % EXPERTS` of each layer.
fn signature(ids: &[u32]) -> Vec<u32> {
    let mut counts = vec![0; LAYERS * EXPERTS];
    for id in ids {
        for layer in 0..LAYERS {
            counts[layer * EXPERTS + (*id as usize / 100) % EXPERTS] += 1;
        }
    }
    counts
}

fn event(event: Event) -> GenerateEvent {
    GenerateEvent { event: Some(event) }
}

#[foregate_wire::tonic::async_trait]
impl Generation for Fake {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateEvent, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let behaviour = Arc::clone(&self.0);
        let metadata = request
            .metadata()
            .iter()
            .filter_map(|pair| match pair {
                foregate_wire::tonic::metadata::KeyAndValueRef::Ascii(key, value) => {
                    Some((key.to_string(), value.to_str().ok()?.to_owned()))
                }
                foregate_wire::tonic::metadata::KeyAndValueRef::Binary(..) => None,
            })
            .collect();
        behaviour.metadata.lock().unwrap().push(metadata);
        let request = request.into_inner();
        behaviour.seen.lock().unwrap().push(request.clone());
        if behaviour.busy.load(Ordering::SeqCst) {
            return Err(Status::resource_exhausted("full"));
        }
        if behaviour.refuse.load(Ordering::SeqCst) {
            return Err(Status::invalid_argument("too odd for me"));
        }
        let open = OpenStream::new(&behaviour);
        let (send, receive) = tokio::sync::mpsc::channel(4);
        // The task ends with its stream, which ends with the runtime.
        #[expect(clippy::disallowed_methods, reason = "dies with the worker's runtime")]
        tokio::spawn(async move {
            let _open = open;
            let _gone = answer(&behaviour, request, &send).await;
        });
        Ok(Response::new(Box::pin(
            tokio_stream::wrappers::ReceiverStream::new(receive),
        )))
    }
}

type Sender = tokio::sync::mpsc::Sender<Result<GenerateEvent, Status>>;

async fn answer(
    behaviour: &Behaviour,
    request: GenerateRequest,
    send: &Sender,
) -> Result<(), tokio::sync::mpsc::error::SendError<Result<GenerateEvent, Status>>> {
    let script = behaviour.answer.lock().unwrap().clone();
    let prompt = request.prompt_len as usize;
    let have = request.token_ids.len() - prompt;
    let mut prefilled = Prefilled {
        cached_tokens: 0,
        prompt_logprobs: Vec::new(),
        routed: None,
        signature: signature(&request.token_ids),
    };
    if let Some(top) = request.prompt_logprobs {
        let later = &request.token_ids[1..];
        prefilled.prompt_logprobs = later.iter().map(|id| info(*id, top)).collect();
    }
    if request.return_routed_experts {
        prefilled.routed = Some(routed(&request.token_ids, 0));
    }
    send.send(Ok(event(Event::Prefilled(prefilled)))).await?;
    let mut last = None;
    let break_after = behaviour.break_after.load(Ordering::SeqCst);
    for index in have..request.max_tokens as usize {
        let pace = behaviour.pace_ms.load(Ordering::SeqCst);
        if pace > 0 {
            tokio::time::sleep(Duration::from_millis(pace.into())).await;
        }
        if break_after > 0 && index - have >= break_after as usize {
            if !behaviour.end_quietly.load(Ordering::SeqCst) {
                send.send(Err(Status::unavailable("going away"))).await?;
            }
            return Ok(());
        }
        let Some(id) = script
            .get(index)
            .copied()
            .or(request.ignore_eos.then_some(5))
        else {
            return finish(send, FinishReason::Stop, prompt, index, Some(0)).await;
        };
        if request.stop_token_ids.contains(&id) {
            return finish(send, FinishReason::Stop, prompt, index, Some(id)).await;
        }
        let seed = request
            .sampling
            .as_ref()
            .map_or(0, |sampling| sampling.seed);
        let hot = request
            .sampling
            .as_ref()
            .is_some_and(|sampling| sampling.temperature > 0.0);
        // A "sampler": with a temperature, the seed shifts the token.
        let id = if hot {
            300 + (u64::from(id).wrapping_add(seed) % 64) as u32
        } else {
            id
        };
        let token = Token {
            index: index as u32,
            id,
            info: request.logprobs.map(|top| info(id, top)),
            routed: last
                .filter(|_| request.return_routed_experts)
                .map(|last| routed(&[last], prompt + index - 1)),
        };
        last = Some(id);
        send.send(Ok(event(Event::Token(token)))).await?;
    }
    finish(
        send,
        FinishReason::Length,
        prompt,
        request.max_tokens as usize,
        None,
    )
    .await
}

async fn finish(
    send: &Sender,
    reason: FinishReason,
    prompt: usize,
    generated: usize,
    stop_token: Option<u32>,
) -> Result<(), tokio::sync::mpsc::error::SendError<Result<GenerateEvent, Status>>> {
    send.send(Ok(event(Event::Finished(Finished {
        reason: reason.into(),
        stop_token,
        prompt_tokens: prompt as u32,
        generated_tokens: generated as u32,
        signature: Vec::new(),
        preemptions: 0,
    }))))
    .await
}

pub fn model() -> ModelSpec {
    ModelSpec {
        family: Family::Qwen3Moe,
        format: WeightFormat::Float32,
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
        queue_timeout_ms: 5000,
        request_timeout_ms: 20_000,
    }
}

/// A gateway with its workers.
pub struct Cluster {
    pub url: String,
    pub workers: Vec<Worker>,
    pub coord: Coord,
    pub lease: Arc<dyn Lease>,
    pub shutdown: CancellationToken,
    pub client: reqwest::Client,
    pub running: tokio::task::JoinHandle<Result<(), foregate_gateway::GatewayError>>,
}

impl Cluster {
    /// `count` ready workers that all answer `answer`, an active placement, a gateway.
    pub async fn start(count: u32, answer: &str, config: GatewayConfig) -> Self {
        let cluster = Self::bare(count, answer, config).await;
        for (rank, worker) in cluster.workers.iter().enumerate() {
            let member = member(rank as u32, &worker.address, Phase::Ready);
            cluster
                .coord
                .register(&member, cluster.lease.as_ref())
                .await
                .unwrap();
        }
        cluster.activate(1, None).await;
        cluster.wait_ready().await;
        cluster
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
        let lease = store.lease(Duration::from_secs(60)).await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shutdown = CancellationToken::new();
        let deps = foregate_gateway::Deps {
            cluster: "test".into(),
            config,
            listener,
            store,
            registry: prometheus::Registry::new(),
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
        for _ in 0..500 {
            let ready = self.client.get(format!("{}/ready", self.url)).send().await;
            if ready.is_ok_and(|response| response.status() == 200) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the gateway did not become ready");
    }

    /// Waits until `holds`, for five seconds at most.
    pub async fn eventually(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        for _ in 0..500 {
            if holds().await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what} did not happen");
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

/// Ids of a text by the demonstration model's tokenizer.
pub fn ids(text: &str) -> Vec<u32> {
    let prompter = foregate_gateway::prompt::Prompter::load(DEMO.as_ref()).unwrap();
    prompter.encode("prompt", text, false).unwrap()
}
