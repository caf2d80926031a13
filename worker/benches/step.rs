//! A decode step through the whole engine, with and without load counters.
//!
//! Tokens per second of sequences that decode together; what is measured is the time from the first to
//! the last token of a batch of answers, prompts of one token. `counting` is the cost of the counters
//! alone, for as many rows as a step of the batch has: divide it by the time of a step.
#![allow(
    clippy::expect_used,
    missing_docs,
    reason = "a benchmark ends when it cannot be set up"
)]

use std::collections::BTreeSet;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use foregate_api::cpu::{CpuPath, Pinning, Seat};
use foregate_api::ids::Rank;
use foregate_api::model::Family;
use foregate_api::node::{FabricKind, WorkerConfig};
use foregate_api::weights::WeightSettings;
use foregate_checkpoint::Checkpoint;
use foregate_checkpoint::tiny::Tiny;
use foregate_kernels::{Cpu, KvCache};
use foregate_models::{LocalExperts, Model};
use foregate_worker::engine::{self, Alone, EngineHandle, EngineParts};
use foregate_worker::load::LoadCounters;
use foregate_worker::sampler::Sampling;
use foregate_worker::sequence::Request;
use futures::future::join_all;
use tokio::runtime::Runtime;

const SEQUENCES: u32 = 8;
const ANSWER: usize = 32;

/// Large enough that a step is not all overhead, small enough to draw in a second.
fn model() -> Tiny {
    Tiny {
        vocab: 4096,
        hidden: 256,
        layers: 8,
        heads: 8,
        kv_heads: 2,
        experts: 32,
        top_k: 4,
        expert_inner: 128,
        max_positions: 1024,
        ..Tiny::new(Family::Qwen3Moe)
    }
}

fn config() -> WorkerConfig {
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
        threads: 2,
        cpu_path: CpuPath::Auto,
        pinning: Pinning::None,
        seat: Seat::ALONE,
        max_num_seqs: SEQUENCES,
        max_num_batched_tokens: 256,
        max_waiting: 8,
        overtake_ms: 0,
        max_model_len: 1024,
        page_tokens: 16,
        kv_bytes: 0,
        exchange_deadline_ms: 1000,
        domain: String::new(),
        window_ms: 1000,
    }
}

fn start(checkpoint: &Checkpoint, load: Arc<LoadCounters>) -> EngineHandle {
    let cpu = Arc::new(Cpu::new(2));
    let model = Model::load(checkpoint, Arc::clone(&cpu), |_, _| {}).expect("model");
    let kv = KvCache::new(model.kv_shape(512, 16)).expect("kv cache");
    engine::start(EngineParts {
        kv,
        model,
        experts: Box::new(Alone(LocalExperts::load(checkpoint, cpu).expect("experts"))),
        config: config(),
        load,
    })
    .expect("engine")
}

fn request(first: u32) -> Request {
    Request {
        id: String::new(),
        tokens: vec![first],
        prompt_len: 1,
        max_tokens: ANSWER,
        min_tokens: 0,
        stop_tokens: BTreeSet::new(),
        sampling: Sampling::greedy(),
        logprobs: None,
        prompt_logprobs: None,
        routed_experts: false,
        hint: None,
    }
}

fn decode(runtime: &Runtime, engine: &EngineHandle) {
    let streams = (0..SEQUENCES).map(|n| {
        let stream = engine.submit(request(3 + n), None, tracing::Span::none());
        let mut stream = stream.expect("submit");
        async move {
            while let Some(event) = stream.next().await {
                event.expect("event");
            }
        }
    });
    runtime.block_on(join_all(streams.collect::<Vec<_>>()));
}

fn step(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("runtime");
    let dir = tempfile::tempdir().expect("directory");
    model().write(dir.path()).expect("checkpoint");
    let checkpoint = Checkpoint::open(dir.path()).expect("checkpoint");
    let spec = checkpoint.spec();
    let (layers, experts, top_k) = (spec.moe_layers(), spec.experts, spec.top_k);

    let mut group = criterion.benchmark_group("decode");
    group
        .sample_size(20)
        .measurement_time(Duration::from_secs(8));
    group.throughput(Throughput::Elements(u64::from(SEQUENCES) * ANSWER as u64));
    // Counters without layers count nothing.
    for (name, load) in [
        ("counted", LoadCounters::new(layers, experts)),
        ("uncounted", LoadCounters::new(0, 0)),
    ] {
        let engine = start(&checkpoint, Arc::new(load));
        group.bench_function(name, |bench| bench.iter(|| decode(&runtime, &engine)));
        runtime.block_on(engine.stop());
    }
    group.finish();

    let mut group = criterion.benchmark_group("counting");
    group.throughput(Throughput::Elements(u64::from(SEQUENCES)));
    let routes: Vec<u32> = (0..layers * top_k)
        .map(|i| (i * 7 % experts) as u32)
        .collect();
    group.bench_function("rows of one step", |bench| {
        bench.iter_batched_ref(
            || LoadCounters::new(layers, experts),
            |load| (0..SEQUENCES).for_each(|_| load.count_row(black_box(&routes))),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
