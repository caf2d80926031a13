//! The engine over real forward passes with all experts in this process.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what it expects by failing"
)]

mod golden;
mod rig;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use foregate_api::ids::Epoch;
use foregate_api::model::Family;
use foregate_checkpoint::tiny::Tiny;
use foregate_models::LocalExperts;
use foregate_models::experts::{ExpertBatch, Experts, ExpertsError, LateRows};
use foregate_wire::frame::TraceContext;
use foregate_wire::generation::FinishReason;
use foregate_wire::generation::generate_event::Event;
use foregate_worker::engine::{Alone, EngineState, StepExperts, StreamError, SubmitError};
use foregate_worker::load::{LoadCounters, WindowHeader};
use foregate_worker::scheduler::Hint;
use foregate_worker::sequence::Request;

use golden::Golden;
use rig::{Rig, Sizes, collect, drawn, next, prompt, request, run, submit, until};

/// Greedy tokens, prompt log-probabilities and routes are those of the reference, however the prompt
/// is cut.
#[tokio::test]
async fn agrees_with_the_reference() {
    for family in ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"] {
        let rig = Rig::open(&rig::fixture(family));
        let golden = Golden::load(&rig::fixture(family));
        let engine = rig.alone(Sizes {
            step_tokens: 7,
            ..Sizes::default()
        });
        let asked = Request {
            prompt_logprobs: Some(3),
            routed_experts: true,
            ..request(&golden.ids, golden.greedy.len() - golden.ids.len())
        };
        let answer = run(&engine, asked).await;
        assert_eq!(answer.ids(), golden.greedy[golden.ids.len()..], "{family}");
        let reports = &answer.start().prompt_logprobs;
        assert_eq!(reports.len(), golden.ids.len() - 1);
        for (position, report) in reports.iter().enumerate() {
            let want = golden.log_softmax(position);
            let chosen = report.chosen.as_ref().unwrap();
            assert_eq!(chosen.id, golden.ids[position + 1]);
            for got in report.top.iter().chain([chosen]) {
                let difference = (f64::from(got.logprob) - want[got.id as usize]).abs();
                assert!(difference < 2e-4, "{family} {position}: {difference}");
            }
        }
        let routed = answer.start().routed.as_ref().unwrap();
        assert_eq!(routed.tokens as usize, golden.ids.len());
        assert_eq!(routed.experts, golden.routes(), "{family}");
    }
}

/// A prompt of which a part is in the prefix cache gives the same bits as one that is not.
#[tokio::test]
async fn a_reused_prefix_changes_no_bit() {
    let rig = Rig::tiny(Family::Qwen3Moe);
    let ids = prompt(23, rig.spec().vocab, 1);
    let asked = Request {
        logprobs: Some(5),
        ..drawn(&ids, 12, 5)
    };
    let engine = rig.alone(Sizes::default());
    let first = run(&engine, asked.clone()).await;
    let second = run(&engine, asked.clone()).await;
    assert_eq!(
        (first.start().cached_tokens, second.start().cached_tokens),
        (0, 20)
    );
    assert_eq!(first.bits(), second.bits());
    assert_eq!(
        (engine.load().prefix_queries, engine.load().prefix_hits),
        (46, 20)
    );
    let whole = Request {
        routed_experts: true,
        ..asked
    };
    let third = run(&engine, whole).await;
    assert_eq!(third.start().cached_tokens, 0);
    assert_eq!(third.bits(), first.bits());
}

/// Sequences that lose their pages give what they give alone.
#[tokio::test]
async fn preemption_changes_no_bit() {
    let rig = Rig::tiny(Family::Mixtral);
    let asked: Vec<Request> = (0..5)
        .map(|seed| Request {
            logprobs: Some(2),
            routed_experts: seed % 2 == 0,
            ..drawn(&prompt(9, rig.spec().vocab, seed), 25, seed)
        })
        .collect();
    let roomy = rig.alone(Sizes::default());
    let mut want = Vec::new();
    for request in &asked {
        want.push(run(&roomy, request.clone()).await);
    }
    let (tight, pace) = rig.paced(Sizes {
        pages: 12,
        ..Sizes::default()
    });
    let streams: Vec<_> = asked.iter().map(|r| submit(&tight, r.clone())).collect();
    drop(pace);
    for (stream, want) in streams.into_iter().zip(&want) {
        let got = collect(stream).await.unwrap();
        assert_eq!(got.bits(), want.bits());
        assert_eq!(got.start().routed, want.start().routed);
        let routes = |a: &rig::Answer| {
            a.tokens
                .iter()
                .map(|t| t.routed.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(routes(&got), routes(want));
        assert_eq!(got.end().signature, want.end().signature);
    }
    until(&tight, "all pages free", |load| load.kv_pages_used == 0).await;
    assert!(tight.load().preemptions > 0);
}

/// Who joins the batch when is another matter than what a sequence answers.
#[tokio::test]
async fn overtaking_changes_no_bit() {
    let rig = Rig::tiny(Family::Qwen3Moe);
    let experts = rig.spec().experts;
    let root = |kind: usize, expert: usize| match expert % 2 == kind {
        true => 255,
        false => 0,
    };
    let asked: Vec<Request> = (0..8)
        .map(|seed| Request {
            logprobs: Some(2),
            hint: (seed != 5).then(|| Hint {
                layers: vec![1],
                roots: (0..experts).map(|e| root(seed as usize % 2, e)).collect(),
            }),
            ..drawn(&prompt(9, rig.spec().vocab, seed), 12, seed)
        })
        .collect();
    let roomy = rig.alone(Sizes::default());
    let mut want = Vec::new();
    for request in &asked {
        want.push(run(&roomy, request.clone()).await);
    }
    let (narrow, pace) = rig.paced(Sizes {
        seqs: 2,
        overtake_ms: 60_000,
        ..Sizes::default()
    });
    let streams: Vec<_> = asked.iter().map(|r| submit(&narrow, r.clone())).collect();
    drop(pace);
    for (stream, want) in streams.into_iter().zip(&want) {
        assert_eq!(collect(stream).await.unwrap().bits(), want.bits());
    }
}

#[tokio::test]
async fn a_dropped_stream_frees_its_pages() {
    let rig = Rig::tiny(Family::Olmoe);
    let (engine, pace) = rig.paced(Sizes::default());
    let mut stream = submit(&engine, request(&[5, 6, 7], 200));
    pace.steps(3);
    for _ in 0..4 {
        next(&mut stream).await.unwrap().unwrap();
    }
    until(&engine, "pages in use", |load| load.kv_pages_used > 0).await;
    drop(stream);
    drop(pace);
    until(&engine, "pages free", |load| {
        load.kv_pages_used == 0 && load.running == 0
    })
    .await;
    assert!(engine.load().generation_tokens < 200);
}

#[tokio::test]
async fn stop_tokens_and_min_tokens() {
    let rig = Rig::tiny(Family::Qwen3Moe);
    let engine = rig.alone(Sizes::default());
    let asked = request(&prompt(6, rig.spec().vocab, 3), 12);
    let free = run(&engine, asked.clone()).await;
    assert_eq!(free.end().reason(), FinishReason::Length);
    let ids = free.ids();
    let stop = ids[4];
    let at = ids.iter().position(|id| *id == stop).unwrap();
    let stopping = Request {
        stop_tokens: BTreeSet::from([stop]),
        ..asked
    };
    let stopped = run(&engine, stopping.clone()).await;
    assert_eq!(stopped.ids(), ids[..at]);
    assert_eq!(stopped.end().reason(), FinishReason::Stop);
    assert_eq!(stopped.end().stop_token, Some(stop));
    assert_eq!(stopped.end().generated_tokens as usize, at);
    let later = Request {
        min_tokens: 12,
        ..stopping
    };
    let later = run(&engine, later).await;
    assert_eq!(later.end().reason(), FinishReason::Length);
    assert!(!later.ids().contains(&stop));
}

#[tokio::test]
async fn seeds_repeat_and_differ() {
    let rig = Rig::tiny(Family::Qwen2Moe);
    let engine = rig.alone(Sizes::default());
    let ids = prompt(5, rig.spec().vocab, 9);
    let one = run(&engine, drawn(&ids, 30, 1)).await.ids();
    assert_eq!(one, run(&engine, drawn(&ids, 30, 1)).await.ids());
    assert_ne!(one, run(&engine, drawn(&ids, 30, 2)).await.ids());
}

/// Another worker goes on from any point, penalties and routes included.
#[tokio::test]
async fn a_resumed_sequence_gives_the_same_rest() {
    let rig = Rig::tiny(Family::Qwen3Moe);
    let ids = prompt(7, rig.spec().vocab, 4);
    let mut asked = Request {
        logprobs: Some(1),
        routed_experts: true,
        ..drawn(&ids, 16, 77)
    };
    asked.sampling.repetition_penalty = 1.3;
    asked.sampling.presence_penalty = 0.4;
    asked.sampling.frequency_penalty = 0.3;
    let whole = run(&rig.alone(Sizes::default()), asked.clone()).await;
    for at in [1, 8, 15, 16] {
        let mut resumed = asked.clone();
        resumed.tokens.extend(&whole.ids()[..at]);
        let rest = run(&rig.alone(Sizes::default()), resumed).await;
        assert_eq!(rest.bits(), whole.bits()[at..], "resumed at {at}");
        assert_eq!(rest.start().routed, whole.start().routed);
        for (got, want) in rest.tokens.iter().zip(&whole.tokens[at..]) {
            assert_eq!((got.index, &got.routed), (want.index, &want.routed));
        }
        // A complete answer is computed to its last token, which an uninterrupted one is not.
        if at < 16 {
            assert_eq!(rest.end().signature, whole.end().signature);
        }
        assert_eq!(rest.end().generated_tokens, 16);
    }
}

#[tokio::test]
async fn signature_routes_and_load_agree() {
    let rig = Rig::tiny(Family::Mixtral);
    let spec = rig.spec().clone();
    let load = Arc::new(LoadCounters::new(spec.moe_layers(), spec.experts));
    let engine = rig.counted(
        Sizes::default(),
        Box::new(Alone(rig.local())),
        Arc::clone(&load),
    );
    let asked = Request {
        routed_experts: true,
        ..request(&prompt(10, spec.vocab, 8), 6)
    };
    let answer = run(&engine, asked).await;
    let width = spec.moe_layers() * spec.top_k;
    let mut routes = answer.start().routed.clone().unwrap().experts;
    assert_eq!(routes.len(), 10 * width);
    assert!(answer.tokens[0].routed.is_none());
    for token in &answer.tokens[1..] {
        let routed = token.routed.clone().unwrap();
        assert_eq!(routed.tokens, 1);
        routes.extend(routed.experts);
    }
    let mut counted = vec![0_u32; spec.moe_layers() * spec.experts];
    for (at, expert) in routes.iter().enumerate() {
        counted[(at % width) / spec.top_k * spec.experts + *expert as usize] += 1;
    }
    assert_eq!(answer.end().signature, counted);
    let window = load.drain(WindowHeader {
        rank: foregate_api::ids::Rank(0),
        epoch: Epoch(1),
        sequence: 1,
        span_ms: 1,
        engine: engine.load(),
    });
    let gate: Vec<u32> = window.gate.concat().iter().map(|n| *n as u32).collect();
    assert_eq!(gate, counted);
}

#[tokio::test]
async fn no_token_wanted_means_prefill_only() {
    let rig = Rig::tiny(Family::Mixtral);
    let engine = rig.alone(Sizes::default());
    let asked = Request {
        prompt_logprobs: Some(0),
        ..request(&[4, 5, 6], 0)
    };
    let answer = run(&engine, asked).await;
    assert_eq!(answer.start().prompt_logprobs.len(), 2);
    assert!(answer.tokens.is_empty());
    assert_eq!(answer.end().reason(), FinishReason::Length);
}

/// Loses rows of some calls, writing garbage in their place.
struct Flaky {
    inner: LocalExperts,
    calls: u64,
}

impl Experts for Flaky {
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        let mut late = self.inner.run(batch, out)?;
        self.calls += 1;
        let rows = batch.dead.len() as u64;
        if self.calls.is_multiple_of(5) {
            late.push((self.calls % rows) as u32);
        }
        for row in &late {
            let at = *row as usize * batch.hidden;
            out[at..at + batch.hidden].fill(1e3);
        }
        Ok(late)
    }
}

impl StepExperts for Flaky {
    fn begin_step(&mut self, _: Option<TraceContext>) -> Epoch {
        Epoch(7)
    }
    fn end_step(&mut self) {}
}

#[tokio::test]
async fn late_rows_delay_and_change_nothing() {
    let rig = Rig::tiny(Family::Qwen3Moe);
    let asked: Vec<Request> = (0..3)
        .map(|seed| Request {
            logprobs: Some(3),
            ..drawn(&prompt(11, rig.spec().vocab, seed), 10, seed)
        })
        .collect();
    let good = rig.alone(Sizes::default());
    let flaky = Flaky {
        inner: rig.local(),
        calls: 0,
    };
    let sizes = Sizes {
        step_tokens: 6,
        ..Sizes::default()
    };
    let engine = rig.engine(sizes, Box::new(flaky));
    let streams: Vec<_> = asked.iter().map(|r| submit(&engine, r.clone())).collect();
    for (stream, asked) in streams.into_iter().zip(asked) {
        let got = collect(stream).await.unwrap();
        let want = run(&good, asked).await;
        assert_eq!(got.bits(), want.bits());
        assert_eq!(got.end().signature, want.end().signature);
    }
    until(&engine, "late rows counted", |load| load.late_rows > 0).await;
    assert_eq!(engine.epoch(), Epoch(7));
}

/// Fails or panics from some call on.
struct Broken {
    inner: LocalExperts,
    left: u32,
    panics: bool,
    calls: Arc<AtomicU32>,
}

impl Experts for Broken {
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.left > 0 {
            self.left -= 1;
            return self.inner.run(batch, out);
        }
        assert!(!self.panics, "the exchange is broken");
        Err(ExpertsError {
            layer: batch.layer,
            what: "no placement".to_owned(),
        })
    }
}

impl StepExperts for Broken {
    fn begin_step(&mut self, _: Option<TraceContext>) -> Epoch {
        Epoch(0)
    }
    fn end_step(&mut self) {}
}

fn broken(rig: &Rig, left: u32, panics: bool) -> Box<Broken> {
    Box::new(Broken {
        inner: rig.local(),
        left,
        panics,
        calls: Arc::default(),
    })
}

#[tokio::test]
async fn a_panic_is_reported_and_ends_every_stream() {
    let rig = Rig::tiny(Family::Qwen3Moe);
    let (engine, pace) = rig.paced_with(Sizes::default(), broken(&rig, 9, true));
    let streams = [1, 2, 3].map(|seed| submit(&engine, drawn(&[4, 5, 6], 40, seed)));
    drop(pace);
    for stream in streams {
        let error = collect(stream).await.unwrap_err();
        assert_eq!(
            error,
            StreamError::Died("the exchange is broken".to_owned())
        );
    }
    assert_eq!(
        engine.state(),
        EngineState::Failed("the exchange is broken".to_owned())
    );
    let refused = engine.submit(request(&[4], 1), None, tracing::Span::none());
    assert!(matches!(refused, Err(SubmitError::Dead(_))), "{refused:?}");
}

#[tokio::test]
async fn steps_that_keep_failing_end_their_sequences() {
    let rig = Rig::tiny(Family::Qwen3Moe);
    let experts = broken(&rig, 9, false);
    let calls = Arc::clone(&experts.calls);
    let engine = rig.engine(Sizes::default(), experts);
    let error = collect(submit(&engine, request(&[4, 5, 6], 40)))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, StreamError::Step(what) if what.contains("no placement")),
        "{error}"
    );
    assert!(calls.load(Ordering::Relaxed) > 15, "several tries");
    until(&engine, "pages free", |load| load.kv_pages_used == 0).await;
    assert_eq!(engine.state(), EngineState::Running);
}

#[tokio::test]
async fn a_deadline_ends_running_and_waiting_sequences() {
    let rig = Rig::drawn(&Tiny {
        max_positions: 50_000,
        ..Tiny::new(Family::Qwen3Moe)
    });
    let engine = rig.alone(Sizes {
        seqs: 1,
        pages: 12_500,
        ..Sizes::default()
    });
    let time = Some(Duration::from_millis(60));
    let long = || request(&[4, 5, 6], 49_000);
    let limited = engine.submit(long(), time, tracing::Span::none()).unwrap();
    let behind = engine.submit(long(), time, tracing::Span::none()).unwrap();
    for stream in [limited, behind] {
        let answer = collect(stream).await.unwrap();
        assert_eq!(answer.end().reason(), FinishReason::Deadline);
    }
}

#[tokio::test]
async fn a_full_engine_refuses_and_a_silent_client_blocks_nobody() {
    let rig = Rig::tiny(Family::Qwen3Moe);
    let engine = rig.alone(Sizes {
        seqs: 2,
        waiting: 1,
        ..Sizes::default()
    });
    // Nobody reads this one while others come and go.
    let silent = submit(&engine, request(&[4, 5, 6], 60));
    for seed in 0..4 {
        run(&engine, drawn(&[7, 8], 20, seed)).await;
    }
    let second = submit(&engine, request(&[4], 60));
    let third = submit(&engine, request(&[5], 60));
    let refused = engine.submit(request(&[6], 1), None, tracing::Span::none());
    assert_eq!(refused.unwrap_err(), SubmitError::Full(3));
    drop((second, third));
    assert_eq!(collect(silent).await.unwrap().tokens.len(), 60);
    run(&engine, request(&[6], 1)).await;
}

#[tokio::test]
async fn what_can_never_fit_is_refused() {
    let rig = Rig::tiny(Family::Qwen3Moe);
    let engine = rig.alone(Sizes {
        pages: 2,
        ..Sizes::default()
    });
    assert_eq!(run(&engine, request(&[4, 5, 6], 6)).await.tokens.len(), 6);
    let refused = engine.submit(request(&[4, 5, 6], 7), None, tracing::Span::none());
    assert!(
        matches!(refused, Err(SubmitError::NeverFits(_))),
        "{refused:?}"
    );
}

#[tokio::test]
async fn drain_finishes_and_stop_cuts_off() {
    let rig = Rig::tiny(Family::Qwen3Moe);
    let engine = rig.alone(Sizes::default());
    let stream = submit(&engine, request(&[4, 5], 30));
    let (state, answer) = tokio::join!(engine.drain(), collect(stream));
    assert_eq!(state, EngineState::Stopped);
    assert_eq!(answer.unwrap().tokens.len(), 30);
    let refused = engine.submit(request(&[4], 1), None, tracing::Span::none());
    assert_eq!(refused.unwrap_err(), SubmitError::Draining);

    let (engine, pace) = rig.paced(Sizes::default());
    let mut stream = submit(&engine, request(&[4, 5], 200));
    pace.steps(1);
    next(&mut stream).await.unwrap().unwrap();
    let (state, ()) = tokio::join!(biased; engine.stop(), async { drop(pace) });
    assert_eq!(state, EngineState::Stopped);
    let last = loop {
        match next(&mut stream).await {
            Some(Ok(Event::Finished(_))) => panic!("it was cut off"),
            Some(Ok(_)) => {}
            other => break other,
        }
    };
    assert_eq!(last, Some(Err(StreamError::Stopped)));
}
