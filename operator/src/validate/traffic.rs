//! `spec.gateway.traffic`: tenants, limits, priorities.

use std::collections::BTreeSet;

use foregate_api::limits;
use foregate_api::traffic::{RateLimits, TenantRule, TenantSpec, Traffic, TrafficSpec};

use super::checks::Checks;

const FIELD: &str = "spec.gateway.traffic";

pub(super) fn traffic(checks: &mut Checks, spec: TrafficSpec) -> Traffic {
    let TrafficSpec {
        requests_per_minute,
        tokens_per_minute,
        most_urgent_priority,
        objectives,
        tenants,
    } = spec;
    let limits = RateLimits {
        requests_per_minute: checks.maybe(&limits::REQUESTS_PER_MINUTE, requests_per_minute),
        tokens_per_minute: checks.maybe(&limits::TOKENS_PER_MINUTE, tokens_per_minute),
    };
    let field = format!("{FIELD}.mostUrgentPriority");
    let most_urgent = most_urgent_priority.unwrap_or(limits::MOST_URGENT_PRIORITY);
    checks.priority(field, most_urgent);
    checks.at_most(
        &format!("{FIELD}.objectives"),
        objectives.len(),
        limits::MAX_TENANTS,
    );
    for (name, priority) in &objectives {
        checks.priority(format!("{FIELD}.objectives[{name}]"), *priority);
    }
    checks.at_most(
        &format!("{FIELD}.tenants"),
        tenants.len(),
        limits::MAX_TENANTS,
    );
    let mut seen = BTreeSet::new();
    let common = Common {
        limits,
        most_urgent,
    };
    let tenants = tenants
        .into_iter()
        .enumerate()
        .map(|(i, spec)| {
            let at = format!("{FIELD}.tenants[{i}]");
            checks.tenant_name(
                format!("{at}.name"),
                &spec.name,
                seen.insert(spec.name.clone()),
            );
            tenant(checks, &at, spec, &common)
        })
        .collect();
    Traffic {
        limits,
        most_urgent,
        objectives,
        tenants,
    }
}

/// What holds for tenants that do not say.
struct Common {
    limits: RateLimits,
    most_urgent: i64,
}

fn tenant(checks: &mut Checks, at: &str, spec: TenantSpec, common: &Common) -> TenantRule {
    let TenantSpec {
        name,
        weight,
        requests_per_minute,
        tokens_per_minute,
        most_urgent_priority,
        speaks_for_others,
    } = spec;
    let requests = checks.maybe_at(
        format!("{at}.requestsPerMinute"),
        &limits::TENANT_REQUESTS_PER_MINUTE,
        requests_per_minute,
    );
    let tokens = checks.maybe_at(
        format!("{at}.tokensPerMinute"),
        &limits::TENANT_TOKENS_PER_MINUTE,
        tokens_per_minute,
    );
    let weight = checks.maybe_at(format!("{at}.weight"), &limits::WEIGHT, weight);
    let most_urgent = most_urgent_priority.unwrap_or(common.most_urgent);
    checks.priority(format!("{at}.mostUrgentPriority"), most_urgent);
    TenantRule {
        name,
        weight: weight.or(limits::WEIGHT.default).unwrap_or(1),
        limits: RateLimits {
            requests_per_minute: requests.or(common.limits.requests_per_minute),
            tokens_per_minute: tokens.or(common.limits.tokens_per_minute),
        },
        most_urgent,
        speaks_for_others: speaks_for_others.unwrap_or(false),
    }
}
