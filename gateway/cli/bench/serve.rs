//! `foregate bench serve`: load on a gateway, open loop (`--rate`) or closed (`--concurrency`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::client::{Seen, Target};
use super::report::Spread;
use super::workload::{Draw, Text, heldout};
use crate::error::{CliError, print};
use crate::progress::Progress;

/// Arguments of `foregate bench serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// URL of the gateway.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Requests in work at a time (closed loop).
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096), conflicts_with = "rate")]
    concurrency: u32,
    /// Requests per second, arriving at random whether or not earlier ones are done (open loop).
    #[arg(long)]
    rate: Option<f64>,
    /// Number of requests.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    /// Files to cut prompts from; default: the demonstration model's held-out texts.
    #[arg(long, num_args = 1..)]
    prompts: Vec<PathBuf>,
    /// Characters per prompt.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_chars: u32,
    /// Tokens per answer.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Seed of prompts and arrivals.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Also write the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What was measured. Times in milliseconds.
#[derive(Debug, Serialize)]
struct Figures {
    requests: usize,
    failed: usize,
    seconds: f64,
    prompt_tokens: u64,
    tokens: u64,
    tokens_per_second: f64,
    requests_per_second: f64,
    time_to_first_token_ms: Spread,
    inter_token_latency_ms: Spread,
    longest_pause_ms: Spread,
    request_ms: Spread,
    errors: Vec<String>,
}

/// Runs the load and prints the figures.
pub(super) async fn run(
    args: &ServeArgs,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    if args
        .rate
        .is_some_and(|rate| !(rate.is_finite() && rate > 0.0))
    {
        return Err(CliError::Usage("--rate must be above 0".to_owned()));
    }
    let files = if args.prompts.is_empty() {
        heldout()?
    } else {
        args.prompts.clone()
    };
    let texts: Vec<Text> = files
        .iter()
        .map(|file| Text::read(file))
        .collect::<Result<_, _>>()?;
    let target = Target::new(&args.url)?;
    let model: Arc<str> = target.model().await?.into();
    let since = Instant::now();
    let results = load(args, &texts, &target, &model, progress, &drain).await;
    let figures = Figures::of(results, since.elapsed());
    print(&figures.text());
    if let Some(path) = &args.json {
        write_json(path, &figures)?;
    }
    if figures.requests == figures.failed {
        return Err(CliError::Runtime("no request succeeded".to_owned()));
    }
    Ok(())
}

/// Writes figures as JSON.
pub(super) fn write_json(path: &PathBuf, figures: &impl Serialize) -> Result<(), CliError> {
    let what = path.display().to_string();
    let text = serde_json::to_vec_pretty(figures).map_err(|e| CliError::runtime(&what, &e))?;
    std::fs::write(path, text).map_err(|error| CliError::runtime(&what, &error))
}

async fn load(
    args: &ServeArgs,
    texts: &[Text],
    target: &Target,
    model: &Arc<str>,
    progress: &Progress,
    drain: &CancellationToken,
) -> Vec<Result<Seen, String>> {
    let task = progress.steps("requests", u64::from(args.requests));
    let permits = Arc::new(Semaphore::new(match args.rate {
        Some(_) => Semaphore::MAX_PERMITS,
        None => args.concurrency as usize,
    }));
    let mut draw = Draw::new(args.seed);
    let mut work = JoinSet::new();
    let mut next = Instant::now();
    for at in 0..args.requests as usize {
        if let Some(rate) = args.rate {
            sleep_until(next).await;
            next += draw.gap(rate);
        }
        let permit = tokio::select! {
            permit = Arc::clone(&permits).acquire_owned() => permit,
            () = drain.cancelled() => break,
        };
        let prompt = texts[at % texts.len()].cut(args.prompt_chars as usize, &mut draw);
        let (target, model, max_tokens) = (target.clone(), Arc::clone(model), args.max_tokens);
        let task = task.clone();
        work.spawn(async move {
            let seen = target.complete(&model, &prompt, max_tokens).await;
            drop(permit);
            task.add(1);
            seen
        });
    }
    let mut results = Vec::new();
    while let Some(result) = work.join_next().await {
        results.push(result.unwrap_or_else(|error| Err(error.to_string())));
    }
    task.finish("done");
    results
}

impl Figures {
    fn of(results: Vec<Result<Seen, String>>, time: Duration) -> Self {
        let requests = results.len();
        let (mut seen, mut errors) = (Vec::new(), Vec::new());
        for result in results {
            match result {
                Ok(one) => seen.push(one),
                Err(error) => errors.push(error),
            }
        }
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let tokens: u64 = seen.iter().map(|one| one.tokens).sum();
        let gaps = seen.iter().flat_map(|one| {
            one.events
                .windows(2)
                .map(move |pair| ms(pair[1].saturating_sub(pair[0])))
        });
        let failed = errors.len();
        errors.sort();
        errors.dedup();
        errors.truncate(10);
        Self {
            requests,
            failed,
            seconds: time.as_secs_f64(),
            prompt_tokens: seen.iter().map(|one| one.prompt_tokens).sum(),
            tokens,
            tokens_per_second: tokens as f64 / time.as_secs_f64(),
            requests_per_second: seen.len() as f64 / time.as_secs_f64(),
            inter_token_latency_ms: Spread::of(gaps.collect()),
            time_to_first_token_ms: Spread::of(
                seen.iter()
                    .filter_map(|one| one.events.first().copied())
                    .map(ms)
                    .collect(),
            ),
            longest_pause_ms: Spread::of(
                seen.iter().map(|one| ms(one.longest_pause())).collect(),
            ),
            request_ms: Spread::of(seen.iter().map(|one| ms(one.total)).collect()),
            errors,
        }
    }

    fn text(&self) -> String {
        let mut lines = vec![
            format!(
                "{} requests, {} failed, in {:.1} s: {:.1} tokens/s, {:.2} requests/s ({} prompt and {} answer tokens)",
                self.requests,
                self.failed,
                self.seconds,
                self.tokens_per_second,
                self.requests_per_second,
                self.prompt_tokens,
                self.tokens
            ),
            self.time_to_first_token_ms.line("time to first token"),
            self.inter_token_latency_ms.line("inter-token latency"),
            self.longest_pause_ms.line("longest pause"),
            self.request_ms.line("request"),
        ];
        lines.extend(self.errors.iter().map(|error| format!("error: {error}")));
        lines.join("\n")
    }
}
