//! `foregate bench engine`: the engine alone, all experts in this process, no network, no HTTP.
//!
//! Each batch size is measured with and without expert telemetry, turn by turn, so that a drift of the machine
//! hits both alike.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::model::ModelSpec;
use foregate_api::node::{FabricKind, WorkerConfig};
use foregate_checkpoint::Checkpoint;
use foregate_kernels::{Cpu, KvCache};
use foregate_models::{LocalExperts, Model};
use foregate_wire::generation::generate_event::Event;
use foregate_worker::engine::{self, Alone, EngineHandle, EngineParts};
use foregate_worker::load::LoadCounters;
use foregate_worker::sampler::Sampling;
use foregate_worker::sequence::Request;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::serve::write_json;
use super::workload::Draw;
use crate::error::{CliError, print};
use crate::progress::Progress;

const PAGE_TOKENS: usize = 16;

/// Arguments of `foregate bench engine`.
#[derive(Debug, clap::Args)]
pub(crate) struct EngineArgs {
    /// Model directory.
    #[arg(long)]
    model: PathBuf,
    /// Compute threads; default: all cores.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Sequences in a batch.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    batch: Vec<u32>,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    /// Tokens to decode per sequence.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    decode_tokens: u32,
    /// Turns per batch size, each with and without telemetry; the best counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    turns: u32,
    /// Also write the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One batch size.
#[derive(Debug, Clone, Copy, Serialize)]
struct Figure {
    batch: u32,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    decode_without_telemetry: f64,
    telemetry_cost_percent: f64,
}

/// Speeds of one turn.
#[derive(Debug, Clone, Copy, Default)]
struct Speed {
    prefill: f64,
    decode: f64,
}

impl Speed {
    fn best(self, other: Self) -> Self {
        Self {
            prefill: self.prefill.max(other.prefill),
            decode: self.decode.max(other.decode),
        }
    }
}

/// Measures and prints.
pub(super) async fn run(args: &EngineArgs, progress: &Progress) -> Result<(), CliError> {
    if args.batch.iter().any(|batch| !(1..=4096).contains(batch)) {
        return Err(CliError::Usage(
            "--batch: each must be from 1 to 4096".to_owned(),
        ));
    }
    let path = args.model.display().to_string();
    let checkpoint =
        Checkpoint::open(&args.model).map_err(|error| CliError::runtime(&path, &error))?;
    let threads = match args.threads {
        Some(threads) => threads as usize,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let cpu = Arc::new(Cpu::new(threads));
    print(&format!("{path}: {threads} threads, {} path", cpu.path()));
    let model = Model::load(&checkpoint, Arc::clone(&cpu), |_, _| {})
        .map_err(|error| CliError::runtime(&path, &error))?;
    let mut figures = Vec::new();
    for batch in &args.batch {
        let task = progress.steps(&format!("batch {batch}"), u64::from(args.turns) * 2);
        let (mut with, mut without) = (Speed::default(), Speed::default());
        for _ in 0..args.turns {
            for telemetry in [true, false] {
                let experts = LocalExperts::load(&checkpoint, Arc::<Cpu>::clone(&cpu))
                    .map_err(|error| CliError::runtime(&path, &error))?;
                let engine =
                    start(args, *batch, &model, experts, checkpoint.spec(), telemetry)?;
                let speed = measure(args, *batch, &engine, checkpoint.spec()).await?;
                engine.stop().await;
                let best = if telemetry { &mut with } else { &mut without };
                *best = best.best(speed);
                task.add(1);
            }
        }
        task.finish("done");
        let figure = Figure {
            batch: *batch,
            prefill_tokens_per_second: with.prefill,
            decode_tokens_per_second: with.decode,
            decode_without_telemetry: without.decode,
            telemetry_cost_percent: (1.0 - with.decode / without.decode) * 100.0,
        };
        print(&figure.line());
        figures.push(figure);
    }
    match &args.json {
        Some(path) => write_json(path, &figures),
        None => Ok(()),
    }
}

impl Figure {
    fn line(&self) -> String {
        format!(
            "batch {:>4}: prefill {:>9.1} tokens/s, decode {:>9.1} tokens/s ({:.1} without expert telemetry, cost {:.2} %)",
            self.batch,
            self.prefill_tokens_per_second,
            self.decode_tokens_per_second,
            self.decode_without_telemetry,
            self.telemetry_cost_percent
        )
    }
}

fn start(
    args: &EngineArgs,
    batch: u32,
    model: &Model,
    experts: LocalExperts,
    spec: &ModelSpec,
    telemetry: bool,
) -> Result<EngineHandle, CliError> {
    let length = (args.prompt_tokens + args.decode_tokens) as usize;
    let pages = (length.div_ceil(PAGE_TOKENS) + 1) * batch as usize;
    let kv = KvCache::new(model.kv_shape(pages, PAGE_TOKENS))
        .map_err(|error| CliError::runtime("KV cache", &error))?;
    // Counters without layers count nothing: that is the engine without telemetry.
    let load = match telemetry {
        true => LoadCounters::new(spec.moe_layers(), spec.experts),
        false => LoadCounters::new(0, 0),
    };
    engine::start(EngineParts {
        model: model.clone(),
        kv,
        experts: Box::new(Alone(experts)),
        config: config(batch, args.prompt_tokens, length),
        load: Arc::new(load),
    })
    .map_err(|error| CliError::runtime("engine", &error))
}

fn config(batch: u32, prompt: u32, length: usize) -> WorkerConfig {
    WorkerConfig {
        rank: Rank(0),
        model_dir: String::new(),
        served_name: String::new(),
        rpc_listen: String::new(),
        exchange_listen: String::new(),
        fabric: FabricKind::Local,
        slots: 0,
        threads: 1,
        max_num_seqs: batch,
        // All prompts in one step, so that the decode that follows is one batch from its first step.
        max_num_batched_tokens: batch.saturating_mul(prompt).max(batch),
        max_waiting: batch,
        max_model_len: u32::try_from(length).unwrap_or(u32::MAX),
        page_tokens: PAGE_TOKENS as u32,
        kv_bytes: 0,
        exchange_deadline_ms: 1000,
        domain: String::new(),
        window_ms: 1000,
    }
}

/// Runs one batch to its end. Prefill ends with the last sequence's first token.
async fn measure(
    args: &EngineArgs,
    batch: u32,
    engine: &EngineHandle,
    spec: &ModelSpec,
) -> Result<Speed, CliError> {
    let since = Instant::now();
    let mut work = JoinSet::new();
    for number in 0..batch {
        let request = request(args, number, spec.vocab);
        let mut stream = engine
            .submit(request, None, tracing::Span::none())
            .map_err(|error| CliError::runtime("engine", &error))?;
        work.spawn(async move {
            let mut first = None;
            while let Some(event) = stream.next().await {
                let event = event.map_err(|error| error.to_string())?;
                if let (Event::Token(_), None) = (event, first) {
                    first = Some(since.elapsed());
                }
            }
            first.ok_or("a sequence gave no token".to_owned())
        });
    }
    let mut prefilled = Duration::ZERO;
    while let Some(done) = work.join_next().await {
        let first = done
            .map_err(|error| CliError::runtime("engine", &error))?
            .map_err(CliError::Runtime)?;
        prefilled = prefilled.max(first);
    }
    let decode = since.elapsed().saturating_sub(prefilled);
    let tokens = |each: u32| f64::from(each) * f64::from(batch);
    Ok(Speed {
        prefill: tokens(args.prompt_tokens) / prefilled.as_secs_f64(),
        decode: tokens(args.decode_tokens - 1) / decode.as_secs_f64(),
    })
}

fn request(args: &EngineArgs, number: u32, vocab: usize) -> Request {
    let mut draw = Draw::new(u64::from(number));
    let mut token = || u32::try_from(draw.below(vocab)).unwrap_or(0);
    let tokens: Vec<u32> = (0..args.prompt_tokens).map(|_| token()).collect();
    Request {
        id: format!("bench-{number}"),
        prompt_len: tokens.len(),
        tokens,
        max_tokens: args.decode_tokens as usize,
        min_tokens: 0,
        stop_tokens: BTreeSet::new(),
        sampling: Sampling::greedy(),
        logprobs: None,
        prompt_logprobs: None,
        routed_experts: false,
    }
}
