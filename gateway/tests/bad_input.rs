//! Bad requests, one per row: what comes back names the field and what to do. Nothing here reaches a worker.

#![expect(clippy::unwrap_used, reason = "a test may end in a panic")]

mod support;

use foregate_gateway::ApiError;
use foregate_gateway::http::{
    Defaults, parse_chat, parse_completions, parse_detokenize, parse_tokenize,
};
use serde_json::{Value, json};
use support::{Cluster, config, with};

/// A row: extra fields, the status, the field it is about (empty: none), a part of the message.
type Row = (Value, u16, &'static str, &'static str);

/// Rows about fields that both routes have.
fn shared() -> Vec<Row> {
    vec![
        (
            json!({"model": "other"}),
            404,
            "model",
            "served: demo, alias",
        ),
        (
            json!({"model": 3}),
            400,
            "model",
            "must be a string, not a number",
        ),
        (
            json!({"temperature": -0.1}),
            400,
            "temperature",
            "from 0 to 2",
        ),
        (
            json!({"temperature": 2.5}),
            400,
            "temperature",
            "from 0 to 2",
        ),
        (
            json!({"temperature": "hot"}),
            400,
            "temperature",
            "must be a number, not a string",
        ),
        (json!({"top_p": 0}), 400, "top_p", "greater than 0"),
        (json!({"top_p": 1.1}), 400, "top_p", "from 0 to 1"),
        (json!({"top_k": -2}), 400, "top_k", "integer from -1"),
        (json!({"top_k": 1.5}), 400, "top_k", "integer"),
        (json!({"min_p": 2}), 400, "min_p", "from 0 to 1"),
        (
            json!({"repetition_penalty": 0}),
            400,
            "repetition_penalty",
            "greater than 0",
        ),
        (
            json!({"presence_penalty": 3}),
            400,
            "presence_penalty",
            "from -2 to 2",
        ),
        (
            json!({"frequency_penalty": -3}),
            400,
            "frequency_penalty",
            "from -2 to 2",
        ),
        (json!({"n": 0}), 400, "n", "from 1 to 128"),
        (json!({"n": 129}), 400, "n", "from 1 to 128"),
        (
            json!({"n": true}),
            400,
            "n",
            "must be an integer, not a boolean",
        ),
        (
            json!({"min_tokens": -1}),
            400,
            "min_tokens",
            "integer from 0",
        ),
        (
            json!({"min_tokens": 9, "max_tokens": 8}),
            400,
            "min_tokens",
            "more than the 8",
        ),
        (
            json!({"max_tokens": 5000}),
            400,
            "max_tokens",
            "maximum context length is 1024",
        ),
        (json!({"max_tokens": -1}), 400, "max_tokens", "integer from"),
        (
            json!({"max_tokens": 1e300}),
            400,
            "max_tokens",
            "integer from",
        ),
        (json!({"seed": "x"}), 400, "seed", "must be an integer"),
        (json!({"seed": 1.5}), 400, "seed", "64-bit integer"),
        (
            json!({"stop": 5}),
            400,
            "stop",
            "string or a list of strings",
        ),
        (json!({"stop": [5]}), 400, "stop[0]", "must be a string"),
        (json!({"stop": ""}), 400, "stop", "empty string"),
        (json!({"stop": vec!["x"; 33]}), 400, "stop", "at most 32"),
        (
            json!({"stop": "x".repeat(1025)}),
            400,
            "stop",
            "at most 1024 bytes",
        ),
        (
            json!({"stop_token_ids": ["a"]}),
            400,
            "stop_token_ids",
            "stop_token_ids[0]",
        ),
        (
            json!({"stop_token_ids": [4096]}),
            400,
            "stop_token_ids",
            "vocabulary of 4096",
        ),
        (json!({"logit_bias": [1]}), 400, "logit_bias", "an object"),
        (
            json!({"logit_bias": {"x": 1}}),
            400,
            "logit_bias",
            "no token id",
        ),
        (
            json!({"logit_bias": {"5": 101}}),
            400,
            "logit_bias.5",
            "from -100 to 100",
        ),
        (
            json!({"logit_bias": {"5000": 1}}),
            400,
            "logit_bias",
            "vocabulary",
        ),
        (json!({"stream": 1}), 400, "stream", "must be a boolean"),
        (
            json!({"stream_options": {}}),
            400,
            "stream_options",
            "only allowed with `stream`",
        ),
        (
            json!({"stream": true, "stream_options": []}),
            400,
            "stream_options",
            "an object",
        ),
        (
            json!({"stream": true, "stream_options": {"x": 1}}),
            400,
            "stream_options.x",
            "unsupported field",
        ),
        (
            json!({"stream": true, "prompt_logprobs": 1}),
            400,
            "prompt_logprobs",
            "not supported with `stream`",
        ),
        (
            json!({"prompt_logprobs": 21}),
            400,
            "prompt_logprobs",
            "from 0 to 20",
        ),
        (json!({"best_of": 4}), 400, "best_of", "must equal `n`"),
        (json!({"store": true}), 400, "store", "not stored"),
        (
            json!({"service_tier": "flex"}),
            400,
            "service_tier",
            "one tier",
        ),
        (
            json!({"response_format": {"type": "json_object"}}),
            400,
            "response_format",
            "only {\"type\": \"text\"}",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {}}}),
            400,
            "response_format",
            "not supported",
        ),
        (
            json!({"tools": [{"type": "function"}]}),
            400,
            "tools",
            "tools are not served",
        ),
        (
            json!({"tool_choice": "required"}),
            400,
            "tool_choice",
            "tools are not served",
        ),
        (
            json!({"use_beam_search": true}),
            400,
            "use_beam_search",
            "no beam search",
        ),
        (
            json!({"guided_json": {}}),
            400,
            "guided_json",
            "unsupported field `guided_json`",
        ),
        (
            json!({"reasoning_effort": "low"}),
            400,
            "reasoning_effort",
            "unsupported field",
        ),
        (
            json!({"temprature": 1}),
            400,
            "temprature",
            "unsupported field `temprature`",
        ),
        (json!({"user": 5}), 400, "user", "must be a string"),
        (
            json!({"metadata": "x"}),
            400,
            "metadata",
            "must be an object",
        ),
        (
            json!({"ignore_eos": "no"}),
            400,
            "ignore_eos",
            "must be a boolean",
        ),
        (
            json!({"return_routed_experts": 1}),
            400,
            "return_routed_experts",
            "must be a boolean",
        ),
    ]
}

fn chat() -> Vec<Row> {
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    vec![
        (
            json!({"messages": null}),
            400,
            "messages",
            "`messages` is missing",
        ),
        (
            json!({"messages": []}),
            400,
            "messages",
            "must not be empty",
        ),
        (json!({"messages": "hi"}), 400, "messages", "must be a list"),
        (
            json!({"messages": ["hi"]}),
            400,
            "messages[0]",
            "must be an object",
        ),
        (
            json!({"messages": [{"content": "x"}]}),
            400,
            "messages[0].role",
            "is missing",
        ),
        (
            json!({"messages": [{"role": "robot", "content": "x"}]}),
            400,
            "messages[0].role",
            "not `robot`",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "x"}]}),
            400,
            "messages[0].role",
            "tools are not served",
        ),
        (
            json!({"messages": [{"role": "user"}]}),
            400,
            "messages[0].content",
            "is missing",
        ),
        (
            json!({"messages": [{"role": "user", "content": "x", "audio": {}}]}),
            400,
            "messages[0].audio",
            "unsupported field",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}),
            400,
            "messages[0].tool_calls",
            "tools are not served",
        ),
        (
            user(json!(5)),
            400,
            "messages[0].content",
            "a string or a list of text parts",
        ),
        (
            user(json!([{"type": "image_url", "image_url": {}}])),
            400,
            "messages[0].content[0].type",
            "only text",
        ),
        (
            user(json!([{"type": "text"}])),
            400,
            "messages[0].content[0].text",
            "is missing",
        ),
        (
            user(json!([{"text": "x"}])),
            400,
            "messages[0].content[0].type",
            "is missing",
        ),
        (
            user(json!("word ".repeat(2000))),
            400,
            "messages",
            "maximum context length",
        ),
        (
            user(json!("x".repeat(1 << 20))),
            400,
            "messages",
            "maximum context length",
        ),
        (json!({"logprobs": 2}), 400, "logprobs", "must be a boolean"),
        (
            json!({"top_logprobs": 2}),
            400,
            "top_logprobs",
            "needs `logprobs`",
        ),
        (
            json!({"logprobs": true, "top_logprobs": 21}),
            400,
            "top_logprobs",
            "from 0 to 20",
        ),
        (json!({"max_tokens": 0}), 400, "max_tokens", "from 1"),
        (
            json!({"max_tokens": 5, "max_completion_tokens": 6}),
            400,
            "max_completion_tokens",
            "differ",
        ),
        (json!({"echo": true}), 400, "echo", "/v1/completions"),
        (
            json!({"modalities": ["audio"]}),
            400,
            "modalities",
            "only [\"text\"]",
        ),
        (
            json!({"continue_final_message": true}),
            400,
            "continue_final_message",
            "/v1/completions",
        ),
        (
            json!({"chat_template_kwargs": {"messages": 1}}),
            400,
            "chat_template_kwargs",
            "must not set `messages`",
        ),
        (json!({"prompt": "x"}), 400, "prompt", "unsupported field"),
    ]
}

fn completions() -> Vec<Row> {
    vec![
        (
            json!({"prompt": null}),
            400,
            "prompt",
            "`prompt` is missing",
        ),
        (json!({"prompt": 5}), 400, "prompt", "not a number"),
        (json!({"prompt": ""}), 400, "prompt", "at least one token"),
        (json!({"prompt": []}), 400, "prompt", "must not be empty"),
        (
            json!({"prompt": [[]]}),
            400,
            "prompt[0]",
            "at least one token",
        ),
        (
            json!({"prompt": ["x", 5]}),
            400,
            "prompt[1]",
            "a string or a list of token ids",
        ),
        (json!({"prompt": [1, "x"]}), 400, "prompt", "prompt[1]"),
        (json!({"prompt": [1, -1]}), 400, "prompt", "token id"),
        (
            json!({"prompt": [1, 4096]}),
            400,
            "prompt",
            "outside the vocabulary",
        ),
        (
            json!({"prompt": vec![1; 1024]}),
            400,
            "prompt",
            "maximum context length",
        ),
        // Scoring a prompt takes room for the token that a worker always makes.
        (
            json!({"prompt": vec![1; 1024], "max_tokens": 0, "echo": true}),
            400,
            "prompt",
            "1024 in the prompt, 1 in the answer",
        ),
        (
            json!({"prompt": vec![1; 1020]}),
            400,
            "max_tokens",
            "1020 in the prompt, 16 in the answer",
        ),
        (
            json!({"prompt": vec!["x"; 1025]}),
            400,
            "prompt",
            "at most 1024",
        ),
        (
            json!({"prompt": vec!["x"; 100], "n": 128}),
            400,
            "n",
            "at most 1024 choices",
        ),
        (
            json!({"logprobs": true}),
            400,
            "logprobs",
            "must be an integer",
        ),
        (json!({"logprobs": 21}), 400, "logprobs", "from 0 to 20"),
        (
            json!({"max_tokens": 0}),
            400,
            "max_tokens",
            "at least 1 without `echo`",
        ),
        (json!({"suffix": "x"}), 400, "suffix", "no insertion"),
        (
            json!({"max_completion_tokens": 5}),
            400,
            "max_completion_tokens",
            "unsupported field",
        ),
        (
            json!({"messages": []}),
            400,
            "messages",
            "unsupported field",
        ),
    ]
}

async fn check(cluster: &Cluster, path: &str, base: &Value, rows: Vec<Row>) {
    for (extra, status, param, part) in rows {
        let body = with(base.clone(), &extra);
        let response = cluster.post(path, &body).await;
        let found = response.status().as_u16();
        let document: Value = response.json().await.unwrap();
        let error = &document["error"];
        let row = extra.to_string();
        let row = &row[..row.len().min(120)];
        assert_eq!(found, status, "{path} {row}: {document}");
        assert_eq!(error["type"], "invalid_request_error", "{path} {row}");
        assert_eq!(error["param"], param, "{path} {row}: {document}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(part), "{path} {row}: {message}");
    }
}

#[tokio::test]
async fn every_bad_field_is_named() {
    let cluster = Cluster::start(1, "x", config()).await;
    let base = json!({"messages": [{"role": "user", "content": "hi"}]});
    check(&cluster, "/v1/chat/completions", &base, shared()).await;
    check(&cluster, "/v1/chat/completions", &base, chat()).await;
    let base = json!({"prompt": "hi"});
    check(&cluster, "/v1/completions", &base, shared()).await;
    check(&cluster, "/v1/completions", &base, completions()).await;
    let rows = vec![
        (json!({}), 400, "prompt", "send `prompt` or `messages`"),
        (
            json!({"prompt": "x", "messages": []}),
            400,
            "messages",
            "unsupported field",
        ),
        (json!({"prompt": 5}), 400, "prompt", "must be a string"),
    ];
    check(&cluster, "/tokenize", &json!({}), rows).await;
    let rows = vec![
        (json!({}), 400, "tokens", "is missing"),
        (json!({"tokens": "x"}), 400, "tokens", "list of token ids"),
        (json!({"tokens": [9999]}), 400, "tokens", "vocabulary"),
    ];
    check(&cluster, "/detokenize", &json!({}), rows).await;
    assert!(cluster.workers[0].requests().is_empty());
}

/// Fields that ask for nothing are taken, and `null` is the same as absent.
#[tokio::test]
async fn harmless_fields_are_taken() {
    let cluster = Cluster::start(1, "x", config()).await;
    let body = json!({
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, "b"], "name": "x", "tool_calls": null}],
        "temperature": 0, "user": "me", "metadata": {"a": "b"}, "store": false, "service_tier": "auto", "best_of": 1, "n": 1.0,
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "parallel_tool_calls": true,
        "stop": null, "seed": null, "functions": null, "modalities": ["text"], "prompt_cache_key": "k",
        "max_tokens": 5, "max_completion_tokens": 5, "logit_bias": {}, "echo": false, "guided_json": null,
    });
    let answer = cluster.json("/v1/chat/completions", &body).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "x");
}

#[tokio::test]
async fn bodies_and_routes_that_are_none() {
    let cluster = Cluster::start(1, "x", config()).await;
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let nested = format!("{{\"prompt\": {deep}}}");
    let latin = "{\"prompt\": \"é\"}".replace('é', "\u{1}");
    for body in [
        "",
        "{",
        "[]",
        "5",
        "null",
        "{\"prompt\": 1e999}",
        deep.as_str(),
        nested.as_str(),
        latin.as_str(),
    ] {
        let response = cluster
            .client
            .post(format!("{}/v1/completions", cluster.url))
            .body(body.to_owned())
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 400, "{body:.40}");
        let document: Value = response.json().await.unwrap();
        assert!(
            document["error"]["message"]
                .as_str()
                .unwrap()
                .starts_with("the body")
        );
    }
    let large = cluster
        .client
        .post(format!("{}/v1/completions", cluster.url))
        .body(vec![b' '; (32 << 20) + 1])
        .send()
        .await;
    // The answer may come while the client still writes; a client that stops reading sees a broken pipe.
    if let Ok(response) = large {
        assert_eq!(response.status(), 413);
        let document: Value = response.json().await.unwrap();
        assert!(
            document["error"]["message"]
                .as_str()
                .unwrap()
                .contains("32 MiB")
        );
    }
    let (status, body) = cluster.get("/v2/unknown").await;
    let document: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (status, &document["error"]["code"]),
        (404, &json!("unknown_url"))
    );
    let (status, body) = cluster.get("/v1/completions").await;
    assert_eq!(status, 405);
    assert!(body.contains("GET is not allowed"), "{body}");
    let metrics = cluster.get("/metrics").await.1;
    assert!(
        metrics.contains("foregate_gateway_rejected_total{reason=\"malformed\"} 9"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_worker_that_refuses_is_quoted() {
    let cluster = Cluster::start(1, "x", config()).await;
    cluster.workers[0]
        .behaviour
        .refuse
        .store(true, std::sync::atomic::Ordering::SeqCst);
    let response = cluster
        .post("/v1/completions", &json!({"prompt": "hi", "stream": true}))
        .await;
    assert_eq!(
        response.status(),
        400,
        "a stream that never began has a status of its own"
    );
    assert!(response.text().await.unwrap().contains("too odd for me"));
}

proptest::proptest! {
    /// No bytes make a parser panic, and what it refuses has a message.
    #[test]
    fn parsers_take_any_bytes(bytes in proptest::collection::vec(0_u8.., 0..200), cut in 0_usize..400) {
        let valid = br#"{"messages":[{"role":"user","content":[{"type":"text","text":"x"}]}],"prompt":[[1,2],"x"],"stop":["a"],"logit_bias":{"5":1},"stream":true,"stream_options":{"include_usage":true},"tokens":[1]}"#;
        let defaults = Defaults::default();
        let mut mixed = valid[..cut.min(valid.len())].to_vec();
        mixed.extend(&bytes);
        for body in [bytes.as_slice(), mixed.as_slice()] {
            let errors: [Option<ApiError>; 4] = [
                parse_chat(body, &defaults).err(),
                parse_completions(body, &defaults).err(),
                parse_tokenize(body).err(),
                parse_detokenize(body).err(),
            ];
            for error in errors.into_iter().flatten() {
                proptest::prop_assert!(!error.message.is_empty());
            }
        }
    }
}
