//! `foregate simulate` as a user starts it: the document, the table, the plot, and what is refused; and
//! `foregate bench lookahead` and `foregate bench gateway`, which bring their own clusters.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::process::{Command, Output};

use foregate_harness::{on_path, skip};
use serde_json::Value;
use tempfile::TempDir;

fn simulate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_foregate"))
        .args(["simulate", "placement"])
        .args(arguments)
        .output()
        .unwrap()
}

fn document(arguments: &[&str]) -> Value {
    let output = simulate(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The smallest setting: a second for all policies.
const SMALL: [&str; 6] = ["--setting", "mixtral-8g", "--seeds", "0", "--steps", "6"];

fn small<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SMALL, more].concat()
}

#[test]
fn the_document_has_what_the_contract_names() {
    let found = document(&SMALL);
    assert_eq!(found["setting"], "mixtral-8g");
    assert_eq!(found["generator"]["version"], 1);
    assert_eq!(found["generator"]["seed"], 0);
    assert_eq!(found["generator"]["steps"], 6);
    assert_eq!(found["redundancy"]["needed"], 2);
    assert_eq!(found["redundancy"]["components_least"], 1);
    assert!(found["load"]["max_over_mean"].as_f64().unwrap() > 1.0);
    let policies = found["policies"].as_array().unwrap();
    let named = |name: &str| policies.iter().find(|own| own["name"] == name).unwrap();
    assert!(
        policies
            .iter()
            .all(|own| own["name"] != "eplb-hierarchical-10")
    );
    let (eplb, ours) = (named("eplb-10"), named("connected-lazy"));
    for own in [eplb, ours] {
        for split in ["even", "fixed", "split", "prefill"] {
            for figure in ["mean", "p5"] {
                let balance = own[split][figure].as_f64().unwrap();
                assert!((0.3..=1.0).contains(&balance), "{own}: {split} {figure}");
            }
        }
        for figure in [
            "activated_max_over_mean",
            "modelled_time_balance",
            "copies_per_10_steps",
            "copies_share",
            "bytes_per_10_steps",
            "most_copies_to_one_rank_in_a_step",
        ] {
            assert!(own[figure].is_number(), "{figure}");
        }
    }
    let split = |own: &Value| own["split"]["mean"].as_f64().unwrap();
    assert!(split(ours) > split(eplb), "{} {}", split(ours), split(eplb));
    assert_eq!(ours["components"], 1.0);
    assert!(ours["plan_ms"]["p99"].as_f64().unwrap() > 0.0);
    assert!(ours["split_us_per_layer"]["p50"].as_f64().unwrap() > 0.0);
}

#[test]
fn the_table_and_the_plot_are_written_beside_the_document() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (json, svg) = (at("figures.json"), at("figures.svg"));
    let policies = "eplb-once,connected-lazy";
    let files = ["--policy", policies, "--json", &json, "--svg", &svg];
    let output = simulate(&small(&files));
    assert!(output.status.success());
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("| eplb-once |") && table.contains("| connected-lazy |"));
    let written: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(written["policies"].as_array().unwrap().len(), 2);
    let plot = std::fs::read_to_string(&svg).unwrap();
    assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>"));
    assert!(plot.contains("connected-lazy ("));
}

#[test]
fn a_forecast_and_more_slots_are_heard() {
    let forecast = document(&small(&["--forecast", "topics", "--slots", "3"]));
    assert_eq!(forecast["forecast"], "topics");
    assert_eq!(forecast["copies"], 24);
    let limit = document(&small(&["--limit", "0", "--policy", "connected-lazy"]));
    assert_eq!(limit["policies"][0]["copies_share"], 0.0);
}

#[test]
fn a_lost_rank_is_repaired_first_and_balance_comes_back() {
    let found = document(&small(&["--lose", "rank:3"]));
    assert_eq!(found["lose"], "rank:3");
    let orphans = found["orphans_per_layer"].as_f64().unwrap();
    let after = found["after"].as_array().unwrap();
    assert_eq!(after.len(), 7);
    // The repair loads the experts that have no copy and nothing else.
    let loaded = after[0]["copies_per_layer"].as_f64().unwrap();
    assert!((loaded - orphans).abs() < 0.01, "{loaded} {orphans}");
    let split = |step: &Value| step["split"]["mean"].as_f64().unwrap();
    assert!(split(&after[6]) >= split(&after[0]) - 0.01);
    assert!(found["eplb"]["copies"].as_f64() >= found["eplb_renamed"]["copies"].as_f64());
}

#[test]
fn a_lost_node_takes_no_expert_with_it_if_all_are_covered() {
    let lost = |cover: &str| {
        let setting = ["--setting", "qwen3-32g", "--slots", "8", "--seeds", "0"];
        let rest = ["--steps", "2", "--lose", "node:1", "--cover", cover];
        let found = document(&[&setting[..], &rest[..]].concat());
        assert_eq!(found["cover"], cover);
        found["orphans_per_layer"].as_f64().unwrap()
    };
    assert!(lost("none") > lost("spread") && lost("spread") > 0.0);
    assert!(lost("all") < 1e-9);
}

#[test]
fn bytes_between_nodes_are_counted_for_planners_that_place_once() {
    let found = document(&["--setting", "qwen3-32g", "--internode", "--seeds", "0"]);
    let policies = found["policies"].as_array().unwrap();
    let names: Vec<&str> = policies
        .iter()
        .map(|own| own["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["eplb", "connected", "node-aware"]);
    for own in policies {
        let visits = own["remote_nodes_local_first"].as_f64().unwrap();
        assert!(visits < own["remote_nodes_random"].as_f64().unwrap());
        let bytes = visits * found["kib_per_visit"].as_f64().unwrap();
        let told = own["kib_per_token_and_layer"].as_f64().unwrap();
        assert!((bytes - told).abs() < 0.2, "{bytes} {told}");
    }
}

/// One line of a recording: four experts in one layer.
fn line(rank: u32, sequence: u64, rows: [u64; 4]) -> String {
    let engine = serde_json::json!({
        "running": 0, "waiting": 0, "kv_pages_used": 0, "kv_pages": 0, "prefix_queries": 0, "prefix_hits": 0,
        "preemptions": 0, "prompt_tokens": 0, "generation_tokens": 0, "steps": 0, "experts_loaded": 0,
        "switch_stall_us": 0, "late_rows": 0
    });
    let window = serde_json::json!({
        "rank": rank, "epoch": 1, "sequence": sequence, "span_ms": 1000, "gate": [rows], "served": [0],
        "engine": engine
    });
    format!("{window}\n")
}

#[test]
fn recorded_windows_are_judged_like_generated_ones() {
    let folder = TempDir::new().unwrap();
    for rank in 0..2 {
        let rows = [100, 40, 30, 30 + u64::from(rank)];
        let lines: String = (0..15).map(|sequence| line(rank, sequence, rows)).collect();
        std::fs::write(folder.path().join(format!("rank-{rank}.jsonl")), lines).unwrap();
    }
    let path = folder.path().to_str().unwrap();
    let found = document(&["--replay", path]);
    assert_eq!((&found["ranks"], &found["slots"]), (&2.into(), &3.into()));
    assert_eq!(found["replay"]["windows"], 15);
    assert!(found.get("generator").is_none());
    let ours = &found["policies"].as_array().unwrap()[7];
    assert_eq!(ours["name"], "connected-lazy");
    assert!(ours["split"]["mean"].as_f64().unwrap() > 0.999);
    assert!(ours.get("prefill").is_none() && ours.get("bytes_per_10_steps").is_none());

    let refused = |arguments: &[&str], named: &str| {
        let output = simulate(&[&["--replay", path], arguments].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.contains(named), "{arguments:?}: {error}");
    };
    refused(&["--seeds", "1"], "--seeds");
    refused(&["--setting", "mixtral-8g"], "mixtral-8g");
    refused(&["--lose", "rank:0"], "--lose");
    refused(&["--device", "h100"], "--device");
    let broken = folder.path().join("z.jsonl");
    std::fs::write(&broken, "{}\n").unwrap();
    refused(&[], "z.jsonl, line 1");
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let table: [(&[&str], &str); 16] = [
        (&["--setting", "dsv4"], "dsv3-64g"),
        (&["--regime", "wild"], "moderate"),
        (&["--policy", "eplb"], "eplb-10"),
        (
            &["--policy", "eplb-hierarchical-10"],
            "eplb-hierarchical-10",
        ),
        (&["--steps", "1"], "two"),
        (&["--slots", "0"], "slots"),
        (&["--slots", "9"], "slots"),
        (&["--device", "abacus"], "h200"),
        (&["--lose", "rank:8"], "rank:8"),
        (&["--lose", "node:each"], "node:each"),
        (&["--lose", "rank:1", "--policy", "eplb-10"], "--policy"),
        (&["--internode"], "one node"),
        (&["--internode", "--lose", "rank:1"], "--lose"),
        (&["--cover", "half"], "spread"),
        (&["--cover", "all"], "1 nodes is not possible"),
        (
            &["--setting", "qwen3-32g", "--cover", "all"],
            "takes 8 slots",
        ),
    ];
    for (arguments, named) in table {
        let setting: &[&str] = if arguments[0] == "--setting" {
            &[]
        } else {
            &SMALL[..2]
        };
        let output = simulate(&[setting, arguments].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.contains(named), "{arguments:?}: {error}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

fn foregate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_foregate"))
        .args(arguments)
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Requests of two kinds that use one half of the experts each, as a trace.
fn traced(folder: &std::path::Path) {
    let header = foregate_trace::Header {
        model: "m".to_owned(),
        layers: 2,
        experts: 32,
        top_k: 4,
        started_ms: 0,
    };
    let mut bytes = foregate_trace::begin(&header);
    for at in 0..600_u64 {
        let rows = |each: u64| -> Vec<u64> {
            let own = |expert: u64| expert % 32 / 16 == at / 3 % 2;
            (0..64)
                .map(|expert| if own(expert) { each } else { 0 })
                .collect()
        };
        let request = foregate_trace::Event::Request {
            at_ms: at,
            number: at + 1,
            prompt_tokens: 32,
            answer_tokens: 33,
            prompt: rows(8),
            total: rows(16),
        };
        request.write(&mut bytes);
    }
    std::fs::write(folder.join("a.fgt"), bytes).unwrap();
}

#[test]
fn recorded_requests_are_routed_by_what_they_used() {
    let folder = TempDir::new().unwrap();
    traced(folder.path());
    let json = folder.path().join("figures.json");
    let (dir, file) = (folder.path().to_str().unwrap(), json.to_str().unwrap());
    let replay = |more: &[&str]| {
        foregate(
            &[
                &[
                    "simulate",
                    "lookahead",
                    "--replay",
                    dir,
                    "--seeds",
                    "0",
                    "--slots",
                    "8",
                ],
                more,
            ]
            .concat(),
        )
    };
    let output = replay(&["--policies", "least,ms:64", "--json", file]);
    assert!(output.status.success(), "{}", said(&output));
    let found: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let policies = found["policies"].as_array().unwrap();
    let distinct = |at: usize| policies[at]["mean"]["distinct_experts"].as_f64().unwrap();
    // A batch of one kind has 16 experts at most, a mixed one nearly all 32.
    assert!(
        distinct(1) < 0.85 * distinct(0),
        "{} of {}",
        distinct(1),
        distinct(0)
    );
    for (wrong, what) in [
        (&["--policies", "label:64"][..], "no topics"),
        (&["--setting", "strong-b32"], "--setting"),
    ] {
        let refused = replay(wrong);
        assert_eq!(refused.status.code(), Some(2));
        assert!(said(&refused).contains(what), "{}", said(&refused));
    }
}

#[test]
fn arms_of_a_running_cluster_give_the_same_answers() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (json, svg) = (at("live.json"), at("live.svg"));
    let output = foregate(&[
        "bench",
        "lookahead",
        "--workers",
        "2",
        "--places",
        "4",
        "--batch",
        "2",
        "--overtake-ms",
        "200",
        "--requests",
        "24",
        "--warmup",
        "12",
        "--rate",
        "8",
        "--prompt-tokens",
        "40",
        "--output-tokens",
        "4-8",
        "--arms",
        "least,hints,ms:8,placebo:8",
        "--json",
        &json,
        "--svg",
        &svg,
    ]);
    assert!(output.status.success(), "{}", said(&output));
    let found: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(found["differing_answers"], 0);
    assert_eq!(found["compared_answers"], 3 * 2 * 24);
    // How much there is to gain depends on how full batches were, and so on the machine.
    assert!(found["headroom"].is_number(), "{found}");
    let arms = found["arms"].as_array().unwrap();
    assert_eq!(arms.len(), 4);
    for own in arms {
        assert_eq!(own["failed"], 0, "{own}");
        assert!(own["figures"]["latency_ms_p95"]["value"].as_f64().unwrap() > 0.0);
        assert!(own["gateway"]["predictors"]["kinds"]["believed"].is_boolean());
    }
    assert_eq!(found["blocks"].as_array().unwrap().len(), 8);
    assert!(std::fs::read_to_string(svg).unwrap().contains("placebo:8"));
    let refused = foregate(&["bench", "lookahead", "--arms", "least,hints"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        said(&refused).contains("--overtake-ms"),
        "{}",
        said(&refused)
    );
}

/// Without SMG, which is fetched only for the figures.
#[test]
fn a_gateway_is_measured_beside_the_direct_way() {
    if on_path("etcd").is_none() {
        skip("etcd is not on PATH, and `bench gateway` needs one");
        return;
    }
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("made").to_str().unwrap().to_owned();
    let tiny = |more: &[&str]| {
        let base = ["bench", "gateway", "--rounds", "1", "--requests", "8"];
        let load = ["--rate", "40", "--concurrency", "4", "--seconds", "1"];
        foregate(&[&base, &load, more].concat())
    };
    let output = tiny(&["--tokens", "6", "--out", &out]);
    assert!(output.status.success(), "{}", said(&output));
    let read = |name: &str| std::fs::read_to_string(format!("{out}/{name}")).unwrap();
    let found: Value = serde_json::from_str(&read("gateway.json")).unwrap();
    let blocks = found["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), 2);
    for block in blocks {
        assert_eq!(block["first"]["count"], 8);
        assert_eq!(block["late"]["count"], 8 * 5);
        assert_eq!(block["whole"]["count"], 8);
        assert_eq!(block["failed"], 0);
        assert!(block["per_second"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(blocks[0]["way"], "direct");
    assert_eq!(blocks[0]["cpu_ms"], Value::Null);
    assert!(blocks[1]["cpu_ms"].as_f64().unwrap() > 0.0);
    let ours = &found["ways"][1];
    assert_eq!(ours["way"], "foregate");
    assert!(ours["whole"]["p99"]["median"].is_number());
    assert!(read("table.md").contains("| foregate |"));
    assert!(read("gateway.svg").contains("foregate"));
    let refused = tiny(&["--smg", "/no/such/smg"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        said(&refused).contains("--smg /no/such/smg"),
        "{}",
        said(&refused)
    );
}
