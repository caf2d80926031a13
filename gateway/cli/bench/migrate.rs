//! `foregate bench migrate`: what a live migration adds to the time between two tokens.
//!
//! Workers in this process decode steady streams. Quiet blocks and blocks full of migrations take turns, so that
//! a drift of the machine hits both alike; each round compares the longest gap between two tokens of any stream
//! in its two blocks. The bench itself is the operator: it moves experts as fast as the workers follow.

mod cluster;
mod gaps;

use std::path::PathBuf;
use std::time::Duration;

use foregate_wire::generation::generate_event::Event;
use foregate_wire::generation::generation_client::GenerationClient;
use foregate_wire::generation::{GenerateRequest, Sampling};
use foregate_wire::tonic::transport::Channel;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::cluster::{Cluster, Shape};
use self::gaps::{Block, Figures, Gap, Troubles};
use super::serve::write_json;
use super::workload::Draw;
use crate::error::{CliError, print};
use crate::progress::Progress;

/// Tokens of each prompt: few, so that a stream that begins anew costs the others no more than a decode step.
const PROMPT: u32 = 4;
/// Longest silence of a stream.
const SILENCE: Duration = Duration::from_secs(60);
/// Time for all streams to be under way.
const WARM_UP: Duration = Duration::from_secs(1);

/// Arguments of `foregate bench migrate`.
#[derive(Debug, clap::Args)]
pub(crate) struct MigrateArgs {
    /// Model directory.
    #[arg(long)]
    model: PathBuf,
    /// Workers.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=64))]
    workers: u32,
    /// Compute threads per worker; default: the cores shared by the workers.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Streams per worker.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    streams: u32,
    /// Tokens of each answer, at least 16; then the stream begins anew.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(16..=1_000_000))]
    max_tokens: u32,
    /// Experts that each worker takes over per layer and migration.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=4096))]
    moves: u32,
    /// Rounds of a quiet block and one with migrations.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Seconds per block.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Also write the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Measures and prints.
pub(super) async fn run(
    args: &MigrateArgs,
    progress: &Progress,
    drain: &CancellationToken,
) -> Result<(), CliError> {
    let mut cluster = Cluster::start(&args.model, shape(args)).await?;
    cluster.migrate().await?;
    let stop = CancellationToken::new();
    let mut streams = JoinSet::new();
    for (client, number) in cluster.clients().iter().zip(0_u32..) {
        for at in 0..args.streams {
            let all = args.streams * args.workers;
            let number = number * args.streams + at;
            // Of different lengths, so that they do not all begin anew in the same step.
            let shorter = args.max_tokens / 2 * number / all;
            streams.spawn(stream(Stream {
                client: client.clone(),
                number,
                max_tokens: args.max_tokens - shorter,
                vocab: cluster.vocab(),
                stop: stop.clone(),
            }));
        }
    }
    sleep(WARM_UP).await;
    let blocks = blocks(args, &mut cluster, progress, drain).await;
    stop.cancel();
    let mut gaps = Vec::new();
    while let Some(done) = streams.join_next().await {
        let seen = done.map_err(|error| CliError::runtime("a stream", &error))?;
        gaps.extend(seen.map_err(|why| CliError::Runtime(format!("a stream: {why}")))?);
    }
    let moved = cluster.copies_moved();
    let troubles = Troubles {
        late_rows: cluster.count("foregate_worker_late_rows_total"),
        retried_rows: cluster.count("foregate_worker_retried_rows_total"),
        refused_calls: cluster.count("foregate_worker_refused_calls_total"),
    };
    cluster.stop().await?;
    let figures = Figures::of(&blocks?, &gaps, moved, troubles);
    print(&figures.text());
    match &args.json {
        Some(path) => write_json(path, &figures),
        None => Ok(()),
    }
}

fn shape(args: &MigrateArgs) -> Shape {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = u32::try_from(cores).unwrap_or(u32::MAX);
    Shape {
        workers: args.workers,
        threads: args.threads.unwrap_or((cores / args.workers).max(1)),
        streams: args.streams,
        tokens: PROMPT + args.max_tokens,
        moves: args.moves,
    }
}

async fn blocks(
    args: &MigrateArgs,
    cluster: &mut Cluster,
    progress: &Progress,
    drain: &CancellationToken,
) -> Result<Vec<Block>, CliError> {
    let task = progress.steps("rounds", u64::from(args.rounds));
    let length = Duration::from_secs(args.seconds);
    let mut blocks = Vec::new();
    for _ in 0..args.rounds {
        if drain.is_cancelled() {
            break;
        }
        let begin = Instant::now();
        sleep(length).await;
        blocks.push(Block {
            begin,
            end: Instant::now(),
            migrations: Vec::new(),
        });
        let (begin, mut migrations) = (Instant::now(), Vec::new());
        while begin.elapsed() < length {
            migrations.push(cluster.migrate().await?);
        }
        blocks.push(Block {
            begin,
            end: Instant::now(),
            migrations,
        });
        task.add(1);
    }
    task.finish("done");
    Ok(blocks)
}

/// One client.
struct Stream {
    client: GenerationClient<Channel>,
    number: u32,
    max_tokens: u32,
    vocab: usize,
    stop: CancellationToken,
}

/// One answer after the other until the end; the gaps between the tokens of each.
async fn stream(mut it: Stream) -> Result<Vec<Gap>, String> {
    let mut gaps = Vec::new();
    let mut draw = Draw::new(u64::from(it.number));
    while !it.stop.is_cancelled() {
        let answer = it.client.generate(it.request(&mut draw)).await;
        let mut events = answer.map_err(|status| status.to_string())?.into_inner();
        let mut last = None;
        while !it.stop.is_cancelled() {
            let event = timeout(SILENCE, events.message())
                .await
                .map_err(|_| format!("silent for {} s", SILENCE.as_secs()))?
                .map_err(|status| status.to_string())?;
            match event.and_then(|event| event.event) {
                Some(Event::Token(_)) => {
                    let now = Instant::now();
                    if let Some(before) = last.replace(now) {
                        gaps.push(Gap {
                            begin: before,
                            end: now,
                        });
                    }
                }
                Some(Event::Prefilled(_)) => {}
                Some(Event::Finished(_)) | None => break,
            }
        }
    }
    Ok(gaps)
}

impl Stream {
    fn request(&self, draw: &mut Draw) -> GenerateRequest {
        let mut token = || u32::try_from(draw.below(self.vocab)).unwrap_or(0);
        GenerateRequest {
            request_id: format!("bench-{}", self.number),
            token_ids: (0..PROMPT).map(|_| token()).collect(),
            prompt_len: PROMPT,
            max_tokens: self.max_tokens,
            ignore_eos: true,
            // Drawn, so that streams do not fall into the same loop and all use the same experts.
            sampling: Some(Sampling {
                temperature: 1.0,
                top_p: 1.0,
                repetition_penalty: 1.0,
                seed: u64::from(self.number),
                ..Sampling::default()
            }),
            deadline_ms: 3_600_000,
            expert_hint: None,
            ..GenerateRequest::default()
        }
    }
}
