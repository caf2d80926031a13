//! All loads on a cluster and on one process, as one run.

use serde::Serialize;

use super::child::Source;
use super::cluster::{Cluster, Compared, FabricName, Phase, Shape, compare};
use super::rig::{Load, Rig};
use super::speed;
use super::{EngineArgs, Loads, memory};
use crate::error::{CliError, print};
use crate::keys;
use crate::progress::Progress;

/// One run.
#[derive(Debug, Serialize)]
struct Figures {
    model: String,
    path: String,
    /// Of the cluster, and of the one process beside it.
    threads: usize,
    #[serde(flatten)]
    shape: Shape,
    bandwidth_gb_s: f64,
    /// Of the one process.
    load_seconds: f64,
    /// Of this process; workers that are processes are not in it.
    peak_rss_bytes: Option<u64>,
    decode: Vec<Decode>,
    prefill: Vec<Prefill>,
}

/// One batch size, sequences of all workers together.
#[derive(Debug, Serialize)]
struct Decode {
    batch: u32,
    context: u32,
    /// What a step of one process must read.
    bytes_per_step: f64,
    /// Of the cluster: its speed over that of reading these bytes once per token of each sequence.
    limit_share: f64,
    #[serde(flatten)]
    compared: Compared,
}

#[derive(Debug, Serialize)]
struct Prefill {
    prompts: u32,
    tokens: u32,
    #[serde(flatten)]
    compared: Compared,
}

/// Measures and prints.
pub(super) async fn run(
    args: &EngineArgs,
    rig: &Rig,
    loads: &Loads,
    workers: u32,
    progress: &Progress,
) -> Result<(), CliError> {
    let shape = Shape {
        workers,
        threads_per_worker: threads_per_worker(rig.cpu.threads(), workers)?,
        fabric: args.fabric,
    };
    let task = progress.steps("load the workers", 1);
    let keys = match args.fabric {
        FabricName::Local | FabricName::Tcp => None,
        FabricName::Tls => Some(keys::make("bench")?),
    };
    let source = Source {
        model: &args.model,
        weights: args.weights.settings(),
        cpu_path: args.cpu_path,
        keys: keys.as_ref().map(|keys| &keys.folders),
        pinning: args.pinning,
    };
    let mut cluster = Cluster::start(source, rig, shape).await?;
    task.finish("done");
    let mut prefill = Vec::new();
    for load in &loads.prefill {
        let what = format!("prefill, {} × {} tokens", load.sequences, load.prompt);
        let compared = turns(
            args,
            rig,
            &mut cluster,
            (load, Phase::Prefill),
            progress,
            &what,
        )
        .await?;
        prefill.push(Prefill {
            prompts: load.sequences,
            tokens: load.prompt,
            compared,
        });
    }
    let mut decode = Vec::new();
    for load in &loads.decode {
        let what = format!("decode, batch {}, context {}", load.sequences, load.prompt);
        let compared = turns(
            args,
            rig,
            &mut cluster,
            (load, Phase::Decode),
            progress,
            &what,
        )
        .await?;
        let bytes_per_step = speed::cost(rig, load).await?.bytes;
        decode.push(Decode {
            batch: load.sequences,
            context: load.prompt,
            bytes_per_step,
            limit_share: compared.tokens_per_second * bytes_per_step
                / f64::from(load.sequences),
            compared,
        });
    }
    let peak = memory::peak_rss();
    let bandwidth = memory::bandwidth(&rig.cpu)?;
    for decode in &mut decode {
        decode.limit_share /= bandwidth;
    }
    args.give(&Figures {
        model: args.model.display().to_string(),
        path: rig.cpu.path().to_string(),
        threads: rig.cpu.threads(),
        shape,
        bandwidth_gb_s: bandwidth / 1e9,
        load_seconds: rig.load_time.as_secs_f64(),
        peak_rss_bytes: peak,
        decode,
        prefill,
    })
}

fn threads_per_worker(threads: usize, workers: u32) -> Result<u32, CliError> {
    let threads = u32::try_from(threads).unwrap_or(u32::MAX);
    if threads % workers == 0 {
        return Ok(threads / workers);
    }
    Err(CliError::Usage(format!(
        "--threads {threads} with --workers {workers}: each worker needs as many threads; give a multiple"
    )))
}

async fn turns(
    args: &EngineArgs,
    rig: &Rig,
    cluster: &mut Cluster,
    (load, phase): (&Load, Phase),
    progress: &Progress,
    what: &str,
) -> Result<Compared, CliError> {
    let task = progress.steps(what, u64::from(args.turns));
    let compared = compare(rig, cluster, *load, phase, args.turns, &task).await?;
    task.finish("done");
    if args.is_text() {
        print(&compared.line(what));
    }
    Ok(compared)
}
