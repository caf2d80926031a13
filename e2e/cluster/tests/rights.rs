//! The operator asks for nothing that it was not granted, and is granted nothing that it does not ask for. Both are
//! read from the API server's own audit log while a cluster comes, changes and goes.

use std::collections::BTreeSet;

use foregate_harness::cluster::{Hermetic, ROLLOUT, awaited};
use serde_json::{Value, json};

use crate::site::{Site, is};
use crate::stage;

/// Group, resource, verb.
type Right = (String, String, String);

/// Granted and not asked for here. A prune removes objects that a manifest does not call for any more, and every manifest
/// calls for these: they go when another version of the operator makes them under another name.
const PRUNED: [(&str, &str); 4] = [
    ("", "services"),
    ("apps", "deployments"),
    ("policy", "poddisruptionbudgets"),
    ("networking.k8s.io", "networkpolicies"),
];

#[test]
fn the_operator_uses_every_right_that_it_has_and_no_other() {
    let Some((cluster, made, _turn)) = stage::made() else {
        return;
    };
    let site = Site::with_operator(cluster, "rights", &json!({}));
    site.apply_tiny(|tiny| {
        tiny["spec"]["workers"]["count"] = json!(3);
        tiny["spec"]["gateway"]["resources"] = json!({"requests": {"cpu": "10m"}});
        tiny["spec"]["gateway"]["autoscaling"] = json!({"minReplicas": 1, "maxReplicas": 2});
    });
    site.await_settled(3);
    // The pod of a rank is made for a second time, which an event counts; without an autoscaler and a rank, both go.
    let _printed = site.namespace.kubectl(&["delete", "pod", "tiny-worker-0"]);
    site.await_settled(3);
    site.apply_tiny(|tiny| tiny["spec"]["workers"]["count"] = json!(2));
    site.await_settled(2);
    awaited("the autoscaler to be removed", ROLLOUT, || {
        let left = site.namespace.kubectl(&["get", "hpa", "-o", "name"]);
        left.is_empty().then_some(()).ok_or(left)
    });
    // A certificate that somebody spoiled is put right.
    let spoiled = r#"{"data":{"tls.crt":""}}"#;
    let patch = ["patch", "secret", "tiny-worker-tls", "-p", spoiled];
    let _printed = site.namespace.kubectl(&patch);
    awaited("the workers' certificate to be put right", ROLLOUT, || {
        let secret = site.namespace.get("secret", "tiny-worker-tls");
        let certificate = secret["data"]["tls.crt"].as_str();
        let right = certificate.is_some_and(|text| !text.is_empty());
        right
            .then_some(())
            .ok_or_else(|| "still spoiled".to_owned())
    });
    assert!(is(&site.moe(), "Ready"));

    let (asked, refused) = asked(made, &site);
    assert!(refused.is_empty(), "{refused:#?}");
    let mut unused = granted(&site);
    unused.retain(|right| !asked.contains(right));
    let pruned = PRUNED.map(|(group, resource)| right(group, resource, "delete"));
    assert_eq!(unused, BTreeSet::from(pruned), "granted and not asked for");
}

fn right(group: &str, resource: &str, verb: &str) -> Right {
    (group.to_owned(), resource.to_owned(), verb.to_owned())
}

/// What the operator has asked for, and what of it was refused.
fn asked(made: &Hermetic, site: &Site) -> (BTreeSet<Right>, Vec<String>) {
    let user = format!("system:serviceaccount:{}:foregate", site.namespace.name);
    let (mut asked, mut refused) = (BTreeSet::new(), Vec::new());
    for line in made.audit().lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let object = &event["objectRef"];
        if event["user"]["username"] != user.as_str() || object.is_null() {
            continue;
        }
        let code = event["responseStatus"]["code"].as_u64();
        if code == Some(403) {
            refused.push(line.to_owned());
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (group, mut resource) = (text(&object["apiGroup"]), text(&object["resource"]));
        if let Some(part) = object["subresource"].as_str() {
            resource = format!("{resource}/{part}");
        }
        // An apply of what is not there makes it, for which both rights are asked.
        if event["verb"] == "patch" && code == Some(201) {
            let _new = asked.insert(right(&group, &resource, "create"));
        }
        let _new = asked.insert((group, resource, text(&event["verb"])));
    }
    (asked, refused)
}

/// What the chart's roles say.
fn granted(site: &Site) -> BTreeSet<Right> {
    let mut granted = BTreeSet::new();
    for role in ["foregate", "foregate-lease"] {
        let role = site.namespace.get("role", role);
        for rule in role["rules"].as_array().unwrap() {
            let all = |field: &str| {
                rule[field]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|v| v.as_str().unwrap())
            };
            for group in all("apiGroups") {
                for resource in all("resources") {
                    granted.extend(all("verbs").map(|verb| right(group, resource, verb)));
                }
            }
        }
    }
    granted
}
