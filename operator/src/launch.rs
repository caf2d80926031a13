//! Validated cluster + what the model is → instances with their `NodeConfig`. Pure: for `up`, and for pods.

use std::collections::BTreeMap;

use foregate_api::cpu::{Pinning, Seat};
use foregate_api::ids::Rank;
use foregate_api::manifest::DeviceClass;
use foregate_api::member::Duty;
pub use foregate_api::model::ModelFacts;
use foregate_api::node::{
    Device, FabricKind, GatewayConfig, NodeConfig, OperatorConfig, RoleConfig, StoreConfig,
    WorkerConfig,
};
use foregate_api::placement::Cover;
use foregate_api::tls::{StoreTls, TlsConfig, TlsRole};
use foregate_planner::redundancy::Needs;

use crate::validate::{ModelLength, Redundancy, Threads, ValidatedCluster};

/// Tokens of a block of keys in the KV cache's layout.
const KEY_BLOCK: u32 = 16;

/// Who will run the instances; decides store and fabric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// Tasks of one process: its own store, channels as fabric.
    InProcess,
    /// Processes of one machine: etcd, TCP on loopback.
    Processes {
        /// etcd's client URLs.
        etcd: Vec<String>,
    },
    /// Pods: etcd, TCP, known ports on all addresses of a pod.
    Pods {
        /// etcd's client URLs.
        etcd: Vec<String>,
        /// How etcd is proven, where its URLs are https.
        etcd_tls: Option<StoreTls>,
        /// Name of the cluster in the store; names of manifests are unique in a namespace only.
        cluster: String,
    },
}

/// Where instances find their keys: folders with `ca.crt`, `tls.crt` and `tls.key`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFolders {
    /// Of gateways.
    pub gateway: String,
    /// Of workers.
    pub worker: String,
    /// What certificates call the cluster.
    pub domain: String,
}

/// Folders of pods.
pub mod folders {
    /// Keys of the role.
    pub const TLS: &str = "/etc/foregate-tls";
    /// Keys of etcd's clients.
    pub const ETCD: &str = "/etc/foregate-etcd";
    /// Keys that clients of the API show.
    pub const API_KEYS: &str = "/etc/foregate-api-keys";
}

/// Ports of pods.
pub mod ports {
    /// The HTTP API of a gateway.
    pub const HTTP: u16 = 8000;
    /// gRPC of a worker.
    pub const RPC: u16 = 7070;
    /// Exchange of rows between workers.
    pub const EXCHANGE: u16 = 7071;
    /// `/metrics`, `/healthz` and `/readyz` of a worker.
    pub const STATUS: u16 = 9090;
}

/// What the workers have to live on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// One machine that all of them share.
    Shared {
        /// Its cores.
        cores: u32,
        /// Its bytes of memory; `None` if it does not tell.
        memory: Option<u64>,
    },
    /// Each has what its pod asks for in the manifest.
    Pods,
}

/// Where the instances run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Who will run them.
    pub form: Form,
    /// Local directory of the model.
    pub model_dir: String,
    /// `host:port` of the gateway.
    pub gateway_listen: String,
    /// Keys of gateways and workers; `None`: they believe everybody.
    pub keys: Option<KeyFolders>,
    /// File or folder with the keys that clients of the gateway show; `None`: everybody may call.
    pub api_keys: Option<String>,
    /// What the workers have to live on.
    pub machine: Machine,
}

/// One process or task to start.
#[derive(Debug, Clone, PartialEq)]
pub struct Instance {
    /// Unique in the plan: `operator`, `worker-0`, …, `gateway`.
    pub name: String,
    /// What it is told.
    pub node: NodeConfig,
}

/// What to start, in this order.
#[derive(Debug, Clone, PartialEq)]
pub struct LaunchPlan {
    /// Operator, workers by rank, gateway.
    pub instances: Vec<Instance>,
    /// Decisions that a user should be told of, one sentence each.
    pub notes: Vec<String>,
}

/// Why a cluster cannot be launched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// The model has no experts or positions.
    #[error(
        "the model has {experts} experts per layer and {max_positions} positions: both must be positive"
    )]
    Model {
        /// Experts per layer.
        experts: u32,
        /// Positions.
        max_positions: u32,
    },
    /// Longer than the model was made for.
    #[error(
        "spec.model.maxModelLen is {wanted}, the model has {max_positions} positions: give at most {max_positions}"
    )]
    TooLong {
        /// What the manifest wants.
        wanted: u32,
        /// What the model has.
        max_positions: u32,
    },
    /// One sequence of the wanted length does not fit into a worker's KV cache.
    #[error(
        "spec.workers.kvMemory is {kv_bytes} bytes; one sequence of {tokens} tokens needs {pages} pages of \
         {page_tokens} tokens × {page_bytes} bytes = {needed} bytes: give more kvMemory or a smaller \
         spec.model.maxModelLen"
    )]
    KvMemory {
        /// What the manifest gives.
        kv_bytes: u64,
        /// The sequence.
        tokens: u32,
        /// Its pages.
        pages: u64,
        /// Tokens per page.
        page_tokens: u32,
        /// Bytes of a page.
        page_bytes: u128,
        /// The product.
        needed: u128,
    },
    /// The workers together need more memory than the machine has.
    #[error(
        "{attending} workers × (spec.workers.kvMemory {kv_bytes} bytes + other weights {dense_bytes} bytes) + {holding} \
         workers × experts {expert_bytes} bytes = {needed} bytes, the machine has {memory}: give less kvMemory, \
         redundantSlots or workers, or quantise the weights (spec.model.quantization)"
    )]
    MachineMemory {
        /// Workers on the machine that take sequences.
        attending: u32,
        /// Workers on the machine that hold experts.
        holding: u32,
        /// KV cache of one worker.
        kv_bytes: u64,
        /// Expert slots of one worker over all layers.
        expert_bytes: u128,
        /// Weights of attention and all else that is no expert's, of one worker.
        dense_bytes: u64,
        /// The sum over all workers.
        needed: u128,
        /// What the machine has.
        memory: u64,
    },
    /// Too few slots for what the manifest insists on.
    #[error(
        "spec.balancing.strict: {slots} expert slots per worker and layer are too few: {sum}; raise \
         spec.workers.redundantSlots to {redundant} ({bytes} bytes more per worker), or set strict to false"
    )]
    Strict {
        /// Slots of a worker.
        slots: u32,
        /// How many are wanted, and why.
        sum: String,
        /// Redundant slots that are enough.
        redundant: u32,
        /// What those that are missing take.
        bytes: u128,
    },
    /// A worker needs more memory than its pod may have.
    #[error(
        "a worker needs spec.workers.kvMemory {kv_bytes} bytes + experts {expert_bytes} bytes + other weights \
         {dense_bytes} bytes = {needed} bytes, spec.workers.resources gives its pod {memory}: give more memory or workers, \
         less kvMemory or redundantSlots, or quantise the weights (spec.model.quantization)"
    )]
    PodMemory {
        /// KV cache.
        kv_bytes: u64,
        /// Expert slots over all layers.
        expert_bytes: u128,
        /// Weights that every worker holds.
        dense_bytes: u64,
        /// The sum.
        needed: u128,
        /// What the pod may have.
        memory: u64,
    },
}

/// A sum that shows how many slots are wanted.
fn sum(needs: &Needs, experts: u32, workers: u32) -> String {
    let linked = format!(
        "linking {workers} workers that hold experts takes 1 + ⌈({experts} − 1)/{workers}⌉ = {}",
        needs.linked
    );
    match needs.covered {
        Some(covered) => {
            format!("{linked}, copies of all experts in two failure domains take {covered}")
        }
        None => linked,
    }
}

/// Everything the instances share.
struct Shared<'a> {
    cluster: &'a ValidatedCluster,
    place: &'a Place,
    slots: u32,
    threads: u32,
    max_model_len: u32,
}

/// The instances of a cluster.
///
/// # Errors
/// If the model and the manifest do not go together, with the sum that shows it.
pub fn launch(
    cluster: &ValidatedCluster,
    model: &ModelFacts,
    place: &Place,
) -> Result<LaunchPlan, LaunchError> {
    if model.experts == 0 || model.max_positions == 0 || model.kv_bytes_per_token == 0 {
        return Err(LaunchError::Model {
            experts: model.experts,
            max_positions: model.max_positions,
        });
    }
    let mut notes = Vec::new();
    let shared = Shared {
        cluster,
        place,
        slots: slots(cluster, model, &mut notes)?,
        threads: threads(cluster, place, &mut notes),
        max_model_len: max_model_len(cluster, model, &mut notes)?,
    };
    fits(&shared, model)?;
    let mut instances = vec![shared.instance("operator".to_owned(), shared.operator())];
    for (rank, domain) in (0..cluster.workers.count).zip(&cluster.workers.domains) {
        let worker = shared.worker(Rank(rank), domain);
        instances.push(shared.instance(format!("worker-{rank}"), worker));
    }
    instances.push(shared.instance("gateway".to_owned(), shared.gateway()));
    Ok(LaunchPlan { instances, notes })
}

/// Compute threads of a worker.
fn threads(cluster: &ValidatedCluster, place: &Place, notes: &mut Vec<String>) -> u32 {
    let workers = &cluster.workers;
    match (workers.threads, place.machine) {
        (Threads::Fixed(threads), _) => threads,
        (Threads::Shared, Machine::Shared { cores, .. }) => (cores / workers.count).max(1),
        (Threads::Shared, Machine::Pods) => match workers.resources.cpu_milli {
            Some(milli) => u32::try_from(milli / 1000).unwrap_or(u32::MAX).max(1),
            None => {
                notes.push(
                    "a worker computes with one thread, since spec.workers.resources has no cpu: give it, or \
                     spec.workers.threads"
                        .to_owned(),
                );
                1
            }
        },
    }
}

/// Memory that a worker needs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkerMemory {
    /// Keys and values.
    pub kv_bytes: u64,
    /// Expert slots over all layers.
    pub expert_bytes: u128,
    /// All weights that are no expert's.
    pub dense_bytes: u64,
}

impl WorkerMemory {
    /// What a worker of a duty needs, with `kv_bytes` if it takes sequences and `slots` per layer if it holds experts.
    #[must_use]
    pub fn of(duty: Duty, kv_bytes: u64, slots: u32, model: &ModelFacts) -> Self {
        let attends = duty.runs_attention();
        Self {
            kv_bytes: if attends { kv_bytes } else { 0 },
            dense_bytes: if attends { model.dense_bytes } else { 0 },
            expert_bytes: if duty.holds_experts() {
                u128::from(slots) * u128::from(model.slot_bytes)
            } else {
                0
            },
        }
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> u128 {
        u128::from(self.kv_bytes) + self.expert_bytes + u128::from(self.dense_bytes)
    }
}

/// Whether KV caches and weights of all workers fit. Memory is taken as it is used, so a plan that cannot fit would
/// start and be killed under load. How much a card has, only its worker can see: it says so before it takes any.
fn fits(shared: &Shared<'_>, model: &ModelFacts) -> Result<(), LaunchError> {
    let workers = &shared.cluster.workers;
    if workers.device == DeviceClass::Cuda {
        return Ok(());
    }
    let memories: Vec<WorkerMemory> = (0..workers.count)
        .map(|rank| {
            let duty = workers.duty(Rank(rank));
            WorkerMemory::of(duty, workers.kv_bytes, shared.slots, model)
        })
        .collect();
    match shared.place.machine {
        Machine::Shared { memory, .. } => {
            let needed = memories.iter().map(WorkerMemory::total).sum();
            let Some(memory) = memory.filter(|memory| needed > u128::from(*memory)) else {
                return Ok(());
            };
            let one = WorkerMemory::of(Duty::Both, workers.kv_bytes, shared.slots, model);
            Err(LaunchError::MachineMemory {
                attending: workers.count - workers.expert_only,
                holding: workers.count - workers.attention_only,
                kv_bytes: one.kv_bytes,
                expert_bytes: one.expert_bytes,
                dense_bytes: one.dense_bytes,
                needed,
                memory,
            })
        }
        Machine::Pods => {
            let largest = memories.into_iter().max_by_key(WorkerMemory::total);
            let one = largest.unwrap_or_default();
            let needed = one.total();
            let memory = workers.resources.memory;
            let Some(memory) = memory.filter(|memory| needed > u128::from(*memory)) else {
                return Ok(());
            };
            Err(LaunchError::PodMemory {
                kv_bytes: one.kv_bytes,
                expert_bytes: one.expert_bytes,
                dense_bytes: one.dense_bytes,
                needed,
                memory,
            })
        }
    }
}

/// Slots per layer of a rank that holds experts: enough for every expert once, and the redundant ones. Too few to link all ranks, or for the
/// cover asked for, are told of, or refused.
fn slots(
    cluster: &ValidatedCluster,
    model: &ModelFacts,
    notes: &mut Vec<String>,
) -> Result<u32, LaunchError> {
    let holders = cluster.workers.holders();
    let count = holders.len() as u32;
    let once = model.experts.div_ceil(count);
    let cover = cluster.balancing.cover == Cover::All;
    let domains = domains(holders);
    let needs = Needs::of(model.experts as usize, &domains, 1, cover);
    let needed = needs.linked.max(needs.covered.unwrap_or(0));
    let needed = u32::try_from(needed).unwrap_or(model.experts);
    let wanted = match cluster.workers.redundancy {
        Redundancy::Linked => once.max(needed),
        Redundancy::Slots(redundant) => once.saturating_add(redundant),
    };
    let slots = wanted.min(model.experts);
    if slots >= needed {
        return Ok(slots);
    }
    let (sum, redundant) = (sum(&needs, model.experts, count), needed - once);
    if cluster.balancing.strict {
        return Err(LaunchError::Strict {
            slots,
            sum,
            redundant,
            bytes: u128::from(needed - slots) * u128::from(model.slot_bytes),
        });
    }
    notes.push(format!(
        "{slots} expert slots per worker and layer are few: {sum}, and {} to link them after one is lost. Load can be \
         balanced, or losses be covered, less well; raise spec.workers.redundantSlots to {redundant}; each slot takes {} \
         bytes per worker",
        needs.after_loss, model.slot_bytes
    ));
    Ok(slots)
}

/// Workers in each failure domain; one without a name is a domain of its own, as the planner has it.
fn domains(names: &[String]) -> Vec<usize> {
    let mut named: BTreeMap<&String, usize> = BTreeMap::new();
    let mut alone = 0;
    for name in names {
        match name.is_empty() {
            true => alone += 1,
            false => *named.entry(name).or_default() += 1,
        }
    }
    named
        .into_values()
        .chain(std::iter::repeat_n(1, alone))
        .collect()
}

/// Most bytes of one page of the KV cache, as the kernels lay it out: keys come in blocks of [`KEY_BLOCK`]
/// tokens, so that a shorter page still takes a whole block of them; values, where they are bfloat16, in pairs.
fn page_bytes(page_tokens: u32, model: &ModelFacts) -> u128 {
    let keys = u128::from(page_tokens.next_multiple_of(KEY_BLOCK));
    let values = u128::from(page_tokens.next_multiple_of(2));
    // Keys and values are half of a token's bytes each.
    (keys + values) * u128::from(model.kv_bytes_per_token) / 2
}

/// The longest sequence, which must fit into one worker's KV cache.
fn max_model_len(
    cluster: &ValidatedCluster,
    model: &ModelFacts,
    notes: &mut Vec<String>,
) -> Result<u32, LaunchError> {
    let workers = &cluster.workers;
    let page_bytes = page_bytes(workers.page_tokens, model);
    let pages = u128::from(workers.kv_bytes) / page_bytes;
    let room = u32::try_from(pages * u128::from(workers.page_tokens)).unwrap_or(u32::MAX);
    let wanted = match cluster.model.length {
        ModelLength::AsPossible => model.max_positions.min(room.max(1)),
        ModelLength::Tokens(tokens) if tokens > model.max_positions => {
            return Err(LaunchError::TooLong {
                wanted: tokens,
                max_positions: model.max_positions,
            });
        }
        ModelLength::Tokens(tokens) => tokens,
    };
    if wanted > room {
        let pages = u64::from(wanted.div_ceil(workers.page_tokens));
        return Err(LaunchError::KvMemory {
            kv_bytes: workers.kv_bytes,
            tokens: wanted,
            pages,
            page_tokens: workers.page_tokens,
            page_bytes,
            needed: u128::from(pages) * page_bytes,
        });
    }
    if wanted < model.max_positions && cluster.model.length == ModelLength::AsPossible {
        notes.push(format!(
            "sequences are limited to {wanted} of the model's {} tokens by spec.workers.kvMemory",
            model.max_positions
        ));
    }
    Ok(wanted)
}

impl Shared<'_> {
    fn instance(&self, name: String, role: RoleConfig) -> Instance {
        let (cluster, store) = match &self.place.form {
            Form::InProcess => (&self.cluster.name, StoreConfig::InProcess),
            Form::Processes { etcd } => (&self.cluster.name, in_etcd(etcd, None)),
            Form::Pods {
                etcd,
                etcd_tls,
                cluster,
            } => (cluster, in_etcd(etcd, etcd_tls.as_ref())),
        };
        let tls = match &role {
            RoleConfig::Operator(_) => None,
            RoleConfig::Gateway(_) => self.keys(TlsRole::Gateway),
            RoleConfig::Worker(_) => self.keys(TlsRole::Worker),
        };
        Instance {
            name,
            node: NodeConfig {
                cluster: cluster.clone(),
                store,
                role,
                status_listen: self.listen(ports::STATUS),
                tls,
            },
        }
    }

    /// The files with a role's keys, where the cluster has them.
    fn keys(&self, role: TlsRole) -> Option<TlsConfig> {
        let keys = self.place.keys.as_ref()?;
        let folder = match role {
            TlsRole::Gateway => &keys.gateway,
            TlsRole::Worker => &keys.worker,
        };
        Some(TlsConfig {
            ca_file: format!("{folder}/ca.crt"),
            cert_file: format!("{folder}/tls.crt"),
            key_file: format!("{folder}/tls.key"),
            domain: keys.domain.clone(),
        })
    }

    /// Where an instance listens: a port that the system chooses and the store tells, or the one of its pod.
    fn listen(&self, port: u16) -> String {
        match self.place.form {
            Form::InProcess | Form::Processes { .. } => "127.0.0.1:0".to_owned(),
            Form::Pods { .. } => format!("0.0.0.0:{port}"),
        }
    }

    fn operator(&self) -> RoleConfig {
        let balancing = &self.cluster.balancing;
        RoleConfig::Operator(OperatorConfig {
            workers: self.cluster.workers.count,
            enabled: balancing.enabled,
            window_ms: balancing.window_ms,
            threshold: balancing.threshold,
            max_moves_per_layer: balancing.max_moves_per_layer,
            min_rows: balancing.min_rows,
            forecast: balancing.forecast,
            cover: balancing.cover,
            max_move_bytes: balancing.max_move_bytes,
            economy: balancing.economy,
            leaving: Vec::new(),
        })
    }

    fn worker(&self, rank: Rank, domain: &str) -> RoleConfig {
        let workers = &self.cluster.workers;
        let duty = workers.duty(rank);
        RoleConfig::Worker(WorkerConfig {
            rank,
            model_dir: self.place.model_dir.clone(),
            weights: self.cluster.model.weights,
            served_name: self
                .cluster
                .model
                .served_names
                .first()
                .cloned()
                .unwrap_or_default(),
            rpc_listen: self.listen(ports::RPC),
            exchange_listen: self.listen(ports::EXCHANGE),
            fabric: match self.place.form {
                Form::InProcess => FabricKind::Local,
                Form::Processes { .. } | Form::Pods { .. } => FabricKind::Tcp,
            },
            duty,
            slots: if duty.holds_experts() { self.slots } else { 0 },
            device: self.device(rank),
            threads: self.threads,
            cpu_path: workers.cpu_path,
            pinning: self.pinning(),
            seat: self.seat(rank),
            max_num_seqs: workers.max_num_seqs,
            max_num_batched_tokens: workers.max_num_batched_tokens,
            max_waiting: workers.max_waiting,
            overtake_ms: workers.overtake_ms,
            max_model_len: self.max_model_len,
            page_tokens: workers.page_tokens,
            kv_bytes: workers.kv_bytes,
            exchange_deadline_ms: workers.exchange_deadline_ms,
            domain: domain.to_owned(),
            window_ms: self.cluster.balancing.window_ms,
        })
    }

    /// Each worker has a card of its own: a pod sees only that one, workers of one machine see all.
    fn device(&self, rank: Rank) -> Device {
        match (self.cluster.workers.device, self.place.machine) {
            (DeviceClass::Cpu, _) => Device::Cpu,
            (DeviceClass::Cuda, Machine::Pods) => Device::Cuda { card: 0 },
            (DeviceClass::Cuda, Machine::Shared { .. }) => Device::Cuda { card: rank.0 },
        }
    }

    fn pinning(&self) -> Pinning {
        let by_place = match self.place.machine {
            Machine::Shared { .. } => Pinning::Node,
            Machine::Pods => Pinning::None,
        };
        self.cluster.workers.pinning.unwrap_or(by_place)
    }

    /// Pods know nothing of each other's processors: each takes those that it was given for its own.
    fn seat(&self, rank: Rank) -> Seat {
        match self.place.machine {
            Machine::Shared { .. } => Seat {
                index: rank.0,
                of: self.cluster.workers.count,
            },
            Machine::Pods => Seat::ALONE,
        }
    }

    fn gateway(&self) -> RoleConfig {
        let gateway = &self.cluster.gateway;
        let balancing = &self.cluster.balancing;
        // Copies that never move need no forecast.
        let foretold = balancing.enabled && balancing.forecast;
        RoleConfig::Gateway(GatewayConfig {
            listen: self.place.gateway_listen.clone(),
            model_dir: self.place.model_dir.clone(),
            served_names: self.cluster.model.served_names.clone(),
            max_model_len: self.max_model_len,
            routing: gateway.routing,
            max_in_flight: gateway.max_in_flight,
            max_queued: gateway.max_queued,
            queue_timeout_ms: gateway.queue_timeout_ms,
            request_timeout_ms: gateway.request_timeout_ms,
            forecast_ms: foretold.then_some(balancing.window_ms),
            expert_hints: self.cluster.workers.overtake_ms > 0,
            traffic: gateway.traffic.clone(),
            api_keys: self.place.api_keys.clone(),
        })
    }
}

fn in_etcd(endpoints: &[String], tls: Option<&StoreTls>) -> StoreConfig {
    StoreConfig::Etcd {
        endpoints: endpoints.to_vec(),
        tls: tls.cloned(),
    }
}

#[cfg(test)]
mod tests;
