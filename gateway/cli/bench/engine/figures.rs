//! All figures of a run: as JSON and as lines for people.

use serde::Serialize;

use super::rig::Load;
use super::speed::{Cost, Prefill, Speed, Times};
use super::telemetry::Telemetry;

/// One run.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    pub(super) model: String,
    pub(super) path: String,
    pub(super) threads: usize,
    /// Read bandwidth of all threads, 10⁹ bytes per second: the median of those around the decode runs.
    pub(super) bandwidth_gb_s: f64,
    /// Additions and multiplications on cached weights, 10⁹ per second.
    pub(super) rate_gflop_s: f64,
    pub(super) load_seconds: f64,
    /// Absent where the system does not say.
    pub(super) peak_rss_bytes: Option<u64>,
    /// Bytes of the checkpoint's tensors.
    pub(super) weight_bytes: u64,
    /// Room for keys and values in the largest of the loads before the peak was read.
    pub(super) kv_bytes: u64,
    /// The peak over weights, keys and values.
    pub(super) peak_rss_ratio: Option<f64>,
    pub(super) decode: Vec<Decode>,
    pub(super) prefill: Vec<Prefill>,
}

/// One batch size.
#[derive(Debug, Serialize)]
pub(super) struct Decode {
    pub(super) batch: u32,
    /// Tokens of each prompt.
    pub(super) context: u32,
    /// Of the middle turn, by its share of the limit.
    pub(super) tokens_per_second: f64,
    /// What memory gave around that turn, 10⁹ bytes per second.
    pub(super) bandwidth_gb_s: f64,
    pub(super) bytes_per_step: f64,
    /// Tokens per second if a step did nothing but read its bytes.
    pub(super) limit_tokens_per_second: f64,
    pub(super) limit_share: f64,
    pub(super) step_time_ms: Times,
    /// What a step spends after the forward pass, median, and its share of the median step.
    pub(super) outside_ms: f64,
    pub(super) outside_share: f64,
    /// Absent until it is measured, which takes longest.
    pub(super) telemetry: Option<Telemetry>,
}

impl Decode {
    pub(super) fn new(load: &Load, speed: Speed, cost: Cost) -> Self {
        let limit = speed.bandwidth / cost.bytes * f64::from(load.sequences);
        Self {
            batch: load.sequences,
            context: load.prompt,
            tokens_per_second: speed.tokens_per_second,
            bandwidth_gb_s: speed.bandwidth / 1e9,
            bytes_per_step: cost.bytes,
            limit_tokens_per_second: limit,
            limit_share: speed.tokens_per_second / limit,
            step_time_ms: cost.times,
            outside_ms: speed.outside_ms,
            outside_share: speed.outside_share,
            telemetry: None,
        }
    }

    fn lines(&self) -> [String; 2] {
        let Times {
            step,
            gate,
            exchange,
            experts,
            attention,
            rest,
        } = self.step_time_ms;
        [
            format!(
                "decode, batch {}, context {}: {:.1} tokens/s; a step reads {:.1} MB, which at {:.1} GB/s is {:.2} of the limit {:.1}",
                self.batch,
                self.context,
                self.tokens_per_second,
                self.bytes_per_step / 1e6,
                self.bandwidth_gb_s,
                self.limit_share,
                self.limit_tokens_per_second,
            ),
            format!(
                "  step {step:.2} ms: gate {gate:.2}, exchange {exchange:.2}, experts {experts:.2}, attention {attention:.2}, rest {rest:.2}; after the forward pass {:.3} ms, {:.2} % of a step",
                self.outside_ms,
                self.outside_share * 100.0
            ),
        ]
    }
}

impl Figures {
    /// For people; without telemetry.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![format!(
            "{}: {} threads, {} path, {:.1} GB/s, {:.0} GFLOP/s; loaded in {:.2} s",
            self.model,
            self.threads,
            self.path,
            self.bandwidth_gb_s,
            self.rate_gflop_s,
            self.load_seconds
        )];
        if let (Some(peak), Some(ratio)) = (self.peak_rss_bytes, self.peak_rss_ratio) {
            lines.push(format!(
                "memory: at most {:.1} MB, {ratio:.2} times the weights' {:.1} MB and the keys' and values' {:.1} MB",
                peak as f64 / 1e6,
                self.weight_bytes as f64 / 1e6,
                self.kv_bytes as f64 / 1e6
            ));
        }
        lines.extend(self.prefill.iter().map(|figure| {
            let limit = figure.limit().map_or_else(String::new, |limit| {
                format!(
                    ", {:.2} of the limit {limit:.1}",
                    figure.tokens_per_second / limit
                )
            });
            format!(
                "prefill, {} × {} tokens: {:.1} tokens/s{limit}",
                figure.prompts, figure.tokens, figure.tokens_per_second
            )
        }));
        lines.extend(self.decode.iter().flat_map(Decode::lines));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests;
