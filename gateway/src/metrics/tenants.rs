//! Tenants: what they asked, used and waited for. A series each for the most active, one for all others.

use prometheus::{CounterVec, GaugeVec, IntCounterVec};

use super::Make;
use crate::traffic::{Tally, Tenant};

/// Metrics by tenant.
#[derive(Debug)]
pub(super) struct Tenants {
    requests: IntCounterVec,
    tokens: IntCounterVec,
    waited: CounterVec,
    queued: GaugeVec,
}

impl Tenants {
    pub(super) fn new(copied: &Make<'_>) -> Result<Self, prometheus::Error> {
        let one = &["tenant"];
        Ok(Self {
            requests: copied.counters(
                "foregate_gateway_tenant_requests_total",
                "Requests by tenant and what became of them at the gate: granted, or why not.",
                &["tenant", "outcome"],
            )?,
            tokens: copied.counters(
                "foregate_gateway_tenant_tokens_total",
                "Tokens of ended requests by tenant and kind.",
                &["tenant", "kind"],
            )?,
            waited: copied.counters_of_time(
                "foregate_gateway_tenant_wait_seconds_total",
                "Time that granted requests waited, by tenant.",
                one,
            )?,
            queued: copied.gauges(
                "foregate_gateway_tenant_queue",
                "Requests waiting for a permit, by tenant.",
                one,
            )?,
        })
    }

    pub(super) fn show(&self, tenants: &[(Tenant, Tally, u32)]) {
        self.requests.reset();
        self.tokens.reset();
        self.waited.reset();
        self.queued.reset();
        for (tenant, tally, queued) in tenants {
            let Tally {
                granted,
                refused,
                tokens,
                waited,
            } = tally;
            let requests = |outcome| self.requests.with_label_values(&[&**tenant, outcome]);
            requests("granted").inc_by(*granted);
            for (why, count) in refused {
                requests(why).inc_by(*count);
            }
            for (kind, count) in [("input", tokens.input), ("output", tokens.output)] {
                self.tokens
                    .with_label_values(&[&**tenant, kind])
                    .inc_by(count);
            }
            let waited = waited.as_secs_f64();
            self.waited.with_label_values(&[&**tenant]).inc_by(waited);
            self.queued
                .with_label_values(&[&**tenant])
                .set(f64::from(*queued));
        }
    }
}
