//! Pushes what /metrics shows to an OTLP receiver: converted, not measured twice. Names stay the same, except
//! those of OpenTelemetry's own conventions, which get their dots back.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use foregate_wire::tonic::transport::Channel;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::common::v1::{
    AnyValue, InstrumentationScope, KeyValue, any_value::Value,
};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint,
    ResourceMetrics, ScopeMetrics, Sum, metric::Data, number_data_point,
};
use opentelemetry_proto::tonic::resource::v1::Resource;
use prometheus::Registry;
use prometheus::proto::{LabelPair, MetricFamily, MetricType};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Metrics of OpenTelemetry's conventions: Prometheus's spelling, theirs, the unit.
const CONVENTIONS: [(&str, &str, &str); 4] = [
    (
        "gen_ai_server_request_duration_seconds",
        "gen_ai.server.request.duration",
        "s",
    ),
    (
        "gen_ai_server_time_to_first_token_seconds",
        "gen_ai.server.time_to_first_token",
        "s",
    ),
    (
        "gen_ai_server_time_per_output_token_seconds",
        "gen_ai.server.time_per_output_token",
        "s",
    ),
    (
        "gen_ai_client_token_usage",
        "gen_ai.client.token.usage",
        "{token}",
    ),
];
/// Attributes of OpenTelemetry's conventions: Prometheus's spelling, theirs.
const ATTRIBUTES: [(&str, &str); 6] = [
    ("error_type", "error.type"),
    ("gen_ai_operation_name", "gen_ai.operation.name"),
    ("gen_ai_provider_name", "gen_ai.provider.name"),
    ("gen_ai_request_model", "gen_ai.request.model"),
    ("gen_ai_response_model", "gen_ai.response.model"),
    ("gen_ai_token_type", "gen_ai.token.type"),
];

/// Periodic sender of registries.
#[derive(Debug)]
pub(super) struct Push {
    channel: Channel,
    service: String,
    interval: Duration,
    since: u64,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Push {
    pub(super) fn new(channel: Channel, service: String, interval: Duration) -> Self {
        Self {
            channel,
            service,
            interval,
            since: now(),
            stop: CancellationToken::new(),
            tasks: JoinSet::new(),
        }
    }

    pub(super) fn start(&mut self, registry: Registry) {
        let mut client = MetricsServiceClient::new(self.channel.clone());
        let (service, since, interval) = (self.service.clone(), self.since, self.interval);
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            loop {
                let last = tokio::select! {
                    () = stop.cancelled() => true,
                    () = tokio::time::sleep(interval) => false,
                };
                let request = convert(&registry.gather(), &service, since, now());
                if let Err(status) = client.export(request).await {
                    tracing::warn!(error = %status, "metrics not accepted by the OTLP receiver");
                }
                if last {
                    return;
                }
            }
        });
    }

    /// Sends once more and ends. The channel's timeout bounds the wait.
    pub(super) async fn stop(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the composition root stamps what leaves the process"
)]
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        })
}

/// Prometheus families as one OTLP request. Families of a kind without a counterpart are left out.
fn convert(
    families: &[MetricFamily],
    service: &str,
    since: u64,
    now: u64,
) -> ExportMetricsServiceRequest {
    let stamp = Stamp { since, now };
    let metrics = families
        .iter()
        .filter_map(|family| {
            let (name, unit) = CONVENTIONS
                .iter()
                .find(|(spelt, ..)| *spelt == family.name())
                .map_or((family.name(), ""), |(_, name, unit)| (*name, *unit));
            Some(Metric {
                name: name.to_owned(),
                description: family.help().to_owned(),
                unit: unit.to_owned(),
                data: Some(stamp.data(family)?),
                ..Metric::default()
            })
        })
        .collect();
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(Resource {
                attributes: vec![attribute("service.name", service)],
                ..Resource::default()
            }),
            scope_metrics: vec![ScopeMetrics {
                scope: Some(InstrumentationScope {
                    name: "foregate".to_owned(),
                    ..InstrumentationScope::default()
                }),
                metrics,
                ..ScopeMetrics::default()
            }],
            ..ResourceMetrics::default()
        }],
    }
}

/// When counting began and when it was read, in nanoseconds.
struct Stamp {
    since: u64,
    now: u64,
}

impl Stamp {
    fn data(&self, family: &MetricFamily) -> Option<Data> {
        let metrics = family.get_metric().iter();
        match family.get_field_type() {
            MetricType::COUNTER => Some(Data::Sum(Sum {
                data_points: metrics
                    .map(|m| self.number(m.get_label(), m.get_counter().get_value()))
                    .collect(),
                aggregation_temporality: AggregationTemporality::Cumulative.into(),
                is_monotonic: true,
            })),
            MetricType::GAUGE => Some(Data::Gauge(Gauge {
                data_points: metrics
                    .map(|m| self.number(m.get_label(), m.get_gauge().get_value()))
                    .collect(),
            })),
            MetricType::HISTOGRAM => Some(Data::Histogram(Histogram {
                data_points: metrics
                    .map(|m| self.histogram(m.get_label(), m.get_histogram()))
                    .collect(),
                aggregation_temporality: AggregationTemporality::Cumulative.into(),
            })),
            _ => None,
        }
    }

    fn number(&self, labels: &[LabelPair], value: f64) -> NumberDataPoint {
        NumberDataPoint {
            attributes: attributes(labels),
            start_time_unix_nano: self.since,
            time_unix_nano: self.now,
            value: Some(number_data_point::Value::AsDouble(value)),
            ..NumberDataPoint::default()
        }
    }

    /// Prometheus counts "up to", OTLP counts "in between", with one bucket more than bounds.
    fn histogram(
        &self,
        labels: &[LabelPair],
        histogram: &prometheus::proto::Histogram,
    ) -> HistogramDataPoint {
        let finite: Vec<_> = histogram
            .get_bucket()
            .iter()
            .filter(|bucket| bucket.upper_bound().is_finite())
            .collect();
        let mut below = 0;
        let mut counts = Vec::with_capacity(finite.len() + 1);
        for bucket in &finite {
            counts.push(bucket.cumulative_count().saturating_sub(below));
            below = bucket.cumulative_count();
        }
        counts.push(histogram.get_sample_count().saturating_sub(below));
        HistogramDataPoint {
            attributes: attributes(labels),
            start_time_unix_nano: self.since,
            time_unix_nano: self.now,
            count: histogram.get_sample_count(),
            sum: Some(histogram.get_sample_sum()),
            bucket_counts: counts,
            explicit_bounds: finite.iter().map(|bucket| bucket.upper_bound()).collect(),
            ..HistogramDataPoint::default()
        }
    }
}

/// To Prometheus, an empty label is one that is not there.
fn attributes(labels: &[LabelPair]) -> Vec<KeyValue> {
    labels
        .iter()
        .filter(|label| !label.value().is_empty())
        .map(|label| {
            let name = ATTRIBUTES
                .iter()
                .find(|(spelt, _)| *spelt == label.name())
                .map_or(label.name(), |(_, name)| name);
            attribute(name, label.value())
        })
        .collect()
}

fn attribute(key: &str, value: &str) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue {
            value: Some(Value::StringValue(value.to_owned())),
        }),
        ..KeyValue::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_up_to_become_counts_in_between() {
        let registry = Registry::new();
        let histogram = prometheus::Histogram::with_opts(
            prometheus::HistogramOpts::new("pause_seconds", "help").buckets(vec![1.0, 2.0]),
        )
        .unwrap();
        registry.register(Box::new(histogram.clone())).unwrap();
        for value in [0.5, 1.5, 1.6, 9.0] {
            histogram.observe(value);
        }
        let request = convert(&registry.gather(), "foregate-test", 1, 2);
        let metric = &request.resource_metrics[0].scope_metrics[0].metrics[0];
        let Some(Data::Histogram(data)) = &metric.data else {
            panic!("{metric:?}")
        };
        let point = &data.data_points[0];
        assert_eq!(point.bucket_counts, [1, 2, 1]);
        assert_eq!(point.explicit_bounds, [1.0, 2.0]);
        assert_eq!((point.count, point.sum), (4, Some(12.6)));
    }

    #[test]
    fn names_of_the_conventions_get_their_dots_back() {
        let registry = Registry::new();
        let options = prometheus::HistogramOpts::new("gen_ai_client_token_usage", "help");
        let labels = ["gen_ai_token_type", "error_type", "engine"];
        let histogram = prometheus::HistogramVec::new(options, &labels).unwrap();
        registry.register(Box::new(histogram.clone())).unwrap();
        histogram
            .with_label_values(&["input", "", "0"])
            .observe(1.0);
        let request = convert(&registry.gather(), "foregate-test", 1, 2);
        let metric = &request.resource_metrics[0].scope_metrics[0].metrics[0];
        assert_eq!(
            (metric.name.as_str(), metric.unit.as_str()),
            ("gen_ai.client.token.usage", "{token}")
        );
        let Some(Data::Histogram(data)) = &metric.data else {
            panic!("{metric:?}")
        };
        let names: Vec<&str> = data.data_points[0]
            .attributes
            .iter()
            .map(|attribute| attribute.key.as_str())
            .collect();
        assert_eq!(names, ["engine", "gen_ai.token.type"]);
    }
}
