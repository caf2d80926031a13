//! A worker of the bench's cluster as a process of its own.
//!
//! The parent writes one [`Order`] per line, the child answers each with one [`Answer`]. A real cluster's
//! processes find each other through a store; here the parent tells them, everything else is the same.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use foregate_api::cpu::{CpuPath, Pinning};
use foregate_api::ids::Rank;
use foregate_api::tls::{TlsConfig, TlsRole};
use foregate_api::weights::WeightSettings;
use foregate_checkpoint::Checkpoint;
use foregate_models::{ExpertWeights, Model};
use foregate_operator::launch::KeyFolders;
use foregate_tls::Keys;
use foregate_worker::exchange::Way;
use foregate_worker::fabric::tcp::TcpSettings;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::node::{Node, Seat, Turn};
use super::rig::Load;
use crate::error::{CliError, print};
use crate::weights::WeightArgs;

/// Arguments of a child.
#[derive(Debug, clap::Args)]
pub(crate) struct ChildArgs {
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    weights: WeightArgs,
    #[arg(long)]
    cpu_path: CpuPath,
    #[arg(long)]
    pinning: Pinning,
    #[arg(long)]
    rank: u32,
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: u32,
    /// Folder with the keys of a worker.
    #[arg(long, requires = "domain")]
    keys: Option<PathBuf>,
    /// What its certificate calls the cluster.
    #[arg(long)]
    domain: Option<String>,
}

/// What all workers load, and how they compute it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) model: &'a Path,
    pub(super) weights: WeightSettings,
    pub(super) cpu_path: CpuPath,
    /// What workers that are processes prove themselves with.
    pub(super) keys: Option<&'a KeyFolders>,
    pub(super) pinning: Pinning,
}

/// What a child is told.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// Addresses of all workers, by rank.
    Join(Vec<String>),
    Prepare(Load),
    Go(u32),
    End,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// Loaded; its address.
    Ready(String),
    Done,
    Turn(Turn),
}

/// Runs a child until its stdin ends.
///
/// # Errors
/// Whatever keeps it from working; the parent sees the text on stderr.
pub(in crate::bench) async fn run(args: &ChildArgs) -> Result<(), CliError> {
    let mut node = open(args)?;
    answer(&Answer::Ready(node.address()))?;
    while let Some(line) = next_line().await? {
        let order =
            serde_json::from_str(&line).map_err(|e| CliError::runtime("an order", &e))?;
        answer(&obey(&mut node, order).await?)?;
    }
    node.end().await;
    Ok(())
}

/// The next line of stdin, `None` at its end.
async fn next_line() -> Result<Option<String>, CliError> {
    let read = tokio::task::spawn_blocking(|| std::io::stdin().lines().next().transpose());
    let line = read
        .await
        .map_err(|error| CliError::runtime("orders", &error))?;
    line.map_err(|error| CliError::runtime("orders", &error))
}

fn open(args: &ChildArgs) -> Result<Node, CliError> {
    let checkpoint = Checkpoint::open_with(&args.model, &args.weights.settings())
        .map_err(|error| CliError::runtime("model", &error))?;
    let listener = TcpListener::bind("127.0.0.1:0")
        .map_err(|error| CliError::runtime("a port of 127.0.0.1", &error))?;
    let seat = Seat {
        rank: Rank(args.rank),
        workers: args.workers,
        threads: args.threads,
    };
    let way = Way::Tcp(listener, TcpSettings::default(), keys(args)?);
    let cpu = foregate_worker::cpu(args.cpu_path, seat.bind(args.pinning)?)
        .map_err(|error| CliError::Usage(format!("--cpu-path: {error}")))?;
    let cpu = Arc::new(cpu);
    let model = Model::load(&checkpoint, Arc::clone(&cpu), |_, _| {})
        .map_err(|error| CliError::runtime("model", &error))?;
    Node::open(model, cpu, seat, way, |layer, expert| {
        let loaded = ExpertWeights::load(&checkpoint, layer, expert);
        loaded
            .map(Arc::new)
            .map_err(|error| CliError::runtime("model", &error))
    })
}

fn keys(args: &ChildArgs) -> Result<Option<Keys>, CliError> {
    let (Some(folder), Some(domain)) = (&args.keys, &args.domain) else {
        return Ok(None);
    };
    let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let config = TlsConfig {
        ca_file: file("ca.crt"),
        cert_file: file("tls.crt"),
        key_file: file("tls.key"),
        domain: domain.clone(),
    };
    let keys = Keys::open(&config, TlsRole::Worker);
    keys.map(Some)
        .map_err(|error| CliError::runtime("keys", &error))
}

async fn obey(node: &mut Node, order: Order) -> Result<Answer, CliError> {
    match order {
        Order::Join(addresses) => node.join(&addresses).await?,
        Order::Prepare(load) => node.prepare(load)?,
        Order::Go(turn) => return Ok(Answer::Turn(node.go(turn).await?)),
        Order::End => node.end().await,
    }
    Ok(Answer::Done)
}

fn answer(answer: &Answer) -> Result<(), CliError> {
    let line = serde_json::to_string(answer);
    print(&line.map_err(|error| CliError::runtime("an answer", &error))?);
    Ok(())
}

/// The parent's end of a child. Dropping it kills the child.
pub(super) struct Remote {
    rank: Rank,
    _process: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Remote {
    /// Starts a child; it loads while others start.
    pub(super) fn spawn(source: Source<'_>, seat: Seat) -> Result<Self, CliError> {
        let failed = |error| CliError::runtime("a worker's process", &error);
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command
            .args(["bench", "engine-worker", "--model"])
            .arg(source.model);
        for (name, value) in [
            ("--dtype", source.weights.dtype.to_string()),
            ("--quantization", source.weights.quantization.to_string()),
            ("--cpu-path", source.cpu_path.name().to_owned()),
            ("--pinning", source.pinning.name().to_owned()),
        ] {
            command.arg(name).arg(value);
        }
        for (name, value) in [
            ("--rank", seat.rank.0),
            ("--workers", seat.workers),
            ("--threads", seat.threads),
        ] {
            command.arg(name).arg(value.to_string());
        }
        if let Some(keys) = source.keys {
            command.args(["--keys", &keys.worker, "--domain", &keys.domain]);
        }
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let (Some(orders), Some(answers)) = (process.stdin.take(), process.stdout.take())
        else {
            return Err(CliError::Runtime(
                "a worker's process has no pipes".to_owned(),
            ));
        };
        Ok(Self {
            rank: seat.rank,
            _process: process,
            orders,
            answers: BufReader::new(answers).lines(),
        })
    }

    /// Waits until it has loaded; its address.
    pub(super) async fn ready(&mut self) -> Result<String, CliError> {
        match self.answer().await? {
            Answer::Ready(address) => Ok(address),
            other => Err(self.odd(&other)),
        }
    }

    /// As [`Node::join`].
    pub(super) async fn join(&mut self, addresses: &[String]) -> Result<(), CliError> {
        self.done(&Order::Join(addresses.to_vec())).await
    }

    /// As [`Node::prepare`].
    pub(super) async fn prepare(&mut self, load: Load) -> Result<(), CliError> {
        self.done(&Order::Prepare(load)).await
    }

    /// As [`Node::end`].
    pub(super) async fn end(&mut self) -> Result<(), CliError> {
        self.done(&Order::End).await
    }

    /// As [`Node::go`].
    pub(super) async fn go(&mut self, turn: u32) -> Result<Turn, CliError> {
        self.tell(&Order::Go(turn)).await?;
        match self.answer().await? {
            Answer::Turn(turn) => Ok(turn),
            other => Err(self.odd(&other)),
        }
    }

    async fn done(&mut self, order: &Order) -> Result<(), CliError> {
        self.tell(order).await?;
        match self.answer().await? {
            Answer::Done => Ok(()),
            other => Err(self.odd(&other)),
        }
    }

    async fn tell(&mut self, order: &Order) -> Result<(), CliError> {
        let mut line =
            serde_json::to_vec(order).map_err(|e| CliError::runtime("an order", &e))?;
        line.push(b'\n');
        let told = self.orders.write_all(&line).await;
        told.map_err(|_| self.lost())
    }

    async fn answer(&mut self) -> Result<Answer, CliError> {
        let line = self.answers.next_line().await;
        let line = line.ok().flatten().ok_or_else(|| self.lost())?;
        serde_json::from_str(&line).map_err(|error| CliError::runtime("an answer", &error))
    }

    fn lost(&self) -> CliError {
        CliError::Runtime(format!("the process of worker {} has ended", self.rank))
    }

    fn odd(&self, answer: &Answer) -> CliError {
        CliError::Runtime(format!("worker {} answered {answer:?}", self.rank))
    }
}
