//! operator | gateway | worker: from a `NodeConfig` to a running role.
//!
//! Here the seams are chosen: which store, which fabric. A role never asks whether it is alone in its process.

use std::io::{BufRead, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::node::{
    FabricKind, GatewayConfig, NodeConfig, OperatorConfig, RoleConfig, StoreConfig,
    WorkerConfig,
};
use foregate_api::tls::{StoreTls, TlsRole};
use foregate_store::etcd::EtcdStore;
use foregate_store::kv::Store;
use foregate_tls::{Keys, StoreKeys};
use foregate_worker::Health;
use foregate_worker::dense::DenseWeights;
use foregate_worker::fabric::local::LocalHub;
use prometheus::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::error::CliError;
use crate::status::{self, Probe};
use crate::telemetry::Telemetry;

/// How long etcd is tried when a role starts.
const ANSWER: Duration = Duration::from_secs(15);
/// How long a role waits for etcd when it starts, all attempts together.
const CONNECT: Duration = Duration::from_secs(30);

/// Arguments of `foregate operator|gateway|worker`.
#[derive(Debug, clap::Args)]
pub(crate) struct RoleArgs {
    /// The node file: one NodeConfig as JSON. `-` reads it as one line from stdin, and drains when stdin ends.
    #[arg(long, value_name = "NODE.json")]
    config: PathBuf,
    /// Address of this machine, or pod, that the others reach: it takes the place of "every address" in the node file.
    #[arg(long, value_name = "IP")]
    host: Option<IpAddr>,
    /// Failure domain of a worker whose node file does not say: in a pod, the name of its machine.
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
    /// stdout is the bound listener of the HTTP API; `up --processes` sets it for its gateway.
    #[arg(long, hide = true)]
    stdout_is_listener: bool,
}

impl RoleArgs {
    /// Of a role that needs a node file only.
    pub(crate) const fn of(config: PathBuf) -> Self {
        Self {
            config,
            host: None,
            domain: None,
            stdout_is_listener: false,
        }
    }

    fn is_stdin(&self) -> bool {
        self.config.as_os_str() == "-"
    }
}

/// What the roles of one process share.
#[derive(Debug, Clone)]
pub(crate) struct Seams {
    /// Where the roles meet.
    pub store: Arc<dyn Store>,
    /// Where local fabrics meet.
    pub hub: Arc<LocalHub>,
    /// Dense weights of its workers.
    pub dense: Arc<DenseWeights>,
}

/// One role, ready to run.
#[derive(Debug)]
pub(crate) struct Role {
    /// What it is told.
    pub node: NodeConfig,
    /// The seams.
    pub seams: Seams,
    /// Its metrics.
    pub registry: Registry,
    /// The bound listener of a gateway, if it is bound already.
    pub listener: Option<TcpListener>,
    /// Told how far a worker's start has come.
    pub progress: Sink,
    /// Asks it to drain.
    pub shutdown: CancellationToken,
}

/// Receives a worker's progress.
#[derive(Clone)]
pub(crate) struct Sink(pub(crate) foregate_worker::ProgressSink);

impl Default for Sink {
    fn default() -> Self {
        Self(Arc::new(|_| {}))
    }
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sink")
    }
}

/// Runs one role as this process.
///
/// # Errors
/// A wrong node file, an unreachable store, or the role's own.
pub(crate) async fn run_alone(
    kind: &'static str,
    args: &RoleArgs,
    telemetry: &mut Telemetry,
    shutdown: CancellationToken,
) -> Result<(), CliError> {
    let node = read_node(kind, args)?;
    let registry = Registry::new();
    telemetry.export(registry.clone());
    let seams = Seams {
        store: connect(&node).await?,
        hub: LocalHub::new(),
        dense: DenseWeights::new(),
    };
    let listener = args.stdout_is_listener.then(inherited_listener);
    let role = Role {
        node,
        seams,
        registry,
        listener: listener.transpose()?,
        progress: Sink::default(),
        shutdown: shutdown.clone(),
    };
    if args.is_stdin() {
        watch_parent(shutdown)?;
    }
    Box::pin(run(role)).await
}

/// The listener that the parent gave as stdout. stdout itself becomes `/dev/null`: as long as one copy of the
/// listener is open, a gateway that drains would keep new clients waiting instead of refusing them.
fn inherited_listener() -> Result<TcpListener, CliError> {
    let failed = |error| CliError::runtime("the inherited listener", &error);
    let listener = std::io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(failed)?;
    let null = std::fs::File::options()
        .write(true)
        .open("/dev/null")
        .map_err(failed)?;
    rustix::stdio::dup2_stdout(null).map_err(|error| failed(error.into()))?;
    TcpListener::from_std(listener.into()).map_err(failed)
}

/// Asks for a drain when stdin ends. On a thread of its own: a read of stdin cannot be cancelled, and the
/// thread simply ends with the process.
///
/// # Errors
/// The system's, if it has no thread.
pub(crate) fn watch_parent(shutdown: CancellationToken) -> Result<(), CliError> {
    let watch = move || {
        let mut byte = [0_u8; 1];
        while matches!(std::io::stdin().read(&mut byte), Ok(1..)) {}
        shutdown.cancel();
    };
    std::thread::Builder::new()
        .name("parent".to_owned())
        .spawn(watch)
        .map(drop)
        .map_err(|error| CliError::runtime("a thread cannot start", &error))
}

fn read_node(kind: &str, args: &RoleArgs) -> Result<NodeConfig, CliError> {
    let path = args.config.display();
    let wrong =
        |error: &dyn std::error::Error| CliError::Usage(format!("node file {path}: {error}"));
    let mut text = Vec::new();
    let read = if args.is_stdin() {
        std::io::stdin()
            .lock()
            .read_until(b'\n', &mut text)
            .map(drop)
    } else {
        std::fs::read(&args.config).map(|read| text = read)
    };
    read.map_err(|error| wrong(&error))?;
    let mut node: NodeConfig = serde_json::from_slice(&text).map_err(|error| wrong(&error))?;
    settle(&mut node, args);
    let is = match &node.role {
        RoleConfig::Operator(_) => "operator",
        RoleConfig::Gateway(_) => "gateway",
        RoleConfig::Worker(_) => "worker",
    };
    if is != kind {
        return Err(CliError::Usage(format!(
            "node file {path} is for a role {is}; run `foregate {is} --config {path}`"
        )));
    }
    if let (RoleConfig::Operator(_), Some(_)) = (&node.role, &node.tls) {
        return Err(CliError::Usage(format!(
            "node file {path}: an operator speaks to no other role, so it has no use for `tls`; leave it out"
        )));
    }
    if let RoleConfig::Worker(worker) = &node.role
        && worker.fabric == FabricKind::Local
    {
        return Err(CliError::Usage(format!(
            "node file {path}: fabric local joins workers of one process; a worker alone wants tcp"
        )));
    }
    Ok(node)
}

/// Fills in what is known only where the role runs. A node file of pods is made before they have an address.
fn settle(node: &mut NodeConfig, args: &RoleArgs) {
    let RoleConfig::Worker(worker) = &mut node.role else {
        return;
    };
    if let Some(host) = args.host {
        for address in [&mut worker.rpc_listen, &mut worker.exchange_listen] {
            if let Ok(parsed) = address.parse::<SocketAddr>()
                && parsed.ip().is_unspecified()
            {
                *address = SocketAddr::new(host, parsed.port()).to_string();
            }
        }
    }
    if worker.domain.is_empty()
        && let Some(domain) = &args.domain
    {
        worker.domain.clone_from(domain);
    }
}

async fn connect(node: &NodeConfig) -> Result<Arc<dyn Store>, CliError> {
    match &node.store {
        StoreConfig::InProcess => Err(CliError::Usage(
            "the node file names the in-process store, which only `foregate up` has; name etcd"
                .to_owned(),
        )),
        StoreConfig::Etcd { endpoints, tls } => {
            let keys = store_keys(tls.as_ref())?;
            connect_etcd(endpoints, keys.as_ref()).await
        }
    }
}

/// The keys of a client of etcd.
///
/// # Errors
/// When a file cannot be used.
pub(crate) fn store_keys(tls: Option<&StoreTls>) -> Result<Option<StoreKeys>, CliError> {
    let opened = tls.map(StoreKeys::open).transpose();
    opened.map_err(|error| CliError::Usage(format!("etcd: {error}")))
}

/// Connects to etcd.
///
/// # Errors
/// When it does not answer in time.
pub(crate) async fn connect_etcd(
    endpoints: &[String],
    keys: Option<&StoreKeys>,
) -> Result<Arc<dyn Store>, CliError> {
    let what = format!("etcd at {}", endpoints.join(", "));
    match tokio::time::timeout(CONNECT, EtcdStore::connect_proven(endpoints, keys, ANSWER))
        .await
    {
        Ok(Ok(store)) => Ok(Arc::new(store)),
        Ok(Err(error)) => Err(CliError::runtime(&what, &error)),
        Err(_) => Err(CliError::Runtime(format!(
            "{what}: no answer within {} s",
            CONNECT.as_secs()
        ))),
    }
}

/// Runs a role until it is told to stop and has drained.
///
/// # Errors
/// An address that cannot be listened on; the role's own.
pub(crate) async fn run(role: Role) -> Result<(), CliError> {
    match role.node.role.clone() {
        RoleConfig::Operator(config) => operator(&role, config).await,
        RoleConfig::Worker(config) => worker(&role, config).await,
        RoleConfig::Gateway(config) => gateway(role, config).await,
    }
}

async fn operator(role: &Role, config: OperatorConfig) -> Result<(), CliError> {
    let deps = foregate_operator::Deps {
        cluster: role.node.cluster.clone(),
        config: watch::channel(config).1,
        store: Arc::clone(&role.seams.store),
        registry: role.registry.clone(),
        shutdown: role.shutdown.clone(),
    };
    beside_status(role, Probe::Operator, foregate_operator::run(deps)).await
}

/// The keys that a node file names.
fn keys(node: &NodeConfig, me: TlsRole) -> Result<Option<Keys>, CliError> {
    let opened = node.tls.as_ref().map(|tls| Keys::open(tls, me)).transpose();
    opened.map_err(|error| CliError::Usage(format!("node file: {error}")))
}

async fn worker(role: &Role, config: WorkerConfig) -> Result<(), CliError> {
    let keys = keys(&role.node, TlsRole::Worker)?;
    let rpc_listener = listen("rpc_listen", &config.rpc_listen).await?;
    let exchange_listener = match config.fabric {
        // Who is local meets at the hub; ranks of NCCL find each other through the store.
        FabricKind::Local | FabricKind::Nccl => None,
        // The fabric has threads of its own, so its listener is a plain one.
        FabricKind::Tcp => {
            let bound = std::net::TcpListener::bind(&config.exchange_listen);
            let what = format!(
                "exchange_listen: cannot listen on {}",
                config.exchange_listen
            );
            Some(bound.map_err(|error| CliError::runtime(&what, &error))?)
        }
    };
    let health = Health::new();
    let deps = foregate_worker::Deps {
        cluster: role.node.cluster.clone(),
        config,
        keys,
        store: Arc::clone(&role.seams.store),
        local_hub: Some(Arc::clone(&role.seams.hub)),
        dense: Arc::clone(&role.seams.dense),
        cards: crate::device::cards(),
        rpc_listener,
        exchange_listener,
        registry: role.registry.clone(),
        progress: Arc::clone(&role.progress.0),
        health: health.clone(),
        shutdown: role.shutdown.clone(),
    };
    beside_status(role, Probe::Worker(health), foregate_worker::run(deps)).await
}

async fn gateway(role: Role, config: GatewayConfig) -> Result<(), CliError> {
    let keys = keys(&role.node, TlsRole::Gateway)?;
    let listener = match role.listener {
        Some(listener) => listener,
        None => listen("listen", &config.listen).await?,
    };
    let deps = foregate_gateway::Deps {
        cluster: role.node.cluster,
        config,
        keys,
        listener,
        store: role.seams.store,
        registry: role.registry,
        trial: foregate_gateway::Trial::default(),
        shutdown: role.shutdown,
    };
    let end = foregate_gateway::run(deps).await;
    end.map_err(|error| CliError::runtime("the role failed", &error))
}

pub(crate) async fn listen(field: &str, address: &str) -> Result<TcpListener, CliError> {
    let bound = status::bind(address).await;
    let (listener, _) =
        bound.map_err(|error| CliError::Runtime(format!("{field}: {error}")))?;
    Ok(listener)
}

/// The role as the log names it, as the launch plan does.
fn name(node: &NodeConfig) -> String {
    match &node.role {
        RoleConfig::Operator(_) => "operator".to_owned(),
        RoleConfig::Gateway(_) => "gateway".to_owned(),
        RoleConfig::Worker(worker) => format!("worker-{}", worker.rank),
    }
}

/// Runs a role with its status server beside it; the server ends after the role.
async fn beside_status<E: std::error::Error + 'static>(
    role: &Role,
    probe: Probe,
    work: impl Future<Output = Result<(), E>>,
) -> Result<(), CliError> {
    let listener = listen("status_listen", &role.node.status_listen).await?;
    if let Ok(address) = listener.local_addr() {
        tracing::info!(role = %name(&role.node), %address, "status server listens");
    }
    let end = CancellationToken::new();
    let server = status::serve(listener, role.registry.clone(), probe, end.clone());
    let work = async {
        let done = work.await;
        end.cancel();
        done
    };
    let (done, ()) = tokio::join!(work, server);
    done.map_err(|error| CliError::runtime("the role failed", &error))
}
