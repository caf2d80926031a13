use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use clap::Parser;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use super::*;
use crate::bench::client::{Ask, Failure, Prompt, Seen};

/// A server that speaks as much of the API as the load needs.
struct Server {
    url: String,
    seen: Arc<Saw>,
    _serving: JoinSet<()>,
}

/// What a server saw, and how it answers.
struct Saw {
    bodies: Mutex<Vec<Value>>,
    keys: Mutex<Vec<String>>,
    count: AtomicUsize,
    answer: fn(usize) -> Answer,
    /// Every answer but the first waits until so many have come.
    together: Barrier,
}

enum Answer {
    Tokens,
    Together,
    Refuse(StatusCode),
    ErrorEvent,
    Cut,
}

impl Server {
    async fn start(answer: fn(usize) -> Answer, together: usize) -> Self {
        let seen = Arc::new(Saw {
            bodies: Mutex::default(),
            keys: Mutex::default(),
            count: AtomicUsize::new(0),
            answer,
            together: Barrier::new(together),
        });
        let models = || async { axum::Json(json!({"data": [{"id": "fake"}]})) };
        let app = Router::new()
            .route("/v1/models", get(models))
            .route("/v1/completions", post(complete))
            .with_state(Arc::clone(&seen));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut serving = JoinSet::new();
        serving.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            url,
            seen,
            _serving: serving,
        }
    }

    async fn bench(&self, more: &[&str]) -> (Result<(), CliError>, Value) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("figures.json");
        let file = file.to_str().unwrap();
        let mut all = vec!["bench", "--url", &self.url, "--json", file];
        all.extend(more);
        let args = Cli::try_parse_from(all).unwrap().args;
        let end = run(&args, &Progress::Lines, CancellationToken::new()).await;
        let figures = std::fs::read(file).unwrap_or_default();
        (end, serde_json::from_slice(&figures).unwrap_or_default())
    }

    fn bodies(&self) -> Vec<Value> {
        self.seen.bodies.lock().unwrap().clone()
    }
}

async fn complete(State(saw): State<Arc<Saw>>, headers: HeaderMap, body: Bytes) -> Response {
    let number = saw.count.fetch_add(1, Ordering::SeqCst);
    let body: Value = serde_json::from_slice(&body).unwrap();
    let tokens = body["max_tokens"].as_u64().unwrap();
    saw.bodies.lock().unwrap().push(body);
    if let Some(key) = headers.get("authorization") {
        saw.keys
            .lock()
            .unwrap()
            .push(key.to_str().unwrap().to_owned());
    }
    let token = "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n\n";
    let usage =
        json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}});
    let whole = token.repeat(usize::try_from(tokens).unwrap());
    match (saw.answer)(number) {
        Answer::Tokens => {}
        Answer::Together => {
            saw.together.wait().await;
        }
        Answer::Refuse(status) => return (status, "no").into_response(),
        Answer::ErrorEvent => {
            return "data: {\"error\":{\"message\":\"lost\"}}\n\n".into_response();
        }
        Answer::Cut => return token.into_response(),
    }
    format!("{whole}data: {usage}\n\ndata: [DONE]\n\n").into_response()
}

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: ServeArgs,
}

#[tokio::test]
async fn an_open_loop_waits_for_nobody() {
    // The first request is the warm-up's. The other 20 are answered when all of them are there, which is more
    // than the closed loop's concurrency.
    let answer = |number| match number {
        0 => Answer::Tokens,
        _ => Answer::Together,
    };
    let server = Server::start(answer, 20).await;
    let arguments = ["--prompt-tokens", "4", "--rate", "500", "--requests", "20"];
    let (end, figures) = server.bench(&arguments).await;
    end.unwrap();
    let run = &figures["runs"][0];
    assert_eq!((&run["requests"], &run["failed"]), (&json!(20), &json!(0)));
    assert_eq!(run["offered_per_second"], json!(500.0));
    assert_eq!(run["tokens"], json!(20 * 64));
    assert_eq!(run["prompt_tokens"], json!(20 * 3));
    assert_eq!(run["goodput_per_second"], Value::Null);
}

#[tokio::test]
async fn every_rate_has_a_run_and_the_same_prompts() {
    let server = Server::start(|_| Answer::Tokens, 1).await;
    let dir = tempfile::tempdir().unwrap();
    let svg = dir.path().join("curve.svg");
    let (end, figures) = server
        .bench(&[
            "--prompt-tokens",
            "2-9",
            "--output-tokens",
            "1-3",
            "--vocab",
            "50",
            "--rate",
            "400,800",
            "--requests",
            "10",
            "--warmup",
            "2",
            "--slo-ttft-ms",
            "1e9",
            "--svg",
            svg.to_str().unwrap(),
        ])
        .await;
    end.unwrap();
    let runs = figures["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    for run in runs {
        // All requests are good, so goodput is throughput.
        assert_eq!(run["goodput_per_second"], run["requests_per_second"]);
    }
    let mut bodies = server.bodies().split_off(2);
    let order = |body: &Value| (body["prompt"].to_string(), body["max_tokens"].to_string());
    let (first, second) = bodies.split_at_mut(10);
    first.sort_by_key(order);
    second.sort_by_key(order);
    assert_eq!(first, second);
    for body in first {
        let prompt = body["prompt"].as_array().unwrap();
        assert!((2..=9).contains(&prompt.len()));
        assert!(prompt.iter().all(|id| id.as_u64().unwrap() < 50));
        assert!((1..=3).contains(&body["max_tokens"].as_u64().unwrap()));
        assert_eq!(
            (&body["ignore_eos"], &body["stream"]),
            (&json!(true), &json!(true))
        );
    }
    let svg = std::fs::read_to_string(svg).unwrap();
    assert!(svg.contains("first token, p99") && svg.trim_end().ends_with("</svg>"));
}

#[tokio::test]
async fn text_goes_out_as_text_to_the_named_model_without_what_it_does_not_know() {
    let server = Server::start(|_| Answer::Tokens, 1).await;
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    std::fs::write(&text, "one two three").unwrap();
    let arguments = [
        "--requests",
        "2",
        "--allow-eos",
        "--model",
        "other",
        "--prompts",
    ];
    let arguments = [&arguments[..], &[text.to_str().unwrap()]].concat();
    let (end, figures) = server.bench(&arguments).await;
    end.unwrap();
    assert_eq!(figures["runs"][0]["concurrency"], json!(8));
    for body in server.bodies() {
        assert_eq!(body["prompt"], json!("one two three"));
        assert_eq!(body["model"], json!("other"));
        assert_eq!(body.get("ignore_eos"), None);
    }
    assert!(server.seen.keys.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_key_is_sent_with_every_request() {
    let server = Server::start(|_| Answer::Tokens, 1).await;
    let target = Target::new(&server.url).unwrap();
    let target = target.with_key(Some("secret".to_owned()));
    let ask = Ask {
        prompt: Prompt::Tokens(vec![1]),
        max_tokens: 1,
        ignore_eos: true,
    };
    target.complete("fake", &ask, Instant::now()).await.unwrap();
    assert_eq!(*server.seen.keys.lock().unwrap(), ["Bearer secret"]);
}

#[tokio::test]
async fn times_count_from_when_a_request_was_due() {
    let server = Server::start(|_| Answer::Tokens, 1).await;
    let target = Target::new(&server.url).unwrap();
    let ask = Ask {
        prompt: Prompt::Tokens(vec![1]),
        max_tokens: 2,
        ignore_eos: true,
    };
    let late = Duration::from_secs(40);
    let due = Instant::now().checked_sub(late).unwrap();
    let seen = target.complete("fake", &ask, due).await.unwrap();
    assert!(seen.first().unwrap() >= late && seen.total >= late);
    // Not so the time between tokens.
    assert!(seen.per_token().unwrap() < late);
}

#[tokio::test]
async fn failures_are_counted_by_kind() {
    let answer = |number| match number % 5 {
        1 | 2 => Answer::Refuse(StatusCode::TOO_MANY_REQUESTS),
        3 => Answer::ErrorEvent,
        4 => Answer::Cut,
        _ => Answer::Tokens,
    };
    let server = Server::start(answer, 1).await;
    let arguments = [
        "--prompt-tokens",
        "4",
        "--requests",
        "10",
        "--concurrency",
        "1",
    ];
    let (end, figures) = server.bench(&arguments).await;
    end.unwrap();
    let run = &figures["runs"][0];
    let errors = json!({"HTTP 429": 4, "error event": 2, "stream": 2});
    assert_eq!((&run["failed"], &run["errors"]), (&json!(8), &errors));
    assert_eq!(run["examples"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_server_that_refuses_the_form_is_named_with_a_remedy() {
    let server = Server::start(|_| Answer::Refuse(StatusCode::BAD_REQUEST), 1).await;
    let (end, _) = server.bench(&["--prompt-tokens", "4"]).await;
    let error = end.unwrap_err().to_string();
    assert!(
        error.contains("HTTP 400") && error.contains("--prompt-tokens"),
        "{error}"
    );
    assert_eq!(server.bodies().len(), 1);
    let closed = Server::start(|_| Answer::Tokens, 1).await.url.clone();
    let args = ["bench", "--url", &closed, "--prompt-tokens", "4"];
    let args = Cli::try_parse_from(args).unwrap().args;
    let end = run(&args, &Progress::Lines, CancellationToken::new()).await;
    assert!(end.unwrap_err().to_string().contains("/v1/models"));
}

#[test]
fn arguments_that_cannot_be_meant_are_refused() {
    for wrong in [
        &["--rate", "0"][..],
        &["--rate", "1,-2"],
        &["--rate", "inf"],
        &["--rate", "fast"],
        &["--rate", "1", "--concurrency", "2"],
        &["--concurrency", "0"],
        &["--requests", "0"],
        &["--prompt-tokens", "9-3"],
        &["--prompt-tokens", "4", "--prompts", "x"],
        &["--vocab", "9"],
        &["--output-tokens", "0"],
        &["--slo-ttft-ms", "0"],
        &["--slo-tpot-ms", "NaN"],
        &["--svg", "x.svg"],
    ] {
        let args = [&["bench"], wrong].concat();
        assert!(Cli::try_parse_from(args).is_err(), "{wrong:?}");
    }
}

#[test]
fn a_key_that_is_not_there_is_an_error() {
    let args = ["bench", "--api-key-env", "FOREGATE_TEST_NO_SUCH_KEY"];
    let error = Cli::try_parse_from(args).unwrap().args.key().unwrap_err();
    assert!(error.to_string().contains("FOREGATE_TEST_NO_SUCH_KEY"));
}

/// A request with its first token after `first` and `tokens` in all, `gap` apart. In milliseconds.
fn seen(first: u64, gap: u64, tokens: u64) -> load::Sent {
    let at = |number| Duration::from_millis(first + gap * number);
    let mut seen = Seen::default();
    seen.events = (0..tokens).map(at).collect();
    seen.tokens = tokens;
    seen.total = at(tokens);
    load::Sent {
        due: Duration::from_millis(first),
        late: Duration::from_millis(1),
        result: Ok(seen),
    }
}

fn good(ttft_ms: Option<f64>, tpot_ms: Option<f64>) -> Option<f64> {
    let objective = Objective { ttft_ms, tpot_ms };
    let failed = load::Sent {
        due: Duration::from_secs(2),
        late: Duration::ZERO,
        result: Err(Failure::new("HTTP 503", "busy")),
    };
    let sent = vec![seen(100, 20, 5), seen(300, 10, 5), seen(50, 500, 1), failed];
    let time = Duration::from_secs(2);
    let figures = Figures::of(Pace::Open(3.0), objective, sent, time);
    // Four requests, the last due after two seconds.
    assert!(
        figures
            .text()
            .starts_with("3 requests/s offered (2.00 came): 4 requests")
    );
    figures.goodput_per_second
}

#[test]
fn goodput_counts_requests_within_both_bounds() {
    assert_eq!(good(None, None), None);
    assert_eq!(good(Some(100.0), None), Some(1.0));
    assert_eq!(good(Some(99.0), None), Some(0.5));
    // One token alone has no time between tokens to be slow in; a failed request is never good.
    assert_eq!(good(None, Some(20.0)), Some(1.5));
    assert_eq!(good(None, Some(19.0)), Some(1.0));
    assert_eq!(good(Some(100.0), Some(19.0)), Some(0.5));
}

#[test]
fn figures_are_over_requests_that_were_answered() {
    let sent = vec![seen(100, 20, 5), seen(300, 10, 3)];
    let objective = Objective {
        ttft_ms: None,
        tpot_ms: None,
    };
    let figures = Figures::of(Pace::Closed(2), objective, sent, Duration::from_secs(4));
    assert_eq!(figures.tokens_per_second, 2.0);
    assert_eq!(figures.requests_per_second, 0.5);
    assert_eq!(figures.time_to_first_token_ms.max, 300.0);
    assert_eq!(figures.inter_token_latency_ms.count, 6);
    assert_eq!(figures.time_per_output_token_ms.p50, 10.0);
    assert!(
        figures
            .text()
            .starts_with("2 at a time: 2 requests, 0 failed")
    );
}
