//! What the API server says about manifests that are wrong, and what kubectl tells of the resources.

use std::fmt::Write as _;
use std::path::PathBuf;

use foregate_harness::cluster::Cluster;
use foregate_harness::repository;
use serde_json::Value;

use crate::site::install_resources;
use crate::stage;

#[path = "../../../operator/tests/admission/table.rs"]
mod table;

/// The same table that validation and the rules are held to without a cluster; and the page of the docs is what was said.
#[test]
fn the_api_server_refuses_what_is_wrong_and_the_docs_show_its_words() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    install_resources(cluster);
    for row in table::GOOD {
        let said = apply(cluster, &table::object(row.change));
        assert_eq!(said, Ok(()), "{}", row.name);
    }
    let mut page = String::from(
        "# Manifests that are refused\n\nEach row is `charts/examples/tiny.yaml` with one change, and what `kubectl apply` then \
         prints. A test writes and compares this page.\n\n| what | change | error |\n|---|---|---|\n",
    );
    for row in table::BAD {
        let object = table::object(row.change);
        let said = apply(cluster, &object).expect_err(row.name);
        assert!(said.contains(row.says), "{}: {said}", row.name);
        let changed = changes(&table::object(|_| {}), &object);
        let cell = |text: &str| text.replace('|', "\\|").replace('\n', "<br>");
        writeln!(
            page,
            "| {} | `{}` | {} |",
            row.name,
            cell(&changed),
            cell(&said)
        )
        .unwrap();
    }
    compare(cluster, "docs/kubernetes/refused.md", &page);
}

#[test]
fn explain_tells_every_field() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    install_resources(cluster);
    let mut page = String::new();
    for what in ["moe", "moe.spec", "moe.spec.workers", "moe.status"] {
        let told = cluster.kubectl(&["explain", what]);
        writeln!(page, "$ kubectl explain {what}\n{told}").unwrap();
    }
    assert!(!page.contains("<no description>"), "{page}");
    compare(cluster, "docs/kubernetes/explain.txt", &page);
}

/// What the API server has against an object, without its name before it.
fn apply(cluster: &Cluster, object: &Value) -> Result<(), String> {
    let arguments = ["apply", "--dry-run=server", "-f", "-"];
    let output = cluster.try_kubectl(&arguments, &object.to_string());
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(said)
}

/// Fields that differ, as `path: value`.
fn changes(from: &Value, to: &Value) -> String {
    let mut found = Vec::new();
    differ(from, to, "", &mut found);
    found.join(", ")
}

fn differ(from: &Value, to: &Value, path: &str, found: &mut Vec<String>) {
    if let (Value::Object(from), Value::Object(to)) = (from, to) {
        for (key, value) in to {
            let before = from.get(key).unwrap_or(&Value::Null);
            differ(before, value, &format!("{path}.{key}"), found);
        }
        let gone = from.keys().filter(|key| !to.contains_key(*key));
        found.extend(gone.map(|key| format!("{path}.{key} is missing")));
    } else if from != to {
        found.push(format!("{}: {to}", path.trim_start_matches('.')));
    }
}

/// Holds a page of the docs to what was seen; `UPDATE_GOLDEN=1` writes it. Another version of Kubernetes has other words.
fn compare(cluster: &Cluster, page: &str, seen: &str) {
    if cluster.hermetic().is_err() {
        return;
    }
    let path: PathBuf = repository("docs").join(page.trim_start_matches("docs/"));
    if std::env::var("UPDATE_GOLDEN").is_ok_and(|value| value == "1") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, seen).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        written, seen,
        "{page} is not what was seen; UPDATE_GOLDEN=1 writes it"
    );
}
