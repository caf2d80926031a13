//! What expert telemetry costs.
//!
//! The cost is far below the noise of two runs. So two engines, one with it and one without, decode the same
//! sequences over the same weights and take turns step by step. Which of them goes first, and where its
//! memory lies, makes a difference of its own: so every turn has fresh engines and both orders.

use std::sync::Arc;

use foregate_worker::engine::Alone;
use serde::Serialize;

use super::before::Before;
use super::lockstep::Turnstile;
use super::median::median;
use super::rig::{Load, Rig, Running, drive, start_engine};
use super::steps::{Kept, Ledger};
use crate::error::CliError;
use crate::progress::Task;

/// The cost at one batch size.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Telemetry {
    /// Pairs of a step with telemetry and one without.
    pairs: usize,
    /// Medians of their two sides.
    step_ms: f64,
    step_ms_without: f64,
    /// Of each turn the median over its pairs; of those the median.
    overhead_percent: f64,
    /// Where the median of more turns would lie with 95 of 100 chances.
    overhead_interval: (f64, f64),
}

impl Telemetry {
    /// For people.
    pub(super) fn line(&self, batch: u32) -> String {
        let (low, high) = self.overhead_interval;
        format!(
            "expert telemetry, batch {batch}: costs {:.2} % (between {low:.2} and {high:.2}), {} pairs of steps",
            self.overhead_percent, self.pairs
        )
    }
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

/// Measures; the task is told each turn.
pub(super) async fn measure(
    rig: &Rig,
    load: &Load,
    turns: u32,
    task: &Task,
) -> Result<Telemetry, CliError> {
    let (mut pairs, mut overheads) = (Vec::new(), Vec::new());
    for _ in 0..turns {
        let orders = [in_turn(rig, load, 0).await?, in_turn(rig, load, 1).await?];
        let ratios = orders[0].iter().zip(&orders[1]);
        let ratios = ratios.map(|(one, other)| (one.ratio() * other.ratio()).sqrt());
        overheads.push((median(ratios.collect()).0 - 1.0) * 100.0);
        pairs.extend(orders.concat());
        task.add(1);
    }
    let of = |side: fn(&Pair) -> f64| median(pairs.iter().map(side).collect());
    let (overhead_percent, overhead_interval) = median(overheads);
    Ok(Telemetry {
        pairs: pairs.len(),
        step_ms: of(|pair| pair.with).0,
        step_ms_without: of(|pair| pair.without).0,
        overhead_percent,
        overhead_interval,
    })
}

/// Decode steps of two engines that take turns; `with` is the side that has telemetry.
async fn in_turn(rig: &Rig, load: &Load, with: usize) -> Result<Vec<Pair>, CliError> {
    let turnstile = Arc::<Turnstile>::default();
    let ledgers: [Ledger; 2] = Default::default();
    let engine = |side: usize| {
        let turnstile = Arc::clone(&turnstile);
        let experts = Before {
            inner: Alone(rig.experts.clone()),
            wait: move || turnstile.pass(side),
        };
        let experts = Kept::new(experts, &ledgers[side]);
        start_engine(load, side == with, &rig.model, experts)
    };
    let engines = [engine(0)?, engine(1)?];
    let run = async |engine: &Running| {
        let done = drive(engine, load.requests(0, rig.spec().vocab)).await;
        turnstile.open();
        done
    };
    let (first, second) = tokio::join!(run(&engines[0]), run(&engines[1]));
    for engine in engines {
        engine.stop().await;
    }
    first.and(second)?;
    // From the last step, up to which the sequences of both sides are equally long.
    let decode = |side: usize| {
        let steps = load.decode_steps(&ledgers[side]).into_iter().rev();
        let times = steps.filter_map(|step| step.time);
        times
            .map(|time| time.as_secs_f64() * 1000.0)
            .collect::<Vec<f64>>()
    };
    let pairs = decode(with).into_iter().zip(decode(1 - with));
    Ok(pairs
        .map(|(with, without)| Pair { with, without })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_the_cost_with_its_interval() {
        let telemetry = Telemetry {
            pairs: 12,
            step_ms: 6.1,
            step_ms_without: 6.0,
            overhead_percent: 1.5,
            overhead_interval: (-0.5, 2.0),
        };
        assert_eq!(
            telemetry.line(8),
            "expert telemetry, batch 8: costs 1.50 % (between -0.50 and 2.00), 12 pairs of steps"
        );
    }
}
