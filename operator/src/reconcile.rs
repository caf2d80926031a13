//! One look at a cluster, one step towards its manifest.
//!
//! ```text
//!  dereference ─ validate ─ know the model ─ launch ─ build ─ apply ─ fleet ─ status
//!  (what is)     (what is   (an inspector    (the    (pure)  (server (pods,  (what was
//!                wanted)     looks once)      sums)           side)   ranks)  observed)
//! ```
//!
//! Nothing is kept from one look to the next but what saves work, so an operator that is killed anywhere goes on at the next.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::limits;
use foregate_api::model::ModelFacts;
use foregate_api::node::{RoleConfig, WorkerConfig};
use foregate_crd::cluster::{InspectedModel, MemoryPlan};
use foregate_crd::{
    ConditionType, ExpertPlacementStatus, MoeCluster, MoeClusterStatus, Reason,
};
use foregate_store::ClusterState;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Client;
use kube::ResourceExt as _;
use kube::runtime::controller::Action;
use kube::runtime::events::Recorder;
use tokio::time::Instant;

use crate::apply::{self, ApplyError};
use crate::build::{self, Component, Defaults, Inputs, Owner, Prepared, selector_text};
use crate::clusters::{Address, Clusters, View};
use crate::dereference::{Found, Inspection, dereference};
use crate::fleet::{self, Doing, Look, Orders};
use crate::launch::{Form, LaunchPlan, Machine, Place, WorkerMemory, folders, launch, ports};
use crate::predict;
use crate::secrets::{self, ApiKey, SecretsError};
use crate::source::Source;
use crate::status::{Facts, Stage, Verdict, status};
use crate::tell::{self, Told};
use crate::validate::{Certificates, ValidatedCluster, validate};

/// How soon a cluster is looked at again while something is under way, and while nothing is.
const SOON: Duration = Duration::from_secs(2);
const LATER: Duration = Duration::from_secs(20);
/// How often objects that have not changed are applied again, in case somebody else changed them.
const REAPPLY: Duration = Duration::from_secs(60);
/// How often Secrets are looked at. They change once in weeks, unless somebody removes one.
const SECRETS: Duration = Duration::from_secs(30);
/// Longest pause after failures in a row.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Why a step was not finished.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    /// The API server did not do what it was asked.
    #[error("{what}: {}", in_words(source))]
    Api {
        /// What it was asked.
        what: &'static str,
        /// Its answer.
        source: Box<kube::Error>,
    },
    /// The Secrets of a cluster cannot be used as they are.
    #[error("{0}")]
    Secrets(String),
    /// The name of an object is taken.
    #[error("{0}")]
    Taken(String),
    /// An object cannot be written as JSON.
    #[error("objects cannot be built: {0}")]
    Build(#[from] serde_json::Error),
}

impl ReconcileError {
    fn api(what: &'static str) -> impl FnOnce(kube::Error) -> Self {
        move |source| Self::Api {
            what,
            source: Box::new(source),
        }
    }

    fn applied(what: &'static str) -> impl FnOnce(ApplyError) -> Self {
        move |error| match error {
            ApplyError::Api(source) => Self::api(what)(source),
            taken @ ApplyError::Taken { .. } => Self::Taken(taken.to_string()),
        }
    }

    /// The step that failed: a label of metrics.
    pub(crate) const fn category(&self) -> &'static str {
        match self {
            Self::Api { what, .. } => what,
            Self::Secrets(_) => "secrets",
            Self::Taken(_) => "apply",
            Self::Build(_) => "build",
        }
    }

    /// What the API server has against an object, if it was the object.
    fn refusal(&self) -> Option<String> {
        match self {
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(error) if matches!(error.code, 400 | 403 | 422) => {
                    Some(error.message.clone())
                }
                // The objects are ours, so it is their kind that is not there.
                kube::Error::Api(error) if error.code == 404 => Some(format!(
                    "{}: is cert-manager installed, which spec.security.certManager asks for?",
                    error.message
                )),
                _ => None,
            },
            Self::Secrets(why) | Self::Taken(why) => Some(why.clone()),
            Self::Build(_) => None,
        }
    }
}

/// An error of the API server without the object that it came in.
fn in_words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => {
            format!("{} ({} {})", status.message, status.code, status.reason)
        }
        other => other.to_string(),
    }
}

/// What every look needs.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) defaults: Defaults,
    pub(crate) clusters: Clusters,
    pub(crate) recorder: Recorder,
    pub(crate) now: fn() -> Time,
    /// What was applied last, per cluster: the hash of its objects, and when.
    pub(crate) applied: Mutex<BTreeMap<String, (blake3::Hash, Instant)>>,
    /// When the Secrets were looked at last, per cluster, and the key that a gateway of it is asked with.
    pub(crate) secured: Mutex<BTreeMap<String, (Instant, Option<ApiKey>)>>,
    /// Failures in a row, per cluster.
    pub(crate) failures: Mutex<BTreeMap<String, u32>>,
}

/// What a look has found out.
struct Outcome {
    stage: Stage,
    orders: Orders,
    model: Option<InspectedModel>,
    memory: Option<MemoryPlan>,
    notes: Vec<String>,
    workers: u32,
    threshold: f64,
    /// The Secret with the API's keys, if it has none.
    keyless: Option<String>,
    view: Option<View>,
}

impl Outcome {
    /// Nothing was done; what runs goes on, and is seen all the same.
    fn stopped(context: &Context, cluster: &MoeCluster, owner: &Owner, stage: Stage) -> Self {
        let (workers, balancing) = (&cluster.spec.workers, &cluster.spec.balancing);
        Self {
            stage,
            orders: Orders::default(),
            model: cluster
                .status
                .as_ref()
                .and_then(|status| status.model.clone()),
            memory: None,
            notes: Vec::new(),
            workers: workers.count.or(limits::COUNT.default).unwrap_or_default(),
            threshold: balancing.threshold.unwrap_or(limits::THRESHOLD),
            keyless: None,
            view: context.clusters.look(owner),
        }
    }
}

/// One look.
///
/// # Errors
/// See [`ReconcileError`].
pub(crate) async fn reconcile(
    cluster: Arc<MoeCluster>,
    context: Arc<Context>,
) -> Result<Action, ReconcileError> {
    let Some(owner) = Owner::of(&cluster) else {
        return Ok(Action::await_change());
    };
    if cluster.metadata.deletion_timestamp.is_some() {
        // Everything is owned by it, and goes with it.
        return Ok(Action::await_change());
    }
    let found = dereference(&context.client, &owner)
        .await
        .map_err(ReconcileError::api("dereference"))?;
    let now = (context.now)();
    let ended = Box::pin(advance(&context, &cluster, &owner, &found, &now)).await;
    let stopped = |stage| Outcome::stopped(&context, &cluster, &owner, stage);
    let (outcome, failed) = match ended {
        Ok(outcome) => (outcome, None),
        Err(error) => match error.refusal() {
            Some(why) => (stopped(Stage::Refused(why)), Some(error)),
            None => return Err(error),
        },
    };
    let settled = report(&context, &cluster, &owner, &found, &outcome, &now).await?;
    if let Some(error) = failed {
        return Err(error);
    }
    lock(&context.failures).remove(&owner.uid);
    Ok(Action::requeue(if settled { LATER } else { SOON }))
}

/// When a failed look is repeated: twice as long after each failure.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the controller calls it with what it owns"
)]
pub(crate) fn error_policy(
    cluster: Arc<MoeCluster>,
    error: &ReconcileError,
    context: Arc<Context>,
) -> Action {
    let failures = {
        let mut failures = lock(&context.failures);
        let count = failures
            .entry(cluster.uid().unwrap_or_default())
            .or_default();
        *count = count.saturating_add(1);
        *count
    };
    tracing::warn!(
        cluster = %cluster.name_any(),
        step = error.category(),
        failures,
        %error,
        "a cluster could not be brought further; it is tried again"
    );
    Action::requeue(pause(failures))
}

fn pause(failures: u32) -> Duration {
    let factor = 2_u32.saturating_pow(failures.saturating_sub(1).min(16));
    Duration::from_millis(500)
        .saturating_mul(factor)
        .min(LONGEST_PAUSE)
}

/// Everything but the report.
async fn advance(
    context: &Context,
    cluster: &MoeCluster,
    owner: &Owner,
    found: &Found,
    now: &Time,
) -> Result<Outcome, ReconcileError> {
    let stopped = |stage| Outcome::stopped(context, cluster, owner, stage);
    let validated = match validate(cluster.manifest()) {
        Ok(validated) => validated,
        Err(findings) => return Ok(stopped(Stage::Invalid(findings.to_string()))),
    };
    let model = match know_model(context, cluster, owner, &validated, found).await? {
        Ok(model) => model,
        Err(stage) => return Ok(stopped(stage)),
    };
    let plan = match plan(context, owner, &validated, &model.facts) {
        Ok(plan) => plan,
        Err(why) => {
            return Ok(Outcome {
                model: Some(model),
                ..stopped(Stage::Unfit(why))
            });
        }
    };
    let seen = found.seen(now);
    let slots = seen
        .iter()
        .map(|(rank, seen)| (*rank, seen.slots))
        .collect();
    let prepared = build::build(&Inputs {
        owner,
        cluster: &validated,
        plan: &plan,
        defaults: &context.defaults,
        slots: &slots,
    })?;
    let api_key = secure(context, owner, &validated, now).await?;
    apply_objects(context, owner, &prepared, found).await?;
    let wanted = prepared
        .pods
        .iter()
        .map(|(rank, pod)| (*rank, pod.config.clone()))
        .collect();
    let view = settings(
        context,
        owner,
        &plan,
        found,
        api_key.as_ref(),
        Vec::new(),
        true,
    );
    let orders = fleet::next(&Look {
        wanted: &wanted,
        pods: &seen,
        state: fresh(view.as_ref()),
        experts: model.facts.experts,
    });
    let leaving = orders.leaving.iter().copied().collect();
    let view = settings(
        context,
        owner,
        &plan,
        found,
        api_key.as_ref(),
        leaving,
        false,
    )
    .or(view);
    obey(context, cluster, &orders, &prepared, found).await?;
    write_placement(context, cluster, owner, found, view.as_ref()).await?;
    Ok(Outcome {
        stage: Stage::Applied,
        orders,
        memory: memory(&plan, &model.facts),
        model: Some(model),
        notes: plan.notes,
        workers: validated.workers.count,
        threshold: validated.balancing.threshold,
        keyless: validated.security.api_keys.filter(|_| api_key.is_none()),
        view,
    })
}

/// The model's sizes, or how far it is to them. They are asked for once per model and kept in the status.
async fn know_model(
    context: &Context,
    cluster: &MoeCluster,
    owner: &Owner,
    validated: &ValidatedCluster,
    found: &Found,
) -> Result<Result<InspectedModel, Stage>, ReconcileError> {
    let key = build::source_key(validated);
    let kept = cluster
        .status
        .as_ref()
        .and_then(|status| status.model.clone());
    let ended = || async {
        match &found.inspector {
            Some(pod) => apply::end(&context.client, pod, true).await,
            None => Ok(()),
        }
    };
    if let Some(model) = kept.filter(|model| model.source == key) {
        ended().await.map_err(ReconcileError::api("inspect"))?;
        return Ok(Ok(model));
    }
    match found.inspection(&key) {
        Some(Inspection::Done(facts)) => Ok(Ok(InspectedModel { source: key, facts })),
        Some(Inspection::Failed(why)) => Ok(Err(Stage::Unreadable(why))),
        Some(Inspection::Working(why)) => Ok(Err(Stage::Reading(why))),
        Some(Inspection::Outdated) => {
            ended().await.map_err(ReconcileError::api("inspect"))?;
            Ok(Err(Stage::Reading(None)))
        }
        None => {
            let pod = build::inspector(owner, validated, &context.defaults);
            let made = apply::create(&context.client, &pod).await;
            made.map_err(ReconcileError::applied("inspect"))?;
            Ok(Err(Stage::Reading(None)))
        }
    }
}

fn plan(
    context: &Context,
    owner: &Owner,
    cluster: &ValidatedCluster,
    facts: &ModelFacts,
) -> Result<LaunchPlan, String> {
    let place = Place {
        form: Form::Pods {
            etcd: context.defaults.etcd.clone(),
            etcd_tls: build::etcd_keys(context.defaults.etcd_tls.as_ref()),
            cluster: owner.store_name(),
        },
        keys: build::keys(owner, cluster),
        api_keys: cluster
            .security
            .api_keys
            .as_ref()
            .map(|_| folders::API_KEYS.to_owned()),
        model_dir: Source::of(&cluster.model).directory(),
        gateway_listen: format!("0.0.0.0:{}", ports::HTTP),
        machine: Machine::Pods,
    };
    launch(cluster, facts, &place).map_err(|error| error.to_string())
}

/// Sees to the Secrets now and then. Gives the key that a gateway is asked with, where it wants one.
async fn secure(
    context: &Context,
    owner: &Owner,
    cluster: &ValidatedCluster,
    now: &Time,
) -> Result<Option<ApiKey>, ReconcileError> {
    let known = lock(&context.secured).get(&owner.uid).cloned();
    if let Some((at, key)) = known
        && at.elapsed() < SECRETS
    {
        return Ok(key);
    }
    let failed = |error: SecretsError| match error {
        SecretsError::Api(error) => ReconcileError::api("secrets")(error),
        SecretsError::Unusable(why) => ReconcileError::Secrets(why),
    };
    if cluster.security.certificates == Certificates::Operator {
        let now = u64::try_from(now.0.as_second()).unwrap_or_default();
        let domain = build::domain(owner);
        let done = secrets::ensure(&context.client, owner, &domain, now).await;
        done.map_err(failed)?;
    }
    if let Some(tls) = &context.defaults.etcd_tls {
        let done = secrets::ensure_etcd(&context.client, owner, tls).await;
        done.map_err(failed)?;
    }
    let key = match &cluster.security.api_keys {
        None => None,
        Some(secret) => secrets::api_key(&context.client, owner, secret)
            .await
            .map_err(ReconcileError::api("secrets"))?,
    };
    lock(&context.secured).insert(owner.uid.clone(), (Instant::now(), key.clone()));
    Ok(key)
}

/// Applies objects that are new or have not been applied for a while, and removes what is not wanted any more.
async fn apply_objects(
    context: &Context,
    owner: &Owner,
    prepared: &Prepared,
    found: &Found,
) -> Result<(), ReconcileError> {
    let bodies: Vec<_> = prepared.objects.iter().map(|object| &object.body).collect();
    // A pod that is still there has the ConfigMap of its name mounted.
    let keep: BTreeSet<String> = found.workers.values().map(|pod| pod.name_any()).collect();
    let hash = blake3::hash(&serde_json::to_vec(&(&bodies, &keep))?);
    let known = lock(&context.applied).get(&owner.uid).copied();
    if known.is_some_and(|(last, at)| last == hash && at.elapsed() < REAPPLY) {
        return Ok(());
    }
    let (client, objects) = (&context.client, &prepared.objects);
    let owned = apply::owned(client, owner)
        .await
        .map_err(ReconcileError::api("apply"))?;
    apply::apply(client, owner, objects, &owned)
        .await
        .map_err(ReconcileError::applied("apply"))?;
    apply::prune(client, owner, objects, &keep, &owned)
        .await
        .map_err(ReconcileError::api("prune"))?;
    lock(&context.applied).insert(owner.uid.clone(), (hash, Instant::now()));
    Ok(())
}

/// Tells the balancer its settings. With `only_look` a balancer that runs keeps the ranks that it was told to empty.
fn settings(
    context: &Context,
    owner: &Owner,
    plan: &LaunchPlan,
    found: &Found,
    api_key: Option<&ApiKey>,
    leaving: Vec<Rank>,
    only_look: bool,
) -> Option<View> {
    let mut roles = plan.instances.iter().map(|instance| &instance.node.role);
    let config = roles.clone().find_map(|role| match role {
        RoleConfig::Operator(config) => Some(config.clone()),
        RoleConfig::Gateway(_) | RoleConfig::Worker(_) => None,
    });
    let model = roles.find_map(|role| match role {
        RoleConfig::Gateway(gateway) => gateway.served_names.first().cloned(),
        RoleConfig::Operator(_) | RoleConfig::Worker(_) => None,
    });
    let mut config = config?;
    let address = Address {
        url: url(owner),
        model: model.unwrap_or_default(),
        api_key: api_key.cloned(),
    };
    let address = (found.available() > 0).then_some(address);
    if only_look && let Some(view) = context.clusters.look(owner) {
        return Some(view);
    }
    config.leaving = leaving;
    Some(context.clusters.ensure(owner, config, address))
}

fn url(owner: &Owner) -> String {
    format!(
        "http://{}.{}.svc:{}",
        owner.name,
        owner.namespace,
        ports::HTTP
    )
}

fn fresh(view: Option<&View>) -> Option<&ClusterState> {
    let state = view.map(|view| view.state.as_ref());
    state.filter(|state| state.connected)
}

/// Makes and ends pods.
async fn obey(
    context: &Context,
    cluster: &MoeCluster,
    orders: &Orders,
    prepared: &Prepared,
    found: &Found,
) -> Result<(), ReconcileError> {
    let failed = || ReconcileError::api("pods");
    for (ranks, at_once) in [(&orders.remove, true), (&orders.end, false)] {
        for rank in ranks {
            if let Some(pod) = found.workers.get(rank) {
                apply::end(&context.client, pod, at_once)
                    .await
                    .map_err(failed())?;
                let what = if at_once { Told::Removed } else { Told::Ended };
                tell::rank(&context.recorder, cluster, *rank, what).await;
            }
        }
    }
    for rank in &orders.create {
        if let Some(wanted) = prepared.pods.get(rank) {
            apply::create(&context.client, &wanted.pod)
                .await
                .map_err(ReconcileError::applied("pods"))?;
            tell::rank(&context.recorder, cluster, *rank, Told::Made).await;
        }
    }
    Ok(())
}

/// Writes the placement's status when its epoch is another than the one that is written.
async fn write_placement(
    context: &Context,
    cluster: &MoeCluster,
    owner: &Owner,
    found: &Found,
    view: Option<&View>,
) -> Result<(), ReconcileError> {
    let Some((plan, _)) = view.and_then(|view| view.state.active.as_ref()) else {
        return Ok(());
    };
    let written = found.placement.as_ref().and_then(|p| p.status.as_ref());
    let epoch = i64::try_from(plan.epoch.0).unwrap_or(i64::MAX);
    if found.placement.is_none() || written.is_some_and(|status| status.epoch == epoch) {
        return Ok(());
    }
    let moved = view.and_then(|view| view.moved(plan.epoch));
    let next = predict::next(&context.clusters.archive(owner), plan.epoch).await;
    let status = ExpertPlacementStatus::of(plan, moved, next);
    let written = apply::write_placement(&context.client, owner, &status).await;
    written.map_err(ReconcileError::api("placement"))?;
    tell::placement(&context.recorder, cluster, plan, moved).await;
    Ok(())
}

/// What the worker that needs most needs.
fn memory(plan: &LaunchPlan, facts: &ModelFacts) -> Option<MemoryPlan> {
    let needs = plan.instances.iter().filter_map(|instance| {
        let RoleConfig::Worker(WorkerConfig {
            duty,
            kv_bytes,
            slots,
            ..
        }) = &instance.node.role
        else {
            return None;
        };
        Some(WorkerMemory::of(*duty, *kv_bytes, *slots, facts))
    });
    let most = needs.max_by_key(WorkerMemory::total)?;
    let bytes = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
    Some(MemoryPlan {
        kv_bytes: most.kv_bytes,
        expert_bytes: bytes(most.expert_bytes),
        dense_bytes: most.dense_bytes,
        total_bytes: bytes(most.total()),
    })
}

/// Writes the status if it says anything new, and tells of what changed. True if nothing is under way.
async fn report(
    context: &Context,
    cluster: &MoeCluster,
    owner: &Owner,
    found: &Found,
    outcome: &Outcome,
    now: &Time,
) -> Result<bool, ReconcileError> {
    let seen = found.seen(now);
    let view = outcome.view.as_ref();
    let applied = outcome.stage == Stage::Applied;
    let facts = Facts {
        generation: cluster.metadata.generation,
        stage: &outcome.stage,
        workers: outcome.workers,
        pods: seen.len(),
        ready: seen.values().filter(|seen| seen.ready).count(),
        trouble: found.trouble(),
        doing: outcome.orders.doing,
        selector: selector_text(&owner.selector(Component::Worker)),
        gateways_wanted: found.gateways_wanted(),
        gateways: found.available(),
        gateways_change: found.gateways_change(),
        keyless: outcome.keyless.clone(),
        url: applied.then(|| url(owner)),
        state: view.map(|view| view.state.as_ref()),
        threshold: outcome.threshold,
        cover: cluster.spec.balancing.cover.unwrap_or_default(),
        verdict: view.map_or(Verdict::Pending, |view| view.verdict.clone()),
        model: outcome.model.clone(),
        memory: outcome.memory,
        notes: outcome.notes.clone(),
    };
    let before = cluster.status.as_ref();
    if before.is_some_and(is_ready) && view.is_some_and(|view| !view.informed) {
        // An operator that has just begun knows no better yet than the one before it.
        return Ok(false);
    }
    let after = status(&facts, before, now);
    if before != Some(&after) {
        let written = apply::write_status(&context.client, owner, &after).await;
        written.map_err(ReconcileError::api("status"))?;
        tell::conditions(&context.recorder, cluster, before, &after).await;
    }
    let ready = is_ready(&after);
    let asked = after
        .conditions
        .iter()
        .any(|c| c.reason == Reason::EpochChanging.name());
    Ok(ready && !asked && outcome.orders.doing == Doing::Settled)
}

fn is_ready(status: &MoeClusterStatus) -> bool {
    let mut conditions = status.conditions.iter();
    conditions.any(|c| c.type_ == ConditionType::Ready.name() && c.status == "True")
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
