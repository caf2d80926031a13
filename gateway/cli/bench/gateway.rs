//! `foregate bench gateway`: what a gateway adds to its back ends, Foregate's and, where it is installed, SMG beside it.
//!
//! The back ends are `foregate bench stub`: every answer has the same tokens at the same moments. In each round every way to
//! them is loaded in turn, in an order that turns with the rounds, by the same prompts at the same moments: streams and
//! whole answers at a rate far below what the machine can do, for latency, and as many streams at a time as go, for requests
//! per second. A round's added latency is a way's percentile less the direct way's of the same round.

mod arms;
mod client;
mod cpu;
mod figures;
mod load;
mod picture;

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use self::arms::{Arms, Way};
use self::client::Asked;
use self::cpu::Busy;
use self::figures::{Block, Report};
use super::stub::Delays;
use super::workload::{Draw, Text, demonstration, heldout};
use crate::error::{CliError, print};
use crate::progress::Progress;

/// Arguments of `foregate bench gateway`.
#[derive(Debug, Clone, Serialize, clap::Args)]
pub(crate) struct GatewayArgs {
    /// Model directory, for its tokenizer; default: the demonstration model.
    #[arg(long)]
    #[serde(skip)]
    model: Option<PathBuf>,
    /// The program `smg`; without it Foregate alone is measured.
    #[arg(long)]
    #[serde(skip)]
    smg: Option<PathBuf>,
    /// Which version of it that is, for the record: the program does not say.
    #[arg(long, requires = "smg")]
    smg_version: Option<String>,
    /// Back ends behind each gateway.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    backends: u32,
    /// Rounds, in each of which every way is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Requests of a latency block, streams and whole answers each.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,
    /// Requests per second of it, arriving at random.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// Streams at a time for requests per second.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: u32,
    /// Seconds of that.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Tokens of an answer.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=512))]
    tokens: u32,
    /// Microseconds between two tokens of a stream. Whole answers, and first tokens, come at once.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    between_us: u64,
    /// Characters of a prompt.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=4000))]
    prompt_chars: u32,
    /// Seed of prompts and arrivals.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write gateway.json, gateway.svg and table.md into this folder.
    #[arg(long)]
    #[serde(skip)]
    out: Option<PathBuf>,
}

impl GatewayArgs {
    /// The command, without where things lie.
    fn told(&self) -> String {
        let smg = self.smg_version.as_ref();
        let smg = smg.map_or(String::new(), |version| format!(", SMG {version}"));
        format!(
            "\n`foregate bench gateway --backends {} --rounds {} --requests {} --rate {} --concurrency {} --seconds {} --tokens {} \
             --between-us {} --prompt-chars {} --seed {}`{smg}.",
            self.backends,
            self.rounds,
            self.requests,
            self.rate,
            self.concurrency,
            self.seconds,
            self.tokens,
            self.between_us,
            self.prompt_chars,
            self.seed,
        )
    }

    /// Of streams.
    const fn delays(&self) -> Delays {
        Delays {
            first_us: 0,
            between_us: self.between_us,
        }
    }
}

/// Measures all ways, prints the table and writes the files.
///
/// # Errors
/// A process that does not start, no etcd, ways that answer differently, requests that fail.
pub(super) async fn run(
    args: &GatewayArgs,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => demonstration()?,
    };
    let files = heldout()?;
    let texts: Result<Vec<Text>, CliError> =
        files.iter().map(|file| Text::read(file)).collect();
    let texts = texts?;
    progress.say("starting back ends and gateways");
    let arms = Arms::start(args, &model).await?;
    let measured = Box::pin(measure(args, &arms, &texts, progress, &drain)).await;
    // Ended in any case: nothing of the bench outlives it.
    arms.end().await?;
    let report = Report::of(args, measured?)?;
    print(&report.table());
    report.write(args.out.as_deref())
}

async fn measure(
    args: &GatewayArgs,
    arms: &Arms,
    texts: &[Text],
    progress: &Progress,
    drain: &CancellationToken,
) -> Result<Vec<Block>, CliError> {
    same_answers(args, arms, texts).await?;
    let task = progress.steps("blocks", u64::from(args.rounds) * arms.ways.len() as u64);
    let mut blocks = Vec::new();
    for round in 0..args.rounds {
        for way in order(arms.ways.len(), round) {
            if drain.is_cancelled() {
                return Err(CliError::Runtime(
                    "stopped before the last round".to_owned(),
                ));
            }
            let way = &arms.ways[way];
            blocks.push(Box::pin(block(args, arms, way, texts, round)).await?);
            task.add(1);
        }
    }
    task.finish("done");
    Ok(blocks)
}

/// Which way comes when: each round begins with the next one, and every second round goes backwards, so that none has
/// always the same neighbour.
fn order(ways: usize, round: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..ways).collect();
    order.rotate_left(round as usize % ways.max(1));
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// Asks every way once per kind of answer: a way that says something else is not measured, and connections are made.
async fn same_answers(args: &GatewayArgs, arms: &Arms, texts: &[Text]) -> Result<(), CliError> {
    let prompt = texts[0].cut(args.prompt_chars as usize, &mut Draw::new(args.seed));
    let mut first: Option<String> = None;
    for way in &arms.ways {
        for streamed in [true, false] {
            let asked = Asked::new(&prompt, args.tokens, streamed);
            let answer = way.client.text(&asked).await;
            let text =
                answer.map_err(|error| CliError::Runtime(format!("{}: {error}", way.name)))?;
            let expected = first.get_or_insert_with(|| text.clone());
            if *expected != text {
                return Err(CliError::Runtime(format!(
                    "{} answers {text:?}, where the back end says {expected:?}",
                    way.name
                )));
            }
        }
    }
    Ok(())
}

/// One way in one round.
async fn block(
    args: &GatewayArgs,
    arms: &Arms,
    way: &Way,
    texts: &[Text],
    round: u32,
) -> Result<Block, CliError> {
    // All ways of a round get the same prompts at the same moments.
    let draw = || Draw::new(args.seed.wrapping_add(1 + u64::from(round)));
    let asks = |streamed| load::Asks {
        texts,
        characters: args.prompt_chars as usize,
        tokens: args.tokens,
        streamed,
        draw: draw(),
    };
    let rate = f64::from(args.rate);
    arms.schedule(args.delays()).await?;
    let streams = load::open(&way.client, asks(true), args.requests, rate, args.delays()).await;
    arms.schedule(Delays::default()).await?;
    let whole = load::open(
        &way.client,
        asks(false),
        args.requests,
        rate,
        Delays::default(),
    )
    .await;
    arms.schedule(args.delays()).await?;
    let before = Busy::read(way.process, &arms.processes())?;
    let seconds = Duration::from_secs(args.seconds);
    let closed = load::closed(&way.client, asks(true), args.concurrency, seconds).await;
    let busy = Busy::read(way.process, &arms.processes())?.since(&before);
    Block::of(way.name, round, streams, whole, closed, busy)
}

#[cfg(test)]
mod tests;
