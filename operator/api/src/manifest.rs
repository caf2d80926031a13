//! The `MoeCluster` manifest: the one document that `foregate up -f` and Kubernetes both take.
//!
//! This is the document as written. `foregate_operator::validate` turns it into a `ValidatedCluster`,
//! in which nothing is optional; unknown fields are errors already here.

use serde::{Deserialize, Serialize};

use crate::cpu::CpuPath;
use crate::weights::{PlainFormat, Quantization};

/// `apiVersion` of every manifest.
pub const API_VERSION: &str = "foregate.dev/v1alpha1";
/// `kind` of a cluster manifest.
pub const KIND: &str = "MoeCluster";

/// The document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifest {
    /// Must be [`API_VERSION`].
    pub api_version: String,
    /// Must be [`KIND`].
    pub kind: String,
    /// Name and the like.
    pub metadata: Metadata,
    /// What is wanted.
    pub spec: ClusterSpec,
}

/// The part of Kubernetes' metadata that a manifest file carries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// DNS label of at most 63 characters.
    pub name: String,
    /// Kubernetes namespace; `foregate up` ignores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels, passed through.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub labels: std::collections::BTreeMap<String, String>,
    /// Annotations, passed through.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub annotations: std::collections::BTreeMap<String, String>,
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterSpec {
    /// Which model.
    pub model: ModelSource,
    /// How many workers and how they compute.
    #[serde(default)]
    pub workers: WorkersSpec,
    /// The HTTP side.
    #[serde(default)]
    pub gateway: GatewaySpec,
    /// How experts are kept in balance.
    #[serde(default)]
    pub balancing: BalancingSpec,
}

/// Where the model comes from and what it is called.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelSource {
    /// A directory (relative to the manifest), `file://…`, `hf://org/name[@revision]` or bare `org/name`.
    pub uri: String,
    /// Names under which `/v1/models` lists it; the first is the main one. Default: last part of the URI.
    #[serde(default)]
    pub served_names: Vec<String>,
    /// Longest sequence; default and upper limit: the model's own.
    #[serde(default)]
    pub max_model_len: Option<u32>,
    /// Format of the weights that are not quantised: `auto`, as the files have them, or `float32`, `bfloat16`,
    /// `float16`. Default `auto`.
    #[serde(default)]
    pub dtype: Option<PlainFormat>,
    /// Quantise linear layers at load: `none`, `int8`, `int4`, `fp8`, `mxfp4`. Default `none`.
    #[serde(default)]
    pub quantization: Option<Quantization>,
}

/// Workers. All numbers are per worker.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkersSpec {
    /// Number of workers, default 2.
    #[serde(default)]
    pub count: Option<u32>,
    /// Expert slots per MoE layer and worker beyond ⌈experts / count⌉. Default: enough to link all ranks
    /// (`S = 1 + ⌈(N−1)/G⌉` slots in all, for N experts on G workers).
    #[serde(default)]
    pub redundant_slots: Option<u32>,
    /// Compute threads; default: the machine's cores divided by the workers on it, at least 1.
    #[serde(default)]
    pub threads: Option<u32>,
    /// Instructions of the kernels, default `auto`.
    #[serde(default)]
    pub cpu_path: Option<CpuPath>,
    /// Most sequences in a batch, default 64.
    #[serde(default)]
    pub max_num_seqs: Option<u32>,
    /// Most tokens in a step, default 512.
    #[serde(default)]
    pub max_num_batched_tokens: Option<u32>,
    /// Most sequences waiting in a worker's queue, default 256.
    #[serde(default)]
    pub max_waiting: Option<u32>,
    /// Tokens per KV page, default 16.
    #[serde(default)]
    pub page_tokens: Option<u32>,
    /// Memory of the KV cache, in Kubernetes' notation (`512Mi`), default 512Mi.
    #[serde(default)]
    pub kv_memory: Option<String>,
    /// Milliseconds after which a peer's rows count as late, default 2000.
    #[serde(default)]
    pub exchange_deadline_ms: Option<u64>,
    /// Failure domains in rank order, one per worker; default: none.
    #[serde(default)]
    pub domains: Vec<String>,
}

/// A routing policy of the gateway; one file each in `gateway/src/route`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum RoutingPolicy {
    /// The worker whose running requests use the most similar experts, within a band of load.
    #[default]
    Signature,
    /// The pair of a waiting request and a worker that costs least, over a window of the queue.
    Window,
    /// The worker with the fewest running and waiting requests.
    LeastLoaded,
    /// One after the other.
    RoundRobin,
}

/// The HTTP side.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GatewaySpec {
    /// Policy, default `signature`.
    #[serde(default)]
    pub routing: Option<RoutingPolicy>,
    /// Most requests in work, default 256.
    #[serde(default)]
    pub max_in_flight: Option<u32>,
    /// Most requests waiting for a permit, default 1024. Beyond it: 429.
    #[serde(default)]
    pub max_queued: Option<u32>,
    /// Longest wait for a permit in milliseconds, default 30000. Beyond it: 429.
    #[serde(default)]
    pub queue_timeout_ms: Option<u64>,
    /// Longest life of a request in milliseconds, default 600000.
    #[serde(default)]
    pub request_timeout_ms: Option<u64>,
}

/// How experts are kept in balance.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BalancingSpec {
    /// Whether copies may move after the first placement, default true.
    #[serde(default)]
    pub enabled: Option<bool>,
    /// Length of a load window in milliseconds, default 2000.
    #[serde(default)]
    pub window_ms: Option<u64>,
    /// Balance (mean over maximum, after the best split) below which copies may move, default 0.97.
    #[serde(default)]
    pub threshold: Option<f64>,
    /// Most copies to move per layer and window, default 4.
    #[serde(default)]
    pub max_moves_per_layer: Option<u32>,
    /// Rows per layer below which a window says too little to act on, default 256.
    #[serde(default)]
    pub min_rows: Option<u64>,
}
