//! Gaps between the tokens of running streams while long prompts arrive.
//!
//! A step computes a row of every decoding sequence first, then as much of the prompts as its budget of tokens has
//! left. So a running stream waits for one step at most, and the budget bounds how long a step is.

use std::time::Duration;

use foregate_wire::generation::generate_event::Event;
use foregate_worker::engine::{Alone, EventStream};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::EngineArgs;
use super::rig::{Load, Rig, Running, start_engine};
use crate::bench::report::Spread;
use crate::error::{CliError, print};
use crate::progress::Progress;

/// Prompts that arrive one after the other.
const ARRIVALS: u32 = 4;
/// Tokens of a running stream's prompt.
const PROMPT: u32 = 64;
/// Before prompts arrive, and after the last has its first token.
const QUIET: Duration = Duration::from_secs(2);

/// One run.
#[derive(Debug, Serialize)]
struct Figures {
    model: String,
    streams: u32,
    prompt: u32,
    mixed: Vec<Mixed>,
}

/// One budget.
#[derive(Debug, Serialize)]
struct Mixed {
    step_tokens: u32,
    /// Gaps of all streams while no prompt is read.
    quiet_ms: Spread,
    /// Gaps of all streams while a prompt is read.
    gap_ms: Spread,
    gap_p95_ms: f64,
    /// From a prompt's arrival to its first token.
    first_token_ms: Spread,
}

/// Measures and prints.
pub(super) async fn run(
    args: &EngineArgs,
    rig: &Rig,
    streams: u32,
    progress: &Progress,
) -> Result<(), CliError> {
    let most = rig.spec().max_positions;
    if args.mixed_prompt as usize >= most {
        return Err(CliError::Usage(format!(
            "--mixed-prompt {}: this model holds {most} tokens, one of them the answer's; give fewer",
            args.mixed_prompt
        )));
    }
    if let Some(few) = args.mixed_step_tokens.iter().find(|most| **most <= streams) {
        return Err(CliError::Usage(format!(
            "--mixed-step-tokens {few} with --mixed {streams}: the streams alone fill a step; give more"
        )));
    }
    let mut mixed = Vec::new();
    for step_tokens in &args.mixed_step_tokens {
        let name = format!("steps of at most {step_tokens} tokens");
        let task = progress.steps(&name, u64::from(ARRIVALS));
        let figures = measure(args, rig, streams, *step_tokens).await?;
        task.finish("done");
        if args.is_text() {
            print(&figures.lines());
        }
        mixed.push(figures);
    }
    args.give(&Figures {
        model: args.model.display().to_string(),
        streams,
        prompt: args.mixed_prompt,
        mixed,
    })
}

/// When a stream's tokens came.
type Times = Vec<Instant>;

async fn measure(
    args: &EngineArgs,
    rig: &Rig,
    streams: u32,
    step_tokens: u32,
) -> Result<Mixed, CliError> {
    let most = u32::try_from(rig.spec().max_positions).unwrap_or(u32::MAX);
    let running = Load {
        sequences: streams,
        prompt: PROMPT.min(most / 2),
        answer: most - PROMPT.min(most / 2),
        step_tokens,
    };
    let arriving = Load {
        sequences: ARRIVALS,
        prompt: args.mixed_prompt,
        answer: 1,
        step_tokens,
    };
    // Room for both at once.
    let room = Load {
        sequences: streams + 1,
        prompt: most / 2,
        answer: most - most / 2,
        step_tokens,
    };
    let engine = start_engine(&room, true, &rig.model, Alone(rig.experts.clone()))?;
    let vocab = rig.spec().vocab;
    let mut watched = JoinSet::new();
    let stop = tokio_util::sync::CancellationToken::new();
    for request in running.requests(0, vocab) {
        watched.spawn(watch(engine.submit(request)?, stop.clone()));
    }
    sleep(QUIET).await;
    let mut busy = Vec::new();
    let begun = Instant::now();
    for request in arriving.requests(1, vocab) {
        let since = Instant::now();
        first_token(engine.submit(request)?).await?;
        busy.push((since, Instant::now()));
    }
    let quiet = (begun - QUIET / 2, begun);
    stop.cancel();
    let mut times: Vec<Times> = Vec::new();
    while let Some(seen) = watched.join_next().await {
        times.push(seen.map_err(|error| CliError::runtime("a stream", &error))??);
    }
    engine.stop().await;
    let gaps = gaps_in(&times, &busy);
    let first = busy.iter().map(|(from, to)| ms(*to - *from)).collect();
    Ok(Mixed {
        step_tokens,
        quiet_ms: Spread::of(gaps_in(&times, &[quiet])),
        gap_p95_ms: percentile(gaps.clone(), 95),
        gap_ms: Spread::of(gaps),
        first_token_ms: Spread::of(first),
    })
}

/// Milliseconds between tokens of each stream, of gaps that end inside one of the spans.
fn gaps_in(times: &[Times], spans: &[(Instant, Instant)]) -> Vec<f64> {
    let inside = |at: Instant| spans.iter().any(|(from, to)| (*from..=*to).contains(&at));
    let pairs = times.iter().flat_map(|times| times.windows(2));
    pairs
        .filter(|pair| inside(pair[1]))
        .map(|pair| ms(pair[1] - pair[0]))
        .collect()
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// By the nearest-rank rule.
fn percentile(mut figures: Vec<f64>, percent: usize) -> f64 {
    figures.sort_by(f64::total_cmp);
    let at = (figures.len() * percent).div_ceil(100).max(1) - 1;
    figures.get(at).copied().unwrap_or(f64::NAN)
}

async fn watch(
    mut stream: EventStream,
    stop: tokio_util::sync::CancellationToken,
) -> Result<Times, CliError> {
    let mut times = Vec::new();
    loop {
        let event = tokio::select! {
            event = stream.next() => event,
            () = stop.cancelled() => return Ok(times),
        };
        match event {
            Some(Ok(Event::Token(_))) => times.push(Instant::now()),
            Some(Ok(Event::Prefilled(_))) => {}
            Some(Ok(Event::Finished(_))) | None => return Ok(times),
            Some(Err(error)) => return Err(CliError::runtime("a stream", &error)),
        }
    }
}

async fn first_token(mut stream: EventStream) -> Result<(), CliError> {
    while let Some(event) = stream.next().await {
        let event = event.map_err(|error| CliError::runtime("a prompt", &error))?;
        if let Event::Token(_) = event {
            return Ok(());
        }
    }
    Err(CliError::Runtime("a prompt gave no token".to_owned()))
}

impl Running {
    /// One more sequence; nothing is held back.
    fn submit(
        &self,
        request: foregate_worker::sequence::Request,
    ) -> Result<EventStream, CliError> {
        let stream = self.engine.submit(request, None, tracing::Span::none());
        stream.map_err(|error| CliError::runtime("engine", &error))
    }
}

impl Mixed {
    fn lines(&self) -> String {
        let name = format!("at most {} tokens", self.step_tokens);
        format!(
            "{}\n{}\n{}, p95 {:.2}",
            self.first_token_ms.line(&format!("{name}: first")),
            self.quiet_ms.line("  gaps, quiet"),
            self.gap_ms.line("  gaps, prompts arrive"),
            self.gap_p95_ms,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_count_where_they_end() {
        let begin = Instant::now();
        let at = |ms: u64| begin + Duration::from_millis(ms);
        let times = [vec![at(0), at(10), at(40)], vec![at(5), at(35)]];
        let gaps = gaps_in(&times, &[(at(30), at(36)), (at(39), at(50))]);
        assert_eq!(gaps, [30.0, 30.0]);
        assert_eq!(percentile(vec![3.0, 1.0, 2.0], 95), 3.0);
        assert!(percentile(Vec::new(), 95).is_nan());
    }
}
