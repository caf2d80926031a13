//! Manifest → [`ValidatedCluster`], in which nothing is open any more. All findings at once.

mod checks;

use std::fmt;

use foregate_api::cpu::CpuPath;
use foregate_api::manifest::{
    API_VERSION, BalancingSpec, GatewaySpec, KIND, Manifest, ModelSource, RoutingPolicy,
    WorkersSpec,
};
use foregate_api::weights::WeightSettings;

use crate::quantity::parse_bytes;
use checks::{Checks, dns_label, model_uri, short_name};

/// Most workers of a cluster.
pub const MAX_WORKERS: u32 = 1024;

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
    /// Redundant expert slots.
    pub redundancy: Redundancy,
    /// Compute threads.
    pub threads: Threads,
    /// Instructions of the kernels.
    pub cpu_path: CpuPath,
    /// Most sequences in a batch.
    pub max_num_seqs: u32,
    /// Most tokens in a step.
    pub max_num_batched_tokens: u32,
    /// Most sequences waiting.
    pub max_waiting: u32,
    /// Tokens per KV page, a power of two.
    pub page_tokens: u32,
    /// Bytes of the KV cache.
    pub kv_bytes: u64,
    /// Milliseconds after which a peer's rows count as late.
    pub exchange_deadline_ms: u64,
    /// Failure domain of each rank; empty strings if unknown. Length `count`.
    pub domains: Vec<String>,
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
    checks.must("metadata.name", &metadata.name, dns_label);
    if let Some(namespace) = &metadata.namespace {
        checks.must("metadata.namespace", namespace, dns_label);
    }
    let cluster = ValidatedCluster {
        name: metadata.name,
        model: model(&mut checks, spec.model),
        workers: workers(&mut checks, spec.workers),
        gateway: gateway(&mut checks, &spec.gateway),
        balancing: balancing(&mut checks, &spec.balancing),
    };
    checks.end(cluster)
}

fn model(checks: &mut Checks, source: ModelSource) -> ValidatedModel {
    let ModelSource {
        uri,
        mut served_names,
        max_model_len,
        dtype,
        quantization,
    } = source;
    let usable = checks.must("spec.model.uri", &uri, model_uri);
    if served_names.is_empty() && usable {
        served_names.push(short_name(&uri));
    }
    checks.served_names(&served_names);
    let length = match max_model_len {
        None => ModelLength::AsPossible,
        Some(_) => ModelLength::Tokens(checks.range(
            "spec.model.maxModelLen",
            max_model_len,
            1,
            2..=1 << 24,
        )),
    };
    ValidatedModel {
        uri,
        served_names,
        length,
        weights: WeightSettings {
            dtype: dtype.unwrap_or_default(),
            quantization: quantization.unwrap_or_default(),
        },
    }
}

fn workers(checks: &mut Checks, spec: WorkersSpec) -> ValidatedWorkers {
    let WorkersSpec {
        count,
        redundant_slots,
        threads,
        cpu_path,
        max_num_seqs,
        max_num_batched_tokens,
        max_waiting,
        page_tokens,
        kv_memory,
        exchange_deadline_ms,
        domains,
    } = spec;
    let count = checks.range("spec.workers.count", count, 2, 1..=MAX_WORKERS);
    let redundancy = match redundant_slots {
        None => Redundancy::Linked,
        some => {
            Redundancy::Slots(checks.range("spec.workers.redundantSlots", some, 0, 0..=4096))
        }
    };
    let threads = match threads {
        None => Threads::Shared,
        some => Threads::Fixed(checks.range("spec.workers.threads", some, 1, 1..=1024)),
    };
    let kv_memory = kv_memory.unwrap_or_else(|| "512Mi".to_owned());
    ValidatedWorkers {
        count,
        redundancy,
        threads,
        cpu_path: cpu_path.unwrap_or_default(),
        max_num_seqs: checks.range("spec.workers.maxNumSeqs", max_num_seqs, 64, 1..=4096),
        max_num_batched_tokens: checks.range(
            "spec.workers.maxNumBatchedTokens",
            max_num_batched_tokens,
            512,
            1..=65_536,
        ),
        max_waiting: checks.range("spec.workers.maxWaiting", max_waiting, 256, 1..=65_536),
        page_tokens: checks.page_tokens(page_tokens),
        kv_bytes: checks.kv_memory(&kv_memory, parse_bytes(&kv_memory)),
        exchange_deadline_ms: checks.range(
            "spec.workers.exchangeDeadlineMs",
            exchange_deadline_ms,
            2000,
            10..=600_000,
        ),
        domains: checks.domains(domains, count),
    }
}

fn gateway(checks: &mut Checks, spec: &GatewaySpec) -> ValidatedGateway {
    let GatewaySpec {
        routing,
        max_in_flight,
        max_queued,
        queue_timeout_ms,
        request_timeout_ms,
    } = *spec;
    ValidatedGateway {
        routing: routing.unwrap_or_default(),
        max_in_flight: checks.range("spec.gateway.maxInFlight", max_in_flight, 256, 1..=65_536),
        max_queued: checks.range("spec.gateway.maxQueued", max_queued, 1024, 0..=1_000_000),
        queue_timeout_ms: checks.range(
            "spec.gateway.queueTimeoutMs",
            queue_timeout_ms,
            30_000,
            1..=3_600_000,
        ),
        request_timeout_ms: checks.range(
            "spec.gateway.requestTimeoutMs",
            request_timeout_ms,
            600_000,
            1..=86_400_000,
        ),
    }
}

fn balancing(checks: &mut Checks, spec: &BalancingSpec) -> ValidatedBalancing {
    let BalancingSpec {
        enabled,
        window_ms,
        threshold,
        max_moves_per_layer,
        min_rows,
    } = *spec;
    ValidatedBalancing {
        enabled: enabled.unwrap_or(true),
        window_ms: checks.range("spec.balancing.windowMs", window_ms, 2000, 50..=600_000),
        threshold: checks.threshold(threshold.unwrap_or(0.97)),
        max_moves_per_layer: checks.range(
            "spec.balancing.maxMovesPerLayer",
            max_moves_per_layer,
            4,
            0..=4096,
        ),
        min_rows: checks.range("spec.balancing.minRows", min_rows, 256, 0..=1 << 40),
    }
}

#[cfg(test)]
mod tests;
