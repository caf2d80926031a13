//! A sequence's bits do not depend on where and with whom it runs.
//!
//! Each case draws a cluster (1 to 4 workers, fabric, threads, batch and chunk sizes, page size, KV
//! memory, with and without proofs between all), requests on random workers, and random placements with copies, one after the other while
//! the requests run. Token ids and the bits of every log-probability must be those of the same request
//! alone on one engine with all experts in its process.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what it expects by failing"
)]

mod cluster;
#[path = "../../operator/tls/tests/desk/mod.rs"]
mod desk;
mod random;
mod rig;

use std::sync::atomic::{AtomicUsize, Ordering};

use foregate_api::ids::Rank;
use foregate_api::model::{Family, ModelSpec};
use foregate_api::node::FabricKind;
use foregate_api::weights::{PlainFormat, Quantization, WeightSettings};
use foregate_checkpoint::tiny::Tiny;
use foregate_wire::generation::{ExpertHint, GenerateRequest, Sampling};
use foregate_worker::Cards;
use foregate_worker::serve::validate;
use futures::future::join_all;

use cluster::{Cluster, Form};
use random::Random;
use rig::{Answer, Rig, Sizes, collect, info_bits, prompt, submit};

fn draw_form(random: &mut Random) -> Form {
    let page_tokens = random.pick(&[2, 4, 16]);
    // A page of the tiny models has 3 layers, 2 heads of 8: keys for a multiple of 16 tokens, values.
    let page_bytes = 3 * 2 * 8 * 4 * (16 + u64::from(page_tokens));
    let tokens = random.pick(&[192, 192, 2_000]);
    Form {
        workers: random.within(1, 4),
        fabric: random.pick(&[FabricKind::Local, FabricKind::Tcp]),
        threads: random.within(1, 2),
        max_num_seqs: random.within(2, 4),
        max_num_batched_tokens: random.within(6, 40),
        page_tokens,
        kv_bytes: page_bytes * u64::from(tokens / page_tokens),
        spare_slots: random.within(0, 3),
        weights: WeightSettings::default(),
        // Set without a draw, so that a case stays what it was.
        proven: page_tokens == 4,
        cards: false,
    }
}

/// What is said of two requests in three, without a draw: it decides who joins a batch first.
fn hint(spec: &ModelSpec, prompt_len: u32) -> Option<ExpertHint> {
    let root = |expert: usize| match expert as u32 % 3 == prompt_len % 3 {
        true => 250,
        false => 10,
    };
    (prompt_len % 3 != 1).then(|| ExpertHint {
        layers: vec![0],
        roots: (0..spec.experts).map(root).collect(),
    })
}

fn draw_request(random: &mut Random, spec: &ModelSpec) -> GenerateRequest {
    let vocab = spec.vocab;
    // Prompts begin alike, so that prefixes are reused.
    let mut token_ids = prompt(random.within(1, 30) as usize, vocab, 0);
    token_ids.extend(prompt(
        random.within(0, 20) as usize,
        vocab,
        u64::from(random.next()),
    ));
    let prompt_len = token_ids.len() as u32;
    GenerateRequest {
        request_id: "fuzz".to_owned(),
        token_ids,
        prompt_len,
        max_tokens: random.within(30, 120),
        ignore_eos: random.chance(80),
        logprobs: Some(random.within(0, 4)),
        prompt_logprobs: random.chance(30).then_some(2),
        return_routed_experts: random.chance(30),
        deadline_ms: 100_000,
        expert_hint: hint(spec, prompt_len),
        sampling: Some(Sampling {
            temperature: random.pick(&[0.0, 0.7, 1.0]),
            top_k: random.pick(&[0, 10]),
            top_p: random.pick(&[1.0, 0.9]),
            repetition_penalty: random.pick(&[1.0, 1.2]),
            seed: u64::from(random.next()),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

/// All that must be equal.
fn bits(answer: &Answer) -> impl PartialEq + std::fmt::Debug + use<> {
    let start = answer.start();
    (
        answer.bits(),
        start
            .prompt_logprobs
            .iter()
            .map(info_bits)
            .collect::<Vec<_>>(),
        start.routed.clone(),
        answer
            .tokens
            .iter()
            .map(|token| token.routed.clone())
            .collect::<Vec<_>>(),
        (answer.end().reason, answer.end().stop_token),
    )
}

/// How many requests met what the test is about.
#[derive(Debug, Default)]
struct Met {
    /// Ran while the placement changed.
    moved: usize,
    /// Lost their pages and were computed again.
    preempted: usize,
    /// Found a part of their prompt in the cache.
    reused: usize,
}

/// Runs one case.
async fn case(family: Family, seed: u64, met: &mut Met) {
    let random = &mut Random::new(seed);
    let form = draw_form(random);
    run(family, seed, form, random, met).await;
}

async fn run(family: Family, seed: u64, form: Form, random: &mut Random, met: &mut Met) {
    let rig = Rig::drawn_with(&Tiny::new(family), &form.weights);
    let cards = Cards::none();
    let mut cluster = Cluster::start(rig.checkpoint.dir(), rig.spec(), form, &cards).await;
    cluster.move_to_random(random).await;
    let requests: Vec<(Rank, GenerateRequest)> = (0..random.within(6, 10))
        .map(|_| {
            let rank = Rank(random.within(0, form.workers - 1));
            (rank, draw_request(random, rig.spec()))
        })
        .collect();
    let ended = AtomicUsize::new(0);
    let answers = requests.iter().map(|(rank, request)| {
        let answer = cluster.ask(*rank, request.clone());
        async {
            let answer = answer.await;
            ended.fetch_add(1, Ordering::Relaxed);
            answer
        }
    });
    let answers = join_all(answers.collect::<Vec<_>>());
    let moves = async {
        let mut across = 0;
        for _ in 0..2 {
            cluster.move_to_random(random).await;
            across = across.max(requests.len() - ended.load(Ordering::Relaxed));
        }
        across
    };
    let (answers, across) = tokio::join!(answers, moves);
    cluster.stop().await;

    let alone = rig.alone(Sizes::default());
    for ((rank, request), got) in requests.into_iter().zip(&answers) {
        let stream = submit(&alone, validate(request.clone(), alone.limits()).unwrap());
        let want = collect(stream).await.unwrap();
        assert_eq!(
            bits(got),
            bits(&want),
            "seed {seed} {family:?} {form:?} {rank} {request:?}"
        );
    }
    met.moved += across;
    met.preempted += answers.iter().filter(|a| a.end().preemptions > 0).count();
    met.reused += answers
        .iter()
        .filter(|a| a.start().cached_tokens > 0)
        .count();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_do_not_depend_on_the_cluster() {
    let families = [
        Family::Qwen3Moe,
        Family::Qwen2Moe,
        Family::Mixtral,
        Family::Olmoe,
    ];
    let mut met = Met::default();
    for seed in 0..10 {
        case(families[seed as usize % families.len()], seed, &mut met).await;
    }
    assert!(
        met.moved > 0 && met.preempted > 0 && met.reused > 0,
        "a case that is not met: {met:?}"
    );
}

/// Weights that are quantised at load travel between workers as they are in memory, so their bits are those
/// of one process too, on any number of workers and across moves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_of_quantised_weights_do_not_depend_on_the_cluster() {
    let kinds = [
        (Quantization::Int8, PlainFormat::Auto),
        (Quantization::Int4, PlainFormat::Bfloat16),
        (Quantization::Fp8, PlainFormat::Auto),
        (Quantization::Mxfp4, PlainFormat::Float16),
    ];
    let workers = [4, 2, 1, 2];
    let mut met = Met::default();
    for (seed, ((quantization, dtype), workers)) in (100..).zip(kinds.into_iter().zip(workers))
    {
        let random = &mut Random::new(seed);
        let form = Form {
            workers,
            weights: WeightSettings {
                dtype,
                quantization,
            },
            ..draw_form(random)
        };
        let family = random.pick(&[Family::Qwen3Moe, Family::Qwen2Moe]);
        run(family, seed, form, random, &mut met).await;
    }
    assert!(met.moved > 0, "no request ran while experts moved: {met:?}");
}
