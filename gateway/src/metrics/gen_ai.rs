//! OpenTelemetry's metrics of generative AI (semantic conventions, status Development): per request, as its
//! client sees it. Buckets are those that the conventions demand.
//!
//! Names and labels are in Prometheus's spelling: underscores for dots, `_seconds` for the unit `s`. What is
//! pushed over OTLP is spelt as in the conventions again.

use std::sync::Arc;
use std::time::Duration;

use prometheus::HistogramVec;
use tokio::time::Instant;

use super::{Make, Metrics};
use crate::error::ApiError;

const DURATION: [f64; 14] = [
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
];
const FIRST_TOKEN: [f64; 16] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];
const PER_TOKEN: [f64; 13] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
];
/// Powers of four.
const TOKENS: [f64; 14] = [
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1024.0,
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];
/// `gen_ai.provider.name`.
const PROVIDER: &str = "foregate";
/// `error.type` of a request whose client left before the end.
const LEFT: &str = "client_left";

/// The four histograms.
#[derive(Debug)]
pub(super) struct GenAi {
    duration: HistogramVec,
    first_token: HistogramVec,
    per_token: HistogramVec,
    tokens: HistogramVec,
}

impl GenAi {
    pub(super) fn new(make: &Make<'_>) -> Result<Self, prometheus::Error> {
        let common = [
            "gen_ai_operation_name",
            "gen_ai_provider_name",
            "gen_ai_request_model",
            "gen_ai_response_model",
        ];
        let with = |label| [common.as_slice(), &[label]].concat();
        Ok(Self {
            duration: make.histograms_by(
                "gen_ai_server_request_duration_seconds",
                "Time from request to last token, or to the error.",
                &DURATION,
                &with("error_type"),
            )?,
            first_token: make.histograms_by(
                "gen_ai_server_time_to_first_token_seconds",
                "Time from request to first token, of answers without error.",
                &FIRST_TOKEN,
                &common,
            )?,
            per_token: make.histograms_by(
                "gen_ai_server_time_per_output_token_seconds",
                "Mean time per token of a choice after the first, of answers without error.",
                &PER_TOKEN,
                &common,
            )?,
            tokens: make.histograms_by(
                "gen_ai_client_token_usage",
                "Tokens of a request by their kind.",
                &TOKENS,
                &with("gen_ai_token_type"),
            )?,
        })
    }
}

/// What a request asked for: `gen_ai.operation.name`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Chat,
    TextCompletion,
}

impl Operation {
    /// The word in spans and metrics.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::TextCompletion => "text_completion",
        }
    }
}

/// How a request ended, and after what time.
#[derive(Debug)]
enum End {
    Failed(&'static str),
    Done {
        after: Duration,
        input: usize,
        output: usize,
        choices: usize,
    },
}

/// One request from its arrival to its end in any form; counted when dropped.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) began: Instant,
    operation: Operation,
    /// The served name that was asked for; empty until it is known to be one, which bounds the label.
    model: String,
    first: Option<Duration>,
    end: Option<End>,
}

impl Call {
    /// A request that arrives now.
    pub(crate) fn begin(metrics: &Arc<Metrics>, operation: Operation) -> Self {
        Self {
            metrics: Arc::clone(metrics),
            began: Instant::now(),
            operation,
            model: String::new(),
            first: None,
            end: None,
        }
    }

    /// The served name under which it is answered.
    pub(crate) fn is_for(&mut self, model: &str) {
        model.clone_into(&mut self.model);
    }

    /// A token came; the first one counts.
    pub(crate) fn token(&mut self) {
        self.first.get_or_insert_with(|| self.began.elapsed());
    }

    /// Everything came: `choices` answers with `output` tokens in all.
    pub(crate) fn done(&mut self, input: usize, output: usize, choices: usize) {
        self.end = Some(End::Done {
            after: self.began.elapsed(),
            input,
            output,
            choices,
        });
    }

    /// It ended with an error.
    pub(crate) fn failed(&mut self, error: &ApiError) {
        self.end = Some(End::Failed(error.reason));
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let gen_ai = &self.metrics.gen_ai;
        let served = if self.model.is_empty() {
            ""
        } else {
            &self.metrics.model
        };
        let common = [self.operation.word(), PROVIDER, &self.model, served];
        let with = |label| [common.as_slice(), &[label]].concat();
        let duration = |error: &'static str, after: Duration| {
            gen_ai
                .duration
                .with_label_values(&with(error))
                .observe(after.as_secs_f64());
        };
        match self.end {
            None => duration(LEFT, self.began.elapsed()),
            Some(End::Failed(reason)) => duration(reason, self.began.elapsed()),
            Some(End::Done {
                after,
                input,
                output,
                choices,
            }) => {
                duration("", after);
                for (kind, count) in [("input", input), ("output", output)] {
                    gen_ai
                        .tokens
                        .with_label_values(&with(kind))
                        .observe(count as f64);
                }
                let Some(first) = self.first else { return };
                gen_ai
                    .first_token
                    .with_label_values(&common)
                    .observe(first.as_secs_f64());
                // Choices run beside each other, so each of them had the whole time.
                let later = output as f64 / choices.max(1) as f64 - 1.0;
                if later > 0.0 {
                    gen_ai
                        .per_token
                        .with_label_values(&common)
                        .observe(after.saturating_sub(first).as_secs_f64() / later);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{Encoder, Registry, TextEncoder};

    use super::*;

    fn text(metrics: &Metrics) -> String {
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&metrics.registry().gather(), &mut text)
            .unwrap();
        String::from_utf8(text).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn every_end_is_counted_once_under_its_word() {
        let metrics = Arc::new(Metrics::new(Registry::new(), "m").unwrap());
        let mut done = Call::begin(&metrics, Operation::Chat);
        done.is_for("alias");
        tokio::time::advance(Duration::from_secs(2)).await;
        done.token();
        tokio::time::advance(Duration::from_secs(6)).await;
        done.token();
        done.done(7, 8, 2);
        // What comes after the last token, such as a slow client, is not the server's time.
        tokio::time::advance(Duration::from_secs(60)).await;
        drop(done);
        drop(Call::begin(&metrics, Operation::TextCompletion));
        let mut failed = Call::begin(&metrics, Operation::TextCompletion);
        failed.failed(&ApiError::upstream("x"));
        drop(failed);

        let text = text(&metrics);
        let chat = "gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"foregate\",gen_ai_request_model=\"alias\",gen_ai_response_model=\"m\"";
        let unknown = "gen_ai_operation_name=\"text_completion\",gen_ai_provider_name=\"foregate\",gen_ai_request_model=\"\",gen_ai_response_model=\"\"";
        for line in [
            format!("gen_ai_server_request_duration_seconds_sum{{error_type=\"\",{chat}}} 8\n"),
            format!(
                "gen_ai_server_request_duration_seconds_count{{error_type=\"client_left\",{unknown}}} 1\n"
            ),
            format!(
                "gen_ai_server_request_duration_seconds_count{{error_type=\"upstream\",{unknown}}} 1\n"
            ),
            format!("gen_ai_server_time_to_first_token_seconds_sum{{{chat}}} 2\n"),
            format!("gen_ai_server_time_per_output_token_seconds_sum{{{chat}}} 2\n"),
            format!("gen_ai_client_token_usage_sum{{{chat},gen_ai_token_type=\"output\"}} 8\n"),
            format!("gen_ai_client_token_usage_sum{{{chat},gen_ai_token_type=\"input\"}} 7\n"),
        ] {
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("token_usage_count{gen_ai_operation_name=\"text_completion\""));
    }
}
