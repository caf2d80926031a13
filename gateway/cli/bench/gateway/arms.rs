//! The processes: back ends, the store in which Foregate finds them, and the gateways.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::{Epoch, ExpertId, Rank};
use foregate_api::member::{Member, Phase};
use foregate_api::model::ModelSpec;
use foregate_api::node::{GatewayConfig, NodeConfig, RoleConfig, StoreConfig};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_store::Coord;
use foregate_store::kv::Lease;
use foregate_store::own_etcd::OwnEtcd;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use super::GatewayArgs;
use super::client::{Asked, Client};
use crate::bench::stub::{Delays, Faces, NAME, spec};
use crate::error::CliError;
use crate::roles::connect_etcd;

/// Name of the cluster in the store.
const CLUSTER: &str = "bench-gateway";
/// Longest wait for a process that serves.
const START: Duration = Duration::from_secs(120);
/// Longest wait for one that was asked to end.
const END: Duration = Duration::from_secs(10);
/// How long the back ends stay in the store when the bench is gone; until then it is kept alive.
const LEASE: Duration = Duration::from_secs(60);

/// A way to the back ends.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) name: &'static str,
    pub(super) client: Client,
    /// The gateway on it.
    pub(super) process: Option<u32>,
}

/// All that runs. What is not ended by [`Arms::end`] is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Arms {
    pub(super) ways: Vec<Way>,
    stub: Child,
    control: String,
    http: reqwest::Client,
    gateways: Vec<Child>,
    etcd: OwnEtcd,
    _lease: Arc<dyn Lease>,
    /// What the processes said.
    logs: TempDir,
}

/// The direct way, which the others are compared with.
pub(super) const DIRECT: &str = "direct";
/// Ours.
pub(super) const FOREGATE: &str = "foregate";
/// SMG, which hands HTTP through.
pub(super) const SMG_HTTP: &str = "smg-http";
/// SMG, which makes tokens of text and text of tokens as Foregate does.
pub(super) const SMG_GRPC: &str = "smg-grpc";

impl Arms {
    /// Starts everything, and waits until every way answers.
    pub(super) async fn start(args: &GatewayArgs, model: &Path) -> Result<Self, CliError> {
        let failed = |error: std::io::Error| CliError::runtime("bench gateway", &error);
        let model = model.canonicalize().map_err(failed)?;
        let logs = TempDir::new().map_err(failed)?;
        let (stub, faces) = stub(args, &model, logs.path()).await?;
        let etcd = OwnEtcd::start()
            .await
            .map_err(|error| CliError::runtime("etcd", &error))?;
        let endpoints = etcd.endpoints();
        let lease = register(&endpoints, &spec(&model)?, &faces).await?;
        let mut arms = Self {
            ways: vec![Way {
                name: DIRECT,
                client: Client::new(&faces.http),
                process: None,
            }],
            control: format!("http://{}/schedule", faces.http[0]),
            http: reqwest::Client::new(),
            stub,
            gateways: Vec::new(),
            etcd,
            _lease: lease,
            logs,
        };
        let port = free_port()?;
        let child = foregate(&model, port, endpoints, arms.logs.path()).await?;
        arms.add(FOREGATE, child, port).await?;
        if let Some(smg) = &args.smg {
            for (name, scheme, workers) in [
                (SMG_HTTP, "http", &faces.http),
                (SMG_GRPC, "grpc", &faces.sglang),
            ] {
                let port = free_port()?;
                let log = arms.logs.path().join(name);
                let child = peer(smg, &model, port, scheme, workers, &log)?;
                arms.add(name, child, port).await?;
            }
        }
        Ok(arms)
    }

    /// Adds a gateway once it answers.
    async fn add(
        &mut self,
        name: &'static str,
        child: Child,
        port: u16,
    ) -> Result<(), CliError> {
        let client = Client::new(&[format!("127.0.0.1:{port}")]);
        let process = child.id();
        self.gateways.push(child);
        let asked = Asked::new("Are you there?", 2, false);
        let since = Instant::now();
        loop {
            let Err(error) = client.text(&asked).await else {
                break;
            };
            if since.elapsed() > START {
                let log = std::fs::read_to_string(self.logs.path().join(name));
                let said = log.unwrap_or_default();
                let end: Vec<&str> = said.lines().rev().take(5).collect();
                return Err(CliError::Runtime(format!(
                    "{name} does not answer after {} s: {error}\n{}",
                    START.as_secs(),
                    end.into_iter().rev().collect::<Vec<_>>().join("\n")
                )));
            }
            sleep(Duration::from_millis(50)).await;
        }
        self.ways.push(Way {
            name,
            client,
            process,
        });
        Ok(())
    }

    /// Sets the delays of the answers that begin from now on.
    pub(super) async fn schedule(&self, delays: Delays) -> Result<(), CliError> {
        let sent = self.http.post(&self.control).json(&delays).send().await;
        sent.and_then(reqwest::Response::error_for_status)
            .map(drop)
            .map_err(|error| CliError::runtime("the back ends' schedule", &error))
    }

    /// Back ends and gateways.
    pub(super) fn processes(&self) -> Vec<u32> {
        let gateways = self.gateways.iter().filter_map(Child::id);
        gateways.chain(self.stub.id()).collect()
    }

    /// Ends all processes.
    ///
    /// # Errors
    /// One that does not end.
    pub(super) async fn end(mut self) -> Result<(), CliError> {
        for child in self.gateways.iter_mut().chain([&mut self.stub]) {
            // Ours drain when their stdin ends; the others have none.
            let drains = child.stdin.take().is_some();
            if !drains || timeout(END, child.wait()).await.is_err() {
                let killed = child.kill().await;
                killed.map_err(|error| CliError::runtime("a process of the bench", &error))?;
            }
        }
        let ended = self.etcd.stop().await;
        ended.map_err(|error| CliError::runtime("etcd", &error))
    }
}

fn ours(log: &Path) -> Result<Command, CliError> {
    let failed = |error: std::io::Error| CliError::runtime("a process of the bench", &error);
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command
        // What a gateway logs per request would be measured with it; SMG is told the same.
        .env("RUST_LOG", "warn")
        .stdin(Stdio::piped())
        .stderr(std::fs::File::create(log).map_err(failed)?)
        .kill_on_drop(true);
    Ok(command)
}

async fn stub(
    args: &GatewayArgs,
    model: &Path,
    logs: &Path,
) -> Result<(Child, Faces), CliError> {
    let failed = |error: &dyn std::error::Error| CliError::runtime("bench stub", error);
    let mut child = ours(&logs.join("stub"))?
        .args(["bench", "stub", "--backends", &args.backends.to_string()])
        .arg("--model")
        .arg(model)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| failed(&error))?;
    let Some(stdout) = child.stdout.take() else {
        return Err(CliError::Runtime("bench stub: it has no stdout".to_owned()));
    };
    let mut lines = BufReader::new(stdout).lines();
    let line = timeout(START, lines.next_line())
        .await
        .map_err(|error| failed(&error))?
        .map_err(|error| failed(&error))?;
    let faces = serde_json::from_str(&line.unwrap_or_default());
    Ok((child, faces.map_err(|error| failed(&error))?))
}

/// Enters the back ends into the store as workers, all of which hold all experts.
async fn register(
    endpoints: &[String],
    spec: &ModelSpec,
    faces: &Faces,
) -> Result<Arc<dyn Lease>, CliError> {
    let failed = |error: &dyn std::error::Error| CliError::runtime("the store", error);
    let store = connect_etcd(endpoints, None).await?;
    let lease = store.lease(LEASE).await.map_err(|error| failed(&error))?;
    let coord = Coord::new(store, CLUSTER);
    for (rank, rpc) in (0..).zip(&faces.generation) {
        let member = member(rank, rpc, spec);
        let entered = coord.register(&member, lease.as_ref()).await;
        entered.map_err(|error| failed(&error))?;
    }
    let plan = placement(spec, faces.generation.len() as u32);
    let proposed = coord.propose(&plan, None).await;
    let activated = coord.activate(&plan, None).await;
    match (proposed, activated) {
        (Ok(true), Ok(true)) => Ok(lease),
        (Err(error), _) | (_, Err(error)) => Err(failed(&error)),
        _ => Err(CliError::Runtime(
            "the store has a placement already, though it is the bench's own".to_owned(),
        )),
    }
}

fn member(rank: u32, rpc: &str, spec: &ModelSpec) -> Member {
    Member {
        rank: Rank(rank),
        incarnation: u64::from(rank) + 1,
        rpc: rpc.to_owned(),
        exchange: format!("local:{rank}"),
        domain: String::new(),
        slots: spec.experts as u32,
        phase: Phase::Ready,
        model: spec.clone(),
        cpu_path: "portable".to_owned(),
        kv_pages: 1 << 16,
        page_tokens: 16,
    }
}

fn placement(spec: &ModelSpec, ranks: u32) -> Placement {
    let ranks: Vec<Rank> = (0..ranks).map(Rank).collect();
    let all: Vec<ExpertId> = (0..spec.experts as u32).map(ExpertId).collect();
    let layer = LayerPlacement::from_slots(&ranks, vec![all; ranks.len()], spec.experts);
    let layers = spec.moe_blocks.iter().filter(|moe| **moe).count();
    Placement {
        epoch: Epoch(1),
        parent: Epoch(0),
        reason: Reason::Initial,
        layers: vec![layer; layers],
        ranks,
        balance_before: 1.0,
        balance_after: 1.0,
    }
}

/// Foregate's gateway with the settings that a manifest that says nothing gives it.
async fn foregate(
    model: &Path,
    port: u16,
    endpoints: Vec<String>,
    logs: &Path,
) -> Result<Child, CliError> {
    let failed = |error: std::io::Error| CliError::runtime(FOREGATE, &error);
    let node = NodeConfig {
        cluster: CLUSTER.to_owned(),
        store: StoreConfig::Etcd {
            endpoints,
            tls: None,
        },
        role: RoleConfig::Gateway(GatewayConfig {
            listen: format!("127.0.0.1:{port}"),
            model_dir: model.display().to_string(),
            served_names: vec![NAME.to_owned()],
            max_model_len: 2048,
            routing: foregate_api::manifest::RoutingPolicy::default(),
            max_in_flight: 256,
            max_queued: 1024,
            queue_timeout_ms: 30_000,
            request_timeout_ms: 600_000,
            forecast_ms: None,
            expert_hints: false,
            traffic: foregate_api::traffic::Traffic::default(),
            api_keys: None,
        }),
        status_listen: "127.0.0.1:0".to_owned(),
        tls: None,
    };
    let mut line =
        serde_json::to_vec(&node).map_err(|error| CliError::runtime(FOREGATE, &error))?;
    line.push(b'\n');
    let mut child = ours(&logs.join(FOREGATE))?
        .args(["gateway", "--config", "-"])
        .stdout(Stdio::null())
        .spawn()
        .map_err(failed)?;
    // Its end asks the gateway to drain, so it stays open.
    if let Some(stdin) = &mut child.stdin {
        stdin.write_all(&line).await.map_err(failed)?;
        stdin.flush().await.map_err(failed)?;
    }
    Ok(child)
}

/// SMG with all switched off that costs it time and that no answer needs, and its cheapest policy.
fn peer(
    smg: &Path,
    model: &Path,
    port: u16,
    scheme: &str,
    workers: &[String],
    log: &Path,
) -> Result<Child, CliError> {
    let failed =
        |error: std::io::Error| CliError::runtime(&format!("--smg {}", smg.display()), &error);
    let log = std::fs::File::create(log).map_err(failed)?;
    let mut command = Command::new(smg);
    command
        .args(["launch", "--host", "127.0.0.1", "--policy", "round_robin"])
        .args(["--port", &port.to_string()])
        .args(["--prometheus-port", &free_port()?.to_string()])
        .args(["--log-level", "warn", "--disable-retries"])
        .args(["--disable-circuit-breaker", "--disable-health-check"])
        .args(["--disable-load-monitoring"])
        .arg("--disable-worker-overload-protection")
        .arg("--model-path")
        .arg(model)
        .arg("--worker-urls")
        .args(workers.iter().map(|worker| format!("{scheme}://{worker}")))
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log)
        .kill_on_drop(true);
    command.spawn().map_err(failed)
}

/// A port that the system has just found free; whoever is told it listens on it at once.
fn free_port() -> Result<u16, CliError> {
    std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|error| CliError::runtime("a port of 127.0.0.1", &error))
}
