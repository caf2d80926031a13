//! The one structural guard: who may import whom, and which crate is the door of which package.
//!
//! It reads `cargo metadata` and checks two tables. (1) Edges between our crates are a subset of
//! [`EDGES`]; dev-dependencies may reach further down the order of the table, never up. (2) Each
//! external package is a direct dependency of its door only ([`DOORS`]); [`EVERYDAY`] packages are
//! free, [`FOR_TESTS`] packages are free as dev-dependencies and in the harness. A package that is
//! in no table is refused: adding one is a decision, written down here and in docs/adr.
#![expect(clippy::expect_used, reason = "a failure here is the test's failure")]

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

/// Our crates from the bottom up, each with what it may import.
const EDGES: &[(&str, &[&str])] = &[
    ("foregate-kernels", &[]),
    ("foregate-cuda-emulate", &[]),
    ("foregate-cuda", &["foregate-kernels"]),
    ("foregate-api", &[]),
    ("foregate-crd", &["foregate-api"]),
    ("foregate-planner", &["foregate-api"]),
    ("foregate-simulate", &["foregate-api", "foregate-planner"]),
    ("foregate-trace", &["foregate-api"]),
    ("foregate-tls", &["foregate-api"]),
    ("foregate-store", &["foregate-api", "foregate-tls"]),
    (
        "foregate-explain",
        &["foregate-api", "foregate-planner", "foregate-store"],
    ),
    (
        "foregate-operator",
        &[
            "foregate-api",
            "foregate-crd",
            "foregate-explain",
            "foregate-planner",
            "foregate-store",
            "foregate-tls",
        ],
    ),
    ("foregate-wire", &["foregate-api", "foregate-tls"]),
    ("foregate-checkpoint", &["foregate-api", "foregate-kernels"]),
    (
        "foregate-models",
        &["foregate-api", "foregate-kernels", "foregate-checkpoint"],
    ),
    (
        "foregate-worker",
        &[
            "foregate-api",
            "foregate-planner",
            "foregate-store",
            "foregate-tls",
            "foregate-wire",
            "foregate-checkpoint",
            "foregate-models",
            "foregate-kernels",
        ],
    ),
    (
        "foregate-gateway",
        &[
            "foregate-api",
            "foregate-trace",
            "foregate-store",
            "foregate-tls",
            "foregate-wire",
        ],
    ),
    (
        HARNESS,
        &["foregate-api", "foregate-store", "foregate-wire"],
    ),
    (
        BINARY,
        &[
            "foregate-kernels",
            "foregate-cuda",
            "foregate-api",
            "foregate-crd",
            "foregate-planner",
            "foregate-simulate",
            "foregate-trace",
            "foregate-store",
            "foregate-explain",
            "foregate-tls",
            "foregate-operator",
            "foregate-wire",
            "foregate-checkpoint",
            "foregate-models",
            "foregate-worker",
            "foregate-gateway",
        ],
    ),
];

/// The crate that serves tests; its packages count as those of tests.
const HARNESS: &str = "foregate-harness";
/// The composition root.
const BINARY: &str = "foregate";

/// Packages that any crate may use.
const EVERYDAY: &[&str] = &[
    "arc-swap",
    "blake3",
    "bytemuck",
    "bytes",
    "crc32fast",
    "futures",
    "half",
    "opentelemetry",
    "prometheus",
    "serde",
    "serde_json",
    "smallvec",
    "thiserror",
    "tokio",
    "tokio-stream",
    "tokio-util",
    "tracing",
    "tracing-opentelemetry",
];

/// Packages that any crate may use in its tests.
const FOR_TESTS: &[&str] = &[
    "axum",
    "cargo_metadata",
    "criterion",
    "http",
    "microlp",
    "opentelemetry-proto",
    "proptest",
    "regex",
    "reqwest",
    "safetensors",
    "serde_yaml_ng",
    "tempfile",
    "tonic",
    "tower",
];

/// Every other package, with the crates that may use it.
const DOORS: &[(&str, &[&str])] = &[
    ("libc", &["foregate-kernels"]),
    ("memmap2", &["foregate-kernels"]),
    // At build time: compiles the kernels for the CPU.
    ("cc", &["foregate-cuda-emulate"]),
    ("cudarc", &["foregate-cuda"]),
    ("libloading", &["foregate-cuda"]),
    ("etcd-client", &["foregate-store"]),
    // In store: the channel under etcd's client, where it is proven.
    ("tonic", &["foregate-wire", "foregate-store"]),
    ("tonic-prost", &["foregate-wire"]),
    ("tonic-prost-build", &["foregate-wire"]),
    ("prost", &["foregate-wire"]),
    ("protox", &["foregate-wire"]),
    ("safetensors", &["foregate-checkpoint"]),
    // In the binary for `foregate crd`, which prints YAML.
    ("serde_yaml_ng", &["foregate-operator", BINARY]),
    // In the api under a feature, for schemas of the manifest.
    ("schemars", &["foregate-api", "foregate-crd"]),
    ("k8s-openapi", &["foregate-crd", "foregate-operator"]),
    ("kube", &["foregate-crd", "foregate-operator"]),
    ("rcgen", &["foregate-tls"]),
    ("rustls", &["foregate-tls"]),
    ("tokio-rustls", &["foregate-tls"]),
    // In wire and store: the connector under their channels.
    (
        "tower",
        &["foregate-gateway", "foregate-wire", "foregate-store"],
    ),
    ("tower-http", &["foregate-gateway"]),
    ("tokenizers", &["foregate-gateway"]),
    ("minijinja", &["foregate-gateway"]),
    ("minijinja-contrib", &["foregate-gateway"]),
    // In the binary only for /metrics, /healthz and /readyz of operator and worker.
    ("axum", &["foregate-gateway", BINARY]),
    ("hyper", &["foregate-gateway"]),
    (
        "hyper-util",
        &["foregate-gateway", "foregate-wire", "foregate-store"],
    ),
    ("clap", &[BINARY]),
    ("hf-hub", &[BINARY]),
    ("indicatif", &[BINARY]),
    ("mimalloc", &[BINARY]),
    ("opentelemetry-otlp", &[BINARY]),
    ("opentelemetry-proto", &[BINARY]),
    ("opentelemetry_sdk", &[BINARY]),
    ("plotters", &[BINARY]),
    // The terminal of `foregate top`.
    ("ratatui", &[BINARY]),
    (
        "rustix",
        &[BINARY, "foregate-kernels", "foregate-worker", HARNESS],
    ),
    // The loads and the token model of `foregate simulate`.
    ("rand_chacha", &["foregate-simulate"]),
    // The load generator of `foregate bench`.
    ("reqwest", &[BINARY]),
    // The data directory of an own etcd; in the binary the folder of the keys of one run.
    ("tempfile", &["foregate-store", BINARY]),
    ("tracing-subscriber", &[BINARY]),
    ("x509-parser", &["foregate-tls"]),
];

fn workspace() -> Metadata {
    MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .no_deps()
        .other_options(vec!["--offline".into()])
        .exec()
        .expect("cargo metadata reads the workspace")
}

fn position(name: &str) -> Option<usize> {
    EDGES.iter().position(|(known, _)| *known == name)
}

/// What is wrong with one crate's dependency on another of ours.
fn judge_edge(from: &str, to: &str, for_tests: bool) -> Option<String> {
    let (Some(above), Some(below)) = (position(from), position(to)) else {
        return Some(format!("{from} → {to}: not in the table of crates"));
    };
    let allowed = EDGES[above].1.contains(&to);
    if allowed || (for_tests && below < above) {
        return None;
    }
    Some(if for_tests {
        format!("{from} → {to}: tests may reach down, never up")
    } else {
        format!("{from} → {to}: not an edge of the table")
    })
}

/// What is wrong with one crate's dependency on an external package.
fn judge_door(from: &str, package: &str, for_tests: bool) -> Option<String> {
    let door = DOORS.iter().find(|(name, _)| *name == package);
    let free = EVERYDAY.contains(&package) || (for_tests && FOR_TESTS.contains(&package));
    if free || door.is_some_and(|(_, doors)| doors.contains(&from)) {
        return None;
    }
    Some(match door {
        Some((_, doors)) => {
            format!("{from} uses {package}, whose door is {}", doors.join(", "))
        }
        None => format!("{from} uses {package}, which is in no table"),
    })
}

fn judge(packages: &[&Package]) -> Vec<String> {
    let ours: BTreeSet<&str> = packages.iter().map(|p| p.name.as_str()).collect();
    let mut wrong = Vec::new();
    for package in packages {
        for dependency in &package.dependencies {
            let dev = dependency.kind == DependencyKind::Development;
            let (from, to) = (package.name.as_str(), dependency.name.as_str());
            wrong.extend(if ours.contains(to) {
                judge_edge(from, to, dev)
            } else {
                judge_door(from, to, dev || from == HARNESS)
            });
        }
    }
    wrong
}

#[test]
fn crates_import_downwards_and_packages_have_one_door() {
    let metadata = workspace();
    let wrong = judge(&metadata.workspace_packages());
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn the_table_names_exactly_the_crates_that_exist() {
    let metadata = workspace();
    let exist: BTreeSet<_> = metadata
        .workspace_packages()
        .iter()
        .map(|p| p.name.to_string())
        .collect();
    let named: BTreeSet<_> = EDGES.iter().map(|(name, _)| (*name).to_string()).collect();
    assert_eq!(exist, named);
}

#[test]
fn the_table_has_no_way_up() {
    let order: BTreeMap<_, _> = EDGES
        .iter()
        .enumerate()
        .map(|(i, (n, _))| (*n, i))
        .collect();
    for (from, edges) in EDGES {
        for to in *edges {
            assert!(order[to] < order[from], "{from} → {to} goes up");
        }
    }
}

#[test]
fn the_guard_refuses_what_it_should() {
    assert!(judge_edge("foregate-kernels", "foregate-api", false).is_some());
    assert!(judge_edge("foregate-worker", "foregate-gateway", true).is_some());
    assert!(judge_edge("foregate-worker", "foregate-operator", false).is_some());
    assert!(judge_edge("foregate-worker", "foregate-operator", true).is_none());
    assert!(judge_door("foregate-worker", "tonic", false).is_some());
    assert!(judge_door("foregate-gateway", "reqwest", false).is_some());
    assert!(judge_door("foregate-gateway", "reqwest", true).is_none());
    assert!(judge_door("foregate-planner", "left-pad", true).is_some());
}
