//! What the API server refuses by the schema, validation refuses too, and the other way round.
//!
//! The rules in CEL are evaluated here as the API server does it; what OpenAPI says beside them (ranges, patterns, lengths) is
//! checked by the few lines at the end. A cluster's test shows the same table to a real API server.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

#[path = "admission/table.rs"]
mod table;

use foregate_api::manifest::Manifest;
use foregate_crd::MoeCluster;
use foregate_operator::validate;
use kube::core::cel::Validator;
use serde_json::Value;

use table::{BAD, GOOD, Row};

fn schema() -> Value {
    let definition = foregate_crd::cluster::definition().unwrap();
    let value = serde_json::to_value(definition).unwrap();
    value
        .pointer("/spec/versions/0/schema/openAPIV3Schema")
        .unwrap()
        .clone()
}

/// What the API server would say: first the schema, then the rules, over an object with its defaults.
fn admit(schema: &Value, mut object: Value, old: Option<&Value>) -> Result<(), String> {
    openapi::fill(schema, &mut object);
    let mut wrong = Vec::new();
    openapi::check(schema, &object, "", &mut wrong);
    if !wrong.is_empty() {
        return Err(wrong.join("\n"));
    }
    let old = old.cloned().map(|mut old| {
        openapi::fill(schema, &mut old);
        old
    });
    let ruled = Validator::new().validate(schema, &object, old.as_ref());
    ruled.map_err(|errors| errors.to_string())
}

fn manifest(object: &Value) -> Manifest {
    let text = serde_json::to_string(object).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn what_is_good_is_admitted_and_validated() {
    let schema = schema();
    for Row { name, change, .. } in GOOD {
        let object = table::object(*change);
        assert_eq!(admit(&schema, object.clone(), None), Ok(()), "{name}");
        assert!(validate(manifest(&object)).is_ok(), "{name}");
    }
}

#[test]
fn what_is_bad_is_refused_by_both_with_the_field() {
    let schema = schema();
    for Row { name, change, says } in BAD {
        let object = table::object(*change);
        let refused = admit(&schema, object.clone(), None);
        let text = refused.expect_err(name);
        assert!(text.contains(says), "{name}: {text}");
        // A value of another type is refused before validation sees it.
        let Ok(manifest) = serde_json::from_value::<Manifest>(object) else {
            continue;
        };
        assert!(validate(manifest).is_err(), "{name} passes validation");
    }
}

#[test]
fn what_cannot_be_changed_is_refused_when_it_is() {
    let schema = schema();
    let old = table::object(|_| {});
    for (path, value) in [
        ("/spec/model/uri", "hf://org/other"),
        ("/spec/model/dtype", "float32"),
        ("/spec/model/quantization", "int8"),
        ("/spec/workers/cpuPath", "avx2"),
    ] {
        let mut new = old.clone();
        table::put(&mut new, path, value.into());
        let text = admit(&schema, new, Some(&old)).expect_err(path);
        assert!(text.contains("cannot be changed"), "{path}: {text}");
    }
    let mut scaled = old.clone();
    table::put(&mut scaled, "/spec/workers/count", 4.into());
    assert_eq!(admit(&schema, scaled, Some(&old)), Ok(()));
}

/// Once the model's sizes are known, a change that cannot fit is refused before it begins, with the sum.
#[test]
fn a_plan_that_cannot_fit_is_refused_with_the_sum() {
    let schema = schema();
    let mut object = table::object(|object| {
        table::put(
            object,
            "/spec/workers/resources/limits/memory",
            "1Gi".into(),
        );
    });
    let facts = serde_json::json!({
        "experts": 32, "maxPositions": 1024, "kvBytesPerToken": 4096, "slotBytes": 64 << 20, "denseBytes": 32 << 20,
    });
    let status = serde_json::json!({ "model": { "source": "x", "facts": facts } });
    table::put(&mut object, "/status", status);
    // 128 Mi of keys and values + 32 Mi + 18 slots of 64 Mi.
    let text = admit(&schema, object.clone(), None).expect_err("1312 Mi in 1 Gi");
    assert!(
        text.contains("18 expert slots x 67108864 is more than"),
        "{text}"
    );
    table::put(&mut object, "/spec/workers/count", 4.into());
    // 8 + 2 slots: 800 Mi.
    assert_eq!(admit(&schema, object, None), Ok(()));
}

/// The same of slots, where the manifest insists that they link all workers.
#[test]
fn too_few_slots_are_refused_with_the_sum_where_that_is_asked_for() {
    let schema = schema();
    let mut object = table::object(|object| {
        table::put(object, "/spec/workers/redundantSlots", 0.into());
        table::put(object, "/spec/workers/count", 4.into());
    });
    let facts = serde_json::json!({
        "experts": 32, "maxPositions": 1024, "kvBytesPerToken": 4096, "slotBytes": 1, "denseBytes": 1,
    });
    let status = serde_json::json!({ "model": { "source": "x", "facts": facts } });
    table::put(&mut object, "/status", status);
    assert_eq!(admit(&schema, object.clone(), None), Ok(()));
    table::put(&mut object, "/spec/balancing/strict", true.into());
    let text = admit(&schema, object.clone(), None).expect_err("8 slots, 9 link");
    let sum = "8 + 0 expert slots per worker do not link 4 workers, which takes 1 + ceil((32 - 1) / 4) = 9";
    assert!(text.contains(sum), "{text}");
    table::put(&mut object, "/spec/workers/redundantSlots", 1.into());
    assert_eq!(admit(&schema, object.clone(), None), Ok(()));
    // One worker holds everything and has nobody to be linked to.
    table::put(&mut object, "/spec/workers/redundantSlots", 0.into());
    table::put(&mut object, "/spec/workers/count", 1.into());
    assert_eq!(admit(&schema, object, None), Ok(()));
}

#[test]
fn a_manifest_and_its_object_are_the_same_document() {
    let object = table::object(|_| {});
    let manifest = manifest(&object);
    let resource = MoeCluster::of(manifest.clone());
    assert_eq!(resource.manifest(), manifest);
    let back: MoeCluster = serde_json::from_value(object).unwrap();
    assert_eq!(back.spec, manifest.spec);
}

/// The part of OpenAPI that the definitions use.
mod openapi {
    use regex::Regex;
    use serde_json::Value;

    /// Fills in defaults, as the API server does before it validates.
    pub(crate) fn fill(schema: &Value, value: &mut Value) {
        let Some(object) = value.as_object_mut() else {
            return;
        };
        let fields = schema.get("properties").and_then(Value::as_object);
        for (name, field) in fields.into_iter().flatten() {
            if let Some(default) = field.get("default")
                && !object.contains_key(name)
            {
                object.insert(name.clone(), default.clone());
            }
            if let Some(value) = object.get_mut(name) {
                fill(field, value);
            }
        }
    }

    pub(crate) fn check(schema: &Value, value: &Value, path: &str, wrong: &mut Vec<String>) {
        let of = |key: &str| schema.get(key).and_then(Value::as_f64);
        let mut say = |what: String| wrong.push(format!("{path}: {what}"));
        if let Some(choices) = schema.get("enum").and_then(Value::as_array)
            && !choices.contains(value)
        {
            say(format!("{value} is none of {choices:?}"));
        }
        if let Some(number) = value.as_f64() {
            let low = of("minimum").is_some_and(|low| number < low);
            let exclusive = schema.get("exclusiveMinimum") == Some(&Value::Bool(true));
            let lowest = exclusive && of("minimum") == Some(number);
            if low || lowest || of("maximum").is_some_and(|high| number > high) {
                say(format!("{number} is out of range"));
            }
            if schema.get("type").is_some_and(|t| t == "string") {
                say("is no text".to_owned());
            }
        }
        if let Some(text) = value.as_str() {
            let length = text.chars().count() as f64;
            if of("minLength").is_some_and(|n| length < n)
                || of("maxLength").is_some_and(|n| length > n)
            {
                say(format!("has {length} characters"));
            }
            if let Some(pattern) = schema.get("pattern").and_then(Value::as_str)
                && !Regex::new(pattern).unwrap().is_match(text)
            {
                say(format!("{text:?} does not match {pattern}"));
            }
            if schema
                .get("type")
                .is_some_and(|t| t == "integer" || t == "number")
            {
                say("is no number".to_owned());
            }
        }
        if schema.get("type").is_some_and(|t| t == "boolean") && !value.is_boolean() {
            say(format!("{value} is neither true nor false"));
        }
        if let Some(values) = value.as_array() {
            if of("maxItems").is_some_and(|n| values.len() as f64 > n) {
                say(format!("has {} entries", values.len()));
            }
            for (i, value) in values.iter().enumerate() {
                check(&schema["items"], value, &format!("{path}[{i}]"), wrong);
            }
        } else if let Some(fields) = value.as_object() {
            for (name, value) in fields {
                let known = schema.get("properties").and_then(|p| p.get(name));
                if let Some(schema) = known.or_else(|| schema.get("additionalProperties")) {
                    let dot = if path.is_empty() { "" } else { "." };
                    check(schema, value, &format!("{path}{dot}{name}"), wrong);
                }
            }
        }
    }
}
