//! What a trace holds, in a few lines.

use std::fmt;

use foregate_trace::{Event, Header};
use serde::Serialize;

use crate::error::CliError;

/// Experts named per trace.
const HOTTEST: usize = 5;

/// Counts over a trace.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Summary {
    model: String,
    layers: usize,
    experts: usize,
    top_k: usize,
    seconds: f64,
    windows: usize,
    ranks: usize,
    steps: u64,
    /// Rows of the busiest layer.
    rows: u64,
    requests: usize,
    prompt_tokens: u64,
    answer_tokens: u64,
    tokens_with_choices: usize,
    lost: u64,
    breaks_off: bool,
    /// The most asked for: layer, expert, part of its layer's rows.
    hottest: Vec<(usize, usize, f64)>,
}

impl Summary {
    pub(super) fn of(header: &Header, events: &[Event], breaks_off: bool) -> Self {
        let mut summary = Self {
            model: header.model.clone(),
            layers: header.layers,
            experts: header.experts,
            top_k: header.top_k,
            seconds: 0.0,
            windows: 0,
            ranks: 0,
            steps: 0,
            rows: 0,
            requests: 0,
            prompt_tokens: 0,
            answer_tokens: 0,
            tokens_with_choices: 0,
            lost: 0,
            breaks_off,
            hottest: Vec::new(),
        };
        let mut sums = vec![0_u64; header.pairs()];
        let mut ranks = std::collections::BTreeSet::new();
        for event in events {
            let at_ms = match event {
                Event::Window {
                    at_ms,
                    rank,
                    steps,
                    counts,
                    ..
                } => {
                    summary.windows += 1;
                    summary.steps = summary.steps.saturating_add(*steps);
                    ranks.insert(*rank);
                    for (sum, count) in sums.iter_mut().zip(counts) {
                        *sum = sum.saturating_add(*count);
                    }
                    *at_ms
                }
                Event::Request {
                    at_ms,
                    prompt_tokens,
                    answer_tokens,
                    ..
                } => {
                    summary.requests += 1;
                    summary.prompt_tokens =
                        summary.prompt_tokens.saturating_add(*prompt_tokens);
                    summary.answer_tokens =
                        summary.answer_tokens.saturating_add(*answer_tokens);
                    *at_ms
                }
                Event::Tokens { choices, .. } => {
                    summary.tokens_with_choices +=
                        choices.len() / (header.layers * header.top_k);
                    0
                }
                Event::Gap { at_ms, lost } => {
                    summary.lost = summary.lost.saturating_add(*lost);
                    *at_ms
                }
            };
            summary.seconds = summary.seconds.max(at_ms as f64 / 1000.0);
        }
        summary.ranks = ranks.len();
        let layers = sums.chunks(header.experts);
        let of_layer: Vec<u64> = layers
            .map(|row| row.iter().copied().fold(0, u64::saturating_add))
            .collect();
        summary.rows = of_layer.iter().copied().max().unwrap_or(0);
        let mut all: Vec<(usize, usize, f64)> = sums
            .iter()
            .enumerate()
            .map(|(at, rows)| {
                let layer = at / header.experts;
                let part = *rows as f64 / of_layer[layer].max(1) as f64;
                (layer, at % header.experts, part)
            })
            .collect();
        all.sort_by(|a, b| b.2.total_cmp(&a.2));
        all.truncate(HOTTEST);
        summary.hottest = all;
        summary
    }

    /// As text or JSON.
    pub(super) fn told(&self, json: bool) -> Result<String, CliError> {
        if !json {
            return Ok(self.to_string().trim_end().to_owned());
        }
        serde_json::to_string_pretty(self)
            .map_err(|error| CliError::runtime("the summary has no JSON form", &error))
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} MoE layers of {} experts, {} a token; {:.1} s",
            self.model, self.layers, self.experts, self.top_k, self.seconds
        )?;
        writeln!(
            f,
            "{} windows of {} ranks, {} steps, {} rows in the busiest layer",
            self.windows, self.ranks, self.steps, self.rows
        )?;
        writeln!(
            f,
            "{} requests with signatures: {} prompt tokens, {} answer tokens; choices of {} tokens",
            self.requests, self.prompt_tokens, self.answer_tokens, self.tokens_with_choices
        )?;
        let hottest: Vec<String> = self
            .hottest
            .iter()
            .map(|(layer, expert, part)| format!("{layer}:{expert} {:.1} %", 100.0 * part))
            .collect();
        writeln!(f, "hottest experts: {}", hottest.join(", "))?;
        if self.lost > 0 {
            writeln!(
                f,
                "{} events were lost: the recorder was too slow",
                self.lost
            )?;
        }
        if self.breaks_off {
            writeln!(
                f,
                "the last event breaks off: the recorder was stopped while it wrote"
            )?;
        }
        Ok(())
    }
}
