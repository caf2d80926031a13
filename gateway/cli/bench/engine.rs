//! `foregate bench engine`: the engine alone, all experts in this process, no network, no HTTP.
//!
//! The cost of expert telemetry is far below the noise of two runs. So two engines, one with it and one without,
//! decode the same sequences over the same weights and take turns step by step. Which of them goes first, and
//! where its memory lies, makes a difference of its own: so every turn has fresh engines and both orders.

mod lockstep;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::model::ModelSpec;
use foregate_api::node::{FabricKind, WorkerConfig};
use foregate_checkpoint::Checkpoint;
use foregate_kernels::{Cpu, KvCache};
use foregate_models::{LocalExperts, Model};
use foregate_wire::generation::generate_event::Event;
use foregate_worker::engine::{self, Alone, EngineHandle, EngineParts, StepExperts};
use foregate_worker::load::LoadCounters;
use foregate_worker::sampler::Sampling;
use foregate_worker::sequence::Request;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::lockstep::{Lockstep, Times, Turnstile};
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
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(3..))]
    decode_tokens: u32,
    /// Turns per batch size; the best speed counts, and all pairs of steps.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    turns: u32,
    /// Also write the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One batch size.
#[derive(Debug, Clone, Copy, Serialize)]
struct Figure {
    batch: u32,
    /// Of the best turn, as the next.
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    /// Pairs of a step with telemetry and one without.
    pairs: usize,
    /// Medians of their two sides.
    step_ms: f64,
    step_ms_without_telemetry: f64,
    /// Of each turn the median over its pairs; of those the median.
    telemetry_overhead_percent: f64,
    /// Where the median of more turns would lie with 95 of 100 chances.
    telemetry_overhead_interval: (f64, f64),
}

/// Milliseconds of two steps with the same work.
#[derive(Debug, Clone, Copy)]
struct Pair {
    with: f64,
    without: f64,
}

impl Pair {
    fn ratio(self) -> f64 {
        self.with / self.without
    }
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
    let experts = LocalExperts::load(&checkpoint, cpu)
        .map_err(|error| CliError::runtime(&path, &error))?;
    let bench = Bench {
        args,
        model,
        experts,
        spec: checkpoint.spec(),
    };
    let mut figures = Vec::new();
    for batch in &args.batch {
        let figure = bench.figure(*batch, progress).await?;
        print(&figure.line());
        figures.push(figure);
    }
    match &args.json {
        Some(path) => write_json(path, &figures),
        None => Ok(()),
    }
}

/// What all blocks share.
struct Bench<'a> {
    args: &'a EngineArgs,
    model: Model,
    experts: LocalExperts,
    spec: &'a ModelSpec,
}

impl Bench<'_> {
    async fn figure(&self, batch: u32, progress: &Progress) -> Result<Figure, CliError> {
        let task = progress.steps(&format!("batch {batch}"), u64::from(self.args.turns) * 2);
        let mut best = Speed::default();
        let (mut pairs, mut overheads) = (Vec::new(), Vec::new());
        for _ in 0..self.args.turns {
            best = best.best(self.alone(batch).await?);
            task.add(1);
            let orders = [self.in_turn(batch, 0).await?, self.in_turn(batch, 1).await?];
            task.add(1);
            let ratios = orders[0].iter().zip(&orders[1]);
            let ratios = ratios.map(|(one, other)| (one.ratio() * other.ratio()).sqrt());
            overheads.push((median(ratios.collect()).0 - 1.0) * 100.0);
            pairs.extend(orders.concat());
        }
        task.finish("done");
        let of = |side: fn(&Pair) -> f64| median(pairs.iter().map(side).collect());
        let (overhead, interval) = median(overheads);
        Ok(Figure {
            batch,
            prefill_tokens_per_second: best.prefill,
            decode_tokens_per_second: best.decode,
            pairs: pairs.len(),
            step_ms: of(|pair| pair.with).0,
            step_ms_without_telemetry: of(|pair| pair.without).0,
            telemetry_overhead_percent: overhead,
            telemetry_overhead_interval: interval,
        })
    }

    /// One batch from prompt to end.
    async fn alone(&self, batch: u32) -> Result<Speed, CliError> {
        let engine = self.start(batch, true, Box::new(Alone(self.experts.clone())))?;
        let speed = measure(self.args, batch, &engine, self.spec).await;
        engine.stop().await;
        speed
    }

    /// Decode steps of two engines that take turns: fresh ones, so that their memory lies elsewhere each time.
    async fn in_turn(&self, batch: u32, with: usize) -> Result<Vec<Pair>, CliError> {
        let turnstile = Arc::<Turnstile>::default();
        let times: [Times; 2] = Default::default();
        let engine = |side: usize| {
            let experts = Lockstep {
                inner: Alone(self.experts.clone()),
                side,
                turnstile: Arc::clone(&turnstile),
                times: Arc::clone(&times[side]),
                begun: None,
            };
            self.start(batch, side == with, Box::new(experts))
        };
        let engines = [engine(0)?, engine(1)?];
        let run = async |engine: &EngineHandle| {
            let done = measure(self.args, batch, engine, self.spec).await;
            turnstile.open();
            done
        };
        let (first, second) = tokio::join!(run(&engines[0]), run(&engines[1]));
        for engine in engines {
            engine.stop().await;
        }
        first.and(second)?;
        let decode = |side: usize| {
            let times = times[side].lock().unwrap_or_else(PoisonError::into_inner);
            // The last step of all has no next one and so no time; prompts are read by the first.
            let steps = times
                .iter()
                .rev()
                .take(self.args.decode_tokens as usize - 2);
            let steps = steps.map(|time| time.as_secs_f64() * 1000.0);
            steps.collect::<Vec<f64>>()
        };
        let pairs = decode(with).into_iter().zip(decode(1 - with));
        Ok(pairs
            .map(|(with, without)| Pair { with, without })
            .collect())
    }

    fn start(
        &self,
        batch: u32,
        telemetry: bool,
        experts: Box<dyn StepExperts>,
    ) -> Result<EngineHandle, CliError> {
        let prompt = self.args.prompt_tokens;
        let length = (prompt + self.args.decode_tokens) as usize;
        let pages = (length.div_ceil(PAGE_TOKENS) + 1) * batch as usize;
        let kv = KvCache::new(self.model.kv_shape(pages, PAGE_TOKENS))
            .map_err(|error| CliError::runtime("KV cache", &error))?;
        // Counters without layers count nothing: that is the engine without telemetry.
        let load = match telemetry {
            true => LoadCounters::new(self.spec.moe_layers(), self.spec.experts),
            false => LoadCounters::new(0, 0),
        };
        engine::start(EngineParts {
            model: self.model.clone(),
            kv,
            experts,
            config: config(batch, prompt, length),
            load: Arc::new(load),
        })
        .map_err(|error| CliError::runtime("engine", &error))
    }
}

/// Median, and the order statistics between which the true one lies with 95 of 100 chances: how many of n
/// figures are below it is binomial with p = 1/2, here by its normal approximation.
fn median(mut figures: Vec<f64>) -> (f64, (f64, f64)) {
    figures.sort_by(f64::total_cmp);
    let n = figures.len();
    let Some(last) = n.checked_sub(1) else {
        return (f64::NAN, (f64::NAN, f64::NAN));
    };
    let out = ((n as f64 - 1.96 * (n as f64).sqrt()) / 2.0).max(0.0) as usize;
    let middle = f64::midpoint(figures[last / 2], figures[n / 2]);
    (middle, (figures[out], figures[last - out]))
}

impl Figure {
    fn line(&self) -> String {
        format!(
            "batch {:>4}: prefill {:>9.1} tokens/s, decode {:>9.1} tokens/s; expert telemetry costs {:.2} % (between {:.2} and {:.2})",
            self.batch,
            self.prefill_tokens_per_second,
            self.decode_tokens_per_second,
            self.telemetry_overhead_percent,
            self.telemetry_overhead_interval.0,
            self.telemetry_overhead_interval.1
        )
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lies_in_its_interval() {
        let figures = (1..=100).rev().map(f64::from).collect();
        // Ranks 41 and 60 of 100.
        assert_eq!(median(figures), (50.5, (41.0, 60.0)));
        assert_eq!(median(vec![3.0]), (3.0, (3.0, 3.0)));
        assert_eq!(median(vec![4.0, 1.0]), (2.5, (1.0, 4.0)));
        assert!(median(Vec::new()).0.is_nan());
    }
}
