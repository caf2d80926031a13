//! Traffic management of the gateway: what a manifest says about it, and the same with nothing left open.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Who may send how much, and who goes first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TrafficSpec {
    /// Requests that each tenant may send to a gateway in a minute. Beyond it: 429. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u64>,
    /// Tokens, read and made, that each tenant may use of a gateway in a minute. Beyond it: 429. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u64>,
    /// The lowest `priority` that a request may have, default 0. Lower ones go first, so it is what keeps clients from
    /// passing each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most_urgent_priority: Option<i64>,
    /// Priorities by the names that requests give in `x-gateway-inference-objective` or
    /// `x-llm-d-inference-objective`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub objectives: BTreeMap<String, i64>,
    /// Tenants for whom other rules hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tenants: Vec<TenantSpec>,
}

/// The rules of one tenant; what is not said is as for all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TenantSpec {
    /// Name of its API key; without API keys what its requests call themselves.
    pub name: String,
    /// Its share of a busy gateway beside that of others, default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Requests in a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u64>,
    /// Tokens in a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u64>,
    /// The lowest `priority` that its requests may have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most_urgent_priority: Option<i64>,
    /// Whether its API key may name other tenants, as a gateway in front does. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speaks_for_others: Option<bool>,
}

/// [`TrafficSpec`], checked and complete.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traffic {
    /// Of tenants without a rule.
    pub limits: RateLimits,
    /// Of tenants without a rule.
    pub most_urgent: i64,
    /// Priorities by name.
    pub objectives: BTreeMap<String, i64>,
    /// No name twice.
    pub tenants: Vec<TenantRule>,
}

/// What may be used in a minute; `None`: as much as there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// Requests.
    pub requests_per_minute: Option<u64>,
    /// Tokens, read and made.
    pub tokens_per_minute: Option<u64>,
}

/// [`TenantSpec`], checked and complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantRule {
    /// The tenant.
    pub name: String,
    /// Its share.
    pub weight: u32,
    /// What it may use.
    pub limits: RateLimits,
    /// The lowest priority it may ask.
    pub most_urgent: i64,
    /// Whether its key may name other tenants.
    pub speaks_for_others: bool,
}
