//! A model with an engine around it, and requests to it.
#![allow(dead_code, reason = "each test target uses its part")]
#![allow(unreachable_pub, reason = "shared by test targets")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use foregate_api::cpu::{CpuPath, Pinning, Seat};
use foregate_api::ids::{Epoch, Rank};
use foregate_api::model::{Family, ModelSpec};
use foregate_api::node::{FabricKind, WorkerConfig};
use foregate_api::weights::WeightSettings;
use foregate_checkpoint::Checkpoint;
use foregate_checkpoint::tiny::Tiny;
use foregate_kernels::{Cpu, KvCache, Ops};
use foregate_models::experts::{ExpertBatch, Experts, ExpertsError, LateRows};
use foregate_models::{LocalExperts, Model};
use foregate_wire::frame::TraceContext;
use foregate_wire::generation::generate_event::Event;
use foregate_wire::generation::{Finished, Prefilled, Token, TokenInfo};
use foregate_worker::engine::{
    self, Alone, EngineHandle, EngineParts, EventStream, StepExperts, StreamError,
};
use foregate_worker::load::LoadCounters;
use foregate_worker::sampler::Sampling;
use foregate_worker::sequence::Request;

/// Longest any single wait of a test may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A loaded checkpoint.
pub struct Rig {
    pub checkpoint: Arc<Checkpoint>,
    pub cpu: Arc<Cpu>,
    model: Model,
    dir: Option<tempfile::TempDir>,
}

pub fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("models/tests/fixtures")
        .join(family)
}

impl Rig {
    pub fn open(dir: &Path) -> Self {
        Self::open_with(dir, &WeightSettings::default())
    }

    pub fn open_with(dir: &Path, weights: &WeightSettings) -> Self {
        let checkpoint = Arc::new(Checkpoint::open_with(dir, weights).unwrap());
        let cpu = Arc::new(Cpu::new(2));
        let model = Model::load(&checkpoint, Arc::clone(&cpu), |_, _| {}).unwrap();
        Self {
            checkpoint,
            cpu,
            model,
            dir: None,
        }
    }

    pub fn tiny(family: Family) -> Self {
        Self::drawn(&Tiny::new(family))
    }

    pub fn drawn(tiny: &Tiny) -> Self {
        Self::drawn_with(tiny, &WeightSettings::default())
    }

    pub fn drawn_with(tiny: &Tiny, weights: &WeightSettings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        tiny.write(dir.path()).unwrap();
        let rig = Self::open_with(dir.path(), weights);
        Self {
            dir: Some(dir),
            ..rig
        }
    }

    pub fn spec(&self) -> &ModelSpec {
        self.checkpoint.spec()
    }

    /// Lets the model compute with other ops that give the same results.
    pub fn compute_with(&mut self, ops: &Arc<dyn Ops>) {
        self.model = self.model.with_ops(Arc::clone(ops));
    }

    pub fn local(&self) -> LocalExperts {
        LocalExperts::load(&self.checkpoint, self.cpu.clone()).unwrap()
    }

    /// An engine over all experts in this process.
    pub fn alone(&self, sizes: Sizes) -> EngineHandle {
        self.engine(sizes, Box::new(Alone(self.local())))
    }

    /// As [`Rig::alone`], but it takes only the steps it is allowed, however fast the machine is.
    pub fn paced(&self, sizes: Sizes) -> (EngineHandle, Pace) {
        self.paced_with(sizes, Box::new(Alone(self.local())))
    }

    pub fn paced_with(
        &self,
        sizes: Sizes,
        experts: Box<dyn StepExperts>,
    ) -> (EngineHandle, Pace) {
        let (allow, allowed) = mpsc::channel();
        let engine = self.engine(sizes, Box::new(Paced { experts, allowed }));
        (engine, Pace(allow))
    }

    pub fn engine(&self, sizes: Sizes, experts: Box<dyn StepExperts>) -> EngineHandle {
        let spec = self.spec();
        let load = LoadCounters::new(spec.moe_layers(), spec.experts);
        self.counted(sizes, experts, Arc::new(load))
    }

    pub fn counted(
        &self,
        sizes: Sizes,
        experts: Box<dyn StepExperts>,
        load: Arc<LoadCounters>,
    ) -> EngineHandle {
        let config = config(sizes);
        let shape = self.model.kv_shape(sizes.pages, sizes.page_tokens);
        engine::start(EngineParts {
            model: self.model.clone(),
            kv: KvCache::new(shape).unwrap(),
            experts,
            config,
            load,
        })
        .unwrap()
    }
}

/// Says how many steps a paced engine takes. Once it is dropped, the engine takes as many as it likes.
pub struct Pace(mpsc::Sender<()>);

impl Pace {
    pub fn steps(&self, count: usize) {
        for _ in 0..count {
            self.0.send(()).unwrap();
        }
    }
}

/// Experts that begin no step before it is allowed.
struct Paced {
    experts: Box<dyn StepExperts>,
    allowed: mpsc::Receiver<()>,
}

impl Experts for Paced {
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        self.experts.run(batch, out)
    }
}

impl StepExperts for Paced {
    fn begin_step(&mut self, trace: Option<TraceContext>) -> Epoch {
        self.allowed.recv().ok();
        self.experts.begin_step(trace)
    }

    fn end_step(&mut self) {
        self.experts.end_step();
    }
}

/// Bounds of an engine.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub seqs: u32,
    pub step_tokens: u32,
    pub waiting: u32,
    pub page_tokens: usize,
    pub pages: usize,
    /// How long a waiting sequence may be overtaken.
    pub overtake_ms: u64,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            seqs: 8,
            step_tokens: 64,
            waiting: 64,
            page_tokens: 4,
            pages: 256,
            overtake_ms: 0,
        }
    }
}

fn config(sizes: Sizes) -> WorkerConfig {
    WorkerConfig {
        rank: Rank(0),
        model_dir: String::new(),
        weights: WeightSettings::default(),
        served_name: String::new(),
        rpc_listen: String::new(),
        exchange_listen: String::new(),
        fabric: FabricKind::Local,
        duty: foregate_api::member::Duty::Attention,
        slots: 0,
        device: foregate_api::node::Device::Cpu,
        threads: 1,
        cpu_path: CpuPath::Auto,
        pinning: Pinning::None,
        seat: Seat::ALONE,
        max_num_seqs: sizes.seqs,
        max_num_batched_tokens: sizes.step_tokens,
        max_waiting: sizes.waiting,
        overtake_ms: sizes.overtake_ms,
        max_model_len: 100_000,
        page_tokens: sizes.page_tokens as u32,
        kv_bytes: 0,
        exchange_deadline_ms: 1000,
        domain: String::new(),
        window_ms: 1000,
    }
}

/// Greedy, without stop tokens.
pub fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        id: "test".to_owned(),
        tokens: prompt.to_vec(),
        prompt_len: prompt.len(),
        max_tokens,
        min_tokens: 0,
        stop_tokens: BTreeSet::new(),
        sampling: Sampling::greedy(),
        logprobs: None,
        prompt_logprobs: None,
        routed_experts: false,
        hint: None,
    }
}

/// Drawn at temperature 1 from a seed.
pub fn drawn(prompt: &[u32], max_tokens: usize, seed: u64) -> Request {
    Request {
        sampling: Sampling {
            temperature: 1.0,
            seed,
            ..Sampling::greedy()
        },
        ..request(prompt, max_tokens)
    }
}

/// Some token ids of a vocabulary, from a seed.
pub fn prompt(len: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            3 + ((state >> 33) % (vocab as u64 - 3)) as u32
        })
        .collect()
}

/// All that came out of a stream.
#[derive(Debug, Default, Clone)]
pub struct Answer {
    pub prefilled: Option<Prefilled>,
    pub tokens: Vec<Token>,
    pub finished: Option<Finished>,
}

impl Answer {
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    /// Token ids and the bits of every log-probability.
    pub fn bits(&self) -> Vec<(u32, Vec<u32>)> {
        self.tokens
            .iter()
            .map(|token| (token.id, token.info.iter().flat_map(info_bits).collect()))
            .collect()
    }

    pub fn end(&self) -> &Finished {
        self.finished.as_ref().unwrap()
    }

    pub fn start(&self) -> &Prefilled {
        self.prefilled.as_ref().unwrap()
    }
}

pub fn info_bits(info: &TokenInfo) -> Vec<u32> {
    info.chosen
        .iter()
        .chain(&info.top)
        .flat_map(|token| [token.id, token.rank, token.logprob.to_bits()])
        .collect()
}

pub fn submit(engine: &EngineHandle, request: Request) -> EventStream {
    engine.submit(request, None, tracing::Span::none()).unwrap()
}

pub async fn next(stream: &mut EventStream) -> Option<Result<Event, StreamError>> {
    let event = tokio::time::timeout(PATIENCE, stream.next()).await;
    event.expect("no event in time")
}

/// Puts a stream's events together and checks their order.
#[derive(Debug, Default)]
pub struct Gather(Answer);

impl Gather {
    pub fn add(&mut self, event: Event) {
        let answer = &mut self.0;
        assert!(answer.finished.is_none(), "an event after the last");
        match event {
            Event::Prefilled(event) => {
                assert!(answer.prefilled.is_none() && answer.tokens.is_empty());
                answer.prefilled = Some(event);
            }
            Event::Token(event) => {
                assert!(answer.prefilled.is_some());
                if let Some(last) = answer.tokens.last() {
                    assert_eq!(event.index, last.index + 1);
                }
                answer.tokens.push(event);
            }
            Event::Finished(event) => answer.finished = Some(event),
        }
    }

    pub fn end(self) -> Answer {
        assert!(
            self.0.finished.is_some(),
            "the stream ended without its last event"
        );
        self.0
    }
}

/// Reads a stream to its end.
pub async fn collect(mut stream: EventStream) -> Result<Answer, StreamError> {
    let mut gather = Gather::default();
    while let Some(event) = next(&mut stream).await {
        gather.add(event?);
    }
    Ok(gather.end())
}

pub async fn run(engine: &EngineHandle, request: Request) -> Answer {
    collect(submit(engine, request)).await.unwrap()
}

/// Waits until an engine's figures say what they should.
pub async fn until(
    engine: &EngineHandle,
    what: &str,
    holds: impl Fn(&foregate_api::load::EngineLoad) -> bool,
) {
    let wait = async {
        while !holds(&engine.load()) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let reached = tokio::time::timeout(PATIENCE, wait).await;
    assert!(reached.is_ok(), "never: {what}; {:?}", engine.load());
}
