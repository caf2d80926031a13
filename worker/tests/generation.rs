//! The gRPC service over a real connection: events, refusals and cancellation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what it expects by failing"
)]

#[path = "../../operator/tls/tests/desk/mod.rs"]
mod desk;
mod rig;

use std::collections::BTreeSet;
use std::time::Duration;

use foregate_api::model::Family;
use foregate_api::tls::TlsRole;
use foregate_tls::Keys;
use foregate_wire::connect::channel;
use foregate_wire::generation::generation_client::GenerationClient;
use foregate_wire::generation::{
    FinishReason, GenerateRequest, PrefixEvent, PrefixesRequest, Sampling,
};
use foregate_wire::prefix;
use foregate_wire::serve::{serve, server};
use foregate_wire::tonic::transport::Channel;
use foregate_wire::tonic::{Code, Status, Streaming};
use foregate_worker::engine::{EngineHandle, SubmitError};
use foregate_worker::serve::GenerationService;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use desk::Desk;
use rig::{Answer, Gather, PATIENCE, Rig, Sizes, collect, run, until};

struct Served {
    engine: EngineHandle,
    client: GenerationClient<Channel>,
    address: String,
    _tasks: JoinSet<()>,
}

impl Served {
    async fn start(sizes: Sizes) -> Self {
        Self::over(Rig::tiny(Family::Qwen3Moe).alone(sizes)).await
    }

    async fn over(engine: EngineHandle) -> Self {
        Self::proven(engine, None, None).await
    }

    /// With keys of the worker, and of its client.
    async fn proven(engine: EngineHandle, worker: Option<Keys>, client: Option<&Keys>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let router = server().add_service(GenerationService::new(engine.clone()).into_server());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            serve(router, listener, worker, CancellationToken::new())
                .await
                .unwrap();
        });
        Self {
            engine,
            client: GenerationClient::new(channel(&address, client).unwrap()),
            address,
            _tasks: tasks,
        }
    }

    /// As another client.
    fn client(&self, keys: Option<&Keys>) -> GenerationClient<Channel> {
        GenerationClient::new(channel(&self.address, keys).unwrap())
    }

    async fn ask(&mut self, request: GenerateRequest) -> Result<Answer, Status> {
        let mut stream = self.client.generate(request).await?.into_inner();
        let mut gather = Gather::default();
        while let Some(event) = stream.message().await? {
            gather.add(event.event.unwrap());
        }
        Ok(gather.end())
    }
}

fn request(max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id: "r-1".to_owned(),
        token_ids: vec![5, 6, 7],
        prompt_len: 3,
        max_tokens,
        ignore_eos: true,
        deadline_ms: 60_000,
        expert_hint: None,
        sampling: Some(Sampling {
            top_p: 1.0,
            repetition_penalty: 1.0,
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

#[tokio::test]
async fn streams_what_the_engine_gives() {
    let mut served = Served::start(Sizes::default()).await;
    let got = served.ask(request(9)).await.unwrap();
    let want = run(&served.engine, rig::request(&[5, 6, 7], 9)).await;
    assert_eq!(got.ids(), want.ids());
    assert_eq!(got.end().reason(), FinishReason::Length);
    assert_eq!(
        (got.end().prompt_tokens, got.end().generated_tokens),
        (3, 9)
    );
}

#[tokio::test]
async fn refuses_by_name_and_by_kind() {
    let mut served = Served::start(Sizes {
        seqs: 1,
        waiting: 0,
        pages: 16,
        ..Sizes::default()
    })
    .await;
    let mut bad = request(5);
    bad.token_ids[0] = 1_000_000;
    let status = served.ask(bad).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().starts_with("token_ids: 1000000"),
        "{status}"
    );

    let status = served.ask(request(200)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("max_tokens: "), "{status}");

    let held = served
        .engine
        .submit(rig::request(&[4], 2), None, tracing::Span::none());
    let status = served.ask(request(5)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    drop(held);
    served.ask(request(5)).await.unwrap();

    served.engine.drain().await;
    let status = served.ask(request(5)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
}

/// A prompt of two pages and a token, which begins with `first`.
fn long(first: u32, page_tokens: u32) -> GenerateRequest {
    let mut long = request(1);
    long.token_ids = (first..first + 2 * page_tokens + 1).collect();
    long.prompt_len = 2 * page_tokens + 1;
    long
}

/// Short names of the two pages of [`long`].
fn pages(first: u32, page_tokens: u32) -> Vec<u64> {
    let tokens = long(first, page_tokens).token_ids;
    let one = prefix::name(&prefix::ROOT, &tokens[..page_tokens as usize]);
    let two = prefix::name(
        &one,
        &tokens[page_tokens as usize..2 * page_tokens as usize],
    );
    vec![prefix::short(&one), prefix::short(&two)]
}

#[tokio::test]
async fn whoever_asks_is_told_what_the_cache_holds_and_how_it_changes() {
    let sizes = Sizes {
        pages: 4,
        ..Sizes::default()
    };
    let page = Sizes::default().page_tokens as u32;
    let mut served = Served::start(sizes).await;
    served.ask(long(1, page)).await.unwrap();
    let mut told = Told::follow(&mut served).await;
    told.until(&pages(1, page), &[]).await;
    // Two prompts more have no room beside it: what was used longest ago goes.
    served.ask(long(20, page)).await.unwrap();
    told.until(&pages(20, page), &[]).await;
    served.ask(long(40, page)).await.unwrap();
    told.until(&pages(40, page), &pages(1, page)).await;
    // Another one is told all that is there now.
    let mut other = Told::follow(&mut served).await;
    other.until(&pages(40, page), &pages(1, page)).await;
    // They end with the engine.
    served.engine.drain().await;
    assert!(timeout(PATIENCE, told.end()).await.is_ok());
}

#[tokio::test]
async fn only_so_many_may_follow() {
    let mut served = Served::start(Sizes::default()).await;
    let mut all = Vec::new();
    let refused = loop {
        match served.client.prefixes(PrefixesRequest {}).await {
            Ok(stream) => all.push(stream),
            Err(status) => break status,
        }
        assert!(all.len() < 1000);
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    drop(all);
}

/// What a follower knows.
struct Told {
    stream: Streaming<PrefixEvent>,
    held: BTreeSet<u64>,
}

impl Told {
    async fn follow(served: &mut Served) -> Self {
        let stream = served.client.prefixes(PrefixesRequest {}).await.unwrap();
        let mut told = Self {
            stream: stream.into_inner(),
            held: BTreeSet::new(),
        };
        assert!(told.next().await, "it begins with all there is");
        told
    }

    /// Takes in one event; whether it resets.
    async fn next(&mut self) -> bool {
        let event = timeout(PATIENCE, self.stream.message()).await.unwrap();
        let event = event.unwrap().expect("the stream goes on");
        if event.reset {
            self.held.clear();
        }
        self.held.retain(|name| !event.removed.contains(name));
        self.held.extend(event.added);
        event.reset
    }

    async fn until(&mut self, there: &[u64], gone: &[u64]) {
        let holds = |name: &u64| self.held.contains(name);
        let so = there.iter().all(holds) && !gone.iter().any(holds);
        if !so {
            self.next().await;
            Box::pin(self.until(there, gone)).await;
        }
    }

    async fn end(&mut self) {
        while let Ok(Some(_)) = self.stream.message().await {}
    }
}

#[tokio::test]
async fn a_client_that_leaves_cancels() {
    let (engine, pace) = Rig::tiny(Family::Qwen3Moe).paced(Sizes {
        seqs: 1,
        waiting: 0,
        ..Sizes::default()
    });
    let mut served = Served::over(engine).await;
    let mut stream = served
        .client
        .generate(request(200))
        .await
        .unwrap()
        .into_inner();
    pace.steps(1);
    stream.message().await.unwrap().unwrap();
    drop(stream);
    // The only place is free again once the service has noticed.
    let taken = timeout(PATIENCE, async {
        loop {
            match served
                .engine
                .submit(rig::request(&[4], 1), None, tracing::Span::none())
            {
                Ok(stream) => break stream,
                Err(refused) => assert_eq!(refused, SubmitError::Full(1)),
            }
            sleep(Duration::from_millis(2)).await;
        }
    });
    let next = taken.await.expect("the client's place in time");
    drop(pace);
    collect(next).await.unwrap();
    until(&served.engine, "nothing runs", |load| {
        load.running == 0 && load.kv_pages_used == 0
    })
    .await;
    assert!(served.engine.load().generation_tokens < 200);
}

#[tokio::test]
async fn a_stopped_engine_ends_streams_as_unavailable() {
    let (engine, pace) = Rig::tiny(Family::Qwen3Moe).paced(Sizes::default());
    let mut served = Served::over(engine).await;
    let mut stream = served
        .client
        .generate(request(250))
        .await
        .unwrap()
        .into_inner();
    pace.steps(1);
    stream.message().await.unwrap().unwrap();
    tokio::join!(biased; served.engine.stop(), async { drop(pace) });
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended as if it were complete"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable);
}

/// No connection, or one that the worker ends when it has seen the proof: `UNAVAILABLE` is the first, the second comes
/// as the break of a connection does.
fn is_refusal(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown)
}

#[tokio::test]
async fn only_the_cluster_is_served() {
    let desk = Desk::new();
    let keys = desk.keys(TlsRole::Gateway);
    let engine = Rig::tiny(Family::Qwen3Moe).alone(Sizes::default());
    let worker = Some(desk.keys(TlsRole::Worker));
    let mut served = Served::proven(engine, worker, Some(&keys)).await;
    let got = served.ask(request(9)).await.unwrap();
    let want = run(&served.engine, rig::request(&[5, 6, 7], 9)).await;
    assert_eq!(got.ids(), want.ids());

    let elsewhere = Desk::new().keys(TlsRole::Gateway);
    let other = desk.of_cluster("other.default.foregate.internal");
    let other = other.keys(TlsRole::Gateway);
    for (who, keys) in [
        ("plain", None),
        ("another authority", Some(&elsewhere)),
        ("another cluster", Some(&other)),
    ] {
        let refused = served.client(keys).generate(request(1)).await.unwrap_err();
        assert!(is_refusal(&refused), "{who}: {refused}");
    }
    // A proven client does not speak to a worker without keys either.
    let plain = Served::over(served.engine.clone()).await;
    let refused = plain
        .client(Some(&keys))
        .generate(request(1))
        .await
        .unwrap_err();
    assert!(is_refusal(&refused), "{refused}");
}

#[tokio::test]
async fn keys_change_while_a_stream_runs() {
    let desk = Desk::new();
    let keys = desk.keys(TlsRole::Gateway);
    let (engine, pace) = Rig::tiny(Family::Qwen3Moe).paced(Sizes::default());
    let worker = Some(desk.keys(TlsRole::Worker));
    let mut served = Served::proven(engine, worker, Some(&keys)).await;
    let mut stream = served
        .client
        .generate(request(9))
        .await
        .unwrap()
        .into_inner();
    pace.steps(1);
    let mut gather = Gather::default();
    gather.add(stream.message().await.unwrap().unwrap().event.unwrap());

    let late = desk.keys_of(TlsRole::Gateway, &desk.issued(TlsRole::Gateway));
    let next = Desk::successor();
    desk.trust(&[&next]);
    for role in TlsRole::ALL {
        desk.write(role, &next.issued(role));
    }
    // A new client with the old certificate, and one with the new one.
    let refused = served
        .client(Some(&late))
        .generate(request(1))
        .await
        .unwrap_err();
    assert!(is_refusal(&refused), "{refused}");
    let mut client = served.client(Some(&keys));
    let second = client.generate(request(2));
    let (second, ()) = tokio::join!(second, async { drop(pace) });
    second.unwrap();
    while let Some(event) = stream.message().await.unwrap() {
        gather.add(event.event.unwrap());
    }
    let want = run(&served.engine, rig::request(&[5, 6, 7], 9)).await;
    assert_eq!(gather.end().ids(), want.ids());
}
