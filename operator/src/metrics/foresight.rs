//! What gateways' forecasts are worth.

use prometheus::{Gauge, Registry};

use crate::forecast::Combined;

/// Its metrics.
#[derive(Debug)]
pub(super) struct Foresight {
    weight: Gauge,
    confidence: Gauge,
    gateways: Gauge,
}

impl Foresight {
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| {
            let gauge = Gauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        Ok(Self {
            weight: gauge(
                "foregate_operator_forecast_weight",
                "Weight of the gateways' forecast in the prediction of the load, from 0 to 1",
            )?,
            confidence: gauge(
                "foregate_operator_forecast_confidence",
                "Part of the expected rows whose experts gateways know, from 0 to 1",
            )?,
            gateways: gauge(
                "foregate_operator_forecast_gateways",
                "Gateways whose forecasts were taken at the last close of a window",
            )?,
        })
    }

    pub(super) fn show(&self, said: Option<(&Combined, f64)>) {
        let (weight, confidence, gateways) = said
            .map_or((0.0, 0.0, 0), |(combined, weight)| {
                (weight, combined.confidence, combined.gateways)
            });
        self.weight.set(weight);
        self.confidence.set(confidence);
        self.gateways.set(gateways as f64);
    }
}
