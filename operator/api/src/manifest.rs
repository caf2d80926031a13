//! The `MoeCluster` manifest: the one document that `foregate up -f` and Kubernetes both take.
//!
//! This is the document as written. `foregate_operator::validate` turns it into a `ValidatedCluster`,
//! in which nothing is optional; unknown fields are errors already here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cpu::{CpuPath, Pinning};
use crate::placement::Cover;
use crate::security::SecuritySpec;
use crate::traffic::TrafficSpec;
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
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations, passed through.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
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
    /// Who may speak with whom.
    #[serde(default)]
    pub security: SecuritySpec,
    /// What all pods of the cluster have in common. Only Kubernetes has pods; `foregate up` does not look at it.
    #[serde(default)]
    pub pods: PodsSpec,
}

/// Where the model comes from and what it is called.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ModelSource {
    /// `hf://org/name[@revision]` or bare `org/name[@revision]` on the hub, `pvc://claim/path`,
    /// `oci://registry/repository:tag`, `file:///directory` or a directory. `foregate up` takes relative directories from
    /// the manifest's own, and has no `pvc` and no `oci`. In pods a directory is one of the image, and a relative one,
    /// which begins with a dot or has no slash, starts at its root. Cannot be changed.
    pub uri: String,
    /// Names under which `/v1/models` lists it; the first is the main one. Default: last part of the URI.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub served_names: Vec<String>,
    /// Longest sequence; default and upper limit: the model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
    /// Format of the weights that are not quantised: `auto`, as the files have them, or `float32`, `bfloat16`,
    /// `float16`. Default `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<PlainFormat>,
    /// Quantise linear layers at load: `none`, `int8`, `int4`, `fp8`, `mxfp4`. Default `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// Claim (PersistentVolumeClaim) that keeps downloaded hub models, shared by all pods, so ReadWriteMany on more than
    /// one machine. Default: each pod downloads into a volume of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_claim: Option<String>,
    /// Secret whose key `HF_TOKEN` is the hub's token; pods start without it if there is none. Default `hf-token`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret: Option<String>,
}

/// Workers. All numbers are per worker.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct WorkersSpec {
    /// Number of workers, default 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// What they compute on: `cpu`, or `cuda`, where each has a card of its own that its pod asks for in `resources`.
    /// Default `cpu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceClass>,
    /// Workers that take requests and hold no experts: the first ones, by rank. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_only: Option<u32>,
    /// Workers that hold experts and take no requests, so that they need neither attention weights nor keys and values: the
    /// ones after `attentionOnly`, by rank. Default 0. All other workers do both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert_only: Option<u32>,
    /// Expert slots per MoE layer and worker that holds experts, beyond ⌈experts / such workers⌉. Default: enough to link all ranks
    /// (`S = 1 + ⌈(N−1)/G⌉` slots in all, for N experts on G such workers), and for `balancing.cover: all` enough for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redundant_slots: Option<u32>,
    /// Compute threads; default: the machine's cores divided by the workers on it, at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// Instructions of the kernels, default `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_path: Option<CpuPath>,
    /// Which processors compute threads keep to: `none`, `node` (one NUMA node), `core` (a processor each). Default
    /// `node`, in pods `none`: which processors a pod has to itself only the kubelet's CPU manager knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinning: Option<Pinning>,
    /// Most sequences in a batch, default 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_num_seqs: Option<u32>,
    /// Most tokens in a step, default 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_num_batched_tokens: Option<u32>,
    /// Most sequences waiting in a worker's queue, default 256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_waiting: Option<u32>,
    /// Milliseconds for which a sequence that waits in a worker may be overtaken by ones whose experts the batch reads
    /// anyway; then it is next. Default 0: the order is that of arrival.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overtake_ms: Option<u64>,
    /// Tokens per KV page, default 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_tokens: Option<u32>,
    /// Memory of the KV cache, in Kubernetes' notation (`512Mi`), default 512Mi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_memory: Option<String>,
    /// Milliseconds after which a peer's rows count as late, default 2000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exchange_deadline_ms: Option<u64>,
    /// Failure domains in rank order, one per worker; default: none. In Kubernetes they are values of the nodes' label
    /// `domainLabel`, and each rank's pod goes to a node of its domain; without them pods are spread over the label's
    /// values, and a worker's domain is its node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<String>,
    /// Label of nodes that tells failure domains apart, default `kubernetes.io/hostname`. Only for Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_label: Option<String>,
    /// Image of the workers' pods. Default: `pods.image`, and without it the operator's: with `device: cuda` its image
    /// for cards, else its own. Only for Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What a worker's pod asks for. `foregate up` does not look at it.
    #[serde(default)]
    pub resources: ResourcesSpec,
}

/// What workers compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum DeviceClass {
    /// Processors.
    #[default]
    Cpu,
    /// Cards with CUDA, one for each worker.
    Cuda,
}

/// What a container asks for, by resource: `cpu`, `memory`, or one of a device plugin, such as `nvidia.com/gpu`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ResourcesSpec {
    /// What the scheduler sets aside.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, Quantity>,
    /// What may not be exceeded.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, Quantity>,
}

/// An amount of a resource in Kubernetes' notation, as text or as a whole number: `500m`, `2Gi`, `1`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize)]
#[serde(transparent)]
pub struct Quantity(pub String);

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;

        impl serde::de::Visitor<'_> for Form {
            type Value = Quantity;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a quantity, such as 500m, 2Gi or 1")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Quantity, E> {
                Ok(Quantity(text.to_owned()))
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }

            fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }
        }

        deserializer.deserialize_any(Form)
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for Quantity {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "x-kubernetes-int-or-string": true })
    }
}

/// A routing policy of the gateway; one file each in `gateway/src/route`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum RoutingPolicy {
    /// The worker whose running requests use the most similar experts, within a band of load.
    #[default]
    Signature,
    /// The pair of a waiting request and a worker that costs least, over a window of the queue.
    Window,
    /// The worker whose KV cache holds the longest prefix of the prompt, within a band of load.
    PrefixAware,
    /// The worker with the fewest running and waiting requests.
    LeastLoaded,
    /// One after the other.
    RoundRobin,
}

/// The HTTP side.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct GatewaySpec {
    /// Policy, default `signature`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingPolicy>,
    /// Most requests in work, default 256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_in_flight: Option<u32>,
    /// Most requests waiting for a permit, default 1024. Beyond it: 429.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_queued: Option<u32>,
    /// Longest wait for a permit in milliseconds, default 30000. Beyond it: 429.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_timeout_ms: Option<u64>,
    /// Longest life of a request in milliseconds, default 600000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_timeout_ms: Option<u64>,
    /// Tenants: limits, priorities, shares.
    #[serde(default)]
    pub traffic: TrafficSpec,
    /// Number of gateways, default 1; with `autoscaling` the autoscaler's to say. `foregate up` starts one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    /// Lets a HorizontalPodAutoscaler choose the number of gateways. Default: none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<AutoscalingSpec>,
    /// What a gateway's pod asks for. `foregate up` does not look at it.
    #[serde(default)]
    pub resources: ResourcesSpec,
}

/// How many gateways the autoscaler may start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct AutoscalingSpec {
    /// Fewest gateways, default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_replicas: Option<u32>,
    /// Most gateways, default 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_replicas: Option<u32>,
    /// Use of the requested processor time to aim at, in percent, default 70.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<u32>,
}

/// How experts are kept in balance.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BalancingSpec {
    /// Whether copies may move after the first placement, default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// Length of a load window in milliseconds, default 2000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_ms: Option<u64>,
    /// Balance (mean over maximum, after the best split) below which copies may move, default 0.98.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// Most copies to move per layer and window, default 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_moves_per_layer: Option<u32>,
    /// Rows per layer below which a window says too little to act on, default 256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_rows: Option<u64>,
    /// Whether gateways tell the planner what the requests that they have admitted will ask for, default true. It is
    /// used only while it predicts the load better than the last windows do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast: Option<bool>,
    /// What the copies of experts shall span, so that the loss of a failure domain takes none with it: `none`, `spread`
    /// (experts that have several copies have them in two failure domains), `all` (every expert has copies in two, which
    /// takes twice as many slots as there are experts). Default `spread`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cover: Option<Cover>,
    /// Most bytes of experts to move per window, over all layers, in Kubernetes' notation (`2Gi`); they are spent where
    /// they gain most. Default: no limit. What repair and new workers need is not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_move_bytes: Option<String>,
    /// Makes copies move only if that saves more time than it costs. Default: they move if it gains at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub economy: Option<EconomySpec>,
    /// Refuses a cluster whose workers have too few slots to be linked, or for the cover asked for, in place of a note.
    /// Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

/// What decides whether a move of copies pays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EconomySpec {
    /// Seconds until drift has eaten the advantage of a move, default 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub horizon_seconds: Option<u32>,
    /// Bytes per second that a worker loads experts with: its link, times the share of it that moves get; in Kubernetes'
    /// notation (`125M`). It is what costs are reckoned with, and slows no transfer. Default: as measured at this
    /// cluster's last moves; the moves before it is known are made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<String>,
    /// Part of a step's time that goes into experts, were they balanced, in percent, default 50.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts_percent: Option<u32>,
    /// Part of the speed that is lost while copies are on their way, in percent, default 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slowdown_percent: Option<u32>,
}

/// What all pods of a cluster have in common.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PodsSpec {
    /// Image of all roles, but for workers that `workers.image` names one for; default: the operator's own, and that for
    /// cards for workers with `device: cuda`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// When a node pulls the image; default: as Kubernetes decides by its tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<PullPolicy>,
    /// Secrets with credentials of the image's registry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<String>,
    /// Environment of all containers, for what libraries read themselves: `NCCL_…`, `UCX_…`, `OMP_NUM_THREADS`,
    /// `RUST_LOG`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that do not keep the pods away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<TolerationSpec>,
    /// PriorityClass of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
    /// RuntimeClass of the workers' pods, such as `nvidia`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_class_name: Option<String>,
    /// Labels of the pods beside the operator's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations of the pods beside the operator's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// When a node pulls an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum PullPolicy {
    /// At every start of a container.
    Always,
    /// Unless the node has it.
    IfNotPresent,
    /// Never; the node must have it.
    Never,
}

impl PullPolicy {
    /// As Kubernetes spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// A taint that does not keep the pods away.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TolerationSpec {
    /// Key of the taint; absent: every taint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// `Exists` or `Equal`, default `Equal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator: Option<TolerationOperator>,
    /// Value of the taint, for `Equal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`; absent: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<TaintEffect>,
    /// Seconds until a pod leaves a node tainted `NoExecute`; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub toleration_seconds: Option<i64>,
}

/// How a toleration matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum TolerationOperator {
    /// Whatever the value is.
    Exists,
    /// The same value.
    Equal,
}

impl TolerationOperator {
    /// As Kubernetes spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exists => "Exists",
            Self::Equal => "Equal",
        }
    }
}

/// What a taint does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum TaintEffect {
    /// New pods stay away.
    NoSchedule,
    /// New pods stay away if they can.
    PreferNoSchedule,
    /// Pods leave.
    NoExecute,
}

impl TaintEffect {
    /// As Kubernetes spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoSchedule => "NoSchedule",
            Self::PreferNoSchedule => "PreferNoSchedule",
            Self::NoExecute => "NoExecute",
        }
    }
}
