//! The binary: the composition root. It alone reads the environment and the command line, builds store,
//! fabric and telemetry, and hands them to the roles.
//!
//! Exit codes: 0 a clean end, 1 something failed, 2 wrong arguments or a wrong manifest, 130 stopped at once.
//! Start reading at [`up`], then [`roles`].
#![forbid(unsafe_code)]

mod bench;
mod crd;
mod device;
mod doctor;
mod environment;
mod error;
mod explain;
mod fetch;
mod inspect;
mod keys;
mod kubernetes;
mod op;
mod plan;
mod progress;
mod roles;
mod shutdown;
mod simulate;
mod status;
mod telemetry;
mod top;
mod trace;
mod up;
mod weights;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use error::CliError;
use progress::Progress;
use shutdown::Signals;
use telemetry::LogFormat;

/// A gateway allocates for every token of every stream, on whatever thread it is.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Serve mixture-of-experts models with one expert plan shared by operator, gateway and workers.
#[derive(Debug, Parser)]
#[command(name = "foregate", version, propagate_version = true)]
struct Cli {
    /// Form of the log lines on stderr; what is logged is up to RUST_LOG.
    #[arg(long, global = true, value_enum, default_value_t)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model on this machine: operator, gateway and workers together.
    Up(up::UpArgs),
    /// Run one operator: of one cluster, or with --kubernetes of all clusters of Kubernetes.
    Operator(Box<kubernetes::OperatorArgs>),
    /// Run one gateway.
    Gateway(roles::RoleArgs),
    /// Run one worker.
    Worker(roles::RoleArgs),
    /// Measure a running gateway, a rebalance, or the engine alone.
    Bench(bench::BenchArgs),
    /// Run routing, batching and caches on synthetic loads, without a cluster.
    Simulate(simulate::SimulateArgs),
    /// Keep an etcd running for `up --processes`.
    #[command(hide = true)]
    OwnEtcd,
    /// Run one operation on tensors of a file, for the check on a card.
    #[command(hide = true)]
    Op(op::OpArgs),
    /// Bring a model of the hub into its cache.
    Fetch(fetch::FetchArgs),
    /// Tell the sizes of a model, as the operator plans with them.
    Inspect(inspect::InspectArgs),
    /// Ask an operator and a gateway whether they answer: the chart's test.
    Ask(kubernetes::AskArgs),
    /// Tell why the experts of a running cluster are where they are.
    Explain(explain::ExplainArgs),
    /// Tell what other workers or slots would give and cost.
    Plan(Box<plan::PlanArgs>),
    /// Watch a running cluster in the terminal: ranks, experts, moves, balance.
    Top(top::TopArgs),
    /// Record which experts live traffic asks for, look into such traces, and run the planner on them.
    Trace(trace::TraceArgs),
    /// Print the custom resources of Kubernetes, to install them.
    Crd,
    /// Check whether this machine can serve, and say what to do where it cannot.
    Doctor(doctor::DoctorArgs),
}

impl Command {
    const fn name(&self) -> &'static str {
        match self {
            Self::Up(_) => "up",
            Self::Operator(_) => "operator",
            Self::Gateway(_) => "gateway",
            Self::Worker(_) => "worker",
            Self::Bench(_) => "bench",
            Self::Simulate(_) => "simulate",
            Self::OwnEtcd => "own-etcd",
            Self::Op(_) => "op",
            Self::Fetch(_) => "fetch",
            Self::Inspect(_) => "inspect",
            Self::Ask(_) => "ask",
            Self::Explain(_) => "explain",
            Self::Plan(_) => "plan",
            Self::Top(_) => "top",
            Self::Trace(_) => "trace",
            Self::Crd => "crd",
            Self::Doctor(_) => "doctor",
        }
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, with code 0.
            drop(error.print());
            return u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return CliError::runtime("the runtime does not start", &error).report(),
    };
    let code = runtime.block_on(run(cli));
    // A download thread that does not react must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    code
}

async fn run(cli: Cli) -> ExitCode {
    let progress = Progress::detect();
    let mut telemetry = match telemetry::init(cli.command.name(), cli.log_format, &progress) {
        Ok(telemetry) => telemetry,
        Err(error) => return CliError::Usage(error.to_string()).report(),
    };
    let signals = match Signals::listen() {
        Ok(signals) => signals,
        Err(error) => return CliError::runtime("signals cannot be handled", &error).report(),
    };
    let drain = signals.drain();
    let work = async {
        match cli.command {
            Command::Up(args) => {
                Box::pin(up::run(args, &mut telemetry, &progress, drain)).await
            }
            Command::Operator(args) => kubernetes::run(*args, &mut telemetry, drain).await,
            Command::Gateway(args) => {
                roles::run_alone("gateway", &args, &mut telemetry, drain).await
            }
            Command::Worker(args) => {
                roles::run_alone("worker", &args, &mut telemetry, drain).await
            }
            Command::Bench(args) => bench::run(args, &progress, drain).await,
            Command::Simulate(args) => simulate::run(args, &progress).await,
            Command::OwnEtcd => up::run_own(drain).await,
            Command::Op(args) => op::run(&args),
            Command::Fetch(args) => fetch::run(args, &progress, drain).await,
            Command::Inspect(args) => inspect::run(args).await,
            Command::Ask(args) => kubernetes::ask(&args).await,
            Command::Explain(args) => explain::run(&args).await,
            Command::Plan(args) => plan::run(*args).await,
            Command::Top(args) => top::run(&args, drain).await,
            Command::Trace(args) => trace::run(args, &progress, drain).await,
            Command::Crd => crd::run(),
            Command::Doctor(args) => doctor::run(&args).await,
        }
    };
    let end = tokio::select! {
        end = Box::pin(work) => end,
        () = signals.at_once() => return ExitCode::from(130),
    };
    telemetry.flush().await;
    match end {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}
