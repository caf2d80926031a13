//! The definitions as Kubernetes gets them.

use std::path::Path;

use foregate_crd::definitions;
use serde_json::Value;

/// The chart carries what the binary prints. `UPDATE_GOLDEN=1` writes it.
#[test]
fn the_chart_has_the_same_definitions() {
    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../charts/foregate-crds/templates");
    for definition in definitions().unwrap() {
        let name = definition.metadata.name.clone().unwrap();
        let path = folder.join(format!("{name}.yaml"));
        let text = serde_yaml_ng::to_string(&definition).unwrap();
        #[expect(
            clippy::disallowed_methods,
            reason = "golden files are rewritten on demand"
        )]
        if std::env::var("UPDATE_GOLDEN").is_ok() {
            std::fs::write(&path, &text).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            golden == text,
            "{} differs: run with UPDATE_GOLDEN=1 and read the difference",
            path.display()
        );
    }
}

/// Every field that a person may write or read is explained by `kubectl explain`.
#[test]
fn every_field_has_a_description() {
    let mut missing = Vec::new();
    for definition in definitions().unwrap() {
        let value = serde_json::to_value(&definition).unwrap();
        let schema = value
            .pointer("/spec/versions/0/schema/openAPIV3Schema")
            .unwrap();
        for group in ["spec", "status"] {
            walk(&schema["properties"][group], group, &mut missing);
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

fn walk(schema: &Value, path: &str, missing: &mut Vec<String>) {
    if schema
        .get("description")
        .and_then(Value::as_str)
        .is_none_or(str::is_empty)
    {
        missing.push(path.to_owned());
    }
    for (name, field) in schema
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        walk(field, &format!("{path}.{name}"), missing);
    }
    if let Some(fields) = schema
        .pointer("/items/properties")
        .and_then(Value::as_object)
    {
        for (name, field) in fields {
            walk(field, &format!("{path}[].{name}"), missing);
        }
    }
}

/// A name of these is what people type.
#[test]
fn names_are_as_documented() {
    let definitions = definitions().unwrap();
    let shown: Vec<_> = definitions
        .iter()
        .map(|d| {
            let names = &d.spec.names;
            (
                names.kind.as_str(),
                names.short_names.as_deref().unwrap_or_default().join(","),
                names.categories.as_deref().unwrap_or_default().join(","),
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("MoeCluster", "moe".to_owned(), "foregate".to_owned()),
            ("ExpertPlacement", "moep".to_owned(), "foregate".to_owned()),
        ]
    );
}
