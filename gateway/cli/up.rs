//! `foregate up`: the whole cluster on one machine.
//!
//! Manifest → validate → launch plan → tasks of this process, or child processes. The steps are those of the
//! operator on Kubernetes; only who starts the instances differs.

mod child_log;
mod etcd;
mod launch;
mod processes;
mod ready;
mod tasks;
mod wish;

use std::path::PathBuf;

use foregate_api::cpu::{CpuPath, Pinning};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::error::CliError;
use crate::fetch::{self, HubSettings};
use crate::keys;
use crate::progress::Progress;
use crate::status;
use crate::telemetry::Telemetry;
use crate::weights::WeightArgs;
pub(crate) use etcd::run_own;
use launch::Prepared;
use wish::Wish;

/// Arguments of `foregate up`.
#[derive(Debug, clap::Args)]
pub(crate) struct UpArgs {
    /// The MoeCluster manifest; default: charts/examples/tiny.yaml of the checkout.
    #[arg(
        short = 'f',
        long = "file",
        value_name = "MANIFEST",
        conflicts_with = "model"
    )]
    file: Option<PathBuf>,
    /// Serve this model with default settings instead of a manifest: a directory, file://…, hf://org/name[@rev] or org/name.
    #[arg(long, value_name = "DIR_OR_URI")]
    model: Option<String>,
    /// Number of workers, in place of the manifest's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: Option<u32>,
    /// Instructions of the workers' kernels, in place of the manifest's: auto, portable, neon, avx2, avx512, avx512bf16,
    /// amx.
    #[arg(long, value_name = "PATH")]
    cpu_path: Option<CpuPath>,
    /// Which processors the workers' threads keep to, in place of the manifest's: none, node, core.
    #[arg(long, value_name = "HOW")]
    pinning: Option<Pinning>,
    /// Run each role as a child process, over TCP and a real etcd.
    #[arg(long)]
    processes: bool,
    /// Use this etcd instead of starting one.
    #[arg(long, value_name = "URL", requires = "processes")]
    etcd: Option<String>,
    /// Address the HTTP API listens on.
    #[arg(long, value_name = "H", default_value = "127.0.0.1")]
    host: String,
    /// Port of the HTTP API; 0 lets the system choose.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Names of the model in /v1/models, in place of the manifest's; the first is the main one.
    #[arg(long = "served-model-name", value_name = "NAME", num_args = 1..)]
    served_model_name: Vec<String>,
    /// Keys that clients show as `Authorization: Bearer KEY`: a file with a key, or `name:key`, a line. It is read again
    /// when it has changed.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Have gateway and workers prove to each other by certificates that they are of this cluster, and encrypt what they
    /// say. The certificates are made for this run.
    #[arg(long)]
    mtls: bool,
    #[command(flatten)]
    weights: WeightArgs,
}

/// Runs `foregate up` to its end.
///
/// # Errors
/// Exit code 2: arguments or manifest; 1: anything else.
pub(crate) async fn run(
    args: UpArgs,
    telemetry: &mut Telemetry,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    let wish = Wish::read(&args)?;
    let listener = bind(&args).await?;
    let hub = HubSettings::from_environment();
    let fetching = fetch::resolve(&wish.cluster.model.uri, &wish.base, &hub, progress);
    let directory = tokio::select! {
        found = fetching => found.map_err(|error| CliError::Runtime(error.to_string()))?,
        () = drain.cancelled() => return Ok(()),
    };
    // The folder of keys goes when this run ends.
    let keys = args
        .mtls
        .then(|| keys::make(&wish.cluster.name))
        .transpose()?;
    let prepared = Prepared {
        cluster: wish.cluster,
        directory,
        listener,
        keys: keys.as_ref().map(|keys| keys.folders.clone()),
        api_keys: wish.api_keys,
    };
    if args.processes {
        processes::run(args.etcd.as_deref(), prepared, progress, drain).await
    } else {
        tasks::run(prepared, telemetry, progress, drain).await
    }
}

/// Takes the port before anything slow, so that one in use is told at once.
async fn bind(args: &UpArgs) -> Result<TcpListener, CliError> {
    let address = if args.host.contains(':') {
        format!("[{}]:{}", args.host.trim_matches(['[', ']']), args.port)
    } else {
        format!("{}:{}", args.host, args.port)
    };
    let (listener, _) = status::bind(&address)
        .await
        .map_err(|error| CliError::Runtime(error.to_string()))?;
    Ok(listener)
}
