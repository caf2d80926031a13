use clap::Parser;
use serde_json::Value;

use super::*;

/// Holds 512 tokens; three mixture layers of eight experts, two of them per token.
const FIXTURE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/worker/models/tests/fixtures/qwen3_moe"
);

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: EngineArgs,
}

/// Runs the command with these arguments after `--model`, and gives the error's text.
async fn refused(model: &str, rest: &str) -> String {
    let words = ["engine", "--model", model].into_iter();
    match Line::try_parse_from(words.chain(rest.split_whitespace())) {
        Err(error) => error.to_string(),
        Ok(line) => match run(&line.args, &Progress::Lines).await {
            Err(CliError::Usage(text)) => text,
            other => panic!("{rest}: {other:?}"),
        },
    }
}

#[tokio::test]
async fn wrong_arguments_are_named() {
    let table = [
        (FIXTURE, "--batch 0", "--batch"),
        (FIXTURE, "--batch 1,0", "--batch"),
        (FIXTURE, "--batch 4097", "--batch"),
        (FIXTURE, "--prompts 0", "--prompts"),
        (FIXTURE, "--decode 2", "--decode"),
        (FIXTURE, "--threads 0", "--threads"),
        (FIXTURE, "--turns 0", "--turns"),
        (FIXTURE, "--workers 1", "--workers"),
        (FIXTURE, "--fabric tcp", "--workers"),
        (FIXTURE, "--fabric nccl --workers 2", "--fabric"),
        (FIXTURE, "--svg some.svg --workers 2", "--svg"),
        (
            FIXTURE,
            "--workers 3 --threads 4",
            "--threads 4 with --workers 3",
        ),
        (
            FIXTURE,
            "--prefill 512",
            "--prefill 512: this model holds 512 tokens",
        ),
        (
            FIXTURE,
            "--batch 1 --context 449 --decode 64",
            "--context 449 and --decode 64 with --batch 1: a sequence grows to 513 tokens",
        ),
        (
            "/no/such/model",
            "",
            "--model /no/such/model: no such directory",
        ),
    ];
    for (model, rest, want) in table {
        let text = refused(model, rest).await;
        assert!(text.contains(want), "{rest}: {want:?} in {text:?}");
    }
}

/// Reads a whole number or a fraction.
fn number(value: &Value, key: &str) -> f64 {
    value[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key} in {value}"))
}

#[tokio::test]
async fn a_run_gives_all_figures_of_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("figures.json");
    let rest = "--threads 2 --batch 1,3 --decode 24 --context 8 --prefill 40 --prompts 1,2 --step-tokens 16 --turns 2";
    let words = ["engine", "--model", FIXTURE].into_iter();
    let words = words.chain(rest.split_whitespace());
    let words = words.chain(["--json", file.to_str().unwrap()]);
    let line = Line::try_parse_from(words).unwrap();
    run(&line.args, &Progress::Lines).await.unwrap();

    let json: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for key in ["bandwidth_gb_s", "load_seconds", "weight_bytes", "kv_bytes"] {
        assert!(number(&json, key) > 0.0, "{key}");
    }
    if cfg!(target_os = "linux") {
        let need = number(&json, "weight_bytes") + number(&json, "kv_bytes");
        let ratio = number(&json, "peak_rss_bytes") / need;
        assert!((number(&json, "peak_rss_ratio") - ratio).abs() < 1e-9 * ratio);
    }
    let prefill = json["prefill"].as_array().unwrap();
    let prompts: Vec<f64> = prefill.iter().map(|one| number(one, "prompts")).collect();
    assert_eq!(prompts, [1.0, 2.0]);
    for one in prefill {
        assert_eq!(number(one, "tokens"), 40.0);
        assert!(number(one, "tokens_per_second") > 0.0);
    }
    let decode = json["decode"].as_array().unwrap();
    assert_eq!(decode.len(), 2);
    for (one, batch) in decode.iter().zip([1.0, 3.0]) {
        assert_eq!(number(one, "batch"), batch);
        let bytes = number(one, "bytes_per_step");
        assert!(bytes < 2.0 * number(&json, "weight_bytes"));
        let limit = number(one, "bandwidth_gb_s") * 1e9 / bytes * batch;
        let share = number(one, "tokens_per_second") / limit;
        assert!((number(one, "limit_share") - share).abs() < 1e-9 * share);
        let times = &one["step_time_ms"];
        let parts = ["gate", "exchange", "experts", "attention", "rest"];
        let sum: f64 = parts.iter().map(|part| number(times, part)).sum();
        assert!((number(times, "step") - sum).abs() < 1e-9 * sum);
        assert!(number(&one["telemetry"], "pairs") > 0.0);
    }
    // Three sequences have more experts, keys and values to read than one.
    assert!(number(&decode[1], "bytes_per_step") > number(&decode[0], "bytes_per_step"));
}
