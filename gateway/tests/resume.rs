//! Sequences that lose their worker: nothing is lost, nothing comes twice.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use foregate_api::manifest::RoutingPolicy;
use foregate_api::member::Phase;
use foregate_gateway::loads::Loads;
use foregate_gateway::metrics::Metrics;
use foregate_gateway::random::Random;
use foregate_gateway::route::Router;
use foregate_gateway::trace::Identity;
use foregate_gateway::upstream::{Event, Upstream};
use foregate_gateway::view::Views;
use foregate_store::coord::ClusterState;
use foregate_wire::generation::GenerateRequest;
use serde_json::{Value, json};
use support::{Cluster, Worker, config, experts_of, ids, member, placement, text_of, with};
use tokio::time::Instant;

const ANSWER: &str = "Blessed are the meek: for they shall inherit the earth 😀 and more.";

fn body(extra: &Value) -> Value {
    let body =
        json!({"prompt": "In the beginning", "max_tokens": 60, "temperature": 0, "seed": 7});
    with(body, extra)
}

/// The first attempt of every sequence goes to the lowest rank, as both are idle.
#[tokio::test]
async fn another_worker_goes_on_at_the_next_index() {
    for quietly in [false, true] {
        let cluster = Cluster::start(2, ANSWER, config()).await;
        let first = &cluster.workers[0].behaviour;
        first.break_after.store(5, Ordering::SeqCst);
        first.end_quietly.store(quietly, Ordering::SeqCst);
        let extra =
            json!({"stream": true, "return_token_ids": true, "return_routed_experts": true});
        let (events, done) = cluster.stream("/v1/completions", &body(&extra)).await;
        assert!(done);
        let choice = |event: &Value, field: &str| event["choices"][0][field].clone();
        assert_eq!(text_of(&events, 0), ANSWER);
        let tokens: Vec<Value> = events
            .iter()
            .flat_map(|event| choice(event, "token_ids").as_array().unwrap().clone())
            .collect();
        assert_eq!(json!(tokens), json!(ids(ANSWER)));
        let routed: Vec<Value> = events
            .iter()
            .flat_map(|event| choice(event, "routed_experts").as_array().unwrap().clone())
            .collect();
        let prompt = ids("In the beginning");
        let all: Vec<u32> = prompt.iter().copied().chain(ids(ANSWER)).collect();
        let expected: Vec<Value> = all[..all.len() - 1]
            .iter()
            .enumerate()
            .map(|(at, id)| experts_of(at, *id).chunks(2).map(Value::from).collect())
            .collect();
        assert_eq!(json!(routed), json!(expected));

        let resumed = cluster.workers[1].requests().remove(0);
        assert_eq!(
            resumed.prompt_len as usize,
            prompt.len(),
            "the prompt stays the prompt"
        );
        assert_eq!(resumed.token_ids, all[..prompt.len() + 5]);
        assert_eq!(resumed.sampling.unwrap().seed, 7);
        assert_eq!(resumed.max_tokens, 60);
        let metrics = cluster.get("/metrics").await.1;
        assert!(
            metrics.contains("foregate_gateway_resumes_total 1"),
            "{metrics}"
        );
    }
}

#[tokio::test]
async fn a_killed_worker_is_replaced_in_mid_stream_for_all_choices() {
    let mut cluster = Cluster::start(2, ANSWER, config()).await;
    let whole = cluster
        .json("/v1/completions", &body(&json!({"n": 4, "temperature": 1})))
        .await;
    let expected: Vec<&str> = (0..4)
        .map(|at| whole["choices"][at]["text"].as_str().unwrap())
        .collect();
    assert_ne!(expected[0], expected[1], "seeds differ");
    cluster.hold_after(5);
    let extra = json!({"stream": true, "n": 4, "temperature": 1});
    let response = cluster.post("/v1/completions", &body(&extra)).await;
    assert_eq!(response.headers()["x-foregate-worker"], "0,1");
    let tokens = whole["usage"]["completion_tokens"].as_u64().unwrap() + 4 * 5;
    let tokens = format!("vllm:generation_tokens_total{{model_name=\"demo\"}} {tokens}\n");
    cluster.shows(&tokens).await;
    cluster.workers[0].kill();
    cluster.hold_after(0);
    let (events, done) = support::events(&response.text().await.unwrap());
    assert!(done);
    for (index, expected) in expected.iter().enumerate() {
        assert_eq!(text_of(&events, index), *expected, "choice {index}");
    }
    // The two choices of the killed worker.
    cluster.shows("foregate_gateway_resumes_total 2\n").await;
}

#[tokio::test]
async fn a_full_worker_is_passed_over_and_all_full_is_429() {
    let cluster = Cluster::start(2, ANSWER, config()).await;
    cluster.workers[0]
        .behaviour
        .busy
        .store(true, Ordering::SeqCst);
    let response = cluster.post("/v1/completions", &body(&json!({}))).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["x-foregate-worker"], "1");
    cluster.workers[1]
        .behaviour
        .busy
        .store(true, Ordering::SeqCst);
    let response = cluster
        .post("/v1/completions", &body(&json!({"stream": true})))
        .await;
    assert_eq!(response.status(), 429);
    assert!(response.headers().contains_key("retry-after"));
}

#[tokio::test]
async fn losses_without_end_become_an_error_event() {
    let cluster = Cluster::start(2, ANSWER, config()).await;
    for worker in &cluster.workers {
        worker.behaviour.break_after.store(1, Ordering::SeqCst);
    }
    let (events, done) = cluster
        .stream("/v1/completions", &body(&json!({"stream": true})))
        .await;
    assert!(!done);
    let error = &events[events.len() - 1]["error"];
    assert_eq!(error["type"], "service_unavailable_error");
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("lost 4 workers"),
        "{error}"
    );
    let requests = cluster.workers.iter().map(|worker| worker.requests().len());
    assert_eq!(requests.sum::<usize>(), 4, "the first try and three more");
}

/// A client that reads slowly lets events pile up; the request's time counts all the same.
#[tokio::test]
async fn events_that_wait_do_not_outlive_the_deadline() {
    let worker = Worker::start();
    worker.behaviour.answer.lock().unwrap().extend(ids(ANSWER));
    let plan = Arc::new(placement(1, 1));
    let ready = member(0, &worker.address, Phase::Ready);
    let state = ClusterState {
        connected: true,
        members: BTreeMap::from([(ready.rank, Arc::new(ready))]),
        active: Some((plan, 1)),
        ..ClusterState::default()
    };
    let metrics = Arc::new(Metrics::new(prometheus::Registry::new(), "demo").unwrap());
    let (views, loads) = (Arc::new(Views::default()), Arc::new(Loads::default()));
    views.replace(Arc::new(state), &loads, &metrics);
    let router = Router::new(RoutingPolicy::LeastLoaded);
    let upstream = Arc::new(Upstream::new(views, loads, router, metrics, None));
    let request = GenerateRequest {
        token_ids: vec![5, 6],
        prompt_len: 2,
        max_tokens: 60,
        ..GenerateRequest::default()
    };
    let random = Random::default();
    let identity = Identity::of(&axum::http::HeaderMap::new(), "POST", "/", &random);
    let began = Instant::now();
    let deadline = began + Duration::from_secs(60);
    let opened = upstream.open(request, &identity, began, deadline).await;
    let mut sequence = opened.unwrap();
    assert!(matches!(
        sequence.next().await.unwrap(),
        Event::Prefilled(_)
    ));
    // Time for the worker's next events to arrive and wait.
    tokio::time::sleep(Duration::from_millis(300)).await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(60)).await;
    let over = sequence.next().await.unwrap_err();
    assert_eq!(over.reason, "deadline");
    assert!(over.message.contains("within 60000 ms"), "{}", over.message);
}

#[tokio::test]
async fn an_end_that_is_lost_after_the_last_token_is_no_loss() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    cluster.workers[0]
        .behaviour
        .break_after
        .store(4, Ordering::SeqCst);
    cluster.workers[0]
        .behaviour
        .end_quietly
        .store(true, Ordering::SeqCst);
    // The fifth token is where the fake breaks, so four are all that was asked for.
    let whole = cluster
        .json("/v1/completions", &body(&json!({"max_tokens": 4})))
        .await;
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 4);
    assert_eq!(cluster.workers[0].requests().len(), 1, "asked once only");
}
