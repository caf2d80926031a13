//! Tokens per second of prefill and decode, and what a decode step reads and spends.

use std::sync::Arc;
use std::time::Duration;

use foregate_kernels::Ops;
use foregate_worker::engine::Alone;
use serde::Serialize;
use tokio::time::Instant;

use super::audit::Audited;
use super::median::median;
use super::memory::Memory;
use super::rig::{Load, Rig, drive, start_engine};
use super::steps::{Kept, Ledger, Step};
use crate::error::CliError;
use crate::progress::Task;

/// After this time a measurement is not repeated.
const ENOUGH: Duration = Duration::from_secs(20);

/// Speed of reading prompts.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Prefill {
    /// Prompts that begin together.
    pub(super) prompts: u32,
    /// Tokens of each.
    pub(super) tokens: u32,
    /// Of all prompts together, until the last of them has its first token.
    pub(super) tokens_per_second: f64,
    /// Bytes of weights, keys and values that reading one prompt token costs, mean over all steps.
    pub(super) bytes_per_token: f64,
    /// Products of weights and activations per prompt token; attention's own are not counted.
    pub(super) multiply_adds_per_token: f64,
    /// Tokens per second if a step did nothing but read its bytes; known once the bandwidth is.
    pub(super) limit_tokens_per_second: Option<f64>,
    /// Tokens per second if a step did nothing but multiply at the rate that cached weights reach; known once that is.
    pub(super) matrix_limit_tokens_per_second: Option<f64>,
}

impl Prefill {
    /// With the limits that a bandwidth in bytes per second and a rate in additions and multiplications per second set.
    pub(super) fn limited(self, bandwidth: f64, rate: f64) -> Self {
        Self {
            limit_tokens_per_second: Some(bandwidth / self.bytes_per_token),
            matrix_limit_tokens_per_second: Some(rate / (2.0 * self.multiply_adds_per_token)),
            ..self
        }
    }
}

impl Prefill {
    /// The lower one of the limits that are known.
    pub(super) fn limit(&self) -> Option<f64> {
        [
            self.limit_tokens_per_second,
            self.matrix_limit_tokens_per_second,
        ]
        .into_iter()
        .flatten()
        .reduce(f64::min)
    }
}

/// A decode step of a full batch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Cost {
    /// Bytes of weights, keys and values that it reads, mean over the steps.
    pub(super) bytes: f64,
    /// Mean times, of a pass of its own with a clock around every op.
    pub(super) times: Times,
}

/// A step's time and its parts, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Times {
    /// All of it.
    pub(super) step: f64,
    /// Norm, router and choice of experts.
    pub(super) gate: f64,
    /// Grouping rows by expert and summing their results.
    pub(super) exchange: f64,
    /// Feed-forwards.
    pub(super) experts: f64,
    /// Norm, projections and attention.
    pub(super) attention: f64,
    /// What remains: embedding, residuals, output projection, sampling, scheduling.
    pub(super) rest: f64,
}

/// Best of up to `turns` runs of prompts alone; the task is told each.
pub(super) async fn prefill(
    rig: &Rig,
    load: &Load,
    turns: u32,
    task: &Task,
) -> Result<Prefill, CliError> {
    let experts = Alone(rig.experts.clone());
    let engine = start_engine(load, true, &rig.model, experts)?;
    let mut best = Duration::MAX;
    for turn in until_enough(turns) {
        best = best.min(drive(&engine, load.requests(turn, rig.spec().vocab)).await?);
        task.add(1);
    }
    engine.stop().await;
    let tokens = f64::from(load.sequences) * f64::from(load.prompt);
    let work = audited(rig, load).await?.work();
    Ok(Prefill {
        prompts: load.sequences,
        tokens: load.prompt,
        tokens_per_second: tokens / best.as_secs_f64(),
        bytes_per_token: work.bytes as f64 / tokens,
        multiply_adds_per_token: work.multiply_adds as f64 / tokens,
        limit_tokens_per_second: None,
        matrix_limit_tokens_per_second: None,
    })
}

/// Speed of decode steps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Speed {
    pub(super) tokens_per_second: f64,
    /// Bytes per second that memory gave just before and just after, mean.
    pub(super) bandwidth: f64,
    /// What a step spends after the forward pass: median of all steps, and its share of the median step.
    pub(super) outside_ms: f64,
    pub(super) outside_share: f64,
}

/// The middle one of up to `turns` runs by what they make of the memory's speed at the time; the task is told each.
pub(super) async fn decode(
    rig: &Rig,
    load: &Load,
    turns: u32,
    memory: &Memory,
    task: &Task,
) -> Result<Speed, CliError> {
    let ledger = Ledger::default();
    let experts = Kept::new(Alone(rig.experts.clone()), &ledger);
    let engine = start_engine(load, true, &rig.model, experts)?;
    let mut runs = Vec::new();
    let mut all = Vec::new();
    let mut before = memory.bandwidth_now();
    for turn in until_enough(turns) {
        drive(&engine, load.requests(turn, rig.spec().vocab)).await?;
        let after = memory.bandwidth_now();
        let steps = steps(&ledger, load)?;
        let (time, count) = total(&steps);
        let speed = f64::from(load.sequences) * count / time.as_secs_f64();
        runs.push((speed, f64::midpoint(before, after)));
        before = after;
        all.extend(steps);
        task.add(1);
    }
    engine.stop().await;
    let (tokens_per_second, bandwidth) = middle_run(runs);
    let middle = |part: fn(&Step) -> Option<Duration>| {
        let times = all
            .iter()
            .filter_map(part)
            .map(|time| time.as_secs_f64() * 1000.0);
        median(times.collect()).0
    };
    let outside_ms = middle(|step| step.outside);
    Ok(Speed {
        tokens_per_second,
        bandwidth,
        outside_ms,
        outside_share: outside_ms / middle(|step| step.time),
    })
}

/// Of runs of a speed and a bandwidth, the one whose speed for its bandwidth is the middle one (of an even number, the
/// slower one of the two in the middle).
fn middle_run(mut runs: Vec<(f64, f64)>) -> (f64, f64) {
    let share = |run: &(f64, f64)| run.0 / run.1;
    runs.sort_by(|a, b| share(a).total_cmp(&share(b)));
    let middle = runs.len().saturating_sub(1) / 2;
    runs.get(middle).copied().unwrap_or((f64::NAN, f64::NAN))
}

/// Numbers of turns: at least one, then until there are `most` of them or time is up.
fn until_enough(most: u32) -> impl Iterator<Item = u32> {
    let begun = Instant::now();
    (0..most).take_while(move |turn| *turn == 0 || begun.elapsed() < ENOUGH)
}

/// One run of decode steps, audited.
pub(super) async fn cost(rig: &Rig, load: &Load) -> Result<Cost, CliError> {
    Ok(Cost::of(&steps(&audited(rig, load).await?, load)?))
}

/// One run in which every op is written down.
async fn audited(rig: &Rig, load: &Load) -> Result<Ledger, CliError> {
    let ledger = Ledger::default();
    let ops: Arc<dyn Ops> = Arc::new(Audited::new(rig.cpu.clone(), &ledger));
    let model = rig.model.with_ops(Arc::clone(&ops));
    let experts = Kept::new(Alone(rig.experts.with_ops(ops)), &ledger);
    let engine = start_engine(load, true, &model, experts)?;
    drive(&engine, load.requests(0, rig.spec().vocab)).await?;
    engine.stop().await;
    Ok(ledger)
}

/// Decode steps of the full batch, at least one of them with a time.
fn steps(ledger: &Ledger, load: &Load) -> Result<Vec<Step>, CliError> {
    let steps = load.decode_steps(ledger);
    if steps.iter().all(|step| step.time.is_none()) {
        return Err(CliError::Runtime(format!(
            "no step decoded all {} sequences at once: raise --decode",
            load.sequences
        )));
    }
    Ok(steps)
}

/// Time of the steps that have one, and their number.
fn total(steps: &[Step]) -> (Duration, f64) {
    let times = steps.iter().filter_map(|step| step.time);
    (times.clone().sum(), times.count() as f64)
}

impl Cost {
    fn of(steps: &[Step]) -> Self {
        let bytes: u64 = steps.iter().map(|step| step.bytes).sum();
        let timed: Vec<Step> = steps.iter().copied().filter(|s| s.time.is_some()).collect();
        let (time, count) = total(&timed);
        let mean = |time: Duration| time.as_secs_f64() * 1000.0 / count;
        let part = |part: fn(&Step) -> Duration| mean(timed.iter().map(part).sum());
        let mut times = Times {
            step: mean(time),
            gate: part(|step| step.parts.gate),
            exchange: part(|step| step.parts.exchange),
            experts: part(|step| step.parts.experts),
            attention: part(|step| step.parts.attention),
            rest: 0.0,
        };
        let known = times.gate + times.exchange + times.experts + times.attention;
        times.rest = times.step - known;
        Self {
            bytes: bytes as f64 / steps.len() as f64,
            times,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::steps::Parts;
    use super::*;

    #[test]
    fn a_cost_is_a_mean_and_its_parts_are_the_whole() {
        let ms = Duration::from_millis;
        let step = |time: Option<u64>, bytes| Step {
            rows: 2,
            time: time.map(ms),
            outside: None,
            bytes,
            multiply_adds: 0,
            parts: Parts {
                gate: ms(1),
                exchange: ms(2),
                experts: ms(4),
                attention: ms(3),
            },
        };
        // The last step has bytes but no time.
        let cost = Cost::of(&[step(Some(20), 10), step(Some(30), 20), step(None, 60)]);
        assert_eq!(cost.bytes, 30.0);
        let times = cost.times;
        assert_eq!([times.step, times.gate, times.exchange], [25.0, 1.0, 2.0]);
        assert_eq!(
            [times.experts, times.attention, times.rest],
            [4.0, 3.0, 15.0]
        );
    }

    #[test]
    fn the_middle_run_is_that_of_the_middle_share() {
        // Shares 2, 1 and 4: the fastest run had the fastest memory.
        assert_eq!(
            middle_run(vec![(20.0, 10.0), (50.0, 50.0), (40.0, 10.0)]),
            (20.0, 10.0)
        );
        assert_eq!(middle_run(vec![(3.0, 1.0), (1.0, 1.0)]), (1.0, 1.0));
        assert!(middle_run(Vec::new()).0.is_nan());
    }
}
