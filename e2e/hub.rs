//! Model URIs of the hub, against a server that speaks its API: download, resume, cache, and each error.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::collections::BTreeMap;
use std::path::Path;

use foregate_harness::binary::Start;
use foregate_harness::client::Client;
use foregate_harness::hub::{COMMIT, Content, Hub};
use foregate_harness::repository;
use serde_json::json;
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_foregate");
const REPO: &str = "someone/small-moe";
const WEIGHTS: &str = "model.safetensors";

fn content() -> Content {
    let directory = repository("worker/models/tests/fixtures/qwen3_moe");
    let mut files = BTreeMap::new();
    for name in ["config.json", "generation_config.json", WEIGHTS] {
        files.insert(
            name.to_owned(),
            std::fs::read(directory.join(name)).unwrap(),
        );
    }
    files.insert("README.md".to_owned(), b"not needed".to_vec());
    Content {
        repo: REPO.to_owned(),
        revisions: vec!["main".to_owned(), "v1".to_owned()],
        files,
        ..Content::default()
    }
}

fn start(uri: &str, hub: &str, home: &Path) -> Start {
    Start::up(BINARY, &["--model", uri, "--workers", "1"])
        .env("HF_ENDPOINT", hub)
        .env("HF_HOME", &home.to_string_lossy())
        .env("HF_TOKEN", "")
        .env("HF_HUB_OFFLINE", "")
}

/// Fails with code 1 and a message that has these words.
async fn fails(start: Start, words: &[&str]) {
    let (code, stdout, stderr) = start.run().await;
    assert_eq!(code, Some(1), "{stdout}\n{stderr}");
    for word in words {
        assert!(stderr.contains(word), "no {word:?} in: {stderr}");
    }
}

async fn serves(start: Start) {
    let cluster = start.ready().await;
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "return_token_ids": true});
    let answer = Client::new(&cluster.url).ok("/v1/completions", &body).await;
    assert!(answer["choices"][0]["token_ids"].is_array(), "{answer}");
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
}

#[tokio::test]
async fn an_interrupted_download_is_resumed_where_it_broke() {
    let home = TempDir::new().unwrap();
    let mut content = content();
    let cut = content.files[WEIGHTS].len() / 2;
    content.cut = Some((WEIGHTS.to_owned(), cut));
    content.redirect = true;
    let whole = content.files[WEIGHTS].clone();
    let hub = Hub::start(content).await;
    serves(start(&format!("hf://{REPO}@v1"), &hub.url, home.path())).await;
    let ranges: Vec<_> = hub
        .seen()
        .into_iter()
        .filter(|request| request.path == format!("/storage/{WEIGHTS}"))
        .filter_map(|request| request.range)
        .filter(|range| range != "bytes=0-0")
        .collect();
    assert_eq!(ranges, ["bytes=0-".to_owned(), format!("bytes={cut}-")]);
    let stored = home.path().join(format!(
        "hub/models--someone--small-moe/snapshots/{COMMIT}/{WEIGHTS}"
    ));
    assert_eq!(std::fs::read(stored).unwrap(), whole);
    let asked_for_readme = hub
        .seen()
        .iter()
        .any(|request| request.path.contains("README"));
    assert!(!asked_for_readme, "only what serving needs is fetched");
}

#[tokio::test]
async fn a_cached_model_serves_offline_and_when_the_hub_is_away() {
    let home = TempDir::new().unwrap();
    let hub = Hub::start(content()).await;
    serves(start(REPO, &hub.url, home.path())).await;
    let requests = hub.seen().len();
    serves(start(REPO, &hub.url, home.path()).env("HF_HUB_OFFLINE", "1")).await;
    assert_eq!(hub.seen().len(), requests, "offline asks nobody");
    serves(start(REPO, "http://127.0.0.1:9", home.path())).await;
}

#[tokio::test]
async fn each_failure_says_what_to_do() {
    let home = TempDir::new().unwrap();
    let mut guarded = content();
    guarded.token = Some("right".to_owned());
    let (open, guarded) = (Hub::start(content()).await, Hub::start(guarded).await);
    let home = home.path();
    fails(
        start(REPO, &guarded.url, home).env("HF_TOKEN", "wrong"),
        &["401", "HF_TOKEN", "wrong or expired"],
    )
    .await;
    fails(start(REPO, &guarded.url, home), &["401", "set HF_TOKEN"]).await;
    fails(
        start("someone/else", &open.url, home),
        &["404", "someone/else", "spelling"],
    )
    .await;
    fails(
        start(&format!("{REPO}@v9"), &open.url, home),
        &["404", "no revision v9"],
    )
    .await;
    fails(
        start(REPO, &open.url, home).env("HF_HUB_OFFLINE", "1"),
        &["not complete", "HF_HUB_OFFLINE"],
    )
    .await;
    fails(
        start(REPO, "http://127.0.0.1:9", home),
        &["not reachable", "HF_ENDPOINT"],
    )
    .await;
    // The right token opens the same door.
    serves(start(REPO, &guarded.url, home).env("HF_TOKEN", "right")).await;
}

#[tokio::test]
async fn a_repository_without_safetensors_is_refused() {
    let home = TempDir::new().unwrap();
    let mut content = content();
    content.files.remove(WEIGHTS);
    content
        .files
        .insert("pytorch_model.bin".to_owned(), vec![0; 8]);
    let hub = Hub::start(content).await;
    fails(
        start(REPO, &hub.url, home.path()),
        &["model.safetensors", REPO],
    )
    .await;
}
