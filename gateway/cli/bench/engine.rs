//! `foregate bench engine`: the engine alone, all experts in this process, no network, no HTTP.
//!
//! Decoding is bound by memory. So the bench also measures how fast all threads read memory, and counts what
//! a step has to read: the experts that its batch chose, the dense weights, keys and values. The two give
//! the limit that the speed is a share of.

mod audit;
mod before;
mod child;
mod cluster;
mod figures;
mod growth;
mod hold;
mod lockstep;
mod median;
mod memory;
mod mixed;
mod node;
mod rig;
mod shares;
mod speed;
mod steps;
mod telemetry;
mod versus;

use std::path::{Path, PathBuf};

use foregate_api::cpu::{CpuPath, Pinning, Seat};
use foregate_api::model::ModelSpec;
use foregate_api::weights::WeightSettings;
use foregate_checkpoint::Checkpoint;
use serde::Serialize;

pub(crate) use self::child::ChildArgs;
pub(super) use self::child::run as run_worker;
use self::cluster::FabricName;
use self::figures::{Decode, Figures};
use self::median::median;
use self::memory::Memory;
pub(super) use self::memory::bandwidth;
use self::rig::{Load, Rig};
use self::speed::{Prefill, Speed};
use self::telemetry::Telemetry;
use super::kernels::matrix_rate;
use super::serve::write_json;
use crate::error::{CliError, print};
use crate::progress::Progress;
use crate::weights::WeightArgs;

/// Most sequences of a batch.
const MOST: i64 = 4096;
/// Most tokens of a prompt or an answer.
const LONGEST: i64 = 1_000_000;
/// Tokens of a prompt where prefill is measured, if the model holds so many.
const PREFILL: u32 = 512;

/// Arguments of `foregate bench engine`.
#[derive(Debug, clap::Args)]
pub(crate) struct EngineArgs {
    /// Model directory.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    weights: WeightArgs,
    /// Compute threads; default: all cores.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Instructions of the kernels: auto, portable, neon, avx2, avx512, avx512bf16, amx.
    #[arg(long, value_name = "PATH", default_value = "auto")]
    cpu_path: CpuPath,
    /// Which processors the threads keep to: none, node, core.
    #[arg(long, value_name = "HOW", default_value = "node")]
    pinning: Pinning,
    /// Sequences that decode together.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32", value_parser = clap::value_parser!(u32).range(1..=MOST))]
    batch: Vec<u32>,
    /// Tokens to decode per sequence.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(3..=LONGEST))]
    decode: u32,
    /// Tokens of a sequence's prompt before it decodes. Every batch decodes at the first, the first batch also
    /// at the others.
    #[arg(long, value_delimiter = ',', default_value = "64", value_parser = clap::value_parser!(u32).range(1..=LONGEST))]
    context: Vec<u32>,
    /// Tokens of a prompt where prefill is measured; default: 512, or as many as the model holds.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=LONGEST))]
    prefill: Vec<u32>,
    /// Prompts that are read together.
    #[arg(long, value_delimiter = ',', default_value = "1,32", value_parser = clap::value_parser!(u32).range(1..=MOST))]
    prompts: Vec<u32>,
    /// Tokens in a step, as `spec.workers.maxNumBatchedTokens`.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    step_tokens: u32,
    /// Most turns per figure; the middle one counts, and all pairs of steps with and without telemetry.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    turns: u32,
    /// Measure gaps between tokens of so many streams while long prompts arrive, for each of `--mixed-step-tokens`.
    #[arg(long, conflicts_with_all = ["workers", "svg"], value_parser = clap::value_parser!(u32).range(1..=MOST))]
    mixed: Option<u32>,
    /// Tokens of each arriving prompt.
    #[arg(long, requires = "mixed", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=LONGEST))]
    mixed_prompt: u32,
    /// Most tokens in a step, as `spec.workers.maxNumBatchedTokens`.
    #[arg(long, requires = "mixed", value_delimiter = ',', default_value = "64,128,256,512", value_parser = clap::value_parser!(u32).range(2..=65_536))]
    mixed_step_tokens: Vec<u32>,
    /// Compare a cluster of so many workers, which share the threads, with one process, in turn.
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=64))]
    workers: Option<u32>,
    /// How the cluster's rows travel: `local`, its workers are threads of this process; `tcp`, each is a
    /// process; `tls`, the same with certificates.
    #[arg(long, value_enum, requires = "workers", default_value = "local")]
    fabric: FabricName,
    /// Draw decode against batch and context, and prefill against prompt length, with their limits.
    #[arg(long, value_name = "FILE", conflicts_with = "workers")]
    svg: Option<PathBuf>,
    /// Leave out what telemetry costs, which takes longest.
    #[arg(long)]
    no_telemetry: bool,
    /// Give the figures as JSON: to this file, or to stdout in place of the text.
    #[arg(long, value_name = "FILE")]
    json: Option<Option<PathBuf>>,
}

impl EngineArgs {
    /// The loads to measure, unless the model cannot hold their sequences.
    fn loads(&self, spec: &ModelSpec) -> Result<Loads, CliError> {
        let most = spec.max_positions;
        let longest = u32::try_from(most.saturating_sub(1)).unwrap_or(u32::MAX);
        let lengths = match self.prefill.as_slice() {
            [] => vec![PREFILL.min(longest)],
            given => given.to_vec(),
        };
        let prefill = self.prompts.iter().flat_map(|prompts| {
            lengths.iter().map(|prompt| Load {
                sequences: *prompts,
                prompt: *prompt,
                answer: 1,
                // Each sequence needs its row in a step.
                step_tokens: self.step_tokens.max(*prompts),
            })
        });
        let first = self.context.iter().take(1);
        let by_batch =
            first.flat_map(|context| self.batch.iter().map(|batch| (*batch, *context)));
        let others = self.context.iter().skip(1);
        let by_context = others
            .flat_map(|context| self.batch.iter().take(1).map(|batch| (*batch, *context)));
        let decode = by_batch.chain(by_context).map(|(batch, context)| {
            Load::decode(batch, context, self.decode, self.step_tokens)
        });
        let loads = Loads {
            prefill: prefill.collect(),
            decode: decode.collect(),
        };
        if let Some(load) = loads.prefill.iter().find(|load| load.length() > most) {
            return Err(CliError::Usage(format!(
                "--prefill {}: this model holds {most} tokens, one of them the answer's; give fewer",
                load.prompt
            )));
        }
        if let Some(load) = loads.decode.iter().find(|load| load.length() > most) {
            return Err(CliError::Usage(format!(
                "--context {} and --decode {} with --batch {}: a sequence grows to {} tokens, this model holds {most}; lower one of them",
                load.prompt,
                self.decode,
                load.sequences,
                load.length()
            )));
        }
        Ok(loads)
    }

    /// Whether people read the figures.
    const fn is_text(&self) -> bool {
        !matches!(self.json, Some(None))
    }

    /// Writes the figures as JSON, if and where that is wanted.
    fn give(&self, figures: &impl Serialize) -> Result<(), CliError> {
        match &self.json {
            None => Ok(()),
            Some(Some(path)) => write_json(path, figures),
            Some(None) => {
                let text = serde_json::to_string_pretty(figures)
                    .map_err(|error| CliError::runtime("--json", &error))?;
                print(&text);
                Ok(())
            }
        }
    }
}

/// What to measure.
#[derive(Debug)]
struct Loads {
    prefill: Vec<Load>,
    decode: Vec<Load>,
}

/// Measures and prints.
pub(super) async fn run(args: &EngineArgs, progress: &Progress) -> Result<(), CliError> {
    let checkpoint = open(&args.model, args.weights.settings())?;
    let loads = args.loads(checkpoint.spec())?;
    let threads = match args.threads {
        Some(threads) => threads,
        None => {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            u32::try_from(cores).unwrap_or(u32::MAX)
        }
    };
    let seats = foregate_worker::seats(args.pinning, Seat::ALONE, threads)
        .map_err(|error| CliError::Usage(format!("--pinning: {error}")))?;
    let cpu = foregate_worker::cpu(args.cpu_path, seats)
        .map_err(|error| CliError::Usage(format!("--cpu-path: {error}")))?;
    let task = progress.steps("load", 1);
    let rig = Rig::load(&checkpoint, cpu)?;
    task.finish("done");
    drop(checkpoint);
    if let Some(workers) = args.workers {
        return versus::run(args, &rig, &loads, workers, progress).await;
    }
    if let Some(streams) = args.mixed {
        return mixed::run(args, &rig, streams, progress).await;
    }
    let bench = Bench {
        args,
        loads,
        rig,
        progress,
    };
    let mut figures = bench.figures().await?;
    let text = args.is_text();
    // The rest takes longest: who stops it has the figures so far.
    if text {
        print(&figures.text());
    }
    if let Some(path) = &args.svg {
        growth::write(path, &figures)?;
    }
    for (load, decode) in bench.loads.decode.iter().zip(&mut figures.decode) {
        if args.no_telemetry {
            break;
        }
        let telemetry = bench.telemetry(load).await?;
        if text {
            print(&telemetry.line(load.sequences));
        }
        decode.telemetry = Some(telemetry);
    }
    args.give(&figures)
}

pub(super) fn open(dir: &Path, weights: WeightSettings) -> Result<Checkpoint, CliError> {
    let name = dir.display().to_string();
    if !dir.is_dir() {
        return Err(CliError::Usage(format!(
            "--model {name}: no such directory"
        )));
    }
    Checkpoint::open_with(dir, &weights).map_err(|error| CliError::runtime(&name, &error))
}

/// What all figures share.
struct Bench<'a> {
    args: &'a EngineArgs,
    loads: Loads,
    rig: Rig,
    progress: &'a Progress,
}

impl Bench<'_> {
    /// All but telemetry. The peak of memory is read before anything is measured that only a bench would do.
    async fn figures(&self) -> Result<Figures, CliError> {
        let rig = &self.rig;
        let prefill = self.prefill().await?;
        let mut costs = Vec::new();
        for load in &self.loads.decode {
            costs.push(speed::cost(rig, load).await?);
        }
        let peak = memory::peak_rss();
        let memory = Memory::new(&rig.cpu)?;
        let mut decode = Vec::new();
        for (load, cost) in self.loads.decode.iter().zip(costs) {
            decode.push(Decode::new(load, self.speed(load, &memory).await?, cost));
        }
        let bandwidths = decode.iter().map(|decode| decode.bandwidth_gb_s * 1e9);
        let bandwidth = median(bandwidths.collect()).0;
        let rate = matrix_rate(&rig.cpu, rig.spec().formats.expert)?;
        let loads = self.loads.prefill.iter().chain(&self.loads.decode);
        let kv_bytes = loads.map(|load| rig.kv_bytes(load)).max().unwrap_or(0);
        let need = rig.weight_bytes + kv_bytes;
        Ok(Figures {
            model: self.args.model.display().to_string(),
            path: rig.cpu.path().to_string(),
            threads: rig.cpu.threads(),
            bandwidth_gb_s: bandwidth / 1e9,
            rate_gflop_s: rate / 1e9,
            load_seconds: rig.load_time.as_secs_f64(),
            peak_rss_bytes: peak,
            weight_bytes: rig.weight_bytes,
            kv_bytes,
            peak_rss_ratio: peak.map(|peak| peak as f64 / need as f64),
            decode,
            prefill: prefill
                .into_iter()
                .map(|p| p.limited(bandwidth, rate))
                .collect(),
        })
    }

    async fn prefill(&self) -> Result<Vec<Prefill>, CliError> {
        let mut figures = Vec::new();
        for load in &self.loads.prefill {
            let name = format!("prefill, {} × {} tokens", load.sequences, load.prompt);
            let task = self.progress.steps(&name, u64::from(self.args.turns));
            figures.push(speed::prefill(&self.rig, load, self.args.turns, &task).await?);
            task.finish("done");
        }
        Ok(figures)
    }

    async fn speed(&self, load: &Load, memory: &Memory) -> Result<Speed, CliError> {
        let turns = self.args.turns;
        let name = format!("decode, batch {}, context {}", load.sequences, load.prompt);
        let task = self.progress.steps(&name, u64::from(turns));
        let speed = speed::decode(&self.rig, load, turns, memory, &task).await?;
        task.finish("done");
        Ok(speed)
    }

    async fn telemetry(&self, load: &Load) -> Result<Telemetry, CliError> {
        let turns = self.args.turns;
        let name = format!("telemetry, batch {}", load.sequences);
        let task = self.progress.steps(&name, u64::from(turns));
        let figure = telemetry::measure(&self.rig, load, turns, &task).await?;
        task.finish("done");
        Ok(figure)
    }
}

#[cfg(test)]
mod tests;
