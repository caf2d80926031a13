//! `NodeConfig`: the one document a role starts from. Nothing in it is optional by accident.

use serde::{Deserialize, Serialize};

use crate::cpu::{CpuPath, Pinning, Seat};
use crate::ids::Rank;
use crate::manifest::RoutingPolicy;
use crate::member::Duty;
use crate::placement::Cover;
use crate::tls::{StoreTls, TlsConfig};
use crate::traffic::Traffic;
use crate::weights::WeightSettings;

/// What one instance is told. Written by `foregate_operator::launch`, read by exactly one role.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Name of the cluster; prefix of every store key.
    pub cluster: String,
    /// How to reach the store.
    pub store: StoreConfig,
    /// The role and its settings.
    pub role: RoleConfig,
    /// `host:port` for `/metrics`, `/healthz` and `/readyz` of operator and worker; port 0 lets the system choose.
    pub status_listen: String,
    /// How gateway and workers prove themselves to each other. Absent: connections between them are plain, and everybody
    /// is believed. An operator has none: it speaks to the store only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
}

/// How to reach the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum StoreConfig {
    /// The store of this process, handed over by the composition root.
    InProcess,
    /// etcd's client URLs.
    Etcd {
        /// One or more `http://host:port`; with `tls` `https://host:port`.
        endpoints: Vec<String>,
        /// How etcd is proven, and what it is shown. Absent: connections are plain.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tls: Option<StoreTls>,
    },
}

/// A role and its settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RoleConfig {
    /// The planner's host.
    Operator(OperatorConfig),
    /// The HTTP side.
    Gateway(GatewayConfig),
    /// Attention and experts.
    Worker(WorkerConfig),
}

/// Settings of the operator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorConfig {
    /// Ranks the first placement waits for: all of `0..workers`.
    pub workers: u32,
    /// Whether copies may move after the first placement.
    pub enabled: bool,
    /// Length of a load window in milliseconds.
    pub window_ms: u64,
    /// Balance below which copies may move.
    pub threshold: f64,
    /// Most copies to move per layer and window.
    pub max_moves_per_layer: u32,
    /// Rows per layer below which a window says too little.
    pub min_rows: u64,
    /// Whether gateways' forecasts take part in the prediction of the load.
    pub forecast: bool,
    /// What copies shall span.
    pub cover: Cover,
    /// Most bytes of experts to move per window; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_move_bytes: Option<u64>,
    /// What decides whether a move pays; absent: it is made if it gains at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub economy: Option<EconomyConfig>,
    /// Ranks that shall hold no experts, because they are about to leave or to be started anew. Ascending.
    pub leaving: Vec<Rank>,
}

/// What decides whether a move of copies pays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EconomyConfig {
    /// Seconds until drift has eaten the advantage of a move, above 0.
    pub horizon_seconds: u32,
    /// Bytes per second that a worker loads experts with, above 0; absent: as measured at the last moves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// Part of a step's time that goes into balanced experts, in percent.
    pub experts_percent: u32,
    /// Part of the speed that is lost while copies are on their way, in percent.
    pub slowdown_percent: u32,
}

/// Settings of a gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewayConfig {
    /// `host:port` of the HTTP API.
    pub listen: String,
    /// Local directory with tokenizer files (may lack them: then prompts are token ids).
    pub model_dir: String,
    /// Names of the model, the first is the main one.
    pub served_names: Vec<String>,
    /// Longest sequence in tokens.
    pub max_model_len: u32,
    /// Routing policy.
    pub routing: RoutingPolicy,
    /// Most requests in work.
    pub max_in_flight: u32,
    /// Most requests waiting for a permit.
    pub max_queued: u32,
    /// Longest wait for a permit in milliseconds.
    pub queue_timeout_ms: u64,
    /// Longest life of a request in milliseconds.
    pub request_timeout_ms: u64,
    /// Milliseconds that the forecast for the planner looks ahead: a load window. Absent: none is published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast_ms: Option<u64>,
    /// Whether workers are told what is expected of a sequence's experts.
    #[serde(default)]
    pub expert_hints: bool,
    /// Tenants: limits, priorities, shares.
    pub traffic: Traffic,
    /// File or folder with the keys that clients show, read again when it has changed: lines of `name:key` or `key`. A
    /// folder has one key a file, by the file's name, as a mounted Secret does. Absent: everybody may call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_keys: Option<String>,
}

/// Which exchange fabric a worker opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FabricKind {
    /// Channels inside one process.
    Local,
    /// Frames over TCP.
    Tcp,
    /// NCCL between cards, all ranks in lock-step. Workers on processors refuse it, and where the node file has `tls`.
    Nccl,
}

/// What a worker computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// A card of NVIDIA's.
    Cuda {
        /// Its number, from 0, among those that the process sees.
        card: u32,
    },
}

/// Settings of a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerConfig {
    /// Its number.
    pub rank: Rank,
    /// Local directory with config.json and safetensors.
    pub model_dir: String,
    /// What is done with the weights at load; the same for all workers of a cluster.
    pub weights: WeightSettings,
    /// Main name of the model: the label `model_name` of its metrics.
    pub served_name: String,
    /// `host:port` of its gRPC listener; port 0 lets the system choose.
    pub rpc_listen: String,
    /// `host:port` of its exchange listener (TCP fabric only).
    pub exchange_listen: String,
    /// Which fabric.
    pub fabric: FabricKind,
    /// Whether it takes sequences, holds experts, or both.
    pub duty: Duty,
    /// Expert slots per MoE layer; 0 exactly if it holds no experts.
    pub slots: u32,
    /// What it computes on; workers of one cluster must sum alike.
    #[serde(default)]
    pub device: Device,
    /// Compute threads.
    pub threads: u32,
    /// Instructions of the kernels; workers of one cluster must sum alike.
    pub cpu_path: CpuPath,
    /// Which processors its threads keep to.
    pub pinning: Pinning,
    /// Its place among the workers of its machine.
    pub seat: Seat,
    /// Most sequences in a batch.
    pub max_num_seqs: u32,
    /// Most tokens in a step.
    pub max_num_batched_tokens: u32,
    /// Most sequences waiting.
    pub max_waiting: u32,
    /// Milliseconds for which a sequence that waits may be overtaken by ones whose experts fit the batch better; 0: never.
    #[serde(default)]
    pub overtake_ms: u64,
    /// Longest sequence in tokens.
    pub max_model_len: u32,
    /// Tokens per KV page.
    pub page_tokens: u32,
    /// Bytes of the KV cache.
    pub kv_bytes: u64,
    /// Milliseconds after which a peer's rows count as late.
    pub exchange_deadline_ms: u64,
    /// Failure domain, empty if unknown.
    pub domain: String,
    /// Length of a load window in milliseconds.
    pub window_ms: u64,
}
