//! Every metric of the worker, once. Names: the de-facto `vllm:` ones for the engine, `foregate_worker_*`
//! for what only this system has. Label values are enums; there is no layer × expert series.
//!
//! | name | kind | meaning |
//! |---|---|---|
//! | `vllm:num_requests_running`, `vllm:num_requests_waiting` | gauge | sequences in the batch; admitted and not in it |
//! | `vllm:kv_cache_usage_perc` | gauge | share of KV pages in use by sequences, 0 to 1 |
//! | `vllm:prefix_cache_queries_total`, `vllm:prefix_cache_hits_total` | counter | prompt tokens looked up; found |
//! | `vllm:prompt_tokens_total`, `vllm:generation_tokens_total` | counter | tokens computed; tokens generated |
//! | `vllm:num_preemptions_total` | counter | sequences put back because pages ran out |
//! | `foregate_worker_steps_total` | counter | engine steps |
//! | `foregate_worker_decode_steps_total`, `…_decode_rows_total`, `…_decode_experts_total`, `…_decode_seconds_total` | counter | steps in which every sequence had one row; their rows, distinct experts (mean over MoE layers) and time |
//! | `foregate_worker_exchange_seconds` | histogram | one layer's exchange, from routing to combined rows |
//! | `foregate_worker_rows_total{where}` | counter | routed rows run here (`local`), sent to a peer (`remote`), run for a peer (`served`) |
//! | `foregate_worker_late_rows_total` | counter | rows that came from no copy in time |
//! | `foregate_worker_retried_rows_total` | counter | rows sent to a second copy |
//! | `foregate_worker_refused_calls_total{side,reason}` | counter | calls refused here (`callee`) and by peers (`caller`) |
//! | `foregate_worker_lost_calls_total` | counter | calls whose connection ended before the answer |
//! | `foregate_worker_corrupt_frames_total` | counter | frames that could not be decoded; each resets its connection |
//! | `foregate_worker_lost_connections_total` | counter | established connections to peers that ended |
//! | `foregate_worker_collectives_total{what}`, `foregate_worker_collective_bytes_total{what}` | counter | lock-step calls to all ranks, and bytes sent in them: `gather`, `rows`, `answers` |
//! | `foregate_worker_lost_groups_total` | counter | lock-step groups that were lost |
//! | `foregate_worker_load_fraction` | gauge | share of the weights loaded that serving begins with, 0 to 1 |
//! | `foregate_worker_experts_resident` | gauge | (layer, expert) pairs in memory |
//! | `foregate_worker_epoch` | gauge | epoch that new steps use |
//! | `foregate_worker_migration_experts_total{source}`, `…_migration_bytes_total{source}` | counter | experts loaded from a `peer` or the `checkpoint` |
//! | `foregate_worker_migration_seconds` | histogram | loading one expert |
//! | `foregate_worker_switch_stall_seconds` | histogram | delay of a step by a switch of epoch |

use std::sync::atomic::{AtomicU64, Ordering};

use foregate_api::load::EngineLoad;
use foregate_wire::frame::RefuseReason;
use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge,
    Opts, Registry,
};

use crate::engine::Decoded;

/// Where a routed row was run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// By this worker for its own step.
    Local,
    /// By a peer.
    Remote,
    /// By this worker for a peer's step.
    Served,
}

/// Where an expert was loaded from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Another worker.
    Peer,
    /// The local files.
    Checkpoint,
}

impl Source {
    /// Label value.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// What a collective of the lock-step discipline carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Collected {
    /// Wishes and sizes.
    Gather,
    /// Rows to experts.
    Rows,
    /// Rows of experts.
    Answers,
}

impl Collected {
    /// Label value.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gather => "gather",
            Self::Rows => "rows",
            Self::Answers => "answers",
        }
    }
}

/// The worker's metrics. Also keeps the three figures that travel in load windows.
#[derive(Debug)]
pub struct WorkerMetrics {
    engine: EngineMetrics,
    decode: DecodeMetrics,
    exchange_seconds: Histogram,
    rows: IntCounterVec,
    late_rows: IntCounter,
    retried_rows: IntCounter,
    refused: IntCounterVec,
    lost_calls: IntCounter,
    corrupt_frames: IntCounter,
    lost_connections: IntCounter,
    collectives: IntCounterVec,
    collective_bytes: IntCounterVec,
    lost_groups: IntCounter,
    load_fraction: Gauge,
    experts_resident: IntGauge,
    epoch: IntGauge,
    migrated: IntCounterVec,
    migrated_bytes: IntCounterVec,
    migration_seconds: Histogram,
    switch_stall: Histogram,
    last_stall_us: AtomicU64,
}

/// The de-facto engine metrics, with the label `model_name`.
#[derive(Debug)]
struct EngineMetrics {
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    queries: IntCounter,
    hits: IntCounter,
    prompt: IntCounter,
    generation: IntCounter,
    preemptions: IntCounter,
    steps: IntCounter,
}

/// Decode steps.
#[derive(Debug)]
struct DecodeMetrics {
    steps: IntCounter,
    rows: IntCounter,
    experts: Counter,
    seconds: Counter,
}

/// Buckets from 10 µs to 2.6 s, doubling.
fn seconds_buckets() -> Vec<f64> {
    (0..18).map(|i| 1e-5 * f64::from(1_u32 << i)).collect()
}

impl WorkerMetrics {
    /// Registers every metric.
    ///
    /// # Errors
    /// When a name is taken in `registry`: one registry serves one worker.
    pub fn register(registry: &Registry, model_name: &str) -> Result<Self, prometheus::Error> {
        let reg = Register { registry };
        Ok(Self {
            engine: EngineMetrics::register(&reg, model_name)?,
            decode: DecodeMetrics {
                steps: reg.counter(
                    "foregate_worker_decode_steps_total",
                    "Steps in which every sequence had one row",
                )?,
                rows: reg
                    .counter("foregate_worker_decode_rows_total", "Rows of these steps")?,
                experts: reg.add(Counter::new(
                    "foregate_worker_decode_experts_total",
                    "Distinct experts that the rows of these steps chose, mean over MoE layers",
                )?)?,
                seconds: reg.add(Counter::new(
                    "foregate_worker_decode_seconds_total",
                    "Time of these steps",
                )?)?,
            },
            exchange_seconds: reg.histogram(
                "foregate_worker_exchange_seconds",
                "One layer's exchange, from routing to combined rows",
            )?,
            rows: reg.counters(
                "foregate_worker_rows_total",
                "Routed rows by where they ran",
                &["where"],
            )?,
            late_rows: reg.counter(
                "foregate_worker_late_rows_total",
                "Rows that came from no copy in time",
            )?,
            retried_rows: reg.counter(
                "foregate_worker_retried_rows_total",
                "Rows sent to a second copy",
            )?,
            refused: reg.counters(
                "foregate_worker_refused_calls_total",
                "Calls refused, by side and reason",
                &["side", "reason"],
            )?,
            lost_calls: reg.counter(
                "foregate_worker_lost_calls_total",
                "Calls whose connection ended before the answer",
            )?,
            corrupt_frames: reg.counter(
                "foregate_worker_corrupt_frames_total",
                "Frames that could not be decoded",
            )?,
            lost_connections: reg.counter(
                "foregate_worker_lost_connections_total",
                "Connections to peers that ended",
            )?,
            collectives: reg.counters(
                "foregate_worker_collectives_total",
                "Lock-step calls to all ranks",
                &["what"],
            )?,
            collective_bytes: reg.counters(
                "foregate_worker_collective_bytes_total",
                "Bytes sent in lock-step calls",
                &["what"],
            )?,
            lost_groups: reg.counter(
                "foregate_worker_lost_groups_total",
                "Lock-step groups that were lost",
            )?,
            load_fraction: reg.add(Gauge::new(
                "foregate_worker_load_fraction",
                "Share of the weights loaded that serving begins with",
            )?)?,
            experts_resident: reg.gauge(
                "foregate_worker_experts_resident",
                "Pairs of layer and expert in memory",
            )?,
            epoch: reg.gauge("foregate_worker_epoch", "Epoch that new steps use")?,
            migrated: reg.counters(
                "foregate_worker_migration_experts_total",
                "Experts loaded, by source",
                &["source"],
            )?,
            migrated_bytes: reg.counters(
                "foregate_worker_migration_bytes_total",
                "Bytes of experts loaded, by source",
                &["source"],
            )?,
            migration_seconds: reg
                .histogram("foregate_worker_migration_seconds", "Loading one expert")?,
            switch_stall: reg.histogram(
                "foregate_worker_switch_stall_seconds",
                "Delay of a step by a switch of epoch",
            )?,
            last_stall_us: AtomicU64::new(0),
        })
    }

    /// Publishes the engine's state. Call it whenever a load window closes, or more often.
    pub fn engine(&self, load: &EngineLoad) {
        self.engine.set(load);
    }

    /// Publishes what the engine counted of its decode steps.
    pub fn decoded(&self, now: &Decoded) {
        raise(&self.decode.steps, now.steps);
        raise(&self.decode.rows, now.rows);
        let rise = |counter: &Counter, total: f64| {
            counter.inc_by((total - counter.get()).max(0.0));
        };
        rise(&self.decode.experts, now.experts);
        rise(&self.decode.seconds, now.ms / 1000.0);
    }

    /// Rows late since start.
    #[must_use]
    pub fn late_rows_total(&self) -> u64 {
        self.late_rows.get()
    }

    /// Experts loaded since start.
    #[must_use]
    pub fn experts_loaded_total(&self) -> u64 {
        self.loaded_from(Source::Peer) + self.loaded_from(Source::Checkpoint)
    }

    /// Experts loaded since start from one kind of source.
    #[must_use]
    pub fn loaded_from(&self, source: Source) -> u64 {
        self.migrated.with_label_values(&[source.name()]).get()
    }

    /// Microseconds by which the last switch delayed a step.
    #[must_use]
    pub fn last_stall_us(&self) -> u64 {
        self.last_stall_us.load(Ordering::Relaxed)
    }

    pub(crate) fn exchange(&self, seconds: f64) {
        self.exchange_seconds.observe(seconds);
    }

    pub(crate) fn rows(&self, ran: Where, rows: usize) {
        let label = match ran {
            Where::Local => "local",
            Where::Remote => "remote",
            Where::Served => "served",
        };
        self.rows.with_label_values(&[label]).inc_by(rows as u64);
    }

    pub(crate) fn late(&self, rows: usize) {
        self.late_rows.inc_by(rows as u64);
    }

    pub(crate) fn retried(&self, rows: usize) {
        self.retried_rows.inc_by(rows as u64);
    }

    pub(crate) fn refused_here(&self, reason: RefuseReason) {
        self.refused
            .with_label_values(&["callee", reason.name()])
            .inc();
    }

    pub(crate) fn refused_by_peer(&self, reason: RefuseReason) {
        self.refused
            .with_label_values(&["caller", reason.name()])
            .inc();
    }

    pub(crate) fn call_lost(&self) {
        self.lost_calls.inc();
    }

    pub(crate) fn frame_corrupt(&self) {
        self.corrupt_frames.inc();
    }

    /// Frames that could not be decoded since start.
    #[must_use]
    pub fn corrupt_frames_total(&self) -> u64 {
        self.corrupt_frames.get()
    }

    /// A lock-step call in which this worker sent `bytes`.
    pub(crate) fn collective(&self, what: Collected, bytes: usize) {
        let label = [what.name()];
        self.collectives.with_label_values(&label).inc();
        let counter = self.collective_bytes.with_label_values(&label);
        counter.inc_by(bytes as u64);
    }

    pub(crate) fn group_lost(&self) {
        self.lost_groups.inc();
    }

    /// Lock-step calls of a kind since start, and bytes sent in them.
    #[must_use]
    pub fn collectives_total(&self, what: Collected) -> (u64, u64) {
        let label = [what.name()];
        let calls = self.collectives.with_label_values(&label).get();
        (calls, self.collective_bytes.with_label_values(&label).get())
    }

    /// Lock-step groups lost since start.
    #[must_use]
    pub fn lost_groups_total(&self) -> u64 {
        self.lost_groups.get()
    }

    pub(crate) fn connection_lost(&self) {
        self.lost_connections.inc();
    }

    pub(crate) fn loading(&self, fraction: f64) {
        self.load_fraction.set(fraction);
    }

    pub(crate) fn resident(&self, experts: usize) {
        self.experts_resident
            .set(i64::try_from(experts).unwrap_or(i64::MAX));
    }

    pub(crate) fn serving(&self, epoch: u64) {
        self.epoch.set(i64::try_from(epoch).unwrap_or(i64::MAX));
    }

    pub(crate) fn loaded(&self, source: Source, bytes: usize, seconds: f64) {
        let label = [source.name()];
        self.migrated.with_label_values(&label).inc();
        self.migrated_bytes
            .with_label_values(&label)
            .inc_by(bytes as u64);
        self.migration_seconds.observe(seconds);
    }

    pub(crate) fn switched(&self, stall: std::time::Duration) {
        self.switch_stall.observe(stall.as_secs_f64());
        let micros = u64::try_from(stall.as_micros()).unwrap_or(u64::MAX);
        self.last_stall_us.store(micros, Ordering::Relaxed);
    }
}

impl EngineMetrics {
    fn register(reg: &Register<'_>, model: &str) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| reg.model_gauge(name, help, model);
        let counter = |name: &str, help: &str| reg.model_counter(name, help, model);
        Ok(Self {
            running: gauge("vllm:num_requests_running", "Sequences in the batch")?,
            waiting: gauge("vllm:num_requests_waiting", "Sequences waiting")?,
            kv_usage: gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use")?,
            queries: counter(
                "vllm:prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache",
            )?,
            hits: counter(
                "vllm:prefix_cache_hits_total",
                "Prompt tokens found in the prefix cache",
            )?,
            prompt: counter("vllm:prompt_tokens_total", "Prompt tokens computed")?,
            generation: counter("vllm:generation_tokens_total", "Tokens generated")?,
            preemptions: counter("vllm:num_preemptions_total", "Sequences preempted")?,
            steps: counter("foregate_worker_steps_total", "Engine steps")?,
        })
    }

    fn set(&self, load: &EngineLoad) {
        self.running.set(f64::from(load.running));
        self.waiting.set(f64::from(load.waiting));
        let pages = f64::from(load.kv_pages.max(1));
        self.kv_usage.set(f64::from(load.kv_pages_used) / pages);
        raise(&self.queries, load.prefix_queries);
        raise(&self.hits, load.prefix_hits);
        raise(&self.prompt, load.prompt_tokens);
        raise(&self.generation, load.generation_tokens);
        raise(&self.preemptions, load.preemptions);
        raise(&self.steps, load.steps);
    }
}

/// Brings a counter up to a total kept elsewhere.
fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

struct Register<'a> {
    registry: &'a Registry,
}

impl Register<'_> {
    fn add<C>(&self, collector: C) -> Result<C, prometheus::Error>
    where
        C: prometheus::core::Collector + Clone + 'static,
    {
        self.registry.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.add(IntCounter::new(name, help)?)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.add(IntGauge::new(name, help)?)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn histogram(&self, name: &str, help: &str) -> Result<Histogram, prometheus::Error> {
        let opts = HistogramOpts::new(name, help).buckets(seconds_buckets());
        self.add(Histogram::with_opts(opts)?)
    }

    fn model_gauge(
        &self,
        name: &str,
        help: &str,
        model: &str,
    ) -> Result<Gauge, prometheus::Error> {
        let family = self.add(GaugeVec::new(Opts::new(name, help), &["model_name"])?)?;
        family.get_metric_with_label_values(&[model])
    }

    fn model_counter(
        &self,
        name: &str,
        help: &str,
        model: &str,
    ) -> Result<IntCounter, prometheus::Error> {
        let family = self.counters(name, help, &["model_name"])?;
        family.get_metric_with_label_values(&[model])
    }
}
