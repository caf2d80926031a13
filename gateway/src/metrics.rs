//! Metrics of the gateway. Names that dashboards and autoscalers know from vLLM are kept; ours begin with
//! `foregate_gateway_`; those of OpenTelemetry's conventions with `gen_ai_`. Labels are of bounded number:
//! engine (ranks), layer, policy, outcome, reason, place, operation, served name, tenant (the most active ones).
//!
//! What the gateway sees is counted here. What workers report through the store, and what is known elsewhere in
//! the gateway, is copied whenever the registry is gathered.

mod cluster;
mod decode;
mod forecast;
mod foresight;
mod gen_ai;
mod scraped;
mod tenants;
mod window;

use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::placement::Placement;
use foregate_store::coord::ClusterState;
use foregate_wire::generation::Steps;
use prometheus::{
    CounterVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    Opts, Registry,
};

use crate::calibration::State;
use crate::heat::OfTenant;
use crate::route::{self, Choice};
use crate::traffic::{Tally, Tenant};
use cluster::Cluster;
use decode::DecodeMetrics;
use forecast::ForecastMetrics;
use foresight::Foresight;
use gen_ai::GenAi;
use scraped::Scraped;
use tenants::Tenants;
use window::WindowMetrics;

pub(crate) use cluster::{imbalance, rank_rows, top_experts};
pub(crate) use gen_ai::{Call, Operation};
pub(crate) use window::WindowState;

/// Seconds from a millisecond to ten minutes.
const SECONDS: [f64; 20] = [
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0, 180.0, 600.0,
];
/// Seconds from ten microseconds to a tenth of a second.
const SHORT: [f64; 13] = [
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1,
];

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    model: String,
    success: IntCounterVec,
    end_to_end: HistogramVec,
    first_token: HistogramVec,
    /// Of the model: found once, as it is asked for with every token.
    between_tokens: Histogram,
    per_token: HistogramVec,
    queued: HistogramVec,
    prompt_tokens: IntCounterVec,
    /// Likewise.
    generated_tokens: IntCounter,
    rejected: IntCounterVec,
    routed: IntCounterVec,
    resumes: IntCounter,
    epochs: IntCounterVec,
    copies_moved: IntCounterVec,
    /// Time the gateway adds to one token, from its arrival to its chunk.
    pub(crate) token_overhead: Histogram,
    /// Time the gateway adds to a request before its sequences run, waiting for a permit not included.
    pub(crate) request_overhead: Histogram,
    in_flight: IntGauge,
    waiting: IntGauge,
    known_prefixes: IntGauge,
    cluster: Cluster,
    window: WindowMetrics,
    forecast: ForecastMetrics,
    foresight: Foresight,
    decode: DecodeMetrics,
    tenants: Tenants,
    scraped: Scraped,
    gen_ai: GenAi,
}

/// What is known elsewhere when somebody looks.
#[derive(Debug)]
pub(crate) struct Known<'a> {
    /// The cluster.
    pub(crate) state: &'a ClusterState,
    /// Seconds since 1970.
    pub(crate) now: u64,
    /// Requests with a permit.
    pub(crate) in_flight: u32,
    /// Requests waiting for one.
    pub(crate) waiting: u32,
    /// Prompt prefixes with a known signature.
    pub(crate) prefixes: usize,
    /// The window, if the policy has one.
    pub(crate) window: Option<WindowState>,
    /// What tenants did, and how many of their requests wait.
    pub(crate) tenants: Vec<(Tenant, Tally, u32)>,
    /// How right predictors of experts were.
    pub(crate) predictors: [State; 3],
    /// What tenants asked of the experts.
    pub(crate) heat: Vec<OfTenant>,
    /// Parts that tenants brought of the most used experts' rows, in their order.
    pub(crate) heated: Vec<Vec<(String, f64)>>,
}

/// What one sequence looked like from outside.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    pub(crate) reason: &'static str,
    pub(crate) whole: Duration,
    pub(crate) first: Option<Duration>,
    pub(crate) generated: u64,
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    /// A name that is registered already.
    pub fn new(registry: Registry, model: &str) -> Result<Self, prometheus::Error> {
        let make = Make(&registry);
        let inner = Registry::new();
        let copied = Make(&inner);
        let named = &["model_name"];
        let metrics = Self {
            model: model.to_owned(),
            success: make.counters(
                "vllm:request_success_total",
                "Finished sequences by reason.",
                &["model_name", "finished_reason"],
            )?,
            end_to_end: make.histograms(
                "vllm:e2e_request_latency_seconds",
                "Time from request to last token.",
                &SECONDS,
            )?,
            first_token: make.histograms(
                "vllm:time_to_first_token_seconds",
                "Time from request to first token.",
                &SECONDS,
            )?,
            between_tokens: make
                .histograms(
                    "vllm:inter_token_latency_seconds",
                    "Time between two tokens of a sequence.",
                    &SECONDS,
                )?
                .with_label_values(&[model]),
            per_token: make.histograms(
                "vllm:request_time_per_output_token_seconds",
                "Mean time per token after the first, by sequence.",
                &SECONDS,
            )?,
            queued: make.histograms(
                "vllm:request_queue_time_seconds",
                "Time a request waited for a permit.",
                &SECONDS,
            )?,
            prompt_tokens: make.counters(
                "vllm:prompt_tokens_total",
                "Prompt tokens of sequences that were read.",
                named,
            )?,
            generated_tokens: make
                .counters("vllm:generation_tokens_total", "Tokens generated.", named)?
                .with_label_values(&[model]),
            rejected: make.counters(
                "foregate_gateway_rejected_total",
                "Error answers by reason.",
                &["reason"],
            )?,
            routed: make.counters(
                "foregate_gateway_route_decisions_total",
                "Routing decisions by policy and what decided.",
                &["policy", "outcome"],
            )?,
            resumes: make.counter(
                "foregate_gateway_resumes_total",
                "Sequences carried on by another worker after a loss.",
            )?,
            epochs: make.counters(
                "foregate_gateway_epoch_changes_total",
                "Changes of the active placement by reason.",
                &["reason"],
            )?,
            copies_moved: make.counters(
                "foregate_gateway_copies_moved_total",
                "Expert copies that changes of placement moved, by reason.",
                &["reason"],
            )?,
            token_overhead: make.histogram(
                "foregate_gateway_token_overhead_seconds",
                "Time from a token's arrival to its chunk.",
                &SHORT,
            )?,
            request_overhead: make.histogram(
                "foregate_gateway_request_overhead_seconds",
                "Time to parse, encode and route a request.",
                &SHORT,
            )?,
            in_flight: copied.gauge(
                "foregate_gateway_requests_in_flight",
                "Requests with a permit.",
            )?,
            waiting: copied.gauge(
                "foregate_gateway_admission_queue",
                "Requests waiting for a permit.",
            )?,
            known_prefixes: copied.gauge(
                "foregate_gateway_known_prefixes",
                "Prompt prefixes with a known expert signature.",
            )?,
            cluster: Cluster::new(&copied, model)?,
            window: WindowMetrics::new(&copied, &make)?,
            forecast: ForecastMetrics::new(&make)?,
            foresight: Foresight::new(&copied)?,
            decode: DecodeMetrics::new(&make)?,
            tenants: Tenants::new(&copied)?,
            scraped: Scraped::register(&registry, inner.clone())?,
            gen_ai: GenAi::new(&make)?,
            registry,
        };
        Ok(metrics)
    }

    /// The registry, for `/metrics`.
    #[must_use]
    pub const fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Copies what is known elsewhere; to be called by what [`Metrics::refresh_with`] was given.
    pub(crate) fn show(&self, known: &Known<'_>) {
        self.in_flight.set(known.in_flight.into());
        self.waiting.set(known.waiting.into());
        let prefixes = i64::try_from(known.prefixes).unwrap_or(i64::MAX);
        self.known_prefixes.set(prefixes);
        self.cluster.show(known.state, known.now);
        self.window.show(known.window.as_ref());
        self.tenants.show(&known.tenants);
        self.foresight
            .show(&known.predictors, &known.heat, &known.heated);
    }

    /// Has `refresh` called whenever the registry is gathered.
    pub(crate) fn refresh_with(&self, refresh: impl Fn() + Send + Sync + 'static) {
        self.scraped.refresh_with(refresh);
    }

    pub(crate) fn rejected(&self, reason: &str) {
        self.rejected.with_label_values(&[reason]).inc();
    }

    pub(crate) fn routed(&self, choice: &Choice) {
        self.routed
            .with_label_values(&[route::word(choice.policy), choice.outcome.word()])
            .inc();
    }

    /// Experts per layer that a request adds, `predicted` or `measured`.
    pub(crate) fn added(&self, when: &str, experts: f64) {
        self.window
            .added
            .with_label_values(&[when])
            .observe(experts);
    }

    /// What the forecast says: rows of a layer expected within its horizon, those whose experts are known, and kinds of
    /// text.
    pub(crate) fn expects(&self, rows: f64, known: f64, kinds: usize) {
        self.forecast.show(rows, known, kinds);
    }

    /// A worker has said what its decode steps took so far.
    pub(crate) fn decoded(&self, worker: Rank, steps: &Steps) {
        self.decode.note(worker, steps);
    }

    pub(crate) fn resumed(&self) {
        self.resumes.inc();
    }

    pub(crate) fn queued(&self, waited: Duration) {
        self.queued
            .with_label_values(&[&self.model])
            .observe(waited.as_secs_f64());
    }

    pub(crate) fn prompt(&self, tokens: usize) {
        self.prompt_tokens
            .with_label_values(&[&self.model])
            .inc_by(tokens as u64);
    }

    pub(crate) fn token(&self, since_last: Option<Duration>) {
        self.generated_tokens.inc();
        if let Some(gap) = since_last {
            self.between_tokens.observe(gap.as_secs_f64());
        }
    }

    pub(crate) fn first_token(&self, after: Duration) {
        self.first_token
            .with_label_values(&[&self.model])
            .observe(after.as_secs_f64());
    }

    pub(crate) fn finished(&self, measured: Measured) {
        let model = self.model.as_str();
        self.success
            .with_label_values(&[model, measured.reason])
            .inc();
        self.end_to_end
            .with_label_values(&[model])
            .observe(measured.whole.as_secs_f64());
        if let Some(first) = measured.first
            && measured.generated > 1
        {
            let rest = measured.whole.saturating_sub(first).as_secs_f64();
            self.per_token
                .with_label_values(&[model])
                .observe(rest / (measured.generated - 1) as f64);
        }
    }

    /// The active placement changed from `old` to `new`.
    pub(crate) fn placement_changed(&self, old: Option<&Placement>, new: &Placement) {
        let reason = serde_json::to_value(new.reason).unwrap_or_default();
        let reason = reason.as_str().unwrap_or("unknown");
        self.epochs.with_label_values(&[reason]).inc();
        let moved = new.copies_moved(old) as u64;
        self.copies_moved.with_label_values(&[reason]).inc_by(moved);
    }
}

/// Makes and registers.
pub(crate) struct Make<'a>(&'a Registry);

impl Make<'_> {
    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        let metric = IntCounter::new(name, help)?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    pub(crate) fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    /// Counters of seconds.
    pub(crate) fn counters_of_time(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<CounterVec, prometheus::Error> {
        let metric = CounterVec::new(Opts::new(name, help), labels)?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        let metric = IntGauge::new(name, help)?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    pub(crate) fn gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<prometheus::GaugeVec, prometheus::Error> {
        let metric = prometheus::GaugeVec::new(Opts::new(name, help), labels)?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> Result<Histogram, prometheus::Error> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        let metric = Histogram::with_opts(options)?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn histograms(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> Result<HistogramVec, prometheus::Error> {
        self.histograms_by(name, help, buckets, &["model_name"])
    }

    fn histograms_by(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
        labels: &[&str],
    ) -> Result<HistogramVec, prometheus::Error> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        let metric = HistogramVec::new(options, labels)?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }
}
