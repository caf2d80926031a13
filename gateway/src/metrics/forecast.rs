//! What the gateway tells the planner of the load to come.

use prometheus::GaugeVec;

use super::Make;

/// Metrics of the forecast.
#[derive(Debug)]
pub(super) struct ForecastMetrics {
    rows: GaugeVec,
    kinds: GaugeVec,
}

impl ForecastMetrics {
    pub(super) fn new(make: &Make<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            rows: make.gauges(
                "foregate_gateway_forecast_rows",
                "Rows of a layer expected of admitted requests within a load window, by whether their experts are known.",
                &["experts"],
            )?,
            kinds: make.gauges(
                "foregate_gateway_forecast_kinds",
                "Kinds of text that the forecast tells apart.",
                &[],
            )?,
        })
    }

    pub(super) fn show(&self, rows: f64, known: f64, kinds: usize) {
        self.rows.with_label_values(&["known"]).set(known);
        self.rows
            .with_label_values(&["unknown"])
            .set((rows - known).max(0.0));
        let none: [&str; 0] = [];
        self.kinds.with_label_values(&none).set(kinds as f64);
    }
}
