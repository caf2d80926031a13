//! Logs, traces and pushed metrics, set up once per process.
//!
//! Logs go to stderr (`RUST_LOG`, `--log-format`). If `OTEL_EXPORTER_OTLP_ENDPOINT` (or its per-signal form) is
//! set, spans and metrics go there over OTLP/gRPC. The metrics are those of /metrics, converted.

mod push;
mod writer;

use std::time::Duration;

use foregate_wire::tonic::transport::Endpoint;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use prometheus::Registry;
use tracing_subscriber::filter::{EnvFilter, LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::environment;
use crate::progress::Progress;
use push::Push;
use writer::Writer;

/// What is logged when `RUST_LOG` says nothing.
const DEFAULT_FILTER: &str = "warn,foregate=info";
/// The specification's default for `OTEL_METRIC_EXPORT_INTERVAL`.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(60);

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TelemetryError {
    #[error("RUST_LOG: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    #[error("{variable}={value:?}: {what}")]
    Variable {
        variable: &'static str,
        value: String,
        what: String,
    },
    #[error("OTLP exporter: {0}")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    #[error("a log subscriber is already set: {0}")]
    AlreadySet(#[from] tracing_subscriber::util::TryInitError),
}

/// What must be flushed at the end.
#[derive(Debug, Default)]
pub(crate) struct Telemetry {
    traces: Option<SdkTracerProvider>,
    metrics: Option<Push>,
}

/// Sets up the process. Call inside the runtime, once.
///
/// # Errors
/// A variable that cannot be honoured is refused, not ignored.
pub(crate) fn init(
    role: &str,
    format: LogFormat,
    progress: &Progress,
) -> Result<Telemetry, TelemetryError> {
    let filter = match environment::variable("RUST_LOG") {
        Some(text) => EnvFilter::try_new(text)?,
        None => EnvFilter::try_new(DEFAULT_FILTER)?,
    };
    let lines = fmt::layer().with_writer(Writer(progress.clone()));
    let lines = match format {
        LogFormat::Text => lines.with_ansi(false).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let exports = Exports::from_environment(role)?;
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    let traces = exports.tracer()?;
    let spans = traces.as_ref().map(|provider| {
        // Ours only: the exporter's own gRPC spans would export themselves for ever.
        let ours = Targets::new().with_target("foregate", LevelFilter::DEBUG);
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("foregate"))
            .with_filter(ours)
    });
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .with(spans)
        .try_init()?;
    Ok(Telemetry {
        traces,
        metrics: exports.push()?,
    })
}

impl Telemetry {
    /// Starts to push what this registry gathers, if metrics are exported.
    pub(crate) fn export(&mut self, registry: Registry) {
        if let Some(push) = &mut self.metrics {
            push.start(registry);
        }
    }

    /// Sends what is left. Waits a few seconds at most.
    pub(crate) async fn flush(self) {
        if let Some(push) = self.metrics {
            push.stop().await;
        }
        if let Some(traces) = self.traces {
            let end = tokio::task::spawn_blocking(move || {
                traces.shutdown_with_timeout(Duration::from_secs(3))
            });
            match end.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "spans left unsent"),
                Err(error) => tracing::warn!(%error, "spans left unsent"),
            }
        }
    }
}

/// Where signals go, as the environment says.
struct Exports {
    service: String,
    traces: Option<String>,
    metrics: Option<String>,
    interval: Duration,
}

impl Exports {
    fn from_environment(role: &str) -> Result<Self, TelemetryError> {
        let off = environment::flag("OTEL_SDK_DISABLED");
        let endpoint = |variable: &'static str| {
            if off {
                return Ok(None);
            }
            let (variable, value) = match environment::variable(variable) {
                Some(value) => (variable, Some(value)),
                None => (
                    "OTEL_EXPORTER_OTLP_ENDPOINT",
                    environment::variable("OTEL_EXPORTER_OTLP_ENDPOINT"),
                ),
            };
            value.map(|url| check_endpoint(variable, url)).transpose()
        };
        let exports = Self {
            service: environment::variable("OTEL_SERVICE_NAME")
                .unwrap_or_else(|| format!("foregate-{role}")),
            traces: endpoint("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")?,
            metrics: endpoint("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")?,
            interval: interval()?,
        };
        if exports.traces.is_some() || exports.metrics.is_some() {
            check_protocol()?;
        }
        Ok(exports)
    }

    fn tracer(&self) -> Result<Option<SdkTracerProvider>, TelemetryError> {
        let Some(endpoint) = &self.traces else {
            return Ok(None);
        };
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint.clone())
            .with_timeout(Duration::from_secs(3))
            .build()?;
        // The provider reads OTEL_TRACES_SAMPLER and the batch settings itself.
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(
                Resource::builder()
                    .with_service_name(self.service.clone())
                    .build(),
            )
            .build();
        Ok(Some(provider))
    }

    fn push(&self) -> Result<Option<Push>, TelemetryError> {
        let Some(endpoint) = &self.metrics else {
            return Ok(None);
        };
        let channel = Endpoint::from_shared(endpoint.clone())
            .map_err(|error| TelemetryError::Variable {
                variable: "OTEL_EXPORTER_OTLP_ENDPOINT",
                value: endpoint.clone(),
                what: error.to_string(),
            })?
            .connect_timeout(Duration::from_secs(3))
            .timeout(Duration::from_secs(3))
            .connect_lazy();
        Ok(Some(Push::new(
            channel,
            self.service.clone(),
            self.interval,
        )))
    }
}

fn check_endpoint(variable: &'static str, url: String) -> Result<String, TelemetryError> {
    if url.starts_with("http://") {
        return Ok(url);
    }
    Err(TelemetryError::Variable {
        variable,
        value: url,
        what: "give an http:// URL of an OTLP/gRPC receiver, as in http://127.0.0.1:4317; https is not supported".to_owned(),
    })
}

fn check_protocol() -> Result<(), TelemetryError> {
    let variable = "OTEL_EXPORTER_OTLP_PROTOCOL";
    match environment::variable(variable) {
        None => Ok(()),
        Some(value) if value == "grpc" => Ok(()),
        Some(value) => Err(TelemetryError::Variable {
            variable,
            value,
            what: "only grpc is supported".to_owned(),
        }),
    }
}

fn interval() -> Result<Duration, TelemetryError> {
    let variable = "OTEL_METRIC_EXPORT_INTERVAL";
    let Some(value) = environment::variable(variable) else {
        return Ok(DEFAULT_INTERVAL);
    };
    match value.parse() {
        Ok(ms) if ms > 0 => Ok(Duration::from_millis(ms)),
        _ => Err(TelemetryError::Variable {
            variable,
            value,
            what: "must be a number of milliseconds above 0".to_owned(),
        }),
    }
}
