//! Manifests that are admitted, and manifests that are not with what the refusal names.

use serde_json::{Value, json};

/// One manifest: a change of a good one.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) change: fn(&mut Value),
    /// Part of the refusal; empty for what is admitted.
    pub(crate) says: &'static str,
}

/// The example, changed.
pub(crate) fn object(change: fn(&mut Value)) -> Value {
    let mut object = json!({
        "apiVersion": "foregate.dev/v1alpha1",
        "kind": "MoeCluster",
        "metadata": { "name": "tiny", "namespace": "default" },
        "spec": {
            "model": { "uri": "../../e2e/models/demo", "servedNames": ["demo"] },
            "workers": { "count": 2, "redundantSlots": 2, "kvMemory": "128Mi" },
        },
    });
    change(&mut object);
    object
}

/// Sets the value at a pointer, making the objects on the way.
pub(crate) fn put(object: &mut Value, path: &str, value: Value) {
    let mut at = object;
    for step in path.trim_start_matches('/').split('/') {
        if !at.is_object() {
            *at = json!({});
        }
        at = &mut at[step.replace("~1", "/").as_str()];
    }
    *at = value;
}

macro_rules! rows {
    ($($name:literal, $path:literal, $value:tt => $says:literal;)*) => {
        &[$(Row { name: $name, change: |o| put(o, $path, json!($value)), says: $says }),*]
    };
}

pub(crate) const GOOD: &[Row] = rows! {
    "the example", "/spec/workers/count", 2 => "";
    "one worker", "/spec/workers/count", 1 => "";
    "most workers", "/spec/workers/count", 1024 => "";
    "a domain for each", "/spec/workers/domains", ["a", "rack-2"] => "";
    "a hub model", "/spec/model/uri", "hf://Qwen/Qwen3-30B-A3B@main" => "";
    "a bare hub model", "/spec/model/uri", "Qwen/Qwen3-30B-A3B" => "";
    "a claim", "/spec/model/uri", "pvc://models/qwen/3" => "";
    "an image", "/spec/model/uri", "oci://ghcr.io/org/model:1" => "";
    "a large page", "/spec/workers/pageTokens", 256 => "";
    "the smallest cache", "/spec/workers/kvMemory", "64Ki" => "";
    "the largest cache", "/spec/workers/kvMemory", "16Ti" => "";
    "a cache in bytes", "/spec/workers/kvMemory", "1e9" => "";
    "tenants with rules", "/spec/gateway/traffic", { "tokensPerMinute": 1000, "mostUrgentPriority": -1, "objectives": { "batch": 5 }, "tenants": [{ "name": "a" }, { "name": "b", "weight": 2, "speaksForOthers": true }] } => "";
    "a share of a core", "/spec/workers/resources/limits/cpu", "1500m" => "";
    "a whole number of cards", "/spec/workers/resources/limits/nvidia.com~1gpu", 1 => "";
    "attention apart", "/spec/workers/attentionOnly", 1 => "";
    "a processor by name", "/spec/workers/device", "cpu" => "";
    "cards", "/spec/workers/device", "cuda" => "";
    "quantised weights on cards", "/spec", { "model": { "uri": "/m", "quantization": "int8" }, "workers": { "device": "cuda" } } => "";
    "half weights on cards", "/spec", { "model": { "uri": "/m", "dtype": "float16" }, "workers": { "device": "cuda" } } => "";
    "a request at its limit", "/spec/gateway/resources", { "requests": { "cpu": "1" }, "limits": { "cpu": "1000m" } } => "";
    "an autoscaler", "/spec/gateway", { "autoscaling": { "maxReplicas": 3 }, "resources": { "requests": { "cpu": 1 } } } => "";
    "a toleration", "/spec/pods/tolerations", [{ "key": "gpu", "operator": "Exists", "effect": "NoSchedule" }] => "";
    "a whole balance", "/spec/balancing/threshold", 1.0 => "";
    "a cover of all", "/spec/balancing/cover", "all" => "";
    "a cover of all in named domains", "/spec", { "model": { "uri": "m" }, "workers": { "domains": ["a", "b"] }, "balancing": { "cover": "all" } } => "";
    "no cover", "/spec/balancing/cover", "none" => "";
    "bytes to move", "/spec/balancing/maxMoveBytes", "2Gi" => "";
    "an economy as measured", "/spec/balancing/economy", {} => "";
    "an economy", "/spec/balancing/economy", { "horizonSeconds": 60, "bandwidth": "125M", "expertsPercent": 100, "slowdownPercent": 0 } => "";
    "slots that must be enough", "/spec/balancing/strict", true => "";
    "plain connections", "/spec/security/mtls", false => "";
    "an issuer", "/spec/security/certManager", { "issuer": "ca", "kind": "ClusterIssuer" } => "";
    "keys of clients", "/spec/security/apiKeys/secretRef/name", "clients" => "";
    "a label of one's own", "/spec/pods/labels", { "team": "x" } => "";
};

pub(crate) const BAD: &[Row] = rows! {
    "a name with a dot", "/metadata/name", "tiny.v2" => "metadata.name: give 1 to 48";
    "a name that leaves no room", "/metadata/name", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" => "metadata.name: give 1 to 48";
    "a name that begins with a digit", "/metadata/name", "2tiny" => "metadata.name: give 1 to 48";
    "no model", "/spec/model/uri", "" => "spec.model.uri";
    "a blank model", "/spec/model/uri", "  " => "is empty: give hf://";
    "an unknown scheme", "/spec/model/uri", "s3://bucket/model" => "its scheme is not supported";
    "a scheme alone", "/spec/model/uri", "hf://" => "names nothing";
    "a claim without a name", "/spec/model/uri", "pvc:///model" => "names nothing";
    "a control character", "/spec/model/uri", "a\u{7}b" => "spec.model.uri";
    "a name twice", "/spec/model/servedNames", ["a", "a"] => "a name is given twice";
    "a name with a space", "/spec/model/servedNames", ["a b"] => "spec.model.servedNames[0]";
    "a length of one", "/spec/model/maxModelLen", 1 => "spec.model.maxModelLen";
    "an unknown format", "/spec/model/quantization", "int3" => "spec.model.quantization";
    "a claim of capitals", "/spec/model/cacheClaim", "Cache" => "spec.model.cacheClaim";
    "no workers", "/spec/workers/count", 0 => "spec.workers.count";
    "too many workers", "/spec/workers/count", 1025 => "spec.workers.count";
    "workers in words", "/spec/workers/count", "two" => "spec.workers.count";
    "experts and nobody who asks", "/spec/workers/expertOnly", 2 => "count is 2, attentionOnly 0 and expertOnly 2";
    "nobody with experts", "/spec/workers/attentionOnly", 2 => "count is 2, attentionOnly 2 and expertOnly 0";
    "a page of 24", "/spec/workers/pageTokens", 24 => "spec.workers.pageTokens";
    "no batch", "/spec/workers/maxNumSeqs", 0 => "spec.workers.maxNumSeqs";
    "a cache of a byte", "/spec/workers/kvMemory", "1" => "is 1; give 64Ki to 16Ti";
    "a cache beyond all", "/spec/workers/kvMemory", "17Ti" => "give 64Ki to 16Ti";
    "a unit of its own", "/spec/workers/kvMemory", "512MiB" => "spec.workers.kvMemory";
    "domains for others", "/spec/workers/domains", ["a"] => "domains has 1 entries for 2 workers";
    "an empty domain", "/spec/workers/domains", ["a", ""] => "spec.workers.domains[1]";
    "cache and no weights", "/spec/workers/resources/limits/memory", "128Mi" => "leaves nothing of resources.limits.memory";
    "a request above its limit", "/spec/workers/resources", { "requests": { "cpu": "2" }, "limits": { "cpu": "1500m" } } => "a request is more than its limit";
    "an amount in words", "/spec/workers/resources/limits/cpu", "many" => "spec.workers.resources.limits.cpu";
    "an unknown policy", "/spec/gateway/routing", "random" => "spec.gateway.routing";
    "no gateways", "/spec/gateway/replicas", 0 => "spec.gateway.replicas";
    "an autoscaler without a request", "/spec/gateway/autoscaling", {} => "autoscaling goes by a share of resources.requests.cpu";
    "an autoscaler upside down", "/spec/gateway", { "autoscaling": { "minReplicas": 5 }, "resources": { "requests": { "cpu": 1 } } } => "minReplicas 5 is more than maxReplicas 4";
    "no time to wait", "/spec/gateway/queueTimeoutMs", 0 => "spec.gateway.queueTimeoutMs";
    "no request a minute", "/spec/gateway/traffic/requestsPerMinute", 0 => "spec.gateway.traffic.requestsPerMinute";
    "no token a minute", "/spec/gateway/traffic/tokensPerMinute", 0 => "spec.gateway.traffic.tokensPerMinute";
    "a tenant without a share", "/spec/gateway/traffic/tenants", [{ "name": "a", "weight": 0 }] => "spec.gateway.traffic.tenants[0].weight";
    "a tenant of two words", "/spec/gateway/traffic/tenants", [{ "name": "two words" }] => "spec.gateway.traffic.tenants[0].name";
    "a tenant given twice", "/spec/gateway/traffic/tenants", [{ "name": "a" }, { "name": "a" }] => "is given twice";
    "a balance of nothing", "/spec/balancing/threshold", 0.0 => "spec.balancing.threshold";
    "more than balanced", "/spec/balancing/threshold", 1.01 => "spec.balancing.threshold";
    "an unknown cover", "/spec/balancing/cover", "half" => "spec.balancing.cover";
    "a cover by one worker", "/spec", { "model": { "uri": "m" }, "workers": { "count": 1 }, "balancing": { "cover": "all" } } => "there is one failure domain";
    "a cover in one domain", "/spec", { "model": { "uri": "m" }, "workers": { "domains": ["a", "a"] }, "balancing": { "cover": "all" } } => "there is one failure domain";
    "bytes of a unit of its own", "/spec/balancing/maxMoveBytes", "2GiB" => "spec.balancing.maxMoveBytes";
    "a byte to move", "/spec/balancing/maxMoveBytes", "1" => "is 1; give 1Ki to 1Pi";
    "no horizon", "/spec/balancing/economy/horizonSeconds", 0 => "spec.balancing.economy.horizonSeconds";
    "a bandwidth beyond all", "/spec/balancing/economy/bandwidth", "2Pi" => "give 1Ki to 1Pi";
    "more than all in experts", "/spec/balancing/economy/expertsPercent", 101 => "spec.balancing.economy.expertsPercent";
    "slower than still", "/spec/balancing/economy/slowdownPercent", 101 => "spec.balancing.economy.slowdownPercent";
    "strict in words", "/spec/balancing/strict", "very" => "spec.balancing.strict";
    "a short window", "/spec/balancing/windowMs", 1 => "spec.balancing.windowMs";
    "an operator of none", "/spec/pods/tolerations", [{ "operator": "Perhaps" }] => "spec.pods.tolerations[0].operator";
    "an issuer of nothing", "/spec/security", { "mtls": false, "certManager": { "issuer": "ca" } } => "certManager has nothing to issue";
    "an issuer of capitals", "/spec/security/certManager/issuer", "CA" => "spec.security.certManager.issuer";
    "an unknown issuer", "/spec/security/certManager", { "issuer": "ca", "kind": "Vault" } => "spec.security.certManager.kind";
    "keys in no Secret", "/spec/security/apiKeys/secretRef/name", "" => "spec.security.apiKeys.secretRef.name";
    "the operator's label", "/spec/pods/labels", { "foregate.dev/rank": "7" } => "are the operator's";
};
