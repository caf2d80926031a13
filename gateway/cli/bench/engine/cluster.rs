//! A small cluster of one machine beside one process, with the same sequences.
//!
//! Turns of both alternate, so that a drift of the machine hits both alike: what counts is the ratio of a pair.

use std::sync::Arc;

use foregate_api::cpu::Pinning;
use foregate_api::ids::Rank;
use foregate_kernels::Cpu;
use foregate_worker::engine::Alone;
use foregate_worker::exchange::Way;
use foregate_worker::fabric::local::LocalHub;
use futures::future::{join_all, try_join_all};
use serde::Serialize;

use super::child::{Remote, Source};
use super::median::median;
use super::node::{Node, Seat, Turn};
use super::rig::{Load, Rig, Running, drive, start_engine};
use super::shares::Share;
use super::steps::{Kept, Ledger};
use crate::error::CliError;
use crate::progress::Task;

/// How rows travel in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FabricName {
    /// Workers are threads of this process.
    Local,
    /// Workers are processes of their own, over loopback.
    Tcp,
    /// The same, over connections that both sides prove and encrypt.
    Tls,
}

/// What the cluster is made of.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Shape {
    pub(super) workers: u32,
    /// Compute threads of each worker.
    pub(super) threads_per_worker: u32,
    pub(super) fabric: FabricName,
}

/// The workers.
pub(super) enum Cluster {
    Here(Vec<Node>),
    Processes(Vec<Remote>),
}

impl Cluster {
    /// Loads and connects all workers. Those of this process share all weights with `rig`.
    pub(super) async fn start(
        source: Source<'_>,
        rig: &Rig,
        shape: Shape,
    ) -> Result<Self, CliError> {
        let seats = (0..shape.workers).map(|rank| Seat {
            rank: Rank(rank),
            workers: shape.workers,
            threads: shape.threads_per_worker,
        });
        match shape.fabric {
            FabricName::Local => Self::here(rig, source.pinning, seats).await,
            FabricName::Tcp | FabricName::Tls => Self::processes(source, seats).await,
        }
    }

    async fn here(
        rig: &Rig,
        pinning: Pinning,
        seats: impl Iterator<Item = Seat>,
    ) -> Result<Self, CliError> {
        let hub = LocalHub::new();
        let missing = || CliError::Runtime("an expert is not loaded".to_owned());
        let nodes: Vec<Node> = seats
            .map(|seat| {
                let way = Way::Local(Arc::clone(&hub));
                let cpu = Cpu::with_path(rig.cpu.path(), seat.bind(pinning)?)
                    .map_err(|error| CliError::runtime("a worker", &error))?;
                let cpu = Arc::new(cpu);
                let model = rig.model.with_ops(Arc::<Cpu>::clone(&cpu));
                Node::open(model, cpu, seat, way, |layer, expert| {
                    let weights = rig.experts.expert(layer, expert);
                    weights.map(Arc::clone).ok_or_else(missing)
                })
            })
            .collect::<Result<_, _>>()?;
        let addresses: Vec<String> = nodes.iter().map(Node::address).collect();
        for node in &nodes {
            node.join(&addresses).await?;
        }
        Ok(Self::Here(nodes))
    }

    async fn processes(
        source: Source<'_>,
        seats: impl Iterator<Item = Seat>,
    ) -> Result<Self, CliError> {
        let mut workers: Vec<Remote> = seats
            .map(|seat| Remote::spawn(source, seat))
            .collect::<Result<_, _>>()?;
        let addresses = try_join_all(workers.iter_mut().map(Remote::ready)).await?;
        try_join_all(workers.iter_mut().map(|worker| worker.join(&addresses))).await?;
        Ok(Self::Processes(workers))
    }

    async fn prepare(&mut self, load: Load) -> Result<(), CliError> {
        match self {
            Self::Here(nodes) => nodes.iter_mut().try_for_each(|node| node.prepare(load)),
            Self::Processes(workers) => {
                try_join_all(workers.iter_mut().map(|worker| worker.prepare(load))).await?;
                Ok(())
            }
        }
    }

    async fn go(&mut self, turn: u32) -> Result<Vec<Turn>, CliError> {
        match self {
            Self::Here(nodes) => try_join_all(nodes.iter_mut().map(|node| node.go(turn))).await,
            Self::Processes(workers) => {
                try_join_all(workers.iter_mut().map(|worker| worker.go(turn))).await
            }
        }
    }

    async fn end(&mut self) -> Result<(), CliError> {
        match self {
            Self::Here(nodes) => {
                join_all(nodes.iter_mut().map(Node::end)).await;
                Ok(())
            }
            Self::Processes(workers) => {
                try_join_all(workers.iter_mut().map(Remote::end)).await?;
                Ok(())
            }
        }
    }
}

/// The cluster beside one process, at one load.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Compared {
    /// Of the cluster, median over the turns.
    pub(super) tokens_per_second: f64,
    /// Of one process with as many threads in all.
    pub(super) one_process_tokens_per_second: f64,
    /// Median of the pairs' ratios.
    pub(super) ratio: f64,
    /// Where the median of more pairs would lie with 95 of 100 chances.
    pub(super) ratio_interval: (f64, f64),
    pub(super) pairs: usize,
    /// Rows of the cluster that came late: their tokens were computed again.
    pub(super) late_rows: u64,
}

impl Compared {
    /// `pairs`: tokens per second of the cluster and of one process.
    fn of(pairs: &[(f64, f64)], late_rows: u64) -> Self {
        let side = |figure: fn(&(f64, f64)) -> f64| median(pairs.iter().map(figure).collect());
        let (ratio, ratio_interval) = side(|(cluster, one)| cluster / one);
        Self {
            tokens_per_second: side(|pair| pair.0).0,
            one_process_tokens_per_second: side(|pair| pair.1).0,
            ratio,
            ratio_interval,
            pairs: pairs.len(),
            late_rows,
        }
    }

    /// For people.
    pub(super) fn line(&self, what: &str) -> String {
        let (low, high) = self.ratio_interval;
        let late = match self.late_rows {
            0 => String::new(),
            rows => format!(", {rows} rows late"),
        };
        format!(
            "{what}: {:.1} tokens/s, one process {:.1}; ratio {:.3} (between {low:.3} and {high:.3}), {} pairs{late}",
            self.tokens_per_second, self.one_process_tokens_per_second, self.ratio, self.pairs
        )
    }
}

/// What is compared of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Prefill,
    Decode,
}

/// One process and the cluster in turn; `turns` pairs after one that does not count.
pub(super) async fn compare(
    rig: &Rig,
    cluster: &mut Cluster,
    load: Load,
    phase: Phase,
    turns: u32,
    task: &Task,
) -> Result<Compared, CliError> {
    let ledger = Ledger::default();
    let experts = Kept::new(Alone(rig.experts.clone()), &ledger);
    let engine = start_engine(&load, true, &rig.model, experts)?;
    cluster.prepare(load).await?;
    let (mut pairs, mut late_rows) = (Vec::new(), 0);
    for turn in 0..=turns {
        let one = vec![alone(rig, &engine, &ledger, load, turn).await?];
        let all = cluster.go(turn).await?;
        late_rows = all.iter().map(|turn| turn.late_rows).sum();
        if turn > 0 {
            pairs.push((speed(&all, load, phase)?, speed(&one, load, phase)?));
            task.add(1);
        }
    }
    cluster.end().await?;
    engine.stop().await;
    Ok(Compared::of(&pairs, late_rows))
}

async fn alone(
    rig: &Rig,
    engine: &Running,
    ledger: &Ledger,
    load: Load,
    turn: u32,
) -> Result<Turn, CliError> {
    let prefilled = drive(engine, load.requests(turn, rig.spec().vocab)).await?;
    let steps = load.decode_steps(ledger).into_iter();
    Ok(Turn {
        prefill_ms: prefilled.as_secs_f64() * 1000.0,
        step_ms: steps
            .filter_map(|step| Some(step.time?.as_secs_f64() * 1000.0))
            .collect(),
        late_rows: 0,
    })
}

/// Tokens per second of one turn of all workers together.
fn speed(turns: &[Turn], load: Load, phase: Phase) -> Result<f64, CliError> {
    match phase {
        Phase::Prefill => {
            let slowest = turns.iter().map(|turn| turn.prefill_ms).fold(0.0, f64::max);
            Ok(f64::from(load.sequences) * f64::from(load.prompt) / slowest * 1000.0)
        }
        Phase::Decode => {
            let workers = u32::try_from(turns.len()).unwrap_or(u32::MAX);
            let mut sum = 0.0;
            for (turn, rank) in turns.iter().zip(0..) {
                let share = Share {
                    whole: load,
                    workers,
                    rank,
                };
                let sequences = share.load().sequences;
                if sequences > 0 {
                    sum += f64::from(sequences) * 1000.0 / typical(&turn.step_ms, load)?;
                }
            }
            Ok(sum)
        }
    }
}

/// Median step.
fn typical(steps: &[f64], load: Load) -> Result<f64, CliError> {
    if steps.is_empty() {
        return Err(CliError::Runtime(format!(
            "no step decoded all of a worker's sequences at once with --batch {}: raise --decode",
            load.sequences
        )));
    }
    Ok(median(steps.to_vec()).0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_as_fast_as_its_workers_together() {
        let load = Load::decode(5, 100, 8, 512);
        let turn = |prefill_ms, step: f64| Turn {
            prefill_ms,
            step_ms: vec![step, step * 9.0, step],
            late_rows: 0,
        };
        let turns = [turn(500.0, 3.0), turn(250.0, 4.0)];
        assert_eq!(speed(&turns, load, Phase::Prefill).unwrap(), 1000.0);
        assert_eq!(speed(&turns, load, Phase::Decode).unwrap(), 1500.0);
        assert!(speed(&[Turn::default()], load, Phase::Decode).is_err());
    }

    #[test]
    fn ratios_are_of_pairs() {
        let compared = Compared::of(&[(9.0, 10.0), (45.0, 90.0), (20.0, 20.0)], 0);
        assert_eq!((compared.ratio, compared.pairs), (0.9, 3));
        assert_eq!(compared.ratio_interval, (0.5, 1.0));
        assert_eq!(
            compared.line("decode, batch 8"),
            "decode, batch 8: 20.0 tokens/s, one process 20.0; ratio 0.900 (between 0.500 and 1.000), 3 pairs"
        );
    }
}
