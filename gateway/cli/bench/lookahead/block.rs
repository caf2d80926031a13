//! Requests through one arm's gateway, and what the workers counted meanwhile.

use std::time::Duration;

use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, Counted};
use crate::bench::client::{Ask, Failure, Seen, Target};
use crate::bench::workload::Draw;
use crate::error::CliError;
use crate::progress::Task;

/// Time between two looks at the workers' counters.
const SAMPLE: Duration = Duration::from_secs(1);
/// Workers bring their counters up to date four times a second.
const SETTLE: Duration = Duration::from_millis(600);
/// One of so many requests comes before counting begins.
const UNCOUNTED: usize = 10;

/// A request that was answered. Times in milliseconds, counted from when it was due.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct One {
    pub(super) first: f64,
    pub(super) per_token: Option<f64>,
    pub(super) total: f64,
}

/// What workers counted in about a second.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Sample {
    pub(super) seconds: f64,
    pub(super) counted: Counted,
}

/// What a block gave.
#[derive(Debug, Clone)]
pub(super) struct Block {
    /// Which arm, by its place.
    pub(super) arm: usize,
    /// Which half round: blocks of one have the same prompts.
    pub(super) half: usize,
    /// Answered requests that count, in the order in which they were due.
    pub(super) requests: Vec<One>,
    /// While requests came, without the beginning.
    pub(super) samples: Vec<Sample>,
    /// A number for each answer, equal for equal answers; `None` of one that failed.
    pub(super) answers: Vec<Option<u64>>,
    /// From the first arrival to the last end.
    pub(super) seconds: f64,
    /// Of the whole block.
    pub(super) counted: Counted,
    pub(super) failures: Vec<String>,
}

/// A block in a few words.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Line {
    pub(super) arm: String,
    pub(super) half: usize,
    pub(super) seconds: f64,
    pub(super) experts_per_step: f64,
    pub(super) batch: f64,
    pub(super) latency_ms_p95: f64,
    pub(super) failed: usize,
    /// Prompt tokens that workers had in their prefix caches.
    pub(super) prefix_hits: f64,
}

/// So many requests at a time until all are answered. Returns those served per second, by the tokens made while all
/// places were taken.
pub(super) async fn closed(
    cluster: &Cluster,
    arm: usize,
    asks: &[Ask],
    places: u32,
    drain: &CancellationToken,
) -> Result<f64, CliError> {
    let target = cluster.target(arm);
    let mut work: JoinSet<Result<Seen, Failure>> = JoinSet::new();
    let (begin, mut full) = (Instant::now(), None);
    let mut end = None;
    for ask in asks {
        if work.len() >= places as usize {
            if full.is_none() {
                full = Some((cluster.counted(), Instant::now()));
            }
            ended(work.join_next().await)?;
        }
        if drain.is_cancelled() {
            return Err(CliError::Runtime("cut off before its end".to_owned()));
        }
        let (target, ask) = (target.clone(), ask.clone());
        work.spawn(async move {
            target
                .complete(super::cluster::MODEL, &ask, Instant::now())
                .await
        });
        end = Some((cluster.counted(), Instant::now()));
    }
    while !work.is_empty() {
        ended(work.join_next().await)?;
    }
    let mean = asks
        .iter()
        .map(|ask| f64::from(ask.max_tokens))
        .sum::<f64>()
        / asks.len() as f64;
    Ok(match (full, end) {
        (Some((first, since)), Some((last, until))) if until > since => {
            (last.generated - first.generated) / (until - since).as_secs_f64() / mean
        }
        _ => asks.len() as f64 / begin.elapsed().as_secs_f64(),
    })
}

fn ended(
    ended: Option<Result<Result<Seen, Failure>, tokio::task::JoinError>>,
) -> Result<(), CliError> {
    match ended {
        None | Some(Ok(Ok(_))) => Ok(()),
        Some(Ok(Err(failure))) => Err(CliError::Runtime(format!(
            "a request of the warm-up failed, {failure}"
        ))),
        Some(Err(error)) => Err(CliError::runtime("a request of the warm-up", &error)),
    }
}

/// Requests that arrive whether or not earlier ones are done.
pub(super) async fn open(
    cluster: &Cluster,
    (arm, half): (usize, usize),
    asks: &[Ask],
    (rate, mut gaps): (f64, Draw),
    task: &Task,
    drain: &CancellationToken,
) -> Block {
    let target = cluster.target(arm);
    let before = cluster.counted();
    let begin = Instant::now();
    let mut work = JoinSet::new();
    let uncounted = asks.len() / UNCOUNTED;
    let (mut due, mut counts_from) = (begin, begin);
    let mut samples = Vec::new();
    {
        let sampling = sample(cluster, &mut samples);
        tokio::pin!(sampling);
        for (at, ask) in asks.iter().enumerate() {
            due += gaps.gap(rate);
            if at == uncounted {
                counts_from = due;
            }
            tokio::select! {
                () = sleep_until(due) => {}
                () = drain.cancelled() => break,
                () = &mut sampling => {}
            }
            work.spawn(one(target.clone(), at, ask.clone(), due, task.clone()));
        }
    }
    let last = due;
    let mut results: Vec<(usize, Result<Seen, Failure>)> = Vec::new();
    while let Some(done) = work.join_next().await {
        results.extend(done.ok());
    }
    let seconds = begin.elapsed().as_secs_f64();
    sleep(SETTLE).await;
    results.sort_by_key(|(at, _)| *at);
    let counted = results.iter().filter(|(at, _)| *at >= uncounted);
    Block {
        arm,
        half,
        requests: counted
            .filter_map(|(_, seen)| seen.as_ref().ok().map(One::of))
            .collect(),
        samples: samples
            .into_iter()
            .filter(|(from, until, _)| *from >= counts_from && *until <= last)
            .map(|(_, _, sample)| sample)
            .collect(),
        answers: results
            .iter()
            .map(|(_, seen)| seen.as_ref().ok().map(Seen::digest))
            .collect(),
        seconds,
        counted: cluster.counted() - before,
        failures: results
            .iter()
            .filter_map(|(_, seen)| seen.as_ref().err().map(ToString::to_string))
            .collect(),
    }
}

async fn one(
    target: Target,
    at: usize,
    ask: Ask,
    due: Instant,
    task: Task,
) -> (usize, Result<Seen, Failure>) {
    let seen = target.complete(super::cluster::MODEL, &ask, due).await;
    task.add(1);
    (at, seen)
}

/// Looks once a second for ever.
async fn sample(cluster: &Cluster, samples: &mut Vec<(Instant, Instant, Sample)>) {
    let mut ticks = interval(SAMPLE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    let (mut before, mut since) = (cluster.counted(), Instant::now());
    loop {
        ticks.tick().await;
        let (counted, now) = (cluster.counted(), Instant::now());
        let sample = Sample {
            seconds: (now - since).as_secs_f64(),
            counted: counted - before,
        };
        samples.push((since, now, sample));
        (before, since) = (counted, now);
    }
}

impl One {
    fn of(seen: &Seen) -> Self {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        Self {
            first: ms(seen.first().unwrap_or(seen.total)),
            per_token: seen.per_token().map(ms),
            total: ms(seen.total),
        }
    }
}
