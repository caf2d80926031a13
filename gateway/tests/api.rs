//! The HTTP API end to end: shapes of answers, headers, limits, readiness.

#![expect(clippy::unwrap_used, reason = "a test may end in a panic")]

mod support;

use std::time::Duration;

use foregate_api::load::EngineLoad;
use foregate_api::member::{Member, Phase};
use serde_json::{Value, json};
use support::{
    Cluster, DEMO, PATIENCE, config, experts_of, ids, logprob_of, member, pass, text_of,
    window, with,
};

const ANSWER: &str = "light — 漢字 and 😀 were there.";

fn chat(extra: &Value) -> Value {
    let body = json!({
        "model": "demo",
        "messages": [{"role": "user", "content": "In the beginning"}],
        "temperature": 0,
    });
    with(body, extra)
}

fn complete(extra: &Value) -> Value {
    let body = json!({"prompt": "In the beginning", "max_tokens": 100, "temperature": 0});
    with(body, extra)
}

#[tokio::test]
async fn chat_answers_whole_and_in_pieces() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    let whole = cluster
        .json("/v1/chat/completions", &chat(&json!({})))
        .await;
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "demo");
    let choice = &whole["choices"][0];
    assert_eq!(
        choice["message"],
        json!({"role": "assistant", "content": ANSWER, "refusal": null})
    );
    assert_eq!(choice["finish_reason"], "stop");
    let (prompt, made) = (ids("In the beginning\n").len(), ids(ANSWER).len());
    assert_eq!(whole["usage"]["prompt_tokens"], prompt);
    assert_eq!(whole["usage"]["completion_tokens"], made);
    assert_eq!(whole["usage"]["total_tokens"], prompt + made);

    let extra = json!({"stream": true, "stream_options": {"include_usage": true}});
    let (events, done) = cluster.stream("/v1/chat/completions", &chat(&extra)).await;
    assert!(done);
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    let text: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .inspect(|piece| assert!(!piece.contains('\u{fffd}')))
        .collect();
    assert_eq!(text, ANSWER);
    let (last, finish) = (&events[events.len() - 1], &events[events.len() - 2]);
    assert_eq!(finish["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"], whole["usage"]);
    for event in &events[..events.len() - 1] {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["id"], events[0]["id"]);
        assert!(event["usage"].is_null());
        assert!(event.as_object().unwrap().contains_key("usage"));
    }
}

#[tokio::test]
async fn completions_take_all_forms_of_prompt() {
    let cluster = Cluster::start(2, ANSWER, config()).await;
    let tokens = ids("In the beginning");
    for (prompt, choices) in [
        (json!("In the beginning"), 1),
        (json!(["In the beginning", "x"]), 2),
        (json!(tokens), 1),
        (json!([tokens, [5, 6], [7]]), 3),
    ] {
        let whole = cluster
            .json("/v1/completions", &complete(&json!({"prompt": prompt})))
            .await;
        assert_eq!(whole["object"], "text_completion");
        let list = whole["choices"].as_array().unwrap();
        assert_eq!(list.len(), choices);
        for (at, choice) in list.iter().enumerate() {
            assert_eq!(choice["index"], at);
            assert_eq!(choice["text"], ANSWER);
        }
    }
    let (events, done) = cluster
        .stream(
            "/v1/completions",
            &complete(&json!({"stream": true, "n": 2, "seed": 1})),
        )
        .await;
    assert!(done);
    for index in 0..2 {
        assert_eq!(text_of(&events, index), ANSWER);
    }
}

#[tokio::test]
async fn seeds_of_choices_count_up_and_are_drawn_when_absent() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    let seeds = async |body: &Value| {
        cluster.workers[0].behaviour.seen.lock().unwrap().clear();
        cluster.json("/v1/completions", body).await;
        let mut seeds: Vec<u64> = cluster.workers[0]
            .requests()
            .iter()
            .map(|request| request.sampling.as_ref().unwrap().seed)
            .collect();
        seeds.sort_unstable();
        seeds
    };
    let given = complete(&json!({"n": 3, "seed": 40, "temperature": 1}));
    assert_eq!(seeds(&given).await, [40, 41, 42]);
    let drawn = complete(&json!({"temperature": 1}));
    assert_ne!(seeds(&drawn).await, seeds(&drawn).await);
}

#[tokio::test]
async fn sampling_reaches_the_worker() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    let extra = json!({
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5,
        "logit_bias": {"17": -2.5}, "ignore_eos": true, "stop_token_ids": [9], "seed": -1,
    });
    cluster.json("/v1/completions", &complete(&extra)).await;
    let request = cluster.workers[0].requests().remove(0);
    let sampling = request.sampling.clone().unwrap();
    assert_eq!(
        (request.max_tokens, request.min_tokens, request.ignore_eos),
        (9, 2, true)
    );
    assert_eq!(request.stop_token_ids, [9]);
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.min_p),
        (0.5, 0.25, 0.125)
    );
    assert_eq!((sampling.top_k, sampling.seed), (7, u64::MAX));
    assert_eq!(sampling.repetition_penalty, 1.5);
    assert_eq!(
        (sampling.presence_penalty, sampling.frequency_penalty),
        (0.5, -0.5)
    );
    assert_eq!(
        sampling.logit_bias.into_iter().collect::<Vec<_>>(),
        [(17, -2.5)]
    );
    assert!((1..=config().request_timeout_ms).contains(&request.deadline_ms));
    assert_eq!(request.prompt_len as usize, request.token_ids.len());
}

/// A directory with the demonstration model's text files and this `generation_config.json`.
fn model_with(generation: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(format!("{DEMO}/{name}"), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join("generation_config.json");
    std::fs::write(path, generation.to_string()).unwrap();
    dir
}

#[tokio::test]
async fn the_model_says_what_the_request_leaves_open() {
    let dir = model_with(&json!({
        "do_sample": true, "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125,
        "repetition_penalty": 1.5, "max_new_tokens": 9,
    }));
    let mut config = config();
    config.model_dir = dir.path().display().to_string();
    let cluster = Cluster::start(1, ANSWER, config).await;
    let asked = async |path: &str, body: &Value| {
        cluster.json(path, body).await;
        let request = cluster.workers[0].requests().pop().unwrap();
        (request.max_tokens, request.sampling.unwrap())
    };
    let messages = json!([{"role": "user", "content": "In the beginning"}]);
    let (most, sampling) = asked("/v1/chat/completions", &json!({"messages": messages})).await;
    assert_eq!(most, 9);
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.min_p),
        (0.5, 0.25, 0.125)
    );
    assert_eq!((sampling.top_k, sampling.repetition_penalty), (7, 1.5));
    let own = json!({
        "messages": messages, "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0,
        "repetition_penalty": 1, "max_tokens": 30,
    });
    let (most, sampling) = asked("/v1/chat/completions", &own).await;
    assert_eq!(most, 30);
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.min_p),
        (0.0, 1.0, 0.0)
    );
    assert_eq!((sampling.top_k, sampling.repetition_penalty), (0, 1.0));
    let (most, sampling) = asked("/v1/completions", &json!({"prompt": "x"})).await;
    assert_eq!((most, sampling.temperature), (16, 0.5));
}

#[tokio::test]
async fn a_model_that_asks_for_more_than_fits_gets_what_fits() {
    let dir = model_with(&json!({"max_new_tokens": 1_000_000}));
    let mut config = config();
    config.model_dir = dir.path().display().to_string();
    let cluster = Cluster::start(1, ANSWER, config).await;
    cluster
        .json("/v1/chat/completions", &chat(&json!({})))
        .await;
    let request = cluster.workers[0].requests().remove(0);
    assert_eq!(request.max_tokens, 1024 - request.prompt_len);
}

#[tokio::test]
async fn stop_strings_end_the_text_and_the_sequence() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    let stop = json!({"stop": ["and 😀", "never"]});
    let whole = cluster.json("/v1/completions", &complete(&stop)).await;
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "light — 漢字 ");
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("stop"), &json!("and 😀"))
    );
    let kept = json!({"stop": "漢字", "include_stop_str_in_output": true});
    let whole = cluster.json("/v1/completions", &complete(&kept)).await;
    assert_eq!(whole["choices"][0]["text"], "light — 漢字");
    cluster.idle().await;
    let token = ids(ANSWER)[2];
    let whole = cluster
        .json(
            "/v1/completions",
            &complete(&json!({"stop_token_ids": [token]})),
        )
        .await;
    assert_eq!(whole["choices"][0]["stop_reason"], token);
    assert_eq!(whole["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn logprobs_of_completions_with_echo() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    let prompt = "é begin";
    let extra = json!({"prompt": prompt, "echo": true, "logprobs": 2, "max_tokens": 3, "return_token_ids": true});
    let whole = cluster.json("/v1/completions", &complete(&extra)).await;
    let choice = &whole["choices"][0];
    let (prompt_ids, made) = (ids(prompt), ids(ANSWER)[..3].to_vec());
    let all: Vec<u32> = prompt_ids.iter().chain(&made).copied().collect();
    let lists = &choice["logprobs"];
    assert_eq!(choice["prompt_token_ids"], json!(prompt_ids));
    assert_eq!(choice["token_ids"], json!(made));
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(lists[list].as_array().unwrap().len(), all.len(), "{list}");
    }
    assert!(lists["token_logprobs"][0].is_null() && lists["top_logprobs"][0].is_null());
    for (at, id) in all.iter().enumerate().skip(1) {
        assert_eq!(
            lists["token_logprobs"][at].as_f64().unwrap() as f32,
            logprob_of(*id)
        );
        assert_eq!(lists["top_logprobs"][at].as_object().unwrap().len(), 2);
    }
    let text: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
    assert!(text.iter().collect::<String>().starts_with(prompt));
    let offsets: Vec<usize> = lists["text_offset"]
        .as_array()
        .unwrap()
        .iter()
        .map(|offset| offset.as_u64().unwrap() as usize)
        .collect();
    assert!(offsets.is_sorted());
    assert_eq!(offsets[prompt_ids.len()], prompt.chars().count());
    for (at, token) in lists["tokens"].as_array().unwrap().iter().enumerate() {
        let token = token.as_str().unwrap();
        if !token.starts_with("bytes:") {
            let from: String = text[offsets[at]..].iter().collect();
            assert!(from.starts_with(token), "{token:?} at {from:?}");
        }
    }

    let none = json!({"prompt": prompt, "echo": true, "logprobs": 0, "max_tokens": 0});
    let whole = cluster.json("/v1/completions", &complete(&none)).await;
    assert_eq!(whole["choices"][0]["text"], prompt);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 0);
    assert_eq!(
        whole["choices"][0]["logprobs"]["tokens"]
            .as_array()
            .unwrap()
            .len(),
        prompt_ids.len()
    );
}

#[tokio::test]
async fn logprobs_of_chat_have_bytes() {
    let cluster = Cluster::start(1, "漢 x", config()).await;
    let extra = json!({"logprobs": true, "top_logprobs": 2, "prompt_logprobs": 1});
    let whole = cluster.json("/v1/chat/completions", &chat(&extra)).await;
    let content = whole["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|entry| entry["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(bytes, "漢 x".as_bytes());
    assert!(
        content
            .iter()
            .all(|entry| entry["top_logprobs"].as_array().unwrap().len() == 2)
    );
    let of_prompt = whole["prompt_logprobs"].as_array().unwrap();
    assert_eq!(of_prompt.len(), ids("In the beginning\n").len());
    assert!(of_prompt[0].is_null());
    assert!(
        of_prompt[1]
            .as_object()
            .unwrap()
            .values()
            .all(|entry| entry["rank"] == 1)
    );
}

#[tokio::test]
async fn routed_experts_are_the_same_whole_and_streamed() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    let extra = json!({"prompt": [11, 12, 13], "max_tokens": 4, "return_routed_experts": true});
    let whole = cluster.json("/v1/completions", &complete(&extra)).await;
    let made = ids(ANSWER);
    let sequence = [11, 12, 13, made[0], made[1], made[2]];
    let expected: Vec<Value> = sequence
        .iter()
        .enumerate()
        .map(|(at, id)| experts_of(at, *id).chunks(2).map(Value::from).collect())
        .collect();
    assert_eq!(whole["choices"][0]["routed_experts"], json!(expected));
    let mut streamed = extra.clone();
    streamed["stream"] = json!(true);
    let (events, _) = cluster
        .stream("/v1/completions", &complete(&streamed))
        .await;
    let joined: Vec<Value> = events
        .iter()
        .flat_map(|event| {
            event["choices"][0]["routed_experts"]
                .as_array()
                .unwrap()
                .clone()
        })
        .collect();
    assert_eq!(joined, expected);
}

#[tokio::test]
async fn a_model_without_tokenizer_serves_ids() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config();
    config.model_dir = dir.path().display().to_string();
    let cluster = Cluster::start(1, ANSWER, config).await;
    let extra =
        json!({"prompt": [5, 6], "max_tokens": 2, "return_token_ids": true, "logprobs": 1});
    let whole = cluster.json("/v1/completions", &complete(&extra)).await;
    let made = &ids(ANSWER)[..2];
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "");
    assert_eq!(choice["token_ids"], json!(made));
    assert_eq!(
        choice["logprobs"]["tokens"][1],
        format!("token_id:{}", made[1])
    );
    for (path, body, param) in [
        ("/v1/completions", complete(&json!({})), "prompt"),
        ("/v1/chat/completions", chat(&json!({})), "messages"),
        (
            "/v1/completions",
            complete(&json!({"prompt": [5], "stop": "x"})),
            "stop",
        ),
        ("/tokenize", json!({"prompt": "x"}), "prompt"),
        ("/detokenize", json!({"tokens": [5]}), "tokens"),
    ] {
        let response = cluster.post(path, &body).await;
        assert_eq!(response.status(), 400, "{path}");
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["param"], param);
        assert!(
            error["error"]["message"]
                .as_str()
                .unwrap()
                .contains("no tokenizer")
        );
    }
}

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    let asked = json!({"prompt": ANSWER, "return_token_strs": true});
    let tokens = cluster.json("/tokenize", &asked).await;
    assert_eq!(tokens["tokens"], json!(ids(ANSWER)));
    assert_eq!(tokens["count"], ids(ANSWER).len());
    assert_eq!(tokens["max_model_len"], 1024);
    assert_eq!(
        tokens["token_strs"].as_array().unwrap().len(),
        ids(ANSWER).len()
    );
    let text = cluster
        .json("/detokenize", &json!({"tokens": tokens["tokens"]}))
        .await;
    assert_eq!(text["prompt"], ANSWER);
    let of_chat = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let tokens = cluster.json("/tokenize", &of_chat).await;
    assert_eq!(tokens["tokens"], json!(ids("Hi\n")));
}

#[tokio::test]
async fn identities_go_in_and_out() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let send = async |id: &str, traceparent: &str| {
        cluster
            .client
            .post(format!("{}/v1/completions", cluster.url))
            .header("x-request-id", id)
            .header("traceparent", traceparent)
            .json(&complete(&json!({})))
            .send()
            .await
            .unwrap()
    };
    let response = send("mine-1", parent).await;
    assert_eq!(response.headers()["x-request-id"], "mine-1");
    assert_eq!(response.headers()["traceparent"], parent);
    assert_eq!(response.headers()["x-foregate-worker"], "0");
    assert_eq!(response.headers()["x-foregate-route"], "least_loaded");
    let seen = cluster.workers[0].behaviour.metadata.lock().unwrap()[0].clone();
    assert_eq!(
        (seen["x-request-id"].as_str(), seen["traceparent"].as_str()),
        ("mine-1", parent)
    );
    assert_eq!(response.json::<Value>().await.unwrap()["id"], "cmpl-mine-1");
    let response = send("not valid", "garbage").await;
    assert_eq!(response.headers()["x-request-id"].len(), 32);
    assert_eq!(response.headers()["traceparent"].len(), 55);
}

#[tokio::test]
async fn ready_only_when_something_can_be_served() {
    let cluster = Cluster::bare(1, ANSWER, config()).await;
    cluster
        .eventually("a look at the store", async || {
            let (status, body) = cluster.get("/ready").await;
            assert_eq!(status, 503);
            body.contains("no placement is active")
        })
        .await;
    assert_eq!(cluster.get("/health").await.0, 200);
    let refused = cluster.post("/v1/completions", &complete(&json!({}))).await;
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));

    let address = cluster.workers[0].address.clone();
    let joining = member(0, &address, Phase::Joining);
    cluster
        .coord
        .register(&joining, cluster.lease.as_ref())
        .await
        .unwrap();
    cluster.activate(1, None).await;
    cluster
        .eventually("the placement", async || {
            cluster
                .get("/ready")
                .await
                .1
                .contains("no worker that takes requests is ready")
        })
        .await;
    let ready = member(0, &address, Phase::Ready);
    cluster
        .coord
        .register(&ready, cluster.lease.as_ref())
        .await
        .unwrap();
    cluster.wait_ready().await;
    let mut cluster = cluster;
    cluster.workers[0].kill();
    // A loss is remembered for two seconds; a look that comes later is repeated with a fresh one.
    cluster
        .eventually("red while dead", async || {
            let lost = cluster.post("/v1/completions", &complete(&json!({}))).await;
            assert_eq!(lost.status(), 503);
            cluster.get("/ready").await.0 == 503
        })
        .await;
}

/// A store that was emptied has no placement for a moment; workers that are ready have theirs, and answer. One that
/// holds experts only is not asked.
#[tokio::test]
async fn a_ready_worker_that_takes_requests_is_enough() {
    let cluster = Cluster::bare(2, ANSWER, config()).await;
    let of = |rank: usize| member(rank as u32, &cluster.workers[rank].address, Phase::Ready);
    let experts_only = Member {
        kv_pages: 0,
        ..of(0)
    };
    let register = async |member: &Member| {
        let lease = cluster.lease.as_ref();
        cluster.coord.register(member, lease).await.unwrap();
    };
    register(&experts_only).await;
    cluster
        .eventually("the worker with experts only", async || {
            let (status, body) = cluster.get("/ready").await;
            assert_eq!(status, 503);
            body.contains("(1 workers registered)")
        })
        .await;
    register(&of(1)).await;
    cluster.wait_ready().await;
    for _ in 0..4 {
        let answer = cluster.post("/v1/completions", &complete(&json!({}))).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["x-foregate-worker"], "1");
    }
}

#[tokio::test]
async fn a_full_gateway_answers_429() {
    let mut config = config();
    (config.max_in_flight, config.max_queued) = (1, 0);
    let cluster = Cluster::start(1, ANSWER, config).await;
    cluster.hold_after(1);
    let first = cluster
        .post("/v1/completions", &complete(&json!({"stream": true})))
        .await;
    let second = cluster.post("/v1/completions", &complete(&json!({}))).await;
    assert_eq!(second.status(), 429);
    assert!(
        second.headers()["retry-after"]
            .to_str()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            >= 1
    );
    let error: Value = second.json().await.unwrap();
    assert_eq!(error["error"]["type"], "rate_limit_error");
    // A client that goes away frees its place and its worker at once.
    drop(first);
    cluster.idle().await;
    cluster.hold_after(0);
    cluster.json("/v1/completions", &complete(&json!({}))).await;
    let metrics = cluster.get("/metrics").await.1;
    assert!(metrics.contains("finished_reason=\"abort\""), "{metrics}");
    assert!(metrics.contains("foregate_gateway_rejected_total{reason=\"queue_full\"} 1"));
}

#[tokio::test]
async fn more_choices_than_permits_run_in_turn() {
    let mut config = config();
    config.max_in_flight = 2;
    let cluster = Cluster::start(1, ANSWER, config).await;
    let whole = cluster
        .json("/v1/completions", &complete(&json!({"n": 7})))
        .await;
    let list = whole["choices"].as_array().unwrap();
    assert_eq!(list.len(), 7);
    assert!(list.iter().all(|choice| choice["text"] == ANSWER));
    let prompt = ids("In the beginning").len();
    assert_eq!(
        whole["usage"]["prompt_tokens"], prompt,
        "counted once per prompt"
    );
}

#[tokio::test]
async fn deadlines_end_requests() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    cluster.hold_after(1);
    let whole_time = Duration::from_millis(config().request_timeout_ms);
    let body = complete(&json!({}));
    let (late, ()) = tokio::join!(cluster.post("/v1/completions", &body), async {
        let asked = async || !cluster.workers[0].requests().is_empty();
        cluster.eventually("the request", asked).await;
        pass(whole_time).await;
    });
    assert_eq!(late.status(), 504);
    let streamed = complete(&json!({"stream": true}));
    let late = cluster.post("/v1/completions", &streamed).await;
    assert_eq!(late.status(), 200);
    pass(whole_time).await;
    let (events, done) = support::events(&late.text().await.unwrap());
    assert!(!done, "a failed stream has no [DONE]");
    assert_eq!(events[events.len() - 1]["error"]["type"], "timeout_error");
}

#[tokio::test]
async fn metrics_and_the_load_matrix_show_the_cluster() {
    let cluster = Cluster::start(2, ANSWER, config()).await;
    for worker in &cluster.workers {
        worker
            .behaviour
            .tells_whole
            .store(true, std::sync::atomic::Ordering::SeqCst);
    }
    cluster.json("/v1/completions", &complete(&json!({}))).await;
    for rank in 0..2 {
        let engine = EngineLoad {
            running: 3,
            waiting: 1,
            kv_pages_used: 32,
            kv_pages: 128,
            prefix_queries: 50,
            prefix_hits: 20,
            switch_stall_us: 1500,
            ..EngineLoad::default()
        };
        cluster
            .coord
            .publish_load(&window(rank, 1, engine), cluster.lease.as_ref())
            .await
            .unwrap();
    }
    cluster
        .shows("vllm:num_requests_running{engine=\"1\",")
        .await;
    let text = cluster.get("/metrics").await.1;
    for line in [
        "vllm:num_requests_running{engine=\"1\",model_name=\"demo\"} 3",
        "vllm:num_requests_waiting{engine=\"0\",model_name=\"demo\"} 1",
        "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"demo\"} 0.25",
        "vllm:prefix_cache_hits_total{engine=\"0\",model_name=\"demo\"} 20",
        "vllm:request_success_total{finished_reason=\"stop\",model_name=\"demo\"} 1",
        "foregate_gateway_epoch{placement=\"active\"} 1",
        "foregate_gateway_epoch_changes_total{reason=\"initial\"} 1",
        "foregate_gateway_switch_stall_seconds{engine=\"0\"} 0.0015",
        "foregate_gateway_route_decisions_total{outcome=\"load\",policy=\"least_loaded\"} 1",
        "foregate_gateway_top_expert_id{place=\"1\"} 7",
        "foregate_gateway_workers{phase=\"ready\"} 2",
        "foregate_gateway_predictor_believed{predictor=\"kinds\"} 1",
        "foregate_gateway_tenant_routed_rows{tenant=\"anonymous\"} ",
        "vllm:lora_requests_info{max_lora=\"0\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"} ",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    // Rank 0 computed 10 rows per layer, rank 1 twenty: most over mean is 4/3.
    assert!(text.contains("foregate_gateway_expert_imbalance{layer=\"1\"} 1.33"));
    for name in [
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "foregate_gateway_token_overhead_seconds",
    ] {
        assert!(text.contains(&format!("# TYPE {name} histogram")), "{name}");
    }
    let made = ids(ANSWER).len();
    assert!(text.contains(&format!(
        "vllm:generation_tokens_total{{model_name=\"demo\"}} {made}"
    )));

    let matrix: Value = serde_json::from_str(&cluster.get("/debug/experts").await.1).unwrap();
    assert_eq!(matrix["active"]["epoch"], 1);
    assert_eq!(matrix["load"][0][7], 7 + 8);
    assert_eq!(matrix["rank_rows"]["1"], json!([20, 20]));
    assert_eq!(matrix["workers"]["0"]["window"]["engine"]["running"], 3);
    assert_eq!(matrix["workers"]["0"]["phase"], "ready");
    assert_eq!(matrix["predictors"]["prefix"]["believed"], true);
    assert_eq!(matrix["predictors"]["prefix"]["last_window"], Value::Null);
    let tenants = matrix["tenants"].as_array().unwrap();
    assert_eq!(tenants.len(), 1);
    assert_eq!(tenants[0]["tenant"], "anonymous");
    assert_eq!(tenants[0]["share"], 1.0);
    assert_eq!(tenants[0]["hottest"][0]["of_expert"], 1.0);
}

/// Whoever pushes the registry sees the cluster too, though nobody asks for `/metrics`.
#[tokio::test]
async fn the_registry_is_up_to_date_by_itself() {
    let cluster = Cluster::start(2, ANSWER, config()).await;
    let workers = || {
        let families = cluster.registry.gather();
        let family = families
            .iter()
            .find(|family| family.name() == "foregate_gateway_workers");
        family.map_or(0.0, |family| {
            let gauges = family.get_metric().iter();
            gauges.map(|metric| metric.get_gauge().get_value()).sum()
        })
    };
    assert_eq!(workers(), 2.0);
}

#[tokio::test]
async fn conventional_metrics_count_requests_by_their_end() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    let made = ids(ANSWER).len();
    cluster
        .json(
            "/v1/completions",
            &complete(&json!({"model": "alias", "n": 2})),
        )
        .await;
    let streamed = chat(&json!({"stream": true}));
    cluster.stream("/v1/chat/completions", &streamed).await;
    let unknown = complete(&json!({"model": "x".repeat(50)}));
    cluster.post("/v1/completions", &unknown).await;
    let text = cluster.get("/metrics").await.1;
    let labels = |operation: &str, request: &str, response: &str| {
        format!(
            "gen_ai_operation_name=\"{operation}\",gen_ai_provider_name=\"foregate\",gen_ai_request_model=\"{request}\",gen_ai_response_model=\"{response}\""
        )
    };
    let (alias, demo) = (
        labels("text_completion", "alias", "demo"),
        labels("chat", "demo", "demo"),
    );
    let nobody = labels("text_completion", "", "");
    for line in [
        format!("request_duration_seconds_count{{error_type=\"\",{alias}}} 1\n"),
        format!("request_duration_seconds_count{{error_type=\"\",{demo}}} 1\n"),
        format!("request_duration_seconds_count{{error_type=\"unknown_model\",{nobody}}} 1\n"),
        format!("time_to_first_token_seconds_count{{{demo}}} 1\n"),
        format!("time_per_output_token_seconds_count{{{alias}}} 1\n"),
        format!(
            "token_usage_sum{{{alias},gen_ai_token_type=\"output\"}} {}\n",
            2 * made
        ),
        format!("token_usage_sum{{{demo},gen_ai_token_type=\"output\"}} {made}\n"),
    ] {
        assert!(text.contains(&line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn small_routes_answer() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    let models: Value = serde_json::from_str(&cluster.get("/v1/models").await.1).unwrap();
    let names: Vec<&str> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|card| card["id"].as_str())
        .collect();
    assert_eq!(names, ["demo", "alias"]);
    assert_eq!(models["data"][0]["max_model_len"], 1024);
    assert_eq!(cluster.get("/v1/models/alias").await.0, 200);
    assert_eq!(cluster.get("/v1/models/org/other").await.0, 404);
    assert!(
        cluster
            .get("/version")
            .await
            .1
            .contains(env!("CARGO_PKG_VERSION"))
    );
}

#[tokio::test]
async fn draining_finishes_what_runs_and_returns() {
    let cluster = Cluster::start(1, ANSWER, config()).await;
    cluster.hold_after(1);
    let running = cluster
        .post("/v1/completions", &complete(&json!({"stream": true})))
        .await;
    cluster.shutdown.cancel();
    cluster.hold_after(0);
    let (events, done) = support::events(&running.text().await.unwrap());
    assert!(done);
    assert_eq!(text_of(&events, 0), ANSWER);
    tokio::time::timeout(PATIENCE, cluster.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn half_a_request_does_not_hold_up_the_drain() {
    use tokio::io::AsyncWriteExt as _;

    let cluster = Cluster::start(1, ANSWER, config()).await;
    let address = cluster.url.trim_start_matches("http://");
    let mut silent = tokio::net::TcpStream::connect(address).await.unwrap();
    silent
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost")
        .await
        .unwrap();
    // A later answer shows that the server has taken the silent connection too.
    assert_eq!(cluster.get("/health").await.0, 200);
    cluster.shutdown.cancel();
    // Only clocks are waited for, so they go on by themselves.
    tokio::time::pause();
    let from = tokio::time::Instant::now();
    cluster.running.await.unwrap().unwrap();
    // Requests in work would have half a minute.
    assert!(from.elapsed() < Duration::from_secs(15));
    drop(silent);
}

#[tokio::test]
async fn who_shows_no_key_gets_nothing_but_health_and_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    std::fs::write(&file, "alice:sk-secret-of-alice").unwrap();
    let mut config = config();
    config.api_keys = Some(file.to_str().unwrap().to_owned());
    let cluster = Cluster::start(1, ANSWER, config).await;
    let ask = async |path: &str, authorization: Option<&str>| {
        let url = format!("{}{path}", cluster.url);
        let mut request = if path.starts_with("/v1/c") {
            cluster
                .client
                .post(url)
                .json(&complete(&json!({"max_tokens": 1})))
        } else {
            cluster.client.get(url)
        };
        if let Some(value) = authorization {
            request = request.header("authorization", value);
        }
        request.send().await.unwrap()
    };
    for path in ["/health", "/ready", "/metrics"] {
        assert_eq!(ask(path, None).await.status(), 200, "{path}");
    }
    let paths = [
        "/v1/models",
        "/v1/completions",
        "/version",
        "/debug/experts",
        "/nowhere",
    ];
    for path in paths {
        let answer = ask(path, None).await;
        assert_eq!(answer.status(), 401, "{path}");
        assert_eq!(answer.headers()["www-authenticate"], "Bearer");
        assert!(answer.headers().contains_key("x-request-id"));
    }
    for wrong in [
        "Bearer sk-secret-of-bob",
        "Bearer ",
        "Basic sk-secret-of-alice",
        "sk-secret-of-alice",
    ] {
        let answer = ask("/v1/completions", Some(wrong)).await;
        assert_eq!(answer.status(), 401, "{wrong}");
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["error"]["type"], "invalid_request_error");
        assert!(!body.to_string().contains("sk-secret"), "{body}");
    }
    let answer = ask("/v1/completions", Some("Bearer sk-secret-of-bob")).await;
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["error"]["code"], "invalid_api_key");
    for right in ["Bearer sk-secret-of-alice", "bearer sk-secret-of-alice"] {
        assert_eq!(ask("/v1/completions", Some(right)).await.status(), 200);
    }
    let metrics = ask("/metrics", None).await.text().await.unwrap();
    assert!(
        metrics.contains("reason=\"unauthorized\""),
        "refusals are counted"
    );
    assert!(!metrics.contains("sk-secret"));
}
