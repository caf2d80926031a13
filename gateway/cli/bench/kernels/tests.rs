use clap::Parser;
use serde_json::Value;

use super::figures::Pass;
use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: KernelsArgs,
}

/// A small model of the tests of numbers.
const MODEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/worker/models/tests/fixtures/qwen3_moe"
);

#[test]
fn every_operation_has_figures_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kernels.json");
    let mut all = vec!["kernels", "--model", MODEL, "--threads", "2"];
    all.extend([
        "--rows",
        "1,3",
        "--context",
        "5,40",
        "--milliseconds",
        "1",
        "--weights-mib",
        "1",
    ]);
    all.extend(["--formats", "bf16,int4", "--json", file.to_str().unwrap()]);
    let args = Cli::try_parse_from(all).unwrap().args;
    run(&args, &Progress::Lines).unwrap();
    let figures: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let lines = figures["operations"].as_array().unwrap();
    let count = |op: &str, format: &str| {
        let of = lines.iter().filter(|line| line["op"] == op);
        of.filter(|line| line["format"] == format).count()
    };
    for format in ["bf16", "int4"] {
        // Two projections, two numbers of rows.
        assert_eq!(count("matmul", format), 4);
        assert_eq!(count("experts", format), 2);
    }
    for format in ["float32", "bfloat16"] {
        assert_eq!(count("attention, decode", format), 4);
        assert_eq!(count("attention, prefill", format), 2);
    }
    for op in ["norm", "rope", "gate", "combine"] {
        assert_eq!(count(op, ""), 2, "{op}");
    }
    for line in lines {
        for key in [
            "microseconds",
            "gb_s",
            "gflop_s",
            "bandwidth_share",
            "rate_share",
        ] {
            assert!(line[key].as_f64().unwrap() > 0.0, "{key} of {line}");
        }
    }
}

#[test]
fn shares_are_of_the_run_s_bandwidth_and_rate() {
    let mut table = Table::new(50e9, 400e9);
    table.add(Pass {
        op: "matmul",
        format: "bf16",
        size: String::new(),
        bytes: 1e9,
        flops: 10e9,
        seconds: 0.04,
    });
    let line = &table.lines[0];
    assert_eq!((line.gb_s, line.bandwidth_share), (25.0, 0.5));
    assert_eq!((line.gflop_s, line.rate_share), (250.0, 0.625));
}

#[test]
fn wrong_arguments_are_refused() {
    for wrong in [
        ["--formats", "int3"],
        ["--rows", "0"],
        ["--context", "0"],
        ["--milliseconds", "0"],
    ] {
        assert!(Cli::try_parse_from([&["kernels"][..], &wrong].concat()).is_err());
    }
    let args = Cli::try_parse_from(["kernels", "--model", "no/such/model"])
        .unwrap()
        .args;
    let error = run(&args, &Progress::Lines).unwrap_err().to_string();
    assert!(error.contains("no/such/model"), "{error}");
}
