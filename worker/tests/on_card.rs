//! Workers that compute on cards: the same host side and the same kernels, run by the emulator, one card to each worker.
//!
//! Their tokens do not depend on how many there are, on the fabric, or on moves; with float32 weights they are those of the
//! processor, since products are the same chains and sums of norms and softmaxes differ in last bits only.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what it expects by failing"
)]

mod cluster;
#[path = "../../operator/tls/tests/desk/mod.rs"]
mod desk;
#[path = "../../kernels/cuda/tests/emulated/mod.rs"]
mod emulated;
mod random;
mod rig;

use std::path::Path;
use std::sync::{Arc, Mutex};

use foregate_api::ids::Rank;
use foregate_api::model::{Family, ModelSpec};
use foregate_api::node::FabricKind;
use foregate_api::weights::{PlainFormat, Quantization, WeightSettings};
use foregate_checkpoint::Checkpoint;
use foregate_checkpoint::tiny::Tiny;
use foregate_cuda::{Cuda, Staged};
use foregate_store::memory::MemoryStore;
use foregate_wire::generation::{GenerateRequest, Sampling};
use foregate_worker::dense::DenseWeights;
use foregate_worker::fabric::local::LocalHub;
use foregate_worker::{Card, Cards, Deps, Health};
use futures::future::join_all;
use prometheus::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use cluster::{Cluster, Form};
use emulated::Emulated;
use random::Random;
use rig::{Answer, prompt};

/// Cards with so much memory each, and what was opened of them.
#[derive(Clone)]
struct Machine {
    opened: Arc<Mutex<Vec<Arc<Emulated>>>>,
    cards: Cards,
}

impl Machine {
    fn new(memory: usize) -> Self {
        let opened = Arc::<Mutex<Vec<Arc<Emulated>>>>::default();
        let kept = Arc::clone(&opened);
        let cards = Cards::new(move |_, cpu| {
            let card = Arc::new(Emulated::new(memory));
            kept.lock().unwrap().push(Arc::clone(&card));
            let cuda = Cuda::new(card);
            Ok(Card {
                name: cuda.driver().name().to_owned(),
                ops: Arc::new(Staged::new(cuda.clone(), cpu.clone())),
                callee_ops: Arc::new(Staged::new(cuda.clone(), cpu.clone())),
                executor: Arc::new(cuda),
            })
        });
        Self { opened, cards }
    }

    fn launches(&self, kernel: &str) -> u64 {
        let opened = self.opened.lock().unwrap();
        let of = |card: &Arc<Emulated>| card.launches().get(kernel).copied().unwrap_or(0);
        opened.iter().map(of).sum()
    }
}

const MEMORY: usize = 1 << 30;

fn form(workers: u32, fabric: FabricKind, dtype: PlainFormat) -> Form {
    Form {
        workers,
        fabric,
        threads: 1,
        max_num_seqs: 3,
        max_num_batched_tokens: 24,
        page_tokens: 4,
        kv_bytes: 1 << 20,
        spare_slots: 1,
        weights: WeightSettings {
            dtype,
            quantization: Quantization::None,
        },
        proven: false,
        cards: true,
    }
}

fn request(length: usize, vocab: usize, seed: u64) -> GenerateRequest {
    GenerateRequest {
        request_id: format!("r{seed}"),
        token_ids: prompt(length, vocab, seed),
        prompt_len: length as u32,
        max_tokens: 24,
        ignore_eos: true,
        deadline_ms: 100_000,
        logprobs: Some(1),
        sampling: Some(Sampling {
            temperature: if seed == 2 { 0.8 } else { 0.0 },
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed,
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

/// Answers to three requests on every worker in turn, while experts move.
async fn answers(dir: &Path, spec: &ModelSpec, form: Form, cards: &Cards) -> Vec<Answer> {
    let random = &mut Random::new(7);
    let mut cluster = Cluster::start(dir, spec, form, cards).await;
    cluster.move_to_random(random).await;
    let asked: Vec<_> = [(9, 1), (17, 2), (30, 3)]
        .into_iter()
        .zip((0..form.workers).cycle())
        .map(|((length, seed), rank)| {
            cluster.ask(Rank(rank), request(length, spec.vocab, seed))
        })
        .collect();
    let (answers, ()) = tokio::join!(join_all(asked), cluster.move_to_random(random));
    cluster.stop().await;
    answers
}

fn model(family: Family, dtype: PlainFormat) -> (tempfile::TempDir, ModelSpec) {
    let dir = tempfile::tempdir().unwrap();
    Tiny::new(family).write(dir.path()).unwrap();
    let settings = WeightSettings {
        dtype,
        quantization: Quantization::None,
    };
    let spec = Checkpoint::open_with(dir.path(), &settings)
        .unwrap()
        .spec()
        .clone();
    (dir, spec)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_do_not_depend_on_how_many_cards_compute_them() {
    let dtype = PlainFormat::Bfloat16;
    let (dir, spec) = model(Family::Qwen2Moe, dtype);
    let machine = Machine::new(MEMORY);
    // One worker has all experts of all layers, and sums their results on its card.
    let bits = |answers: Vec<Answer>| answers.iter().map(Answer::bits).collect::<Vec<_>>();
    let one = form(1, FabricKind::Local, dtype);
    let alone = bits(answers(dir.path(), &spec, one, &machine.cards).await);
    assert!(alone.iter().all(|bits| bits.len() == 24));
    assert!(machine.launches("fg_combine") > 0);
    for (workers, fabric) in [(2, FabricKind::Local), (3, FabricKind::Tcp)] {
        let many = form(workers, fabric, dtype);
        let found = bits(answers(dir.path(), &spec, many, &machine.cards).await);
        assert_eq!(found, alone, "{workers} workers, {fabric:?}");
    }
    let used: Vec<usize> = machine
        .opened
        .lock()
        .unwrap()
        .iter()
        .map(|card| card.used())
        .collect();
    assert_eq!(used, [0; 6], "all memory goes back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn float32_tokens_are_those_of_the_processor() {
    let dtype = PlainFormat::Float32;
    for family in [Family::Qwen3Moe, Family::Mixtral] {
        let (dir, spec) = model(family, dtype);
        let machine = Machine::new(MEMORY);
        let cards = form(2, FabricKind::Local, dtype);
        let processors = Form {
            cards: false,
            ..cards
        };
        let ids = |answers: Vec<Answer>| answers.iter().map(Answer::ids).collect::<Vec<_>>();
        let found = ids(answers(dir.path(), &spec, cards, &machine.cards).await);
        let wanted = ids(answers(dir.path(), &spec, processors, &machine.cards).await);
        assert_eq!(found, wanted, "{family:?}");
    }
}

/// What one worker that cannot start says.
async fn refused(dir: &Path, spec: &ModelSpec, form: Form, cards: &Cards) -> String {
    let deps = Deps {
        cluster: "test".to_owned(),
        config: cluster::config(dir, Rank(0), spec.experts as u32, form),
        keys: None,
        store: Arc::new(MemoryStore::new()),
        local_hub: Some(LocalHub::new()),
        dense: DenseWeights::new(),
        cards: cards.clone(),
        rpc_listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        exchange_listener: None,
        registry: Registry::new(),
        progress: Arc::new(|_| {}),
        health: Health::new(),
        shutdown: CancellationToken::new(),
    };
    foregate_worker::run(deps).await.unwrap_err().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_had_is_refused_by_name() {
    let dtype = PlainFormat::Bfloat16;
    let (dir, spec) = model(Family::Qwen3Moe, dtype);
    let form = form(1, FabricKind::Local, dtype);

    let small = Machine::new(380 << 20);
    let wide = Form {
        kv_bytes: 200 << 20,
        ..form
    };
    let text = refused(dir.path(), &spec, wide, &small.cards).await;
    assert!(text.starts_with("device: weights "), "{text}");
    assert!(
        text.contains("spec.workers.kvMemory") && text.contains("would fit"),
        "{text}"
    );
    let taken = small.opened.lock().unwrap()[0].used();
    assert_eq!(taken, 0, "it says so before it takes any");

    let text = refused(dir.path(), &spec, form, &Cards::none()).await;
    assert_eq!(
        text,
        "device: there is no card 0 here; spec.workers.device: cpu"
    );

    for (dtype, quantization, remedy) in [
        (
            PlainFormat::Auto,
            Quantization::Int8,
            "spec.model.quantization",
        ),
        (
            PlainFormat::Float16,
            Quantization::None,
            "spec.model.dtype: bfloat16",
        ),
    ] {
        let weights = WeightSettings {
            dtype,
            quantization,
        };
        let machine = Machine::new(MEMORY);
        let text = refused(dir.path(), &spec, Form { weights, ..form }, &machine.cards).await;
        assert!(
            text.starts_with("device: ") && text.contains(remedy),
            "{text}"
        );
    }
}
