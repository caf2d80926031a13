//! `foregate bench planners`: the operator's planner, EPLB and a placement that stays, under the same shifting mix.
//!
//! Each has a cluster of its own, one after the other: `foregate up --processes` over an etcd of the bench's, so real
//! processes, the TCP fabric and the operator's own epoch protocol. For EPLB the operator's balancer is switched off,
//! and the bench proposes what EPLB says, as any other planner could: what is written as the target is prepared,
//! activated and drained like a placement of the operator's. All three split each batch over the copies in the same way.

mod cluster;
mod eplb;
mod stalls;

use std::path::PathBuf;

use serde::Serialize;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::cluster::Cluster;
use super::client::Target;
use super::rebalance::{LoadArgs, drive};
use super::record::{Imbalance, Record};
use super::report::Spread;
use super::workload::demonstration;
use crate::bench::write_json;
use crate::error::{CliError, print};
use crate::progress::Progress;

/// Arguments of `foregate bench planners`.
#[derive(Debug, clap::Args)]
pub(crate) struct PlannersArgs {
    /// Model directory; default: the demonstration model.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Workers.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=64))]
    workers: u32,
    /// Expert slots of each beyond ⌈experts / workers⌉.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=4096))]
    redundant_slots: u32,
    /// Length of a load window in milliseconds.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(50..=60_000))]
    window_ms: u64,
    /// Windows after which EPLB plans anew, on their sum.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    eplb_every: u32,
    /// Who is compared: static, eplb, operator. All, if none is named.
    #[arg(long, value_delimiter = ',')]
    arm: Vec<Arm>,
    #[command(flatten)]
    load: LoadArgs,
    /// Write the records as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Who plans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
enum Arm {
    /// Nobody: the first placement, made without any load, stays.
    Static,
    /// EPLB, every so many windows.
    Eplb,
    /// The operator's balancer.
    Operator,
}

impl Arm {
    const ALL: [Self; 3] = [Self::Static, Self::Eplb, Self::Operator];

    const fn name(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::Eplb => "eplb",
            Self::Operator => "operator",
        }
    }
}

/// What one planner came to.
#[derive(Debug, Serialize)]
struct OfArm {
    arm: Arm,
    /// Delay of a step by a switch of epoch, one per rank and switch, in microseconds.
    switch_stall_us: Spread,
    record: Record,
}

/// The comparison.
#[derive(Debug, Serialize)]
struct Comparison {
    workers: u32,
    redundant_slots: u32,
    window_ms: u64,
    eplb_every: u32,
    seconds: u64,
    concurrency: u32,
    arms: Vec<OfArm>,
}

/// Runs all arms, prints a table and writes the file.
///
/// # Errors
/// A cluster that does not start, no etcd, texts that cannot be read.
pub(super) async fn run(
    args: &PlannersArgs,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    let arms = match args.arm.is_empty() {
        true => Arm::ALL.to_vec(),
        false => args.arm.clone(),
    };
    let model = match &args.model {
        Some(model) => model.clone(),
        None => demonstration()?,
    };
    let mut comparison = Comparison {
        workers: args.workers,
        redundant_slots: args.redundant_slots,
        window_ms: args.window_ms,
        eplb_every: args.eplb_every,
        seconds: args.load.seconds,
        concurrency: args.load.concurrency,
        arms: Vec::new(),
    };
    for arm in arms {
        if drain.is_cancelled() {
            break;
        }
        progress.say(&format!("{}: starting a cluster", arm.name()));
        let cluster = Cluster::start(&manifest(args, arm, &model)).await?;
        let measured = Box::pin(measure(args, arm, &cluster, progress, &drain)).await;
        // Ended in any case, so that the next one has the machine to itself.
        cluster.end().await?;
        comparison.arms.push(measured?);
    }
    print(&comparison.table());
    match &args.json {
        Some(path) => write_json(path, &comparison),
        None => Ok(()),
    }
}

/// The cluster as a manifest: JSON is YAML.
fn manifest(args: &PlannersArgs, arm: Arm, model: &std::path::Path) -> String {
    serde_json::json!({
        "apiVersion": foregate_api::manifest::API_VERSION,
        "kind": foregate_api::manifest::KIND,
        "metadata": { "name": cluster::NAME },
        "spec": {
            "model": { "uri": model },
            "workers": {
                "count": args.workers, "redundantSlots": args.redundant_slots, "kvMemory": "64Mi",
            },
            "balancing": {
                "enabled": arm == Arm::Operator, "windowMs": args.window_ms, "minRows": 128,
            },
        },
    })
    .to_string()
}

async fn measure(
    args: &PlannersArgs,
    arm: Arm,
    cluster: &Cluster,
    progress: &Progress,
    drain: &CancellationToken,
) -> Result<OfArm, CliError> {
    let texts = args.load.texts()?;
    let target = Target::new(cluster.url())?;
    let model = target.model().await?;
    let stop = drain.child_token();
    let mut planner = JoinSet::new();
    if arm == Arm::Eplb {
        let every = args.eplb_every as usize;
        let window = std::time::Duration::from_millis(args.window_ms);
        let (coord, states) = (cluster.coord().clone(), cluster.states());
        planner.spawn(eplb::plan(coord, states, every, window, stop.clone()));
    }
    let mut watch = JoinSet::new();
    watch.spawn(stalls::gather(cluster.states(), stop.clone()));
    let driven = drive(&args.load, &texts, &target, &model, progress, drain);
    let record = Box::pin(driven).await;
    stop.cancel();
    while let Some(ended) = planner.join_next().await {
        ended.map_err(|error| CliError::runtime("EPLB", &error))??;
    }
    let stalls = match watch.join_next().await {
        Some(Ok(stalls)) => stalls,
        _ => Vec::new(),
    };
    Ok(OfArm {
        arm,
        switch_stall_us: Spread::of(stalls),
        record,
    })
}

impl Comparison {
    fn table(&self) -> String {
        let head = "| planner | imbalance, mean | second halves | copies moved | epochs | tokens | between tokens p50 / p99 / \
                    longest, ms | stall of a switch p50 / p99, ms |";
        let mut lines = vec![
            head.to_owned(),
            "|---|---|---|---|---|---|---|---|".to_owned(),
        ];
        lines.extend(self.arms.iter().map(OfArm::row));
        lines.join("\n")
    }
}

impl OfArm {
    fn row(&self) -> String {
        let record = &self.record;
        let seen: Vec<Imbalance> = record.imbalance().into_iter().flatten().collect();
        let mean = |of: fn(&Imbalance) -> f64| {
            seen.iter().map(of).sum::<f64>() / seen.len().max(1) as f64
        };
        let stall = self.switch_stall_us;
        format!(
            "| {} | {:.3} | {:.3} | {} | {} | {} ({} failed) | {:.1} / {:.1} / {:.0} | {:.2} / {:.2} ({} switches) |",
            self.arm.name(),
            mean(|i| i.mean),
            mean(|i| i.settled),
            record.copies(),
            record.last_epoch,
            record.tokens,
            record.failed,
            record.between_tokens_p50_ms,
            record.between_tokens_p99_ms,
            record.longest_pause_ms,
            stall.p50 / 1000.0,
            stall.p99 / 1000.0,
            stall.count,
        )
    }
}
