//! The operator on Kubernetes: watches, leadership, and the end.
//!
//! In: a client, the store, where to ask for a token. Out: every `MoeCluster` brought to what its manifest wants. One process of
//! several leads; the others wait. What is decided about a cluster is decided in `reconcile.rs`.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use foregate_crd::MoeCluster;
use foregate_store::Store;
use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use k8s_openapi::jiff::Timestamp;
use kube::runtime::Controller;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::Store as Reflected;
use kube::runtime::watcher::Config;
use kube::{Api, Client, ResourceExt as _};
use prometheus::Registry;
use tokio::sync::mpsc;
use tokio::time::interval;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::build::{MANAGER, selector_text};
use crate::clusters::{Canary, Clusters, WAKE_UPS};
use crate::election::Election;
use crate::error::OperatorError;
use crate::metrics::Controls;
use crate::reconcile::{Context, error_policy, reconcile};

pub use crate::build::Defaults;
pub use kube::Client as KubeClient;

/// How often what is left of clusters that are gone is removed.
const SWEEP: Duration = Duration::from_secs(60);
/// Clusters that are worked on at the same time.
const AT_ONCE: u16 = 8;

/// What the operator is given.
#[derive(Clone)]
pub struct KubeDeps {
    /// Client of the API server.
    pub client: KubeClient,
    /// The namespace that it watches; `None`: all of them.
    pub namespace: Option<String>,
    /// Namespace of its Lease.
    pub own_namespace: String,
    /// Tells this process from others; a pod's name does.
    pub identity: String,
    /// What it adds to every manifest.
    pub defaults: Defaults,
    /// Where roles meet.
    pub store: Arc<dyn Store>,
    /// Asks gateways for a token.
    pub canary: Arc<dyn Canary>,
    /// Where it registers its metrics.
    pub registry: Registry,
    /// Tells it to stop.
    pub shutdown: CancellationToken,
}

impl std::fmt::Debug for KubeDeps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KubeDeps")
            .field("namespace", &self.namespace)
            .field("identity", &self.identity)
            .field("defaults", &self.defaults)
            .finish_non_exhaustive()
    }
}

/// A client: of the cluster that this process runs in, or of `KUBECONFIG`.
///
/// # Errors
/// If there is neither.
pub async fn connect() -> Result<KubeClient, OperatorError> {
    let client = Client::try_default().await;
    client.map_err(|error| OperatorError::Kubernetes(Box::new(error)))
}

/// Runs until it is told to stop, or loses its lead: a successor may already be at work then.
///
/// # Errors
/// Metrics that are registered already, a lost lead.
pub async fn run(deps: KubeDeps) -> Result<(), OperatorError> {
    let (wake, woken) = mpsc::channel(WAKE_UPS);
    let clusters = Clusters::new(Arc::clone(&deps.store), Arc::clone(&deps.canary), wake);
    deps.registry.register(Box::new(clusters.clone()))?;
    let controls = Controls::register(&deps.registry)?;
    let election = Election::new(
        deps.client.clone(),
        &deps.own_namespace,
        MANAGER,
        deps.identity.clone(),
        || MicroTime(Timestamp::now()),
    );
    if !election.won(&deps.shutdown).await {
        return Ok(());
    }
    controls.leader.set(1);
    tracing::info!(identity = %deps.identity, "this operator leads");
    let stop = deps.shutdown.child_token();
    let work = control(&deps, clusters.clone(), woken, &controls, stop.clone());
    let mut work = Box::pin(work);
    let end = tokio::select! {
        () = &mut work => Ok(()),
        () = election.lost() => Err(OperatorError::LostLead),
    };
    stop.cancel();
    if end.is_err() {
        work.await;
    }
    clusters.stop().await;
    controls.leader.set(0);
    if end.is_ok() {
        election.resign().await;
    }
    end
}

/// Follows all clusters until `stop`.
async fn control(
    deps: &KubeDeps,
    clusters: Clusters,
    woken: mpsc::Receiver<()>,
    controls: &Controls,
    stop: CancellationToken,
) {
    let recorder = Recorder::new(
        deps.client.clone(),
        Reporter {
            controller: MANAGER.to_owned(),
            instance: Some(deps.identity.clone()),
        },
    );
    let context = Arc::new(Context {
        client: deps.client.clone(),
        defaults: deps.defaults.clone(),
        clusters: clusters.clone(),
        recorder,
        now: || Time(Timestamp::now()),
        applied: Mutex::default(),
        failures: Mutex::default(),
    });
    let ours = Config::default().labels(&managed());
    let controller = Controller::new(api::<MoeCluster>(deps), Config::default())
        .with_config(kube::runtime::controller::Config::default().concurrency(AT_ONCE))
        .owns(api::<Pod>(deps), ours.clone())
        .owns(api::<Deployment>(deps), ours)
        .reconcile_all_on(ReceiverStream::new(woken))
        .graceful_shutdown_on(stop.clone().cancelled_owned());
    let known = controller.store();
    let looks = controller
        .run(reconcile, error_policy, context)
        .for_each(|look| {
            match look {
                Ok((object, _)) => {
                    controls.looks.with_label_values(&["done"]).inc();
                    tracing::debug!(%object, "looked at");
                }
                Err(error) => {
                    controls.looks.with_label_values(&["failed"]).inc();
                    tracing::debug!(%error, "a look failed");
                }
            }
            std::future::ready(())
        });
    let sweeping = sweep(deps, &clusters, known, &stop);
    tokio::join!(looks, sweeping);
}

fn api<K>(deps: &KubeDeps) -> Api<K>
where
    K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
{
    match &deps.namespace {
        Some(namespace) => Api::namespaced(deps.client.clone(), namespace),
        None => Api::all(deps.client.clone()),
    }
}

/// Selects what this operator has made.
fn managed() -> String {
    let label = (
        "app.kubernetes.io/managed-by".to_owned(),
        MANAGER.to_owned(),
    );
    selector_text(&std::collections::BTreeMap::from([label]))
}

/// Stops what runs for clusters that are gone, and removes their keys: the store knows nothing of owners.
async fn sweep(
    deps: &KubeDeps,
    clusters: &Clusters,
    known: Reflected<MoeCluster>,
    stop: &CancellationToken,
) {
    let mut ticks = interval(SWEEP);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            ready = known.wait_until_ready() => if ready.is_err() { return },
        }
        let there = known.state();
        let is_there = |uid: &str| there.iter().any(|c| c.uid().as_deref() == Some(uid));
        for name in clusters.retain(&is_there) {
            if let Err(error) = forget(deps, &name).await {
                tracing::warn!(cluster = %name, %error, "its keys were not removed from the store");
            }
        }
    }
}

/// Removes a cluster's keys.
async fn forget(deps: &KubeDeps, name: &str) -> Result<(), foregate_store::StoreError> {
    let keys = foregate_store::Keys::new(name);
    for root in [keys.root(), keys.past()] {
        for key in deps.store.list(root).await?.keys() {
            deps.store.delete(key).await?;
        }
    }
    tracing::info!(cluster = %name, "forgotten");
    Ok(())
}
