//! What one load gave.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::load::{Pace, Sent};
use super::ms;
use crate::bench::client::{Failure, Seen};
use crate::bench::report::Spread;

/// When a request counts as good. What is not set holds for every request.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Objective {
    /// Most milliseconds until the first token.
    pub(super) ttft_ms: Option<f64>,
    /// Most milliseconds per token after it, in the mean over the answer.
    pub(super) tpot_ms: Option<f64>,
}

impl Objective {
    /// Whether there is one.
    const fn is_set(self) -> bool {
        self.ttft_ms.is_some() || self.tpot_ms.is_some()
    }

    /// Whether a request is good.
    fn met(self, seen: &Seen) -> bool {
        let within = |time: Option<Duration>, most: Option<f64>| match (time, most) {
            (Some(time), Some(most)) => ms(time) <= most,
            // An answer of one token has no time per token.
            _ => true,
        };
        within(seen.first(), self.ttft_ms) && within(seen.per_token(), self.tpot_ms)
    }
}

/// Figures of one pace. Times in milliseconds, counted from when a request was due.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    /// Requests per second that were offered; absent in a closed loop.
    pub(super) offered_per_second: Option<f64>,
    /// Requests per second that came of it: few random arrivals may lie well beside the rate.
    arrived_per_second: Option<f64>,
    /// Requests in work at a time; absent in an open loop.
    concurrency: Option<u32>,
    pub(super) requests: usize,
    pub(super) failed: usize,
    /// From the first request's turn to the last answer's end.
    seconds: f64,
    prompt_tokens: u64,
    tokens: u64,
    pub(super) tokens_per_second: f64,
    pub(super) requests_per_second: f64,
    /// Good requests per second; absent without an objective.
    pub(super) goodput_per_second: Option<f64>,
    pub(super) time_to_first_token_ms: Spread,
    pub(super) inter_token_latency_ms: Spread,
    /// Mean time per token after the first, over requests.
    pub(super) time_per_output_token_ms: Spread,
    longest_pause_ms: Spread,
    request_ms: Spread,
    /// How late requests were sent: if that is not small, the client was the limit.
    sent_late_ms: Spread,
    /// Failures by kind.
    errors: BTreeMap<String, usize>,
    /// One failure of each kind.
    examples: Vec<String>,
}

impl Figures {
    pub(super) fn of(
        pace: Pace,
        objective: Objective,
        sent: Vec<Sent>,
        time: Duration,
    ) -> Self {
        let seconds = time.as_secs_f64();
        let late = sent.iter().map(|one| ms(one.late)).collect();
        let requests = sent.len();
        let last_due = sent.iter().map(|one| one.due).max().unwrap_or_default();
        let (mut seen, mut failures) = (Vec::new(), Vec::new());
        for one in sent {
            match one.result {
                Ok(one) => seen.push(one),
                Err(failure) => failures.push(failure),
            }
        }
        let spread =
            |times: &mut dyn Iterator<Item = Duration>| Spread::of(times.map(ms).collect());
        let gaps = |one: &Seen| {
            let pairs = one.events.windows(2);
            pairs
                .map(|pair| pair[1].saturating_sub(pair[0]))
                .collect::<Vec<_>>()
        };
        let tokens: u64 = seen.iter().map(|one| one.tokens).sum();
        let good = seen.iter().filter(|one| objective.met(one)).count();
        let (errors, examples) = by_kind(&failures);
        Self {
            offered_per_second: match pace {
                Pace::Open(rate) => Some(rate),
                Pace::Closed(_) => None,
            },
            arrived_per_second: match pace {
                Pace::Open(_) => Some(requests as f64 / last_due.as_secs_f64()),
                Pace::Closed(_) => None,
            },
            concurrency: match pace {
                Pace::Closed(concurrency) => Some(concurrency),
                Pace::Open(_) => None,
            },
            requests,
            failed: failures.len(),
            seconds,
            prompt_tokens: seen.iter().map(|one| one.prompt_tokens).sum(),
            tokens,
            tokens_per_second: tokens as f64 / seconds,
            requests_per_second: seen.len() as f64 / seconds,
            goodput_per_second: objective.is_set().then(|| good as f64 / seconds),
            time_to_first_token_ms: spread(&mut seen.iter().filter_map(Seen::first)),
            inter_token_latency_ms: spread(&mut seen.iter().flat_map(gaps)),
            time_per_output_token_ms: spread(&mut seen.iter().filter_map(Seen::per_token)),
            longest_pause_ms: spread(&mut seen.iter().map(Seen::longest_pause)),
            request_ms: spread(&mut seen.iter().map(|one| one.total)),
            sent_late_ms: Spread::of(late),
            errors,
            examples,
        }
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let pace = match (self.offered_per_second, self.concurrency) {
            (Some(rate), _) => Pace::Open(rate).to_string(),
            (None, concurrency) => Pace::Closed(concurrency.unwrap_or(0)).to_string(),
        };
        let arrived = self
            .arrived_per_second
            .map(|rate| format!(" ({rate:.2} came)"));
        let mut lines = vec![format!(
            "{pace}{}: {} requests, {} failed, in {:.1} s: {:.1} tokens/s, {:.2} requests/s ({} prompt and {} answer tokens)",
            arrived.unwrap_or_default(),
            self.requests,
            self.failed,
            self.seconds,
            self.tokens_per_second,
            self.requests_per_second,
            self.prompt_tokens,
            self.tokens
        )];
        if let Some(goodput) = self.goodput_per_second {
            lines.push(format!(
                "goodput: {goodput:.2} requests/s within the objective"
            ));
        }
        lines.extend([
            self.time_to_first_token_ms.line("time to first token"),
            self.inter_token_latency_ms.line("inter-token latency"),
            self.time_per_output_token_ms.line("time per output token"),
            self.longest_pause_ms.line("longest pause"),
            self.request_ms.line("request"),
            self.sent_late_ms.line("sent late"),
        ]);
        let kinds = self.errors.iter();
        lines.extend(kinds.map(|(kind, count)| format!("error: {count} × {kind}")));
        lines.extend(
            self.examples
                .iter()
                .map(|error| format!("  such as {error}")),
        );
        lines.join("\n")
    }
}

/// How many of each kind, and one of each.
fn by_kind(failures: &[Failure]) -> (BTreeMap<String, usize>, Vec<String>) {
    let (mut counts, mut examples) = (BTreeMap::new(), Vec::new());
    for failure in failures {
        let count = counts.entry(failure.kind.clone()).or_insert(0);
        if *count == 0 {
            examples.push(failure.to_string());
        }
        *count += 1;
    }
    (counts, examples)
}
