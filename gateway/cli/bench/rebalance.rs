//! `foregate bench rebalance`: the mix of texts shifts, and the plan follows.
//!
//! Each phase sends mostly one kind of text; what a client has sent already is answered in the next. Meanwhile /debug/experts is sampled; the result is a record of
//! epoch and imbalance over time, the longest pause any stream saw, and a plot of both.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::placement::Placement;
use serde::Deserialize as _;
use serde_json::Value;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use super::client::{Ask, Failure, Prompt, Seen, Target};
use super::plot;
use super::record::{Phase, Record, Sample};
use super::serve::write_json;
use super::workload::{Draw, Text, heldout};
use crate::error::{CliError, print};
use crate::progress::Progress;

const SAMPLE: Duration = Duration::from_millis(500);
/// One request in this many is of another kind than the phase's.
const OTHERS: usize = 10;

/// Arguments of `foregate bench rebalance`.
#[derive(Debug, clap::Args)]
pub(crate) struct RebalanceArgs {
    /// URL of the gateway.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    #[command(flatten)]
    load: LoadArgs,
    /// Write the record as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// The record of an earlier run, to be drawn beside this one: for example without balancing.
    #[arg(long, requires = "svg")]
    baseline: Option<PathBuf>,
    /// Write the plot as SVG to this file.
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// A mix of texts that shifts: what a run asks for.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct LoadArgs {
    /// Files, one per kind of text; default: the demonstration model's held-out texts.
    #[arg(long, num_args = 1..)]
    prompts: Vec<PathBuf>,
    /// Seconds per kind.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) seconds: u64,
    /// How often all kinds come in turn.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    cycles: u32,
    /// Requests in work at a time.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(super) concurrency: u32,
    /// Characters per prompt.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_chars: u32,
    /// Tokens per answer.
    #[arg(long, default_value_t = 48, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
}

impl LoadArgs {
    /// Reads the texts.
    pub(super) fn texts(&self) -> Result<Arc<[Text]>, CliError> {
        let files = if self.prompts.is_empty() {
            heldout()?
        } else {
            self.prompts.clone()
        };
        files.iter().map(|file| Text::read(file)).collect()
    }
}

/// Runs all phases, prints a summary and writes the files.
pub(super) async fn run(
    args: &RebalanceArgs,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    let texts = args.load.texts()?;
    let baseline = args.baseline.as_ref().map(Record::read).transpose()?;
    let target = Target::new(&args.url)?;
    let model = target.model().await?;
    let record = Box::pin(drive(&args.load, &texts, &target, &model, progress, &drain)).await;
    print(&record.text());
    if let Some(path) = &args.json {
        write_json(path, &record)?;
    }
    if let Some(path) = &args.svg {
        plot::write(path, &record, baseline.as_ref())?;
    }
    Ok(())
}

/// All phases against a gateway.
pub(super) async fn drive(
    args: &LoadArgs,
    texts: &Arc<[Text]>,
    target: &Target,
    model: &str,
    progress: &Progress,
    drain: &CancellationToken,
) -> Record {
    let since = Instant::now();
    let stop = drain.child_token();
    let mut sampler = JoinSet::new();
    sampler.spawn(sample(target.clone(), since, stop.clone()));
    let schedule = Schedule {
        begins: since,
        phase: Duration::from_secs(args.seconds),
        kinds: texts.len(),
        phases: texts.len() * args.cycles as usize,
    };
    let mut clients = JoinSet::new();
    for number in 0..args.concurrency {
        clients.spawn(client(Client {
            target: target.clone(),
            model: model.to_owned(),
            texts: Arc::clone(texts),
            schedule,
            length: args.prompt_chars as usize,
            max_tokens: args.max_tokens,
            draw: Draw::new(u64::from(number)),
            drain: drain.clone(),
        }));
    }
    let phases = tell(schedule, texts, progress, drain).await;
    let mut results = Vec::new();
    while let Some(done) = clients.join_next().await {
        let lost = |error: JoinError| vec![Err(Failure::new("client", error.to_string()))];
        results.extend(done.unwrap_or_else(lost));
    }
    stop.cancel();
    let samples = match sampler.join_next().await {
        Some(Ok(samples)) => samples,
        _ => Vec::new(),
    };
    Record::of(phases, samples, &results)
}

/// Which kind is sent when.
#[derive(Debug, Clone, Copy)]
struct Schedule {
    begins: Instant,
    phase: Duration,
    kinds: usize,
    phases: usize,
}

impl Schedule {
    /// The kind of this moment; `None` after the last phase.
    fn kind(&self, now: Instant) -> Option<usize> {
        let past = now.saturating_duration_since(self.begins);
        let phase = (past.as_secs_f64() / self.phase.as_secs_f64()) as usize;
        (phase < self.phases).then_some(phase % self.kinds.max(1))
    }
}

/// Says when which phase begins, until the last one ends.
async fn tell(
    schedule: Schedule,
    texts: &[Text],
    progress: &Progress,
    drain: &CancellationToken,
) -> Vec<Phase> {
    let mut phases = Vec::new();
    while let Some(kind) = schedule.kind(Instant::now()) {
        let kind = &texts[kind].kind;
        progress.say(&format!("mostly {kind} for {} s", schedule.phase.as_secs()));
        phases.push(Phase {
            seconds: schedule.begins.elapsed().as_secs_f64(),
            kind: kind.clone(),
        });
        let next = schedule.begins + schedule.phase * phases.len() as u32;
        tokio::select! {
            () = sleep_until(next) => {}
            () = drain.cancelled() => break,
        }
    }
    phases
}

struct Client {
    target: Target,
    model: String,
    texts: Arc<[Text]>,
    schedule: Schedule,
    length: usize,
    max_tokens: u32,
    draw: Draw,
    drain: CancellationToken,
}

/// One request after the other until the last phase ends.
async fn client(mut it: Client) -> Vec<Result<Seen, Failure>> {
    let mut results = Vec::new();
    while let Some(kind) = it
        .schedule
        .kind(Instant::now())
        .filter(|_| !it.drain.is_cancelled())
    {
        let kind = match it.draw.below(OTHERS) {
            0 => it.draw.below(it.texts.len()),
            _ => kind,
        };
        let ask = Ask {
            prompt: Prompt::Text(it.texts[kind].cut(it.length, &mut it.draw)),
            max_tokens: it.max_tokens,
            ignore_eos: true,
        };
        let seen = it.target.complete(&it.model, &ask, Instant::now()).await;
        results.push(seen);
    }
    results
}

async fn sample(target: Target, since: Instant, stop: CancellationToken) -> Vec<Sample> {
    let mut samples = Vec::new();
    let (mut before, mut copies) = (None::<Placement>, 0);
    let mut ticks = interval(SAMPLE);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return samples,
        }
        match target.json("/debug/experts").await {
            Ok(experts) => {
                let active = Placement::deserialize(&experts["active"]).ok();
                if let (Some(now), Some(before)) = (&active, &before)
                    && now.epoch != before.epoch
                {
                    copies += now.copies_moved(Some(before)) as u64;
                }
                samples.push(Sample {
                    seconds: since.elapsed().as_secs_f64(),
                    epoch: active.as_ref().map_or(0, |plan| plan.epoch.0),
                    imbalance: mean(&experts["imbalance"]),
                    copies,
                });
                before = active.or(before);
            }
            Err(error) => tracing::warn!(%error, "no sample"),
        }
    }
}

fn mean(layers: &Value) -> Option<f64> {
    let figures: Vec<f64> = layers
        .as_array()?
        .iter()
        .filter_map(Value::as_f64)
        .collect();
    (!figures.is_empty()).then(|| figures.iter().sum::<f64>() / figures.len() as f64)
}
