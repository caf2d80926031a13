//! `foregate up` as a user starts it: answers equal the reference's in every form, text is text, ends are clean.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failure here is the test's failure"
)]

use foregate_harness::binary::{Foregate, Start};
use foregate_harness::client::Client;
use foregate_harness::golden::Golden;
use foregate_harness::manifest::ManifestFile;
use foregate_harness::{on_path, repository, skip};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::JoinSet;

const BINARY: &str = env!("CARGO_BIN_EXE_foregate");
const FAMILIES: [&str; 4] = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"];
/// What the reference and we may differ by, in float32.
const TOLERANCE: f64 = 2e-4;

async fn up(family: &str, workers: &str, more: &[&str]) -> Foregate {
    let model = repository(&format!("worker/models/tests/fixtures/{family}"));
    let model = model.to_string_lossy();
    let mut start = Start::up(BINARY, &["--model", &model, "--workers", workers]);
    for argument in more {
        start = start.arg(argument);
    }
    start.ready().await
}

fn floats(list: &Value) -> Vec<Option<f64>> {
    list.as_array().unwrap().iter().map(Value::as_f64).collect()
}

/// Log-probabilities of the prompt, greedy tokens and routes of one fixture are the reference's.
async fn agrees(client: &Client, golden: &Golden, what: &str) {
    let body = json!({
        "prompt": golden.input, "max_tokens": golden.greedy.len(), "temperature": 0,
        "ignore_eos": true, "echo": true, "logprobs": 20, "prompt_logprobs": 20,
        "return_token_ids": true, "return_routed_experts": true,
    });
    let answer = client.ok("/v1/completions", &body).await;
    let choice = &answer["choices"][0];
    let tokens: Vec<u32> = serde_json::from_value(choice["token_ids"].clone()).unwrap();
    assert_eq!(tokens, golden.greedy, "{what}");

    let logprobs = floats(&choice["logprobs"]["token_logprobs"]);
    assert_eq!(
        logprobs.len(),
        golden.input.len() + golden.greedy.len(),
        "{what}"
    );
    assert_eq!(logprobs[0], None, "{what}: the first token has none");
    for at in 0..golden.input.len() - 1 {
        let expected = golden.logprobs(at);
        let near = |got: f64, id: usize| {
            let off = (got - expected[id]).abs();
            assert!(off < TOLERANCE, "{what}: token {at}, id {id}: {off}");
        };
        near(logprobs[at + 1].unwrap(), golden.input[at + 1] as usize);
        let best = choice["prompt_logprobs"][at + 1].as_object().unwrap();
        assert!(best.len() >= 20, "{what}");
        for (id, entry) in best {
            near(entry["logprob"].as_f64().unwrap(), id.parse().unwrap());
        }
    }
    // The first generated token's distribution is that of the last prompt token.
    let last = golden.logprobs(golden.input.len() - 1);
    let first = logprobs[golden.input.len()].unwrap();
    assert!(
        (first - last[golden.greedy[0] as usize]).abs() < TOLERANCE,
        "{what}"
    );

    let routes: Vec<Vec<Vec<u32>>> =
        serde_json::from_value(choice["routed_experts"].clone()).unwrap();
    for (token, layers) in routes.iter().take(golden.input.len()).enumerate() {
        for (layer, experts) in layers.iter().enumerate() {
            assert_eq!(
                experts, &golden.routes[layer][token],
                "{what}: token {token}, layer {layer}"
            );
        }
    }
    assert!(
        routes.len() >= golden.input.len(),
        "{what}: a route for every prompt token"
    );
}

async fn parity(workers: &str, more: &[&str]) {
    for family in FAMILIES {
        let golden = Golden::read(&repository(&format!(
            "worker/models/tests/fixtures/{family}"
        )));
        let cluster = up(family, workers, more).await;
        let what = format!("{family}, {workers} workers {more:?}");
        agrees(&Client::new(&cluster.url), &golden, &what).await;
        let (status, stderr) = cluster.stop().await;
        assert!(status.success(), "{what}: {status}\n{stderr}");
    }
}

#[tokio::test]
async fn one_worker_agrees_with_the_reference() {
    parity("1", &[]).await;
}

#[tokio::test]
async fn two_workers_agree_with_the_reference() {
    parity("2", &[]).await;
}

#[tokio::test]
async fn four_workers_agree_with_the_reference() {
    parity("4", &[]).await;
}

#[tokio::test]
async fn processes_agree_with_the_reference() {
    if on_path("etcd").is_none() {
        return skip("no etcd on PATH");
    }
    for workers in ["1", "2", "4"] {
        parity(workers, &["--processes"]).await;
    }
}

/// Ranks that run attention only and ranks that hold experts only: the same answers, and both are what they are told.
#[tokio::test]
async fn divided_duties_agree_with_the_reference() {
    let model = repository("worker/models/tests/fixtures/qwen3_moe");
    let golden = Golden::read(&model);
    for (duties, forms) in [
        (
            "{count: 2, attentionOnly: 1, expertOnly: 1}",
            &[&[][..], &["--processes"]][..],
        ),
        (
            "{count: 4, attentionOnly: 1, expertOnly: 2}",
            &[&[][..]][..],
        ),
    ] {
        let file = ManifestFile::text(&format!(
            "apiVersion: foregate.dev/v1alpha1\nkind: MoeCluster\nmetadata: {{name: divided}}\n\
             spec: {{model: {{uri: {}}}, workers: {duties}}}\n",
            model.display()
        ));
        for form in forms {
            if form.contains(&"--processes") && on_path("etcd").is_none() {
                skip("no etcd on PATH");
                continue;
            }
            let mut start = Start::up(BINARY, &["-f", file.argument()]);
            for argument in *form {
                start = start.arg(argument);
            }
            let cluster = start.ready().await;
            let client = Client::new(&cluster.url);
            agrees(&client, &golden, &format!("{duties} {form:?}")).await;
            let (status, stderr) = cluster.stop().await;
            assert!(status.success(), "{duties} {form:?}: {status}\n{stderr}");
        }
    }
}

/// Certificates between all, a key of the client's: the same answers; without the key none.
#[tokio::test]
async fn processes_that_prove_themselves_agree_with_the_reference() {
    if on_path("etcd").is_none() {
        return skip("no etcd on PATH");
    }
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "alice:sk-of-alice").unwrap();
    let path = keys.path().to_string_lossy();
    let more = ["--processes", "--mtls", "--api-key-file", &path];
    let golden = Golden::read(&repository("worker/models/tests/fixtures/qwen3_moe"));
    let cluster = up("qwen3_moe", "2", &more).await;
    let client = Client::with_key(&cluster.url, "sk-of-alice");
    agrees(&client, &golden, "proven processes").await;
    let body = json!({ "prompt": golden.input, "max_tokens": 1 });
    let (status, refusal) = Client::new(&cluster.url)
        .post("/v1/completions", &body)
        .await;
    assert_eq!(status.as_u16(), 401, "{refusal}");
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
    for said in ["sk-of-alice", "PRIVATE KEY", "_refused"] {
        assert!(!stderr.contains(said), "{said} in the log: {stderr}");
    }
}

#[tokio::test]
async fn the_demonstration_model_streams_readable_text() {
    let cluster = Start::up(BINARY, &[]).ready().await;
    assert!(
        cluster.stdout().contains("serves demo on 2 workers"),
        "{}",
        cluster.stdout()
    );
    let client = Client::new(&cluster.url);
    let body = json!({
        "model": "demo", "prompt": "And the LORD said unto", "max_tokens": 40, "temperature": 0,
        "stream": true, "stream_options": {"include_usage": true},
    });
    let events = client.stream("/v1/completions", &body).await;
    let text: String = events
        .iter()
        .filter_map(|event| event.data["choices"][0]["text"].as_str())
        .collect();
    let words: Vec<&str> = text.split_whitespace().collect();
    assert!(words.len() > 15, "{text:?}");
    let known = [
        "the", "unto", "LORD", "and", "of", "shall", "him", "thou", "saith", "I",
    ];
    let common = words.iter().filter(|word| known.contains(word)).count();
    assert!(
        common * 5 >= words.len(),
        "not the language of its kind: {text:?}"
    );
    let usage = &events.last().expect("events").data["usage"];
    assert_eq!(usage["completion_tokens"], 40, "{usage}");
    let again = client.stream("/v1/completions", &body).await;
    let repeated: String = again
        .iter()
        .filter_map(|event| event.data["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(repeated, text, "greedy text repeats");
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
}

/// ctrl-c in mid-stream: the stream is finished first.
#[tokio::test]
async fn a_drain_finishes_what_runs() {
    let cluster = Start::up(BINARY, &["--served-model-name", "one", "two"])
        .ready()
        .await;
    let client = Client::new(&cluster.url);
    let models = client.json("/v1/models").await;
    let names: Vec<_> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["id"])
        .collect();
    assert_eq!(names, ["one", "two"]);
    let body = json!({
        "model": "two", "prompt": "def main():", "max_tokens": 200, "temperature": 0,
        "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
    });
    let running = Notify::new();
    let stream = client.watched_stream("/v1/completions", &body, || running.notify_one());
    let stop = async {
        running.notified().await;
        cluster.stop().await
    };
    let (events, (status, stderr)) = tokio::join!(stream, stop);
    assert!(status.success(), "{status}\n{stderr}");
    let usage = &events.last().expect("events").data["usage"];
    assert_eq!(usage["completion_tokens"], 200, "{usage}");
}

/// What every policy is asked: prompts that share prefixes and prompts that do not, greedy and drawn.
const TURNS: [(&str, f64); 8] = [
    (
        "def read(self, size):\n    \"\"\"Read up to size bytes",
        0.0,
    ),
    (
        "def read(self, size):\n    \"\"\"Read up to size bytes",
        0.8,
    ),
    ("And the LORD spake unto Moses, saying, Speak unto", 0.0),
    ("impl Iterator for Lines {\n    type Item =", 0.0),
    (
        "def read(self, size):\n    \"\"\"Read up to size bytes and return",
        0.0,
    ),
    ("# Usage\n\nTo install the package", 0.9),
    (
        "And the LORD spake unto Moses, saying, Speak unto the children",
        0.7,
    ),
    ("import os\nimport sys\n\nclass", 0.0),
];
const ROUNDS: usize = 3;

/// The tokens of all turns, several rounds at once so that batches differ.
async fn tokens_under(policy: &str) -> Vec<Vec<u64>> {
    let manifest = ManifestFile::demo(&format!(
        "  workers:\n    count: 3\n    kvMemory: 64Mi\n    maxNumSeqs: 4\n  gateway:\n    routing: {policy}\n    maxInFlight: 9\n"
    ));
    let cluster = Start::up(BINARY, &["-f", manifest.argument()])
        .ready()
        .await;
    let client = Client::new(&cluster.url);
    let mut streams = JoinSet::new();
    for at in 0..ROUNDS * TURNS.len() {
        let client = client.clone();
        streams.spawn(async move {
            let (prompt, temperature) = TURNS[at % TURNS.len()];
            let body = json!({
                "prompt": prompt, "temperature": temperature, "seed": 11 + at, "max_tokens": 32, "ignore_eos": true,
                "stream": true, "return_token_ids": true,
            });
            let events = client.stream("/v1/completions", &body).await;
            let ids = events
                .iter()
                .filter_map(|event| event.data["choices"][0]["token_ids"].as_array())
                .flatten()
                .map(|id| id.as_u64().expect("an id"))
                .collect::<Vec<u64>>();
            (at, ids)
        });
    }
    let mut all = vec![Vec::new(); ROUNDS * TURNS.len()];
    while let Some(stream) = streams.join_next().await {
        let (at, ids) = stream.expect("no stream fails");
        all[at] = ids;
    }
    let decided = client
        .metric(
            "foregate_gateway_route_decisions_total",
            &format!("policy=\"{policy}\""),
        )
        .await;
    assert_eq!(decided, Some(all.len() as f64), "{policy} decided");
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
    all
}

#[tokio::test]
async fn no_routing_policy_changes_a_token() {
    let expected = tokens_under("round_robin").await;
    assert!(expected.iter().all(|ids| ids.len() == 32), "{expected:?}");
    assert_eq!(
        expected[0],
        expected[TURNS.len()],
        "greedy, whatever the seed"
    );
    assert_ne!(expected[1], expected[1 + TURNS.len()], "the seed matters");
    for policy in ["least_loaded", "prefix_aware", "signature", "window"] {
        assert_eq!(tokens_under(policy).await, expected, "{policy}");
    }
}
