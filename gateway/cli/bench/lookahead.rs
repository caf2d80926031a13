//! `foregate bench lookahead`: does routing by expected experts pay on a running cluster? An A/B with a placebo.
//!
//! One cluster of this process, made from a manifest as `foregate up` makes it: operator, workers, memory store. Before
//! it stand several gateways, one per arm, each with its own policy and its own memory of prompts; a block of requests
//! goes through one of them. So policies change from block to block, and workers, placement and caches stay.
//!
//! ```text
//!  warm up every arm ─ measure the capacity ─ for each round: arms in a drawn order, then the same order backwards
//!  block: the same arrival times in all blocks; the same prompts in all blocks of a half round, new ones in the next
//! ```
//!
//! So every arm answers each prompt once, no gateway and no prefix cache has seen it before, and a drift of the machine
//! hits all arms alike. The answers of all arms must be equal: routing chooses when and where, never what.

mod arm;
mod block;
mod cluster;
mod figures;
mod headroom;
mod interval;
mod report;
mod requests;

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use self::arm::Arm;
use self::block::Block;
use self::cluster::Cluster;
use self::report::{Report, Settings};
use self::requests::{Lengths, Source};
use super::workload::{Draw, Length, demonstration, heldout};
use crate::bench::write_json;
use crate::error::{CliError, print};
use crate::progress::Progress;

/// Arguments of `foregate bench lookahead`.
#[derive(Debug, clap::Args)]
pub(crate) struct LookaheadArgs {
    /// Model directory; default: the demonstration model.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Workers.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=64))]
    workers: u32,
    /// Compute threads of each; default: the cores shared out.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Expert slots of each beyond ⌈experts / workers⌉.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=4096))]
    redundant_slots: u32,
    /// Sequences that run at a time, on all workers together.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    places: u32,
    /// Sequences in a worker's batch; default: half as many again as its share of the places. With fewer than its share
    /// sequences wait in the worker.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: Option<u32>,
    /// Milliseconds for which one that waits in a worker may be overtaken by others, if its gateway says what it expects of
    /// them (arm `hints`).
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=60_000))]
    overtake_ms: u64,
    /// Arms, the first is the baseline: least, signature, prefix, ms:W (the window over W requests), placebo:W (the same,
    /// with what is known of requests exchanged among them), hints (least, and workers are told what is known).
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "least,ms:16,ms:64,placebo:64"
    )]
    arms: Vec<Arm>,
    /// Rounds; each has two blocks of every arm.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Requests of a block; the first tenth is not counted.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(20..=100_000))]
    requests: u32,
    /// Requests through each arm before the first block.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    warmup: u32,
    /// Requests that arrive, as a part of what the cluster can serve; above 1 they queue.
    #[arg(long, default_value_t = 1.25, value_parser = part)]
    load: f64,
    /// Requests per second, in place of a part of the measured capacity.
    #[arg(long, value_parser = part)]
    rate: Option<f64>,
    /// Files to cut prompts from, in turn; default: the demonstration model's held-out texts.
    #[arg(long, num_args = 1..)]
    prompts: Vec<PathBuf>,
    /// Tokens of a prompt.
    #[arg(long, default_value = "128")]
    prompt_tokens: Length,
    /// Tokens of an answer, such as 64, or 64-192 for evenly drawn lengths.
    #[arg(long, default_value = "64-192")]
    output_tokens: Length,
    /// Seed of prompts, arrivals, and the order of the arms.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the plot as SVG to this file.
    #[arg(long)]
    svg: Option<PathBuf>,
}

fn part(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    number
        .filter(|number: &f64| number.is_finite() && *number > 0.0)
        .ok_or_else(|| "give a number above 0, such as 1.25".to_owned())
}

/// Runs all blocks, prints a table and writes the files.
///
/// # Errors
/// A cluster that does not start, texts that cannot be read, arms that are one.
pub(super) async fn run(
    args: &LookaheadArgs,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    if args.arms.contains(&Arm::Hints) && args.overtake_ms == 0 {
        return Err(CliError::Usage(
            "--arms hints: without --overtake-ms workers keep the order of arrival; give one, such as 500".to_owned(),
        ));
    }
    if args.arms.len() < 2 {
        return Err(CliError::Usage(
            "--arms: give at least two to compare".to_owned(),
        ));
    }
    let model = match &args.model {
        Some(model) => model.clone(),
        None => demonstration()?,
    };
    let files = match args.prompts.is_empty() {
        true => heldout()?,
        false => args.prompts.clone(),
    };
    let lengths = Lengths {
        prompt: args.prompt_tokens,
        output: args.output_tokens,
    };
    let source = Source::read(&model, &files, lengths)?;
    progress.say("starting a cluster");
    let (cluster, mut roles) = Box::pin(Cluster::start(args, &model)).await?;
    let measured = tokio::select! {
        measured = Box::pin(measure(args, &cluster, &source, progress, &drain)) => measured,
        ended = roles.first_end() => Err(ended),
    };
    // Ended in any case: its tasks are of this process.
    roles.end().await;
    let (rate, blocks, gateways) = measured?;
    let settings = Settings {
        model: model.display().to_string(),
        workers: args.workers,
        redundant_slots: args.redundant_slots,
        places: args.places,
        batch: args.batch,
        overtake_ms: args.overtake_ms,
        load: args.rate.is_none().then_some(args.load),
        requests_per_second: rate,
        requests: args.requests,
        rounds: args.rounds,
        prompt_tokens: args.prompt_tokens.to_string(),
        output_tokens: args.output_tokens.to_string(),
        seed: args.seed,
    };
    let report = Report::of(
        settings,
        &args.arms,
        &blocks,
        gateways,
        headroom::Kinds::read(&model),
    );
    print(&report.text());
    if let Some(path) = &args.svg {
        report.draw(path)?;
    }
    args.json
        .as_ref()
        .map_or(Ok(()), |path| write_json(path, &report))
}

/// The rate, all blocks, and what each arm's gateway says at the end.
type Measured = (f64, Vec<Block>, Vec<cluster::Said>);

async fn measure(
    args: &LookaheadArgs,
    cluster: &Cluster,
    source: &Source,
    progress: &Progress,
    drain: &CancellationToken,
) -> Result<Measured, CliError> {
    let mut draw = Draw::new(args.seed);
    for arm in 0..args.arms.len() {
        progress.say(&format!("warming up {}", args.arms[arm]));
        let asks = source.draw(args.warmup, &mut draw);
        block::closed(cluster, arm, &asks, args.places, drain).await?;
    }
    let rate = match args.rate {
        Some(rate) => rate,
        None => {
            progress.say("measuring the capacity");
            let asks = source.draw(args.warmup.max(4 * args.places), &mut draw);
            let served = block::closed(cluster, 0, &asks, args.places, drain).await?;
            args.load * served
        }
    };
    let mut blocks = Vec::new();
    for (half, order) in orders(args, &mut draw).into_iter().enumerate() {
        let asks = source.draw(args.requests, &mut draw);
        for arm in order {
            if drain.is_cancelled() {
                return Err(CliError::Runtime("cut off before its end".to_owned()));
            }
            let task = progress.steps(&args.arms[arm].to_string(), u64::from(args.requests));
            let gaps = Draw::new(args.seed.wrapping_add(1));
            blocks.push(
                block::open(cluster, (arm, half), &asks, (rate, gaps), &task, drain).await,
            );
            task.finish("done");
        }
    }
    Ok((rate, blocks, cluster.said().await))
}

/// The order of the arms in each half round: drawn, then backwards.
fn orders(args: &LookaheadArgs, draw: &mut Draw) -> Vec<Vec<usize>> {
    let mut halves = Vec::new();
    for _ in 0..args.rounds {
        let mut order: Vec<usize> = (0..args.arms.len()).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, draw.below(at + 1));
        }
        let back = order.iter().rev().copied().collect();
        halves.extend([order, back]);
    }
    halves
}
