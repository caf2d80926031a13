//! `foregate bench serve`: load on any OpenAI server, open loop (`--rate`) or closed (`--concurrency`).
//!
//! In an open loop requests are due at the moments of a Poisson process, whether or not earlier ones are done,
//! and every time counts from the moment a request was due. So a server that stands still is charged for all
//! that would have come meanwhile. Several rates in one call give a curve.

mod curve;
mod figures;
mod load;

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::figures::{Figures, Objective};
use self::load::{Load, Pace, Prompts};
use super::client::Target;
use super::workload::{Draw, Length, Text, heldout};
use crate::environment;
use crate::error::{CliError, print};
use crate::progress::Progress;

/// Arguments of `foregate bench serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// URL of the server.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Model to ask for; default: the first that the server lists.
    #[arg(long)]
    model: Option<String>,
    /// Variable of the environment that holds the server's API key.
    #[arg(long, value_name = "NAME")]
    api_key_env: Option<String>,
    /// Requests in work at a time (closed loop).
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096), conflicts_with = "rate")]
    concurrency: u32,
    /// Requests per second, arriving at random whether or not earlier ones are done (open loop); several
    /// rates run one after the other.
    #[arg(long, value_delimiter = ',', value_parser = rate)]
    rate: Vec<f64>,
    /// Number of requests, for each rate.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    /// Requests before them that are not counted, one after the other.
    #[arg(long, default_value_t = 0)]
    warmup: u32,
    /// Prompts of so many random token ids, such as 128, or 64-256 for evenly drawn lengths; without it
    /// prompts are text.
    #[arg(long, conflicts_with_all = ["prompts", "prompt_chars"])]
    prompt_tokens: Option<Length>,
    /// Token ids are drawn below this number: at most the model's vocabulary.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(2..), requires = "prompt_tokens")]
    vocab: u32,
    /// Files to cut prompts from; default: the demonstration model's held-out texts.
    #[arg(long, num_args = 1..)]
    prompts: Vec<PathBuf>,
    /// Characters per prompt.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_chars: u32,
    /// Tokens per answer, such as 64, or 32-128 for evenly drawn lengths.
    #[arg(long, alias = "max-tokens", default_value = "64")]
    output_tokens: Length,
    /// Let the model end its answer, for servers that refuse the field `ignore_eos`.
    #[arg(long)]
    allow_eos: bool,
    /// A request is good if its first token came within so many milliseconds …
    #[arg(long, value_parser = milliseconds)]
    slo_ttft_ms: Option<f64>,
    /// … and the mean time per token after that is at most so many milliseconds.
    #[arg(long, value_parser = milliseconds)]
    slo_tpot_ms: Option<f64>,
    /// Seed of prompts and arrivals.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Also write the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Also draw latency and throughput against the offered rate, as SVG.
    #[arg(long, requires = "rate")]
    svg: Option<PathBuf>,
}

fn rate(text: &str) -> Result<f64, String> {
    positive(text).ok_or_else(|| "give requests per second above 0, such as 2.5".to_owned())
}

fn milliseconds(text: &str) -> Result<f64, String> {
    positive(text).ok_or_else(|| "give milliseconds above 0, such as 200".to_owned())
}

fn positive(text: &str) -> Option<f64> {
    let number = text.parse().ok();
    number.filter(|number: &f64| number.is_finite() && *number > 0.0)
}

/// What was measured, and how.
#[derive(Debug, Serialize)]
struct Report {
    url: String,
    model: String,
    prompt: String,
    output_tokens: String,
    seed: u64,
    objective: Objective,
    runs: Vec<Figures>,
}

/// Runs the loads and prints the figures.
pub(super) async fn run(
    args: &ServeArgs,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    let prompts = args.prompts()?;
    let target = Target::new(&args.url)?.with_key(args.key()?);
    let model = match &args.model {
        Some(model) => model.clone(),
        None => target.model().await?,
    };
    let mut load = Load {
        target,
        model: model.into(),
        prompts,
        output: args.output_tokens,
        ignore_eos: !args.allow_eos,
        draw: Draw::new(args.seed),
        arrivals: Draw::new(args.seed),
    };
    load.warm_up(args.warmup.max(1)).await?;
    let objective = Objective {
        ttft_ms: args.slo_ttft_ms,
        tpot_ms: args.slo_tpot_ms,
    };
    let mut runs = Vec::new();
    for pace in args.paces() {
        if drain.is_cancelled() {
            break;
        }
        // Every rate has the prompts and the arrivals of its own seed, whichever rates ran before it.
        load.draw = Draw::new(args.seed.wrapping_add(1));
        load.arrivals = Draw::new(args.seed.wrapping_add(2));
        let task = progress.steps(&pace.to_string(), u64::from(args.requests));
        let since = Instant::now();
        let results = load.run(pace, args.requests, &task, &drain).await;
        task.finish("done");
        let figures = Figures::of(pace, objective, results, since.elapsed());
        print(&figures.text());
        runs.push(figures);
    }
    let report = Report {
        url: args.url.clone(),
        model: load.model.to_string(),
        prompt: load.prompts.to_string(),
        output_tokens: args.output_tokens.to_string(),
        seed: args.seed,
        objective,
        runs,
    };
    args.write(&report)
}

impl ServeArgs {
    fn prompts(&self) -> Result<Prompts, CliError> {
        if let Some(length) = self.prompt_tokens {
            return Ok(Prompts::Tokens {
                length,
                vocab: self.vocab,
            });
        }
        let files = match self.prompts.is_empty() {
            true => heldout()?,
            false => self.prompts.clone(),
        };
        let texts: Result<Vec<Text>, CliError> =
            files.iter().map(|file| Text::read(file)).collect();
        Ok(Prompts::Texts {
            texts: texts?,
            characters: self.prompt_chars as usize,
        })
    }

    fn key(&self) -> Result<Option<String>, CliError> {
        let Some(name) = &self.api_key_env else {
            return Ok(None);
        };
        match environment::variable(name) {
            Some(key) => Ok(Some(key)),
            None => Err(CliError::Usage(format!(
                "--api-key-env {name}: the environment has no such variable, or it is empty; export it"
            ))),
        }
    }

    fn paces(&self) -> Vec<Pace> {
        match self.rate.is_empty() {
            true => vec![Pace::Closed(self.concurrency)],
            false => self.rate.iter().copied().map(Pace::Open).collect(),
        }
    }

    fn write(&self, report: &Report) -> Result<(), CliError> {
        if let Some(path) = &self.json {
            write_json(path, report)?;
        }
        if let Some(path) = &self.svg {
            curve::write(path, &report.runs)?;
        }
        if report.runs.iter().all(|run| run.requests == run.failed) {
            return Err(CliError::Runtime("no request succeeded".to_owned()));
        }
        Ok(())
    }
}

/// Writes figures as JSON.
pub(crate) fn write_json(path: &PathBuf, figures: &impl Serialize) -> Result<(), CliError> {
    let what = path.display().to_string();
    let text = serde_json::to_vec_pretty(figures).map_err(|e| CliError::runtime(&what, &e))?;
    std::fs::write(path, text).map_err(|error| CliError::runtime(&what, &error))
}

/// A time in milliseconds.
fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests;
