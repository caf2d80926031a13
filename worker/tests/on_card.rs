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
#[path = "../../kernels/cuda/tests/peers/mod.rs"]
mod peers;
mod random;
mod rig;

use std::path::Path;
use std::sync::{Arc, Mutex};

use foregate_api::ids::Rank;
use foregate_api::model::{Family, ModelSpec};
use foregate_api::node::FabricKind;
use foregate_api::weights::{PlainFormat, Quantization, WeightFormat, WeightSettings};
use foregate_checkpoint::Checkpoint;
use foregate_checkpoint::tiny::Tiny;
use foregate_cuda::{Cuda, Staged};
use foregate_store::memory::MemoryStore;
use foregate_wire::generation::{GenerateRequest, Sampling, TokenInfo};
use foregate_worker::dense::DenseWeights;
use foregate_worker::fabric::local::LocalHub;
use foregate_worker::{Card, Cards, Deps, Health};
use futures::future::join_all;
use prometheus::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use cluster::{Cluster, Form};
use emulated::Emulated;
use peers::Gone;
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
        let cards = cards.with_comms(|_| Ok(Arc::new(peers::comms(Gone::Told))));
        Self { opened, cards }
    }

    fn launches(&self, kernel: &str) -> u64 {
        let opened = self.opened.lock().unwrap();
        let of = |card: &Arc<Emulated>| card.launches().get(kernel).copied().unwrap_or(0);
        opened.iter().map(of).sum()
    }
}

const MEMORY: usize = 1 << 30;

fn plain(dtype: PlainFormat) -> WeightSettings {
    WeightSettings {
        dtype,
        quantization: Quantization::None,
    }
}

fn form(workers: u32, fabric: FabricKind, weights: WeightSettings) -> Form {
    Form {
        workers,
        fabric,
        threads: 1,
        max_num_seqs: 3,
        max_num_batched_tokens: 24,
        page_tokens: 4,
        kv_bytes: 1 << 20,
        spare_slots: 1,
        weights,
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

fn spec(dir: &Path, weights: &WeightSettings) -> ModelSpec {
    let checkpoint = Checkpoint::open_with(dir, weights).unwrap();
    checkpoint.spec().clone()
}

fn model(family: Family, weights: &WeightSettings) -> (tempfile::TempDir, ModelSpec) {
    let dir = tempfile::tempdir().unwrap();
    Tiny::new(family).write(dir.path()).unwrap();
    let spec = spec(dir.path(), weights);
    (dir, spec)
}

fn bits(answers: &[Answer]) -> Vec<Vec<(u32, Vec<u32>)>> {
    answers.iter().map(Answer::bits).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_do_not_depend_on_how_many_cards_compute_them() {
    let weights = plain(PlainFormat::Bfloat16);
    let (dir, spec) = model(Family::Qwen2Moe, &weights);
    let machine = Machine::new(MEMORY);
    // One worker has all experts of all layers, and sums their results on its card.
    let one = form(1, FabricKind::Local, weights);
    let alone = bits(&answers(dir.path(), &spec, one, &machine.cards).await);
    assert!(alone.iter().all(|bits| bits.len() == 24));
    assert!(machine.launches("fg_combine") > 0);
    let several = [
        (2, FabricKind::Local),
        (3, FabricKind::Tcp),
        (2, FabricKind::Nccl),
        (3, FabricKind::Nccl),
    ];
    for (workers, fabric) in several {
        let many = form(workers, fabric, weights);
        let found = bits(&answers(dir.path(), &spec, many, &machine.cards).await);
        assert_eq!(found, alone, "{workers} workers, {fabric:?}");
    }
    let used: Vec<usize> = machine
        .opened
        .lock()
        .unwrap()
        .iter()
        .map(|card| card.used())
        .collect();
    assert_eq!(used, [0; 11], "all memory goes back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn float32_tokens_are_those_of_the_processor() {
    let weights = plain(PlainFormat::Float32);
    for family in [Family::Qwen3Moe, Family::Mixtral] {
        let (dir, spec) = model(family, &weights);
        let machine = Machine::new(MEMORY);
        let cards = form(2, FabricKind::Local, weights);
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

/// How far the log-probabilities of greedy tokens may be apart on a card and on a processor: both round inputs of products and
/// keys and values to bfloat16, and a difference in the last bit of a float32 can become one of a bfloat16.
const APART: f32 = 0.1;

/// Greedy tokens and what they were worth, of one answer.
fn chosen(answer: &Answer) -> Vec<(u32, f32)> {
    let tokens = answer.tokens.iter();
    let of = |info: &TokenInfo| info.chosen.unwrap().logprob;
    tokens
        .map(|token| (token.id, of(token.info.as_ref().unwrap())))
        .collect()
}

/// Holds greedy answers to those of the processor up to where two tokens were as good as equal, and says how many were.
fn near(name: &str, found: &[Answer], wanted: &[Answer]) -> usize {
    let mut compared = 0;
    // The second is drawn, not greedy.
    for at in [0, 2] {
        for (found, wanted) in chosen(&found[at]).into_iter().zip(chosen(&wanted[at])) {
            let apart = (found.1 - wanted.1).abs();
            assert!(
                apart <= APART,
                "{name}: {found:?}, the processor {wanted:?}"
            );
            if found.0 != wanted.0 {
                break;
            }
            compared += 1;
        }
    }
    compared
}

/// One and two cards give the same bits while experts move, and the tokens of the processor; `kernels` computed them.
async fn same_on_cards(name: &str, dir: &Path, weights: WeightSettings, kernels: &[&str]) {
    let spec = spec(dir, &weights);
    let machine = Machine::new(MEMORY);
    let one = form(1, FabricKind::Local, weights);
    let two = form(2, FabricKind::Local, weights);
    let processors = Form {
        cards: false,
        ..two
    };
    let alone = answers(dir, &spec, one, &machine.cards).await;
    assert!(
        alone.iter().all(|answer| answer.tokens.len() == 24),
        "{name}"
    );
    let found = answers(dir, &spec, two, &machine.cards).await;
    assert_eq!(bits(&found), bits(&alone), "{name}: two workers");
    for kernel in kernels {
        assert!(machine.launches(kernel) > 0, "{name}: {kernel}");
    }
    let wanted = answers(dir, &spec, processors, &machine.cards).await;
    let compared = near(name, &found, &wanted);
    assert!(
        compared >= 12,
        "{name}: only {compared} tokens could be compared"
    );
    let opened = machine.opened.lock().unwrap();
    let used: usize = opened.iter().map(|card| card.used()).sum();
    assert_eq!(used, 0, "{name}: all memory goes back");
}

const CODED: [&str; 3] = [
    "fg_gemm_coded_m8",
    "fg_moe_gate_up_coded_m8",
    "fg_moe_down_coded_m8",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weights_quantised_at_load_are_computed_on_cards() {
    for (family, quantization) in [
        (Family::Qwen3Moe, Quantization::Int8),
        (Family::Qwen2Moe, Quantization::Int4),
        (Family::Mixtral, Quantization::Fp8),
        (Family::Olmoe, Quantization::Mxfp4),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut tiny = Tiny::new(family);
        tiny.format = WeightFormat::Bfloat16;
        tiny.write(dir.path()).unwrap();
        let weights = WeightSettings {
            dtype: PlainFormat::Auto,
            quantization,
        };
        let name = format!("{family:?} {quantization}");
        same_on_cards(&name, dir.path(), weights, &CODED).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quantised_and_half_checkpoints_are_computed_on_cards() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/formats");
    // Of MXFP4 only experts are stored so.
    let mxfp4 = ["fg_gemm_bf16_m8", CODED[1], CODED[2]];
    for (name, kernels) in [
        ("fp8", &CODED[..]),
        ("mxfp4", &mxfp4),
        ("awq", &CODED),
        ("gptq", &CODED),
        ("gptq_v2", &CODED),
        ("float16", &["fg_gemm_f16", "fg_embed_f16"]),
    ] {
        let weights = WeightSettings::default();
        same_on_cards(name, &fixtures.join(name), weights, kernels).await;
    }
}

/// An embedding that is the output projection is quantised with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quantised_embedding_is_read_on_cards() {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new(Family::Qwen3Moe);
    tiny.set
        .insert("tie_word_embeddings".to_owned(), true.into());
    tiny.write(dir.path()).unwrap();
    let weights = WeightSettings {
        dtype: PlainFormat::Bfloat16,
        quantization: Quantization::Int8,
    };
    same_on_cards("tied", dir.path(), weights, &["fg_embed_coded"]).await;
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
    let weights = plain(PlainFormat::Bfloat16);
    let (dir, spec) = model(Family::Qwen3Moe, &weights);
    let form = form(1, FabricKind::Local, weights);

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

    // What the fabric between cards wants, is told before weights are read.
    let lock_step = Form {
        fabric: FabricKind::Nccl,
        ..form
    };
    let processors = Form {
        cards: false,
        ..lock_step
    };
    let text = refused(dir.path(), &spec, processors, &Cards::none()).await;
    assert!(
        text.starts_with("fabric: `nccl` carries rows between cards") && text.contains("`tcp`"),
        "{text}"
    );
    let machine = Machine::new(MEMORY);
    let old = "libnccl.so.2 is NCCL 2.27.3; 2.28.0 or newer is needed";
    let cards = machine
        .cards
        .clone()
        .with_comms(move |_| Err(old.to_owned()));
    let text = refused(dir.path(), &spec, lock_step, &cards).await;
    assert_eq!(text, format!("fabric: `nccl`: {old}; or use `tcp`"));
}
