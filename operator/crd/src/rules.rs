//! What a manifest may say: ranges, forms of texts, and rules in CEL.
//!
//! `foregate_operator::validate` says the same, for manifests that never meet an API server, and with all findings at
//! once; a test holds both together. Only here: what may not be changed, since validation sees one manifest alone.

use foregate_api::limits::{self, BANDWIDTH, KV_MEMORY, Limit, MAX_MOVE_BYTES, QuantityLimit};
use foregate_api::placement::Cover;
use serde_json::{Map, Value, json};

use crate::schema::{SchemaError, field};

/// A quantity: digits, a fraction, a suffix. Quantities below zero make no sense anywhere here.
const QUANTITY: &str = r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)(m|k|[KMGTPE]i?|[eE]\+?[0-9]+)?$";
/// The same of bytes: no thousandths.
const BYTES: &str = r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)(k|[KMGTPE]i?|[eE]\+?[0-9]+)?$";

/// What stands in rules of the whole object under a name: `$name` is replaced by the expression, which may use the
/// names after it.
const NAMES: &[(&str, &str)] = &[
    // Slots that link all workers (`foregate_planner::redundancy`): 1 + ceil((experts - 1) / workers).
    (
        "$linkingSlots",
        "(1 + ($facts.experts + $holders - 2) / $holders)",
    ),
    ("$evenSlots", "(($facts.experts + $holders - 1) / $holders)"),
    (
        "$redundantSlots",
        "(has($workers.redundantSlots) ? $workers.redundantSlots : 0)",
    ),
    // Workers that hold experts.
    ("$holders", "($workers.count - $workers.attentionOnly)"),
    ("$kvBytes", "quantity($workers.kvMemory).asInteger()"),
    (
        "$memoryBytes",
        "quantity(string($workers.resources.limits['memory'])).asInteger()",
    ),
    ("$workers", "self.spec.workers"),
    ("$facts", "self.status.model.facts"),
];

/// An expression without names.
fn spelled_out(expression: &str) -> String {
    let replace = |text: String, (name, meaning): &(&str, &str)| text.replace(name, meaning);
    NAMES.iter().fold(expression.to_owned(), replace)
}

/// A rule of a field.
struct Rule {
    /// Path of the field that is `self`; empty: the whole object.
    at: &'static str,
    /// The expression, true if all is well.
    rule: &'static str,
    /// What is wrong and what to do.
    says: Says,
}

/// A message.
enum Says {
    /// The same for all values.
    Text(&'static str),
    /// An expression, with a text for when it cannot be evaluated.
    Expression(&'static str, &'static str),
}

const RULES: &[Rule] = &[
    Rule {
        at: "",
        rule: "size(self.metadata.name) <= 48 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        says: Says::Text(
            "metadata.name: give 1 to 48 of a-z, 0-9 and `-`, a letter first and no `-` last: other objects are named after it",
        ),
    },
    // The memory plan, once the sizes of the model are known: a change that cannot fit is refused before it begins. It is
    // that of a worker that does both; where there is none, the operator says in the status what does not fit.
    Rule {
        at: "",
        rule: "$workers.device != 'cpu' || $workers.attentionOnly + $workers.expertOnly >= $workers.count || \
               !has(self.status) || !has(self.status.model) || !has($workers.resources) || !has($workers.resources.limits) || \
               !('memory' in $workers.resources.limits) || \
               $kvBytes + $facts.denseBytes + $facts.slotBytes * ($evenSlots + $redundantSlots) <= $memoryBytes",
        says: Says::Expression(
            "'spec.workers: kvMemory %d bytes + dense weights %d + %d expert slots x %d is more than resources.limits.memory, %d \
             bytes: give more memory, more workers, or less kvMemory or redundantSlots'.format([\
             $kvBytes, $facts.denseBytes, $evenSlots + $redundantSlots, $facts.slotBytes, $memoryBytes])",
            "spec.workers: KV cache and weights are more than resources.limits.memory",
        ),
    },
    // The same of slots, where they are to be enough: those of a manifest that says none are.
    Rule {
        at: "",
        rule: "!self.spec.balancing.strict || $workers.attentionOnly >= $workers.count || !has(self.status) || \
               !has(self.status.model) || !has($workers.redundantSlots) || \
               $evenSlots + $redundantSlots >= $facts.experts || $evenSlots + $redundantSlots >= $linkingSlots",
        says: Says::Expression(
            "'spec.workers.redundantSlots: %d + %d expert slots per worker do not link %d workers, which takes 1 + ceil((%d - \
             1) / %d) = %d: raise it, or set spec.balancing.strict to false'.format([\
             $evenSlots, $workers.redundantSlots, $holders, $facts.experts, $holders, $linkingSlots])",
            "spec.workers.redundantSlots: too few to link all workers; raise it, or set spec.balancing.strict to false",
        ),
    },
    Rule {
        at: "spec",
        rule: "self.balancing.cover != 'all' || (self.workers.count - self.workers.attentionOnly > 1 && \
               (!has(self.workers.domains) || size(self.workers.domains) == 0 || \
               self.workers.domains.exists(domain, domain != self.workers.domains[0])))",
        says: Says::Text(
            "balancing.cover is all, and there is one failure domain: give two workers or more, in two workers.domains, or \
             cover spread",
        ),
    },
    Rule {
        at: "spec.balancing.maxMoveBytes",
        rule: "!isQuantity(self) || (quantity(self).compareTo(quantity('1Ki')) >= 0 && \
               quantity(self).compareTo(quantity('1Pi')) <= 0)",
        says: Says::Expression("'is ' + self + '; give 1Ki to 1Pi'", "give 1Ki to 1Pi"),
    },
    Rule {
        at: "spec.balancing.economy.bandwidth",
        rule: "!isQuantity(self) || (quantity(self).compareTo(quantity('1Ki')) >= 0 && \
               quantity(self).compareTo(quantity('1Pi')) <= 0)",
        says: Says::Expression("'is ' + self + '; give 1Ki to 1Pi'", "give 1Ki to 1Pi"),
    },
    Rule {
        at: "spec.model.uri",
        rule: "self == oldSelf",
        says: Says::Text(
            "the model of a cluster cannot be changed: make another MoeCluster beside this one",
        ),
    },
    Rule {
        at: "spec.model.dtype",
        rule: "self == oldSelf",
        says: Says::Text(
            "the format of weights cannot be changed: ranks of two formats cannot serve together; make another MoeCluster",
        ),
    },
    Rule {
        at: "spec.model.quantization",
        rule: "self == oldSelf",
        says: Says::Text(
            "the format of weights cannot be changed: ranks of two formats cannot serve together; make another MoeCluster",
        ),
    },
    Rule {
        at: "spec.workers.cpuPath",
        rule: "self == oldSelf",
        says: Says::Text(
            "the instruction path cannot be changed: ranks of two paths may sum differently; make another MoeCluster",
        ),
    },
    Rule {
        at: "spec.model.uri",
        rule: "self.trim() != ''",
        says: Says::Text(
            "is empty: give hf://org/name[@revision], org/name, pvc://claim/path, oci://image or a directory",
        ),
    },
    Rule {
        at: "spec.model.uri",
        rule: "!self.contains('://') || self.matches('^(hf|file|oci)://.+') || \
               self.matches('^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/.*)?$')",
        says: Says::Text(
            "names nothing, or its scheme is not supported: give hf://org/name[@revision], org/name, pvc://claim/path, \
             oci://image or a directory",
        ),
    },
    Rule {
        at: "spec.model.servedNames",
        rule: "self.all(name, self.exists_one(other, other == name))",
        says: Says::Text("a name is given twice: remove one of them"),
    },
    Rule {
        at: "spec.workers.kvMemory",
        rule: "!isQuantity(self) || (quantity(self).compareTo(quantity('64Ki')) >= 0 && \
               quantity(self).compareTo(quantity('16Ti')) <= 0)",
        says: Says::Expression("'is ' + self + '; give 64Ki to 16Ti'", "give 64Ki to 16Ti"),
    },
    Rule {
        at: "spec.workers.device",
        rule: "self == oldSelf",
        says: Says::Text(
            "the device cannot be changed: ranks of two devices sum differently; make another MoeCluster",
        ),
    },
    Rule {
        at: "spec.workers",
        // The schema's default of `spec.workers` is judged before the defaults of its fields are filled in.
        rule: "!has(self.count) || !has(self.attentionOnly) || !has(self.expertOnly) || (self.attentionOnly < self.count && \
               self.expertOnly < self.count && self.attentionOnly + self.expertOnly <= self.count)",
        says: Says::Expression(
            "'count is %d, attentionOnly %d and expertOnly %d: some worker must take requests, some must hold experts, and \
             each worker does one of both at least: give a larger count, or less of the others'\
             .format([self.count, self.attentionOnly, self.expertOnly])",
            "count is too small for attentionOnly and expertOnly",
        ),
    },
    Rule {
        at: "spec.workers",
        rule: "!has(self.domains) || size(self.domains) == 0 || size(self.domains) == self.count",
        says: Says::Expression(
            "'domains has %d entries for %d workers: give one per worker, in the order of ranks, or none'\
             .format([size(self.domains), self.count])",
            "domains: give one per worker, in the order of ranks, or none",
        ),
    },
    Rule {
        at: "spec.workers",
        // On a card keys and values are in its own memory.
        rule: "(has(self.device) && self.device != 'cpu') || !has(self.resources) || !has(self.resources.limits) || \
               !('memory' in self.resources.limits) || !isQuantity(self.kvMemory) || !isQuantity(string(self.resources.limits['memory'])) || \
               quantity(self.kvMemory).isLessThan(quantity(string(self.resources.limits['memory'])))",
        says: Says::Expression(
            "'kvMemory %s leaves nothing of resources.limits.memory %s for weights: give more memory or less kvMemory'\
             .format([self.kvMemory, string(self.resources.limits['memory'])])",
            "kvMemory leaves nothing of resources.limits.memory for weights",
        ),
    },
    Rule {
        at: "spec.workers.resources",
        rule: FITS_LIMITS,
        says: Says::Text(
            "a request is more than its limit: raise the limit or lower the request",
        ),
    },
    Rule {
        at: "spec.gateway.resources",
        rule: FITS_LIMITS,
        says: Says::Text(
            "a request is more than its limit: raise the limit or lower the request",
        ),
    },
    Rule {
        at: "spec.gateway.autoscaling",
        rule: "self.minReplicas <= self.maxReplicas",
        says: Says::Expression(
            "'minReplicas %d is more than maxReplicas %d: raise maxReplicas'.format([self.minReplicas, self.maxReplicas])",
            "minReplicas is more than maxReplicas: raise maxReplicas",
        ),
    },
    Rule {
        at: "spec.gateway",
        rule: "!has(self.autoscaling) || (has(self.resources) && has(self.resources.requests) && 'cpu' in \
               self.resources.requests)",
        says: Says::Text("autoscaling goes by a share of resources.requests.cpu: give it"),
    },
    Rule {
        at: "spec.gateway.traffic.tenants",
        rule: "self.all(tenant, self.exists_one(other, other.name == tenant.name))",
        says: Says::Text("a tenant is given twice: remove one of them"),
    },
    Rule {
        at: "spec.security",
        rule: "self.mtls || !has(self.certManager)",
        says: Says::Text(
            "certManager has nothing to issue, since mtls is false: set mtls to true or leave certManager out",
        ),
    },
    Rule {
        at: "spec.pods.labels",
        rule: OWN_KEYS,
        says: Says::Text(
            "keys of foregate.dev/ and app.kubernetes.io/ are the operator's: choose another prefix",
        ),
    },
    Rule {
        at: "spec.pods.annotations",
        rule: OWN_KEYS,
        says: Says::Text(
            "keys of foregate.dev/ and app.kubernetes.io/ are the operator's: choose another prefix",
        ),
    },
];

const FITS_LIMITS: &str = "!has(self.requests) || !has(self.limits) || self.requests.all(name, !(name in self.limits) || \
                           !isQuantity(string(self.requests[name])) || !isQuantity(string(self.limits[name])) || \
                           quantity(string(self.requests[name])).compareTo(quantity(string(self.limits[name]))) <= 0)";
const OWN_KEYS: &str =
    "self.all(key, !key.startsWith('foregate.dev/') && !key.startsWith('app.kubernetes.io/'))";

/// Puts everything into the schema of `MoeCluster`.
pub(crate) fn constrain(object: &mut Value) -> Result<(), SchemaError> {
    metadata(object)?;
    for limit in limits::all() {
        number(object, limit.field, &limit)?;
    }
    traffic(object)?;
    texts(object)?;
    quantities(object)?;
    enumerations(object)?;
    threshold(object, "spec.balancing.threshold")?;
    for (field, default) in [("enabled", true), ("forecast", true), ("strict", false)] {
        let field = format!("spec.balancing.{field}");
        set(object, &field, &[("default", json!(default))])?;
    }
    set(object, "spec.security.mtls", &[("default", json!(true))])?;
    // Without an object there are no defaults of its fields.
    for group in [
        "spec.workers",
        "spec.gateway",
        "spec.gateway.traffic",
        "spec.balancing",
        "spec.security",
        "spec.pods",
    ] {
        set(object, group, &[("default", json!({}))])?;
    }
    for rule in RULES {
        add(object, rule)?;
    }
    set(
        object,
        "status.conditions",
        &[
            ("x-kubernetes-list-type", json!("map")),
            ("x-kubernetes-list-map-keys", json!(["type"])),
        ],
    )
}

/// The limits of `spec.balancing` in the schema of `ExpertPlacement`.
pub(crate) fn constrain_balancing(object: &mut Value) -> Result<(), SchemaError> {
    metadata(object)?;
    for limit in limits::all() {
        if limit.field.starts_with("spec.balancing.") {
            number(object, limit.field, &limit)?;
        }
    }
    bytes(object, &MAX_MOVE_BYTES)?;
    bytes(object, &BANDWIDTH)?;
    threshold(object, "spec.balancing.threshold")
}

/// The API server knows what metadata is; only its name may be ruled.
fn metadata(object: &mut Value) -> Result<(), SchemaError> {
    field(object, "")?
        .entry("properties")
        .or_insert_with(|| json!({}))
        .as_object_mut()
        .ok_or_else(|| SchemaError::NoField("metadata".to_owned()))?
        .insert("metadata".to_owned(), json!({ "type": "object" }));
    Ok(())
}

fn number(object: &mut Value, path: &str, limit: &Limit<u64>) -> Result<(), SchemaError> {
    set(
        object,
        path,
        &[
            ("minimum", json!(limit.low)),
            ("maximum", json!(limit.high)),
        ],
    )?;
    match limit.default {
        Some(default) => set(object, path, &[("default", json!(default))]),
        None => Ok(()),
    }
}

fn threshold(object: &mut Value, path: &str) -> Result<(), SchemaError> {
    set(
        object,
        path,
        &[
            ("default", json!(limits::THRESHOLD)),
            ("minimum", json!(0)),
            ("exclusiveMinimum", json!(true)),
            ("maximum", json!(1)),
        ],
    )
}

/// Tenants and priorities.
fn traffic(object: &mut Value) -> Result<(), SchemaError> {
    let (low, high) = limits::PRIORITY;
    let range = [("minimum", json!(low)), ("maximum", json!(high))];
    for path in [
        "spec.gateway.traffic.mostUrgentPriority",
        "spec.gateway.traffic.tenants[].mostUrgentPriority",
    ] {
        set(object, path, &range)?;
    }
    set(
        object,
        "spec.gateway.traffic.mostUrgentPriority",
        &[("default", json!(limits::MOST_URGENT_PRIORITY))],
    )?;
    let priority =
        json!({ "type": "integer", "format": "int64", "minimum": low, "maximum": high });
    set(
        object,
        "spec.gateway.traffic.objectives",
        &[
            ("maxProperties", json!(limits::MAX_TENANTS)),
            ("additionalProperties", priority),
        ],
    )?;
    set(
        object,
        "spec.gateway.traffic.tenants",
        &[("maxItems", json!(limits::MAX_TENANTS))],
    )?;
    set(
        object,
        "spec.gateway.traffic.tenants[].name",
        &[
            ("minLength", json!(1)),
            ("maxLength", json!(limits::MAX_TENANT_NAME)),
            ("pattern", json!("^[!-~]+$")),
        ],
    )
}

fn texts(object: &mut Value) -> Result<(), SchemaError> {
    set(
        object,
        "spec.model.uri",
        &[
            ("minLength", json!(1)),
            ("maxLength", json!(limits::MAX_URI)),
            ("pattern", json!(r"^[^\x00-\x1f\x7f]*$")),
        ],
    )?;
    set(
        object,
        "spec.model.servedNames",
        &[("maxItems", json!(limits::MAX_SERVED_NAMES))],
    )?;
    set(
        object,
        "spec.model.servedNames[]",
        &[
            ("minLength", json!(1)),
            ("maxLength", json!(limits::MAX_SERVED_NAME)),
            ("pattern", json!(r"^[^\s\x00-\x1f\x7f]+$")),
        ],
    )?;
    set(
        object,
        "spec.workers.domains",
        &[("maxItems", json!(limits::COUNT.high))],
    )?;
    set(
        object,
        "spec.workers.domains[]",
        &[
            ("minLength", json!(1)),
            ("maxLength", json!(limits::MAX_DOMAIN)),
            ("pattern", json!("^[-A-Za-z0-9_./]+$")),
        ],
    )?;
    for name in [
        "spec.model.cacheClaim",
        "spec.model.tokenSecret",
        "spec.security.certManager.issuer",
        "spec.security.apiKeys.secretRef.name",
    ] {
        set(
            object,
            name,
            &[
                ("minLength", json!(1)),
                ("maxLength", json!(limits::MAX_DOMAIN)),
                ("pattern", json!("^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")),
            ],
        )?;
    }
    set(
        object,
        "spec.model.tokenSecret",
        &[("default", json!(limits::TOKEN_SECRET))],
    )?;
    set(
        object,
        "spec.workers.domainLabel",
        &[
            ("default", json!(limits::DOMAIN_LABEL)),
            ("minLength", json!(1)),
            ("maxLength", json!(317)),
            ("pattern", json!("^[-A-Za-z0-9_./]+$")),
        ],
    )
}

fn quantities(object: &mut Value) -> Result<(), SchemaError> {
    for limit in [&KV_MEMORY, &MAX_MOVE_BYTES, &BANDWIDTH] {
        bytes(object, limit)?;
    }
    for resources in ["spec.workers.resources", "spec.gateway.resources"] {
        for map in ["requests", "limits"] {
            let values = json!({
                "anyOf": [{ "type": "integer" }, { "type": "string" }],
                "x-kubernetes-int-or-string": true,
                "maxLength": 32,
                "pattern": QUANTITY,
            });
            set(
                object,
                &format!("{resources}.{map}"),
                &[
                    ("maxProperties", json!(32)),
                    ("additionalProperties", values),
                ],
            )?;
        }
    }
    for map in ["labels", "annotations", "nodeSelector", "env"] {
        set(
            object,
            &format!("spec.pods.{map}"),
            &[("maxProperties", json!(64))],
        )?;
    }
    Ok(())
}

fn bytes(object: &mut Value, limit: &QuantityLimit) -> Result<(), SchemaError> {
    let form = [("maxLength", json!(32)), ("pattern", json!(BYTES))];
    set(object, limit.field, &form)?;
    match limit.default {
        Some(default) => set(object, limit.field, &[("default", json!(default))]),
        None => Ok(()),
    }
}

fn enumerations(object: &mut Value) -> Result<(), SchemaError> {
    let powers: Vec<u32> = (0..=8).map(|bit| 1 << bit).collect();
    set(
        object,
        "spec.workers.pageTokens",
        &[("enum", json!(powers))],
    )?;
    for (path, default) in [
        ("spec.model.dtype", "auto"),
        ("spec.model.quantization", "none"),
        ("spec.workers.cpuPath", "auto"),
        ("spec.workers.device", "cpu"),
        ("spec.workers.pinning", "none"),
        ("spec.gateway.routing", "signature"),
        ("spec.balancing.cover", Cover::default().name()),
        ("spec.security.certManager.kind", "Issuer"),
    ] {
        set(object, path, &[("default", json!(default))])?;
    }
    Ok(())
}

fn set(object: &mut Value, path: &str, entries: &[(&str, Value)]) -> Result<(), SchemaError> {
    let schema = field(object, path)?;
    for (key, value) in entries {
        schema.insert((*key).to_owned(), value.clone());
    }
    Ok(())
}

fn add(object: &mut Value, rule: &Rule) -> Result<(), SchemaError> {
    let mut entry = Map::new();
    entry.insert("rule".to_owned(), json!(spelled_out(rule.rule)));
    match rule.says {
        Says::Text(text) => {
            entry.insert("message".to_owned(), json!(text));
        }
        Says::Expression(expression, text) => {
            entry.insert("message".to_owned(), json!(text));
            entry.insert(
                "messageExpression".to_owned(),
                json!(spelled_out(expression)),
            );
        }
    }
    let schema = field(object, rule.at)?;
    let rules = schema
        .entry("x-kubernetes-validations")
        .or_insert_with(|| json!([]));
    if let Some(rules) = rules.as_array_mut() {
        rules.push(Value::Object(entry));
    }
    Ok(())
}
