//! What a running cluster has recorded of its decisions gives them again, to the byte, and what they brought is told.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::process::Command;
use std::time::Duration;

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_explain::{Past, expert, last, next, rank};
use foregate_harness::binary::Start;
use foregate_harness::client::Client;
use foregate_harness::manifest::ManifestFile;
use foregate_harness::repository;
use serde_json::{Value, json};

const BINARY: &str = env!("CARGO_BIN_EXE_foregate");
const LONG: Duration = Duration::from_secs(60);

fn manifest() -> ManifestFile {
    ManifestFile::demo(
        "  workers:\n    count: 4\n    redundantSlots: 1\n    kvMemory: 64Mi\n  balancing:\n    windowMs: 500\n    \
         threshold: 0.99\n    minRows: 64\n",
    )
}

async fn past(client: &Client) -> (Past, u64) {
    let told = client.json("/debug/plan").await;
    let entries = told["entries"].as_object().unwrap();
    let stored: Vec<(String, Vec<u8>)> = entries
        .iter()
        .map(|(name, value)| (name.clone(), value.to_string().into_bytes()))
        .collect();
    let past = Past::read(
        stored
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_slice())),
    );
    assert!(past.unreadable.is_empty(), "{:?}", past.unreadable);
    (past, told["now_ms"].as_u64().unwrap())
}

/// Python only: no first placement fits it.
async fn load(client: &Client) {
    let text =
        std::fs::read_to_string(repository("e2e/models/demo/heldout/python.txt")).unwrap();
    let text: Vec<char> = text.chars().collect();
    for at in 0..8 {
        let prompt: String = text[at * 701..at * 701 + 400].iter().collect();
        let body =
            json!({"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": true});
        client.ok("/v1/completions", &body).await;
    }
}

fn explain(url: &str, about: &[&str]) -> String {
    let mut command = Command::new(BINARY);
    let done = command
        .args(["explain", "--url", url])
        .args(about)
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    String::from_utf8(done.stdout).unwrap()
}

#[tokio::test]
async fn every_decision_is_given_again_by_its_record() {
    let manifest = manifest();
    let cluster = Start::up(BINARY, &["-f", manifest.argument()])
        .ready()
        .await;
    let client = Client::new(&cluster.url);
    client
        .until("a change was measured", LONG, || async {
            load(&client).await;
            let (past, _) = past(&client).await;
            let records = past.records.values();
            let mut measured = records.filter(|record| record.measured.balance_after.is_some());
            past.records.len() > 1 && measured.next().is_some()
        })
        .await;
    let (past, now) = past(&client).await;
    for (epoch, record) in &past.records {
        let parent = past.parent(record).unwrap();
        let decision = record.replay(parent).unwrap();
        assert_eq!(
            decision.placement(),
            Some(past.placement(*epoch).unwrap()),
            "epoch {epoch}"
        );
    }
    let first = past.records.values().next().unwrap();
    assert_eq!((first.parent, first.epoch), (Epoch(0), Epoch(1)));
    // Each answer is there, and computed.
    let about_last = last(&past, now).unwrap();
    assert!(about_last.recomputed);
    assert!(!next(&past, now).unwrap().layers.is_empty());
    let newest = past.newest().unwrap();
    let plan = past.placement(newest.epoch).unwrap();
    let about_rank = rank(&past, Rank(1), now).unwrap();
    assert_eq!(about_rank.layers[0].holds, plan.layers[0].slots[1]);
    let about_expert = expert(&past, LayerId(0), ExpertId(3), now).unwrap();
    assert_eq!(about_expert.copies.len(), plan.layers[0].copies[3].len());
    assert!(!about_expert.alternatives.is_empty());
    // The command tells the same of the same cluster.
    for (about, holds) in [
        (vec!["last"], "predicted"),
        (vec!["next"], "The next is due"),
        (vec!["rank", "1"], "If it were lost"),
        (vec!["expert", "0:3"], "Instead there could be"),
    ] {
        let text = explain(&cluster.url, &about);
        assert!(text.contains(holds), "{text}");
        let mut about = about;
        about.push("--json");
        let json: Value = serde_json::from_str(&explain(&cluster.url, &about)).unwrap();
        assert!(json["epoch"].as_u64().is_some());
    }
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
}
