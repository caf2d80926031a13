use std::collections::BTreeSet;

use serde_json::Value;

use super::*;

/// A batch of 8 whose step reads 100 MB: at 20 GB/s it takes 5 ms at least.
fn decode() -> Decode {
    let cost = Cost {
        bytes: 100e6,
        times: Times {
            step: 6.0,
            gate: 0.5,
            exchange: 0.25,
            experts: 3.0,
            attention: 1.25,
            rest: 1.0,
        },
    };
    let speed = Speed {
        tokens_per_second: 1200.0,
        bandwidth: 20e9,
        outside_ms: 0.03,
        outside_share: 0.005,
    };
    Decode::new(&Load::decode(8, 64, 16, 512), speed, cost)
}

fn figures() -> Figures {
    Figures {
        model: "some/model".to_owned(),
        path: "avx2".to_owned(),
        threads: 2,
        bandwidth_gb_s: 20.0,
        rate_gflop_s: 400.0,
        load_seconds: 1.5,
        peak_rss_bytes: Some(230_000_000),
        weight_bytes: 150_000_000,
        kv_bytes: 50_000_000,
        peak_rss_ratio: Some(1.15),
        decode: vec![decode()],
        prefill: vec![Prefill {
            prompts: 32,
            tokens: 512,
            tokens_per_second: 4000.0,
            bytes_per_token: 4e6,
            multiply_adds_per_token: 2e8,
            limit_tokens_per_second: Some(5000.0),
            matrix_limit_tokens_per_second: None,
        }],
    }
}

#[test]
fn the_limit_is_bandwidth_over_bytes() {
    let decode = decode();
    assert_eq!(decode.limit_tokens_per_second, 1600.0);
    assert_eq!(decode.limit_share, 0.75);
}

#[test]
fn json_has_the_names_that_programs_read() {
    let json = serde_json::to_value(figures()).unwrap();
    let has = |value: &Value, keys: &[&str]| {
        let have: BTreeSet<&str> = value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let missing: Vec<_> = keys.iter().filter(|key| !have.contains(*key)).collect();
        assert!(missing.is_empty(), "{missing:?} in {have:?}");
    };
    has(
        &json,
        &[
            "bandwidth_gb_s",
            "load_seconds",
            "peak_rss_bytes",
            "decode",
            "prefill",
        ],
    );
    has(
        &json["decode"][0],
        &[
            "batch",
            "tokens_per_second",
            "bytes_per_step",
            "limit_share",
        ],
    );
    has(
        &json["prefill"][0],
        &["prompts", "tokens", "tokens_per_second"],
    );
    assert_eq!(json["decode"][0]["bytes_per_step"], 100e6);
}

#[test]
fn people_read_the_same_figures() {
    let text = figures().text();
    for part in [
        "2 threads, avx2 path, 20.0 GB/s, 400 GFLOP/s; loaded in 1.50 s",
        "memory: at most 230.0 MB, 1.15 times the weights' 150.0 MB and the keys' and values' 50.0 MB",
        "prefill, 32 × 512 tokens: 4000.0 tokens/s, 0.80 of the limit 5000.0",
        "decode, batch 8, context 64: 1200.0 tokens/s; a step reads 100.0 MB, which at 20.0 GB/s is 0.75 of the limit 1600.0",
        "step 6.00 ms: gate 0.50, exchange 0.25, experts 3.00, attention 1.25, rest 1.00; after the forward pass 0.030 ms, 0.50 % of a step",
    ] {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
    let unknown = Figures {
        peak_rss_bytes: None,
        peak_rss_ratio: None,
        ..figures()
    };
    assert!(!unknown.text().contains("memory"));
}
