//! Manifest → [`ValidatedCluster`], in which nothing is open any more. All findings at once.

mod checks;
mod security;
mod traffic;

use std::collections::BTreeMap;
use std::fmt;

use foregate_api::cpu::{CpuPath, Pinning};
use foregate_api::ids::Rank;
use foregate_api::limits;
use foregate_api::manifest::{
    API_VERSION, AutoscalingSpec, BalancingSpec, DeviceClass, EconomySpec, GatewaySpec, KIND,
    Manifest, ModelSource, PodsSpec, Quantity, ResourcesSpec, RoutingPolicy, WorkersSpec,
};
use foregate_api::member::Duty;
use foregate_api::node::EconomyConfig;
use foregate_api::placement::Cover;
use foregate_api::traffic::Traffic;
use foregate_api::weights::WeightSettings;

pub use security::{Certificates, ValidatedSecurity};

use checks::{Checks, cluster_name, dns_label, model_uri, object_name, short_name};

/// A cluster as it is wanted, complete and within limits.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidatedCluster {
    /// A DNS label.
    pub name: String,
    /// Which model.
    pub model: ValidatedModel,
    /// The workers.
    pub workers: ValidatedWorkers,
    /// The HTTP side.
    pub gateway: ValidatedGateway,
    /// The balancer.
    pub balancing: ValidatedBalancing,
    /// Who may speak with whom.
    pub security: ValidatedSecurity,
    /// What all pods have in common; texts that only the API server can judge are as written.
    pub pods: PodsSpec,
}

/// Which model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidatedModel {
    /// As written; where relative directories start is the caller's to know.
    pub uri: String,
    /// At least one, the first is the main one.
    pub served_names: Vec<String>,
    /// Longest sequence.
    pub length: ModelLength,
    /// What is done with the weights at load.
    pub weights: WeightSettings,
    /// Claim that keeps downloads.
    pub cache_claim: Option<String>,
    /// Secret with the hub's token.
    pub token_secret: String,
}

/// Longest sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelLength {
    /// The model's own, or what the KV cache of one worker holds, if that is less.
    AsPossible,
    /// This many tokens, and an error if they do not fit.
    Tokens(u32),
}

/// Expert slots beyond ⌈experts / workers⌉.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redundancy {
    /// As many as link all ranks.
    Linked,
    /// This many.
    Slots(u32),
}

/// Compute threads of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The machine's cores divided by its workers.
    Shared,
    /// This many.
    Fixed(u32),
}

/// The workers; numbers are per worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidatedWorkers {
    /// Number of workers.
    pub count: u32,
    /// What they compute on.
    pub device: DeviceClass,
    /// Workers that take sequences and hold no experts: the first ranks. Fewer than `count`.
    pub attention_only: u32,
    /// Workers that hold experts and take no sequences: the ranks after those. Fewer than `count`.
    pub expert_only: u32,
    /// Redundant expert slots.
    pub redundancy: Redundancy,
    /// Compute threads.
    pub threads: Threads,
    /// Instructions of the kernels.
    pub cpu_path: CpuPath,
    /// Which processors compute threads keep to; `None` leaves it to the place.
    pub pinning: Option<Pinning>,
    /// Most sequences in a batch.
    pub max_num_seqs: u32,
    /// Most tokens in a step.
    pub max_num_batched_tokens: u32,
    /// Most sequences waiting.
    pub max_waiting: u32,
    /// Milliseconds for which a waiting sequence may be overtaken.
    pub overtake_ms: u64,
    /// Tokens per KV page, a power of two.
    pub page_tokens: u32,
    /// Bytes of the KV cache.
    pub kv_bytes: u64,
    /// Milliseconds after which a peer's rows count as late.
    pub exchange_deadline_ms: u64,
    /// Failure domain of each rank; empty strings if unknown. Length `count`.
    pub domains: Vec<String>,
    /// Label of nodes that tells failure domains apart.
    pub domain_label: String,
    /// Image of their pods; `None`: the one of all pods.
    pub image: Option<String>,
    /// What a pod asks for.
    pub resources: Resources,
}

impl ValidatedWorkers {
    /// What a rank does for the others.
    #[must_use]
    pub const fn duty(&self, rank: Rank) -> Duty {
        Duty::of(rank, self.attention_only, self.expert_only)
    }

    /// Failure domains of the ranks that hold experts, in their order.
    #[must_use]
    pub fn holders(&self) -> &[String] {
        let first = self.attention_only as usize;
        self.domains.get(first..).unwrap_or_default()
    }
}

/// What a container asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resources {
    /// What the scheduler sets aside, as written.
    pub requests: BTreeMap<String, String>,
    /// What may not be exceeded, as written.
    pub limits: BTreeMap<String, String>,
    /// Thousandths of a core: the limit, else the request.
    pub cpu_milli: Option<u64>,
    /// Bytes of memory: the limit, else the request.
    pub memory: Option<u64>,
}

/// How many gateways there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replicas {
    /// This many.
    Fixed(u32),
    /// As many as an autoscaler says.
    Autoscaled {
        /// Fewest.
        min: u32,
        /// Most.
        max: u32,
        /// Share of the requested processor time it aims at.
        cpu_percent: u32,
    },
}

/// The HTTP side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidatedGateway {
    /// Policy.
    pub routing: RoutingPolicy,
    /// Most requests in work.
    pub max_in_flight: u32,
    /// Most requests waiting.
    pub max_queued: u32,
    /// Longest wait in milliseconds.
    pub queue_timeout_ms: u64,
    /// Longest life of a request in milliseconds.
    pub request_timeout_ms: u64,
    /// Tenants.
    pub traffic: Traffic,
    /// How many there are.
    pub replicas: Replicas,
    /// What a pod asks for.
    pub resources: Resources,
}

/// The balancer.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidatedBalancing {
    /// Whether copies may move after the first placement.
    pub enabled: bool,
    /// Length of a load window in milliseconds.
    pub window_ms: u64,
    /// Balance below which copies may move, in (0, 1].
    pub threshold: f64,
    /// Most copies to move per layer and window.
    pub max_moves_per_layer: u32,
    /// Rows per layer below which a window says too little.
    pub min_rows: u64,
    /// Whether gateways forecast the load.
    pub forecast: bool,
    /// What copies shall span.
    pub cover: Cover,
    /// Most bytes of experts to move per window.
    pub max_move_bytes: Option<u64>,
    /// What decides whether a move pays.
    pub economy: Option<EconomyConfig>,
    /// Whether too few slots are refused.
    pub strict: bool,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Path of the field, such as `spec.workers.count`.
    pub field: String,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.field, self.what, self.remedy)
    }
}

/// Everything that is wrong with a manifest, in the order of its fields. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Findings(pub Vec<Finding>);

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, finding) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{finding}")?;
        }
        Ok(())
    }
}

/// Checks a manifest and fills in what it leaves open.
///
/// # Errors
/// All findings.
pub fn validate(manifest: Manifest) -> Result<ValidatedCluster, Findings> {
    let Manifest {
        api_version,
        kind,
        metadata,
        spec,
    } = manifest;
    let mut checks = Checks::default();
    checks.must_be("apiVersion", &api_version, API_VERSION);
    checks.must_be("kind", &kind, KIND);
    checks.must("metadata.name", &metadata.name, cluster_name);
    if let Some(namespace) = &metadata.namespace {
        checks.must("metadata.namespace", namespace, dns_label);
    }
    let cluster = ValidatedCluster {
        name: metadata.name,
        model: model(&mut checks, spec.model),
        workers: workers(&mut checks, spec.workers),
        gateway: gateway(&mut checks, spec.gateway),
        balancing: balancing(&mut checks, spec.balancing),
        security: security::security(&mut checks, spec.security),
        pods: spec.pods,
    };
    checks.coverable(cluster.balancing.cover, cluster.workers.holders());
    for (field, keys) in [
        ("spec.pods.labels", &cluster.pods.labels),
        ("spec.pods.annotations", &cluster.pods.annotations),
    ] {
        checks.foreign_keys(field, keys);
    }
    checks.end(cluster)
}

fn model(checks: &mut Checks, source: ModelSource) -> ValidatedModel {
    let ModelSource {
        uri,
        mut served_names,
        max_model_len,
        dtype,
        quantization,
        cache_claim,
        token_secret,
    } = source;
    let usable = checks.must("spec.model.uri", &uri, model_uri);
    if served_names.is_empty() && usable {
        served_names.push(short_name(&uri));
    }
    checks.served_names(&served_names);
    let length = match max_model_len {
        None => ModelLength::AsPossible,
        some => ModelLength::Tokens(checks.range(&limits::MAX_MODEL_LEN, some)),
    };
    if let Some(claim) = &cache_claim {
        checks.must("spec.model.cacheClaim", claim, object_name);
    }
    let token_secret = token_secret.unwrap_or_else(|| limits::TOKEN_SECRET.to_owned());
    checks.must("spec.model.tokenSecret", &token_secret, object_name);
    ValidatedModel {
        uri,
        served_names,
        length,
        weights: WeightSettings {
            dtype: dtype.unwrap_or_default(),
            quantization: quantization.unwrap_or_default(),
        },
        cache_claim,
        token_secret,
    }
}

fn workers(checks: &mut Checks, spec: WorkersSpec) -> ValidatedWorkers {
    let WorkersSpec {
        count,
        device,
        attention_only,
        expert_only,
        redundant_slots,
        threads,
        cpu_path,
        pinning,
        max_num_seqs,
        max_num_batched_tokens,
        max_waiting,
        overtake_ms,
        page_tokens,
        kv_memory,
        exchange_deadline_ms,
        domains,
        domain_label,
        image,
        resources,
    } = spec;
    let count = checks.range(&limits::COUNT, count);
    let device = device.unwrap_or_default();
    let attention_only = checks.range(&limits::ATTENTION_ONLY, attention_only);
    let expert_only = checks.range(&limits::EXPERT_ONLY, expert_only);
    checks.duties(count, attention_only, expert_only);
    let redundancy = match redundant_slots {
        None => Redundancy::Linked,
        some => Redundancy::Slots(checks.range(&limits::REDUNDANT_SLOTS, some)),
    };
    let threads = match threads {
        None => Threads::Shared,
        some => Threads::Fixed(checks.range(&limits::THREADS, some)),
    };
    let kv_bytes = checks.bytes(&limits::KV_MEMORY, kv_memory.as_deref());
    let resources = checks.resources("spec.workers.resources", resources);
    // On a card they are in its own memory.
    if let (Some(memory), DeviceClass::Cpu) = (resources.memory, device) {
        checks.room_for_weights(kv_bytes, memory);
    }
    let domain_label = domain_label.unwrap_or_else(|| limits::DOMAIN_LABEL.to_owned());
    checks.must("spec.workers.domainLabel", &domain_label, checks::label_key);
    ValidatedWorkers {
        count,
        device,
        attention_only,
        expert_only,
        redundancy,
        threads,
        cpu_path: cpu_path.unwrap_or_default(),
        pinning,
        max_num_seqs: checks.range(&limits::MAX_NUM_SEQS, max_num_seqs),
        max_num_batched_tokens: checks
            .range(&limits::MAX_NUM_BATCHED_TOKENS, max_num_batched_tokens),
        max_waiting: checks.range(&limits::MAX_WAITING, max_waiting),
        overtake_ms: checks.range(&limits::OVERTAKE_MS, overtake_ms),
        page_tokens: checks.page_tokens(page_tokens),
        kv_bytes,
        exchange_deadline_ms: checks.range(&limits::EXCHANGE_DEADLINE_MS, exchange_deadline_ms),
        domains: checks.domains(domains, count),
        domain_label,
        image,
        resources,
    }
}

fn gateway(checks: &mut Checks, spec: GatewaySpec) -> ValidatedGateway {
    let GatewaySpec {
        routing,
        max_in_flight,
        max_queued,
        queue_timeout_ms,
        request_timeout_ms,
        traffic,
        replicas,
        autoscaling,
        resources,
    } = spec;
    let resources = checks.resources("spec.gateway.resources", resources);
    ValidatedGateway {
        routing: routing.unwrap_or_default(),
        max_in_flight: checks.range(&limits::MAX_IN_FLIGHT, max_in_flight),
        max_queued: checks.range(&limits::MAX_QUEUED, max_queued),
        queue_timeout_ms: checks.range(&limits::QUEUE_TIMEOUT_MS, queue_timeout_ms),
        request_timeout_ms: checks.range(&limits::REQUEST_TIMEOUT_MS, request_timeout_ms),
        traffic: traffic::traffic(checks, traffic),
        replicas: gateways(checks, replicas, autoscaling.as_ref(), &resources),
        resources,
    }
}

fn gateways(
    checks: &mut Checks,
    replicas: Option<u32>,
    autoscaling: Option<&AutoscalingSpec>,
    resources: &Resources,
) -> Replicas {
    let fixed = checks.range(&limits::GATEWAY_REPLICAS, replicas);
    let Some(&AutoscalingSpec {
        min_replicas,
        max_replicas,
        cpu_percent,
    }) = autoscaling
    else {
        return Replicas::Fixed(fixed);
    };
    let min = checks.range(&limits::MIN_REPLICAS, min_replicas);
    let max = checks.range(&limits::MAX_REPLICAS, max_replicas);
    checks.autoscaling(min, max, resources);
    Replicas::Autoscaled {
        min,
        max,
        cpu_percent: checks.range(&limits::CPU_PERCENT, cpu_percent),
    }
}

fn balancing(checks: &mut Checks, spec: BalancingSpec) -> ValidatedBalancing {
    let BalancingSpec {
        enabled,
        window_ms,
        threshold,
        max_moves_per_layer,
        min_rows,
        forecast,
        cover,
        max_move_bytes,
        economy,
        strict,
    } = spec;
    ValidatedBalancing {
        enabled: enabled.unwrap_or(true),
        window_ms: checks.range(&limits::WINDOW_MS, window_ms),
        threshold: checks.threshold(threshold.unwrap_or(limits::THRESHOLD)),
        max_moves_per_layer: checks.range(&limits::MAX_MOVES_PER_LAYER, max_moves_per_layer),
        min_rows: checks.range(&limits::MIN_ROWS, min_rows),
        forecast: forecast.unwrap_or(true),
        cover: cover.unwrap_or_default(),
        max_move_bytes: max_move_bytes
            .map(|text| checks.bytes(&limits::MAX_MOVE_BYTES, Some(&text))),
        economy: economy.map(|spec| economics(checks, &spec)),
        strict: strict.unwrap_or(false),
    }
}

fn economics(checks: &mut Checks, spec: &EconomySpec) -> EconomyConfig {
    let EconomySpec {
        horizon_seconds,
        bandwidth,
        experts_percent,
        slowdown_percent,
    } = spec;
    EconomyConfig {
        horizon_seconds: checks.range(&limits::HORIZON_SECONDS, *horizon_seconds),
        bandwidth: bandwidth
            .as_deref()
            .map(|text| checks.bytes(&limits::BANDWIDTH, Some(text))),
        experts_percent: checks.range(&limits::EXPERTS_PERCENT, *experts_percent),
        slowdown_percent: checks.range(&limits::SLOWDOWN_PERCENT, *slowdown_percent),
    }
}

#[cfg(test)]
mod tests;
