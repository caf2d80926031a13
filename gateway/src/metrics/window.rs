//! The window: what it aims at, whether it groups, and what that is worth.

use prometheus::{GaugeVec, HistogramVec};

use super::Make;
use crate::route::window::{Regime, StepModel};

/// Experts per layer that a token adds to a batch.
const ADDED: [f64; 12] = [
    0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0,
];

/// The window at a moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WindowState {
    pub(crate) regime: Regime,
    pub(crate) grouping: bool,
    pub(crate) waiting: usize,
    pub(crate) switch_offs: u64,
    pub(crate) gain: Option<f64>,
    pub(crate) separation: Option<f64>,
    /// Cost of a step in use, and whether workers have measured it.
    pub(crate) step: (StepModel, bool),
}

/// Metrics of the window.
#[derive(Debug)]
pub(super) struct WindowMetrics {
    regime: GaugeVec,
    grouping: GaugeVec,
    waiting: GaugeVec,
    switch_offs: GaugeVec,
    gain: GaugeVec,
    separation: GaugeVec,
    step: GaugeVec,
    measured: GaugeVec,
    pub(super) added: HistogramVec,
}

impl WindowMetrics {
    /// `copied` is gathered when somebody looks, `make` always.
    pub(super) fn new(copied: &Make<'_>, make: &Make<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            regime: copied.gauges("foregate_gateway_window_regime", "1 for what the window aims at: group or mix.", &["regime"])?,
            grouping: copied.gauges("foregate_gateway_window_grouping", "1 while requests join their like.", &[])?,
            waiting: copied.gauges("foregate_gateway_window_waiting", "Requests in the window.", &[])?,
            switch_offs: copied.gauges("foregate_gateway_window_switch_offs", "How often grouping was switched off because it gained too little.", &[])?,
            gain: copied.gauges("foregate_gateway_window_gain_ratio", "What grouping saved in the last interval, as a share of a step's time.", &[])?,
            separation: copied.gauges("foregate_gateway_window_separation_ratio", "Share of the signatures' variance that lies between the kinds of requests.", &[])?,
            step: copied.gauges("foregate_gateway_window_step_ms", "Cost of a step that the window reckons with: base, per distinct expert, per row.", &["part"])?,
            measured: copied.gauges("foregate_gateway_window_step_measured", "1 while that cost is fitted to the workers' steps, 0 while it is assumed.", &[])?,
            added: make.histograms_by("foregate_gateway_window_added_experts", "Experts per layer that a request adds to the batch of its worker, as predicted and as measured.", &ADDED, &["when"])?,
        })
    }

    pub(super) fn show(&self, state: Option<&WindowState>) {
        let Some(state) = state else { return };
        for regime in [Regime::Group, Regime::Mix] {
            let on = f64::from(regime == state.regime);
            self.regime.with_label_values(&[regime.word()]).set(on);
        }
        let none: [&str; 0] = [];
        self.grouping
            .with_label_values(&none)
            .set(f64::from(state.grouping));
        self.waiting
            .with_label_values(&none)
            .set(state.waiting as f64);
        self.switch_offs
            .with_label_values(&none)
            .set(state.switch_offs as f64);
        let (step, measured) = state.step;
        for (part, ms) in [
            ("base", step.base),
            ("expert", step.expert),
            ("row", step.sequence),
        ] {
            self.step.with_label_values(&[part]).set(ms);
        }
        self.measured
            .with_label_values(&none)
            .set(f64::from(measured));
        for (gauge, value) in [
            (&self.gain, state.gain),
            (&self.separation, state.separation),
        ] {
            if let Some(value) = value {
                gauge.with_label_values(&none).set(value);
            }
        }
    }
}
