use std::time::Duration;

use foregate_wire::connect::channel;
use foregate_wire::generation::GenerateRequest;
use foregate_wire::generation::generate_event::Event;
use foregate_wire::generation::generation_client::GenerationClient;
use foregate_wire::sglang::generate_response::Response as Part;
use foregate_wire::sglang::sglang_scheduler_client::SglangSchedulerClient;
use foregate_wire::sglang::{self as sgl, SamplingParams, TokenizedInput};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::*;
use crate::bench::client::{Ask, Prompt, Target};

const DEMO: &str = "e2e/models/demo";

fn script(delays: Delays) -> Arc<Script> {
    Arc::new(Script::load(DEMO.as_ref(), delays).unwrap())
}

fn says(script: &Script, tokens: u32) -> String {
    (0..tokens).map(|index| script.token(index).1).collect()
}

/// A face that ends with the returned tasks.
async fn face<F>(serve: impl FnOnce(TcpListener) -> F) -> (String, JoinSet<()>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let (listener, address) = port().await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(serve(listener));
    (address, tasks)
}

async fn http(script: &Arc<Script>) -> (String, JoinSet<()>) {
    let router = openai::router(script);
    let limits = Limits::for_requests(8);
    face(move |listener| {
        server::serve(
            listener,
            router,
            limits,
            End::at_once(CancellationToken::new()),
        )
    })
    .await
}

#[test]
fn a_script_is_text_that_its_tokens_give_one_by_one() {
    let script = script(Delays::default());
    let length = script.tokens.len() as u32;
    assert!(length > 16);
    assert_eq!(says(&script, length), SAYS);
    assert!(script.tokens.iter().all(|(_, text)| !text.is_empty()));
    assert_eq!(script.token(length), script.token(0));
}

#[tokio::test(start_paused = true)]
async fn tokens_come_at_their_moments_whoever_is_slow() {
    let delays = Delays {
        first_us: 10_000,
        between_us: 4000,
    };
    let mut pace = Schedule::new(delays).begin(3);
    let since = Instant::now();
    assert_eq!(pace.next().await, Some(0));
    assert_eq!(since.elapsed(), Duration::from_millis(10));
    // Whoever takes it is late: the next one was due at 14 ms and is there at once.
    tokio::time::advance(Duration::from_millis(6)).await;
    assert_eq!(pace.next().await, Some(1));
    assert_eq!(since.elapsed(), Duration::from_millis(16));
    assert_eq!(pace.next().await, Some(2));
    assert_eq!(since.elapsed(), Duration::from_millis(18));
    assert_eq!(pace.next().await, None);
    assert_eq!(pace.told(), 3);
    let mut whole = Schedule::new(delays).begin(3);
    let since = Instant::now();
    whole.all().await;
    assert_eq!(
        (since.elapsed(), whole.told()),
        (Duration::from_millis(18), 3)
    );
    let mut none = Schedule::new(delays).begin(0);
    none.all().await;
    assert_eq!(none.told(), 0);
}

#[tokio::test]
async fn the_http_face_streams_and_answers_whole() {
    let script = script(Delays::default());
    let (address, _tasks) = http(&script).await;
    let target = Target::new(&format!("http://{address}")).unwrap();
    assert_eq!(target.model().await.unwrap(), NAME);
    let ask = Ask {
        prompt: Prompt::Text("Hello".to_owned()),
        max_tokens: 5,
        ignore_eos: false,
    };
    let seen = target.complete(NAME, &ask, Instant::now()).await.unwrap();
    assert_eq!(seen.tokens, 5);
    let body = json!({"prompt": "Hello", "max_tokens": 5});
    let answer = reqwest::Client::new()
        .post(format!("http://{address}/v1/completions"))
        .json(&body)
        .send()
        .await
        .unwrap();
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["choices"][0]["text"], says(&script, 5));
    assert_eq!(answer["usage"]["completion_tokens"], 5);
}

#[tokio::test]
async fn the_schedule_is_set_over_http_and_refuses_what_it_does_not_know() {
    let script = script(Delays::default());
    let (address, _tasks) = http(&script).await;
    let set = async |body: Value| {
        let request = reqwest::Client::new()
            .post(format!("http://{address}/schedule"))
            .json(&body);
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(set(json!({"first_us": 7, "between_us": 9})).await, 204);
    let want = Delays {
        first_us: 7,
        between_us: 9,
    };
    assert_eq!(want.until(2), Duration::from_micros(25));
    assert!(format!("{:?}", script.schedule).contains("first_us: 7, between_us: 9"));
    assert_eq!(set(json!({"first_us": 7, "between": 9})).await, 422);
}

#[tokio::test]
async fn the_face_of_a_worker_gives_prefilled_tokens_and_an_end() {
    let script = script(Delays::default());
    let service = GenerationServer::new(generation::Face(Arc::clone(&script)));
    let (address, _tasks) = face(async move |listener| {
        let router = grpc().add_service(service);
        drop(serve(router, listener, None, CancellationToken::new()).await);
    })
    .await;
    let mut client = GenerationClient::new(channel(&address, None).unwrap());
    let request = GenerateRequest {
        token_ids: vec![1, 2, 3],
        prompt_len: 3,
        max_tokens: 2,
        ..GenerateRequest::default()
    };
    let mut stream = client.generate(request.clone()).await.unwrap().into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.message().await.unwrap() {
        events.push(event.event.unwrap());
    }
    let [
        Event::Prefilled(prefilled),
        Event::Token(first),
        Event::Token(second),
        Event::Finished(end),
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    let moe = script.spec.moe_blocks.iter().filter(|moe| **moe).count();
    assert_eq!(prefilled.signature.len(), moe * script.spec.experts);
    assert_eq!((first.index, first.id), (0, script.token(0).0));
    assert_eq!((second.index, second.id), (1, script.token(1).0));
    assert_eq!((end.prompt_tokens, end.generated_tokens), (3, 2));
    let resumed = GenerateRequest {
        prompt_len: 2,
        ..request
    };
    let refused = client.generate(resumed).await.unwrap_err();
    assert!(refused.message().contains("resumes no answer"), "{refused}");
}

#[tokio::test]
async fn the_face_of_sglang_gives_chunks_and_a_whole() {
    let script = script(Delays::default());
    let service = SglangSchedulerServer::new(sglang::Face(Arc::clone(&script)));
    let (address, _tasks) = face(async move |listener| {
        let router = grpc().add_service(service);
        drop(serve(router, listener, None, CancellationToken::new()).await);
    })
    .await;
    let mut client = SglangSchedulerClient::new(channel(&address, None).unwrap());
    let info = client.get_model_info(sgl::GetModelInfoRequest {}).await;
    assert_eq!(info.unwrap().into_inner().served_model_name, NAME);
    for streamed in [true, false] {
        let request = sgl::GenerateRequest {
            request_id: "r".to_owned(),
            tokenized: Some(TokenizedInput {
                input_ids: vec![1, 2, 3],
            }),
            sampling_params: Some(SamplingParams {
                max_new_tokens: Some(2),
            }),
            stream: streamed,
        };
        let mut stream = client.generate(request).await.unwrap().into_inner();
        let mut parts = Vec::new();
        while let Some(part) = stream.message().await.unwrap() {
            assert_eq!(part.request_id, "r");
            parts.push(part.response.unwrap());
        }
        let Some(Part::Complete(whole)) = parts.pop() else {
            panic!("{parts:?}");
        };
        assert_eq!(whole.output_ids, [script.token(0).0, script.token(1).0]);
        assert_eq!((whole.prompt_tokens, whole.completion_tokens), (3, 2));
        assert_eq!(parts.len(), if streamed { 2 } else { 0 });
    }
    let bare = client.generate(sgl::GenerateRequest::default()).await;
    let refused = bare.unwrap_err();
    assert!(refused.message().contains("max_new_tokens"), "{refused}");
}
