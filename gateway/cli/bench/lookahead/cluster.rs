//! The cluster under test: all roles in this process, and a gateway per arm.

use std::collections::BTreeMap;
use std::ops::Sub;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::node::{GatewayConfig, NodeConfig, RoleConfig};
use foregate_api::weights::WeightSettings;
use foregate_checkpoint::Checkpoint;
use foregate_gateway::Deps;
use foregate_operator::launch::{Form, Machine, ModelFacts, Place, launch};
use foregate_operator::parse_manifest;
use foregate_operator::validate::validate;
use foregate_store::kv::Store;
use foregate_store::memory::MemoryStore;
use foregate_worker::dense::DenseWeights;
use foregate_worker::fabric::local::LocalHub;
use prometheus::Registry;
use prometheus::proto::{MetricFamily, MetricType};
use serde::Serialize;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Arm, LookaheadArgs};
use crate::bench::client::Target;
use crate::error::CliError;
use crate::roles::{self, Role, Seams, Sink};
use crate::status;

/// Name of the model.
pub(super) const MODEL: &str = "bench";
/// Longest wait for a cluster that serves.
const START: Duration = Duration::from_secs(600);
/// Longest wait for one kind of role to drain.
const DRAIN: Duration = Duration::from_secs(40);
/// Longest wait for a place: no request of a long queue may be turned away.
const PATIENCE_MS: u64 = 3_600_000;

/// Totals of all workers since their start.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Counted {
    /// Steps in which every sequence had one row; their rows, distinct experts (mean over layers) and seconds.
    pub(super) decode_steps: f64,
    pub(super) decode_rows: f64,
    pub(super) decode_experts: f64,
    pub(super) decode_seconds: f64,
    /// All steps.
    pub(super) steps: f64,
    /// Tokens made.
    pub(super) generated: f64,
    /// Prompt tokens that were in a prefix cache.
    pub(super) prefix_hits: f64,
}

impl Sub for Counted {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            decode_steps: self.decode_steps - before.decode_steps,
            decode_rows: self.decode_rows - before.decode_rows,
            decode_experts: self.decode_experts - before.decode_experts,
            decode_seconds: self.decode_seconds - before.decode_seconds,
            steps: self.steps - before.steps,
            generated: self.generated - before.generated,
            prefix_hits: self.prefix_hits - before.prefix_hits,
        }
    }
}

/// What an arm's gateway says of itself at the end.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Said {
    /// How right its predictors were.
    pub(super) predictors: Value,
    /// Its gauges and counters of the window and of routing decisions, by name and labels.
    pub(super) metrics: BTreeMap<String, f64>,
}

/// A running cluster, as the bench sees it.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    targets: Vec<Target>,
    gateways: Vec<Registry>,
    workers: Vec<Registry>,
}

/// Its roles, in the order of draining: gateways, operator, workers.
#[derive(Debug, Default)]
pub(super) struct Roles {
    tokens: [CancellationToken; 3],
    sets: [JoinSet<Result<(), CliError>>; 3],
}

impl Cluster {
    /// Starts all roles and waits until every gateway can serve.
    pub(super) async fn start(
        args: &LookaheadArgs,
        model: &Path,
    ) -> Result<(Self, Roles), CliError> {
        let facts = facts(model).await?;
        let manifest = manifest(args, model, &facts);
        let wrong = |error: &dyn std::fmt::Display| CliError::Usage(error.to_string());
        let manifest = parse_manifest(&manifest).map_err(|error| wrong(&error))?;
        let validated = validate(manifest).map_err(|findings| wrong(&findings))?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let place = Place {
            form: Form::InProcess,
            model_dir: model.to_string_lossy().into_owned(),
            gateway_listen: "127.0.0.1:0".to_owned(),
            keys: None,
            api_keys: None,
            machine: Machine::Shared {
                cores: u32::try_from(cores).unwrap_or(u32::MAX),
                memory: crate::doctor::total_memory(),
            },
        };
        let plan = launch(&validated, &facts, &place).map_err(|error| wrong(&error))?;
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let seams = Seams {
            store,
            hub: LocalHub::new(),
            dense: DenseWeights::new(),
        };
        let (mut cluster, mut roles) = (Self::default(), Roles::default());
        for instance in plan.instances {
            match instance.node.role.clone() {
                RoleConfig::Operator(_) => {
                    roles.start(1, instance.node, &seams);
                }
                RoleConfig::Worker(_) => {
                    let registry = roles.start(2, instance.node, &seams);
                    cluster.workers.push(registry);
                }
                RoleConfig::Gateway(config) => {
                    for arm in &args.arms {
                        let name = instance.node.cluster.clone();
                        let seat = (&mut roles, &seams);
                        cluster.gateway(*arm, config.clone(), name, seat).await?;
                    }
                }
            }
        }
        match timeout(START, cluster.ready(&mut roles)).await {
            Ok(ready) => ready.map(|()| (cluster, roles)),
            Err(_) => Err(CliError::Runtime(format!(
                "the cluster does not serve after {} s",
                START.as_secs()
            ))),
        }
    }

    async fn gateway(
        &mut self,
        arm: Arm,
        mut config: GatewayConfig,
        cluster: String,
        (roles, seams): (&mut Roles, &Seams),
    ) -> Result<(), CliError> {
        let (listener, address) = status::bind("127.0.0.1:0")
            .await
            .map_err(|error| CliError::Runtime(error.to_string()))?;
        let (policy, trial) = arm.policy();
        config.routing = policy;
        config.expert_hints = arm.hints();
        let registry = Registry::new();
        let deps = Deps {
            cluster,
            config,
            keys: None,
            listener,
            store: Arc::clone(&seams.store),
            registry: registry.clone(),
            trial,
            shutdown: roles.tokens[0].clone(),
        };
        roles.sets[0].spawn(async move {
            let end = Box::pin(foregate_gateway::run(deps)).await;
            end.map_err(|error| CliError::runtime("a gateway", &error))
        });
        self.gateways.push(registry);
        self.targets
            .push(Target::new(&format!("http://{address}"))?);
        Ok(())
    }

    async fn ready(&self, roles: &mut Roles) -> Result<(), CliError> {
        for target in &self.targets {
            while target.text("/ready").await.is_err() {
                tokio::select! {
                    ended = roles.first_end() => return Err(ended),
                    () = sleep(Duration::from_millis(100)) => {}
                }
            }
        }
        Ok(())
    }

    /// The gateway of an arm.
    pub(super) fn target(&self, arm: usize) -> Target {
        self.targets[arm].clone()
    }

    /// Totals of all workers.
    pub(super) fn counted(&self) -> Counted {
        let families: Vec<MetricFamily> =
            self.workers.iter().flat_map(Registry::gather).collect();
        let of = |name: &str| {
            let own = families.iter().filter(|family| family.name() == name);
            own.flat_map(MetricFamily::get_metric)
                .map(|metric| metric.get_counter().get_value())
                .sum()
        };
        Counted {
            decode_steps: of("foregate_worker_decode_steps_total"),
            decode_rows: of("foregate_worker_decode_rows_total"),
            decode_experts: of("foregate_worker_decode_experts_total"),
            decode_seconds: of("foregate_worker_decode_seconds_total"),
            steps: of("foregate_worker_steps_total"),
            generated: of("vllm:generation_tokens_total"),
            prefix_hits: of("vllm:prefix_cache_hits_total"),
        }
    }

    /// What every arm's gateway says of itself.
    pub(super) async fn said(&self) -> Vec<Said> {
        let mut said = Vec::new();
        for (target, registry) in self.targets.iter().zip(&self.gateways) {
            let experts = target.json("/debug/experts").await;
            said.push(Said {
                predictors: experts.map_or(Value::Null, |mut all| all["predictors"].take()),
                metrics: told(registry),
            });
        }
        said
    }
}

impl Roles {
    fn start(&mut self, order: usize, node: NodeConfig, seams: &Seams) -> Registry {
        let registry = Registry::new();
        let role = Role {
            node,
            seams: seams.clone(),
            registry: registry.clone(),
            listener: None,
            progress: Sink::default(),
            shutdown: self.tokens[order].clone(),
        };
        self.sets[order].spawn(async move { Box::pin(roles::run(role)).await });
        registry
    }

    /// Resolves when any role ends, which none should.
    pub(super) async fn first_end(&mut self) -> CliError {
        let [gateways, operator, workers] = &mut self.sets;
        let ended = tokio::select! {
            Some(ended) = gateways.join_next() => ended,
            Some(ended) = operator.join_next() => ended,
            Some(ended) = workers.join_next() => ended,
            else => return CliError::Runtime("the cluster has no role".to_owned()),
        };
        match ended {
            Ok(Ok(())) => CliError::Runtime("a role ended by itself".to_owned()),
            Ok(Err(error)) => error,
            Err(error) => CliError::runtime("a role failed", &error),
        }
    }

    /// Drains all: gateways first, so that their streams still have workers.
    pub(super) async fn end(mut self) {
        for (token, set) in self.tokens.iter().zip(&mut self.sets) {
            token.cancel();
            let all = async { while set.join_next().await.is_some() {} };
            if timeout(DRAIN, all).await.is_err() {
                set.abort_all();
            }
        }
    }
}

/// Gauges and counters that say how the window and its routes fared.
fn told(registry: &Registry) -> BTreeMap<String, f64> {
    let told = [
        "foregate_gateway_window_",
        "foregate_gateway_route_decisions",
    ];
    let mut found = BTreeMap::new();
    for family in registry.gather() {
        let name = family.name();
        if !told.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        for metric in family.get_metric() {
            let labels: Vec<&str> = metric
                .get_label()
                .iter()
                .map(|label| label.value())
                .collect();
            let value = match family.get_field_type() {
                MetricType::COUNTER => metric.get_counter().get_value(),
                MetricType::GAUGE => metric.get_gauge().get_value(),
                _ => continue,
            };
            found.insert([&[name], &labels[..]].concat().join(" "), value);
        }
    }
    found
}

async fn facts(model: &Path) -> Result<ModelFacts, CliError> {
    let (path, what) = (model.to_owned(), format!("model {}", model.display()));
    let opened = tokio::task::spawn_blocking(move || {
        Checkpoint::open_with(&path, &WeightSettings::default())
            .map(|checkpoint| ModelFacts::of(checkpoint.spec()))
    });
    opened
        .await
        .map_err(|error| CliError::runtime(&what, &error))?
        .map_err(|error| CliError::runtime(&what, &error))
}

/// The cluster as a manifest: JSON is YAML. The KV cache holds half as many sequences again as run, so that what one
/// block has read is gone when the next one comes.
fn manifest(args: &LookaheadArgs, model: &Path, facts: &ModelFacts) -> String {
    let share = args.places.div_ceil(args.workers);
    let batch = args.batch.unwrap_or(share + share.div_ceil(2));
    let longest = args.prompt_tokens.longest() + args.output_tokens.longest() + 16;
    let tokens = u64::from(longest) * u64::from(batch + 1);
    let kilobytes = (tokens * facts.kv_bytes_per_token * 5 / 4).div_ceil(1024);
    serde_json::json!({
        "apiVersion": foregate_api::manifest::API_VERSION,
        "kind": foregate_api::manifest::KIND,
        "metadata": { "name": MODEL },
        "spec": {
            "model": { "uri": model, "servedNames": [MODEL] },
            "workers": {
                "count": args.workers, "redundantSlots": args.redundant_slots, "threads": args.threads,
                "maxNumSeqs": batch, "overtakeMs": args.overtake_ms,
                "kvMemory": format!("{kilobytes}Ki"),
            },
            "gateway": {
                "maxInFlight": args.places, "maxQueued": 1_000_000, "queueTimeoutMs": PATIENCE_MS,
                "requestTimeoutMs": PATIENCE_MS,
            },
            "balancing": { "enabled": false, "windowMs": 1000 },
        },
    })
    .to_string()
}
