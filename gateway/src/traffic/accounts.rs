//! What is known of each tenant: its rules, its share so far, its limits, how active it is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::traffic::{RateLimits, TenantRule, Traffic as Rules};

use super::bucket::{Bucket, Standing};
use super::{Refusal, Tenant, Tokens};

/// Tenants that are told apart at a time. More come only where clients name themselves.
pub const MOST_TENANTS: usize = 1024;
/// Whoever cannot be told apart.
pub const OTHER: &str = "other";
/// What a token counts, so that weights divide it without much being lost.
const SCALE: u64 = 1000;
/// Time in which activity falls to half.
const HALF_LIFE: f64 = 300.0;

#[derive(Debug)]
struct Account {
    weight: u32,
    most_urgent: i64,
    /// Scaled tokens granted over weight.
    tag: u64,
    waiting: u32,
    running: u32,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    activity: f64,
    seen: Duration,
}

#[derive(Debug)]
pub(super) struct Accounts {
    rules: Rules,
    by_tenant: BTreeMap<Tenant, Account>,
    /// The largest tag at which anybody was granted.
    virtual_time: u64,
}

impl Account {
    fn new(rule: &Ruling, now: Duration) -> Self {
        let RateLimits {
            requests_per_minute,
            tokens_per_minute,
        } = rule.limits;
        Self {
            weight: rule.weight,
            most_urgent: rule.most_urgent,
            tag: 0,
            waiting: 0,
            running: 0,
            requests: requests_per_minute.map(|limit| Bucket::new(limit, now)),
            tokens: tokens_per_minute.map(|limit| Bucket::new(limit, now)),
            activity: 0.0,
            seen: now,
        }
    }

    /// Whether forgetting it changes nothing.
    fn forgettable(&mut self, now: Duration) -> bool {
        let full = |bucket: &mut Option<Bucket>| bucket.as_mut().is_none_or(|b| b.is_full(now));
        self.waiting == 0
            && self.running == 0
            && full(&mut self.requests)
            && full(&mut self.tokens)
    }

    fn fade(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.seen).as_secs_f64();
        self.activity *= 0.5_f64.powf(passed / HALF_LIFE);
        self.seen = self.seen.max(now);
    }

    fn share(&self, tokens: Tokens) -> u64 {
        tokens.cost().saturating_mul(SCALE) / u64::from(self.weight.max(1))
    }
}

/// The rule that holds for a tenant.
struct Ruling {
    weight: u32,
    most_urgent: i64,
    limits: RateLimits,
}

impl Accounts {
    pub(super) const fn new(rules: Rules) -> Self {
        Self {
            rules,
            by_tenant: BTreeMap::new(),
            virtual_time: 0,
        }
    }

    fn rule(&self, name: &str) -> Option<&TenantRule> {
        self.rules.tenants.iter().find(|rule| rule.name == name)
    }

    fn ruling(&self, name: &str) -> Ruling {
        let rule = self.rule(name);
        Ruling {
            weight: rule.map_or(1, |rule| rule.weight),
            most_urgent: rule.map_or(self.rules.most_urgent, |rule| rule.most_urgent),
            limits: rule.map_or(self.rules.limits, |rule| rule.limits),
        }
    }

    /// Makes sure that there is an account, and says whose.
    pub(super) fn enter(&mut self, name: &str, now: Duration) -> Tenant {
        if let Some((tenant, _)) = self.by_tenant.get_key_value(name) {
            return Arc::clone(tenant);
        }
        let room = self.rule(name).is_some()
            || self.by_tenant.len() < MOST_TENANTS
            || self.forget_one(now);
        let tenant = Tenant::from(if room { name } else { OTHER });
        if !self.by_tenant.contains_key(&tenant) {
            let account = Account::new(&self.ruling(&tenant), now);
            self.by_tenant.insert(Arc::clone(&tenant), account);
        }
        tenant
    }

    /// Forgets who was away longest of those that nothing depends on.
    fn forget_one(&mut self, now: Duration) -> bool {
        let longest = self
            .by_tenant
            .iter_mut()
            .filter_map(|(tenant, account)| {
                account
                    .forgettable(now)
                    .then(|| (account.seen, Arc::clone(tenant)))
            })
            .min();
        longest.is_some_and(|(_, tenant)| self.by_tenant.remove(&tenant).is_some())
    }

    fn with<T: Default>(
        &mut self,
        tenant: &Tenant,
        change: impl FnOnce(&mut Account) -> T,
    ) -> T {
        self.by_tenant
            .get_mut(tenant)
            .map(change)
            .unwrap_or_default()
    }

    pub(super) fn most_urgent(&self, tenant: &Tenant) -> i64 {
        self.by_tenant
            .get(tenant)
            .map_or(self.rules.most_urgent, |account| account.most_urgent)
    }

    pub(super) fn weight(&self, tenant: &Tenant) -> u32 {
        self.by_tenant
            .get(tenant)
            .map_or(1, |account| account.weight)
    }

    pub(super) fn tag(&self, tenant: &Tenant) -> u64 {
        self.by_tenant.get(tenant).map_or(0, |account| account.tag)
    }

    /// Requests of a tenant that wait; of all without one.
    pub(super) fn waiting(&self, tenant: Option<&Tenant>) -> u32 {
        match tenant {
            Some(tenant) => self
                .by_tenant
                .get(tenant)
                .map_or(0, |account| account.waiting),
            None => self.by_tenant.values().map(|account| account.waiting).sum(),
        }
    }

    /// Takes a request and its tokens out of the tenant's minute.
    pub(super) fn spend(
        &mut self,
        tenant: &Tenant,
        expected: Tokens,
        now: Duration,
    ) -> Result<(), Refusal> {
        let Some(account) = self.by_tenant.get_mut(tenant) else {
            return Ok(());
        };
        let mut wanted = expected.sum();
        if let Some(bucket) = &mut account.tokens {
            let limit = bucket.look(0, now).limit;
            if expected.input > limit {
                return Err(Refusal::TooManyTokens { limit });
            }
            // The answer's length is a guess; a full bucket is always enough.
            wanted = wanted.min(limit);
        }
        let requests = account.requests.as_mut().map(|bucket| bucket.look(1, now));
        let tokens = account
            .tokens
            .as_mut()
            .map(|bucket| bucket.look(wanted, now));
        let standing = Standing { requests, tokens };
        if requests.is_some_and(|level| !level.wait.is_zero()) {
            return Err(Refusal::Requests(standing));
        }
        if tokens.is_some_and(|level| !level.wait.is_zero()) {
            return Err(Refusal::Tokens(standing));
        }
        if let Some(bucket) = &mut account.requests {
            bucket.take(1.0, now);
        }
        if let Some(bucket) = &mut account.tokens {
            bucket.take(expected.sum() as f64, now);
        }
        Ok(())
    }

    pub(super) fn standing(&mut self, tenant: &Tenant, now: Duration) -> Standing {
        self.with(tenant, |account| Standing {
            requests: account.requests.as_mut().map(|bucket| bucket.look(0, now)),
            tokens: account.tokens.as_mut().map(|bucket| bucket.look(0, now)),
        })
    }

    /// A request waits from now on. Who had none waiting saves nothing up for the time in between.
    pub(super) fn waits(&mut self, tenant: &Tenant) {
        let virtual_time = self.virtual_time;
        self.with(tenant, |account| {
            if account.waiting == 0 {
                account.tag = account.tag.max(virtual_time);
            }
            account.waiting += 1;
        });
    }

    /// A request that waited runs, and is charged.
    pub(super) fn goes(&mut self, tenant: &Tenant, expected: Tokens) {
        let at = self.with(tenant, |account| {
            let at = account.tag;
            account.waiting = account.waiting.saturating_sub(1);
            account.running += 1;
            account.tag = at.saturating_add(account.share(expected));
            at
        });
        self.virtual_time = self.virtual_time.max(at);
    }

    /// A request that waited is gone; its tokens are given back.
    pub(super) fn left(&mut self, tenant: &Tenant, expected: Tokens, now: Duration) {
        self.with(tenant, |account| {
            account.waiting = account.waiting.saturating_sub(1);
            if let Some(bucket) = &mut account.tokens {
                bucket.take(-(expected.sum() as f64), now);
            }
        });
    }

    /// A request that ran has ended: what it used takes the place of what was expected.
    pub(super) fn settle(
        &mut self,
        tenant: &Tenant,
        expected: Tokens,
        used: Tokens,
        now: Duration,
    ) {
        self.with(tenant, |account| {
            account.running = account.running.saturating_sub(1);
            account.tag = account
                .tag
                .saturating_sub(account.share(expected))
                .saturating_add(account.share(used));
            if let Some(bucket) = &mut account.tokens {
                bucket.take(used.sum() as f64 - expected.sum() as f64, now);
            }
            account.fade(now);
            account.activity += used.sum() as f64;
        });
    }

    pub(super) fn activity(&mut self, now: Duration) -> Vec<(Tenant, f64)> {
        self.by_tenant
            .iter_mut()
            .map(|(tenant, account)| {
                account.fade(now);
                (Arc::clone(tenant), account.activity)
            })
            .collect()
    }

    pub(super) fn speaks_for_others(&self, key: &str) -> bool {
        self.rule(key).is_some_and(|rule| rule.speaks_for_others)
    }

    pub(super) fn objective(&self, name: &str) -> Result<i64, Vec<String>> {
        let known = &self.rules.objectives;
        let found = known.get(name).copied();
        found.ok_or_else(|| known.keys().cloned().collect())
    }
}
