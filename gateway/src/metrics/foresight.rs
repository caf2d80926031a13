//! How right predictors of experts were, and which tenants heat which experts.

use prometheus::GaugeVec;

use super::Make;
use crate::calibration::State;
use crate::heat::OfTenant;

/// Metrics of what ended sequences have shown; copied when somebody looks.
#[derive(Debug)]
pub(super) struct Foresight {
    believed: GaugeVec,
    switches: GaugeVec,
    hit: GaugeVec,
    loss: GaugeVec,
    rows: GaugeVec,
    heated: GaugeVec,
}

impl Foresight {
    pub(super) fn new(copied: &Make<'_>) -> Result<Self, prometheus::Error> {
        let (one, both) = (&["predictor"], &["predictor", "of"]);
        Ok(Self {
            believed: copied.gauges(
                "foregate_gateway_predictor_believed",
                "1 while a predictor of experts is used: it was better than the mean of all answers.",
                one,
            )?,
            switches: copied.gauges(
                "foregate_gateway_predictor_switches",
                "How often a predictor was switched off or on again.",
                one,
            )?,
            hit: copied.gauges(
                "foregate_gateway_predictor_hit_ratio",
                "Part of the answers' choices that fell on the k experts of a layer thought likeliest, by the predictor and by the mean on the same answers.",
                both,
            )?,
            loss: copied.gauges(
                "foregate_gateway_predictor_log_loss_nats",
                "Log loss per choice, by the predictor and by the mean on the same answers.",
                both,
            )?,
            rows: copied.gauges(
                "foregate_gateway_tenant_routed_rows",
                "Pairs of row and expert that a tenant's ended sequences asked for; older ones fade with a half-life of five minutes.",
                &["tenant"],
            )?,
            heated: copied.gauges(
                "foregate_gateway_top_expert_tenant_share",
                "Part of the n-th most used expert's rows that a tenant's ended sequences brought.",
                &["place", "tenant"],
            )?,
        })
    }

    pub(super) fn show(
        &self,
        predictors: &[State],
        tenants: &[OfTenant],
        heated: &[Vec<(String, f64)>],
    ) {
        for state in predictors {
            let word = state.predictor.word();
            self.believed
                .with_label_values(&[word])
                .set(f64::from(state.believed));
            self.switches
                .with_label_values(&[word])
                .set(state.switches as f64);
            let Some(score) = state.score else { continue };
            for (of, hit, loss) in [
                ("own", score.hit, score.loss),
                ("mean", score.mean.0, score.mean.1),
            ] {
                self.hit.with_label_values(&[word, of]).set(hit);
                self.loss.with_label_values(&[word, of]).set(loss);
            }
        }
        self.rows.reset();
        self.heated.reset();
        for of in tenants {
            self.rows.with_label_values(&[&of.tenant]).set(of.rows);
        }
        for (place, parts) in heated.iter().enumerate() {
            let place = (place + 1).to_string();
            for (tenant, part) in parts {
                self.heated.with_label_values(&[&place, tenant]).set(*part);
            }
        }
    }
}
