//! What tenants did, for metrics: a row each for the most active, one for all others.
//!
//! A row begins when its tenant comes among the most active and counts from then on, so a series that exists never
//! falls, and the number of series has a bound.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{OTHER, Tenant, Tokens};

/// Tenants with a row of their own.
pub const NAMED: usize = 16;
/// By how much a newcomer must be more active than the least of those that have a row.
const CLEARLY: f64 = 2.0;

/// What a tenant did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that ran.
    pub granted: u64,
    /// Requests that were sent away, by the word of the reason; `left`: the client went while it waited.
    pub refused: BTreeMap<&'static str, u64>,
    /// Tokens read and made.
    pub tokens: Tokens,
    /// Time that granted requests waited.
    pub waited: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    named: BTreeMap<Tenant, Tally>,
    other: Tally,
}

impl Ledger {
    fn of(&mut self, tenant: &Tenant) -> &mut Tally {
        self.named.get_mut(tenant).unwrap_or(&mut self.other)
    }

    pub(super) fn granted(&mut self, tenant: &Tenant, waited: Duration) {
        let tally = self.of(tenant);
        tally.granted += 1;
        tally.waited = tally.waited.saturating_add(waited);
    }

    pub(super) fn refused(&mut self, tenant: &Tenant, why: &'static str) {
        *self.of(tenant).refused.entry(why).or_default() += 1;
    }

    pub(super) fn used(&mut self, tenant: &Tenant, tokens: Tokens) {
        let tally = self.of(tenant);
        tally.tokens.input = tally.tokens.input.saturating_add(tokens.input);
        tally.tokens.output = tally.tokens.output.saturating_add(tokens.output);
    }

    /// Gives rows to the most active. `activity`: of all tenants.
    pub(super) fn choose(&mut self, mut activity: Vec<(Tenant, f64)>) {
        activity.retain(|(tenant, _)| **tenant != *OTHER);
        activity.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let of = |tenant: &Tenant| {
            let found = activity.iter().find(|(known, _)| known == tenant);
            found.map_or(0.0, |(_, active)| *active)
        };
        for (tenant, active) in &activity {
            if *active <= 0.0 || self.named.contains_key(tenant) {
                continue;
            }
            if self.named.len() >= NAMED {
                let least = self
                    .named
                    .keys()
                    .map(|known| (of(known), Arc::clone(known)))
                    .min_by(|a, b| a.0.total_cmp(&b.0));
                match least {
                    Some((least, known)) if *active > least * CLEARLY => {
                        self.named.remove(&known);
                    }
                    _ => return,
                }
            }
            self.named.insert(Arc::clone(tenant), Tally::default());
        }
    }

    /// All rows, each with what `waiting` says of its tenant.
    pub(super) fn rows(
        &self,
        waiting: impl Fn(Option<&Tenant>) -> u32,
    ) -> Vec<(Tenant, Tally, u32)> {
        let named: u32 = self.named.keys().map(|tenant| waiting(Some(tenant))).sum();
        let rest = waiting(None).saturating_sub(named);
        self.named
            .iter()
            .map(|(tenant, tally)| (Arc::clone(tenant), tally.clone(), waiting(Some(tenant))))
            .chain([(Tenant::from(OTHER), self.other.clone(), rest)])
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn many(from: usize, to: usize, active: f64) -> Vec<(Tenant, f64)> {
        (from..to)
            .map(|i| (format!("t{i:02}").into(), active))
            .collect()
    }

    #[test]
    fn rows_are_few_and_never_fall() {
        let mut ledger = Ledger::default();
        let tokens = Tokens {
            input: 1,
            output: 2,
        };
        ledger.used(&"t00".into(), tokens);
        ledger.choose(many(0, 40, 1.0));
        assert_eq!(ledger.named.len(), NAMED);
        // What it did before it had a row stays with the others.
        ledger.used(&"t00".into(), tokens);
        ledger.used(&"t39".into(), tokens);
        let rows = ledger.rows(|tenant| if tenant.is_some() { 1 } else { 40 });
        assert_eq!(
            (rows.len(), &*rows[0].0, rows[0].1.tokens),
            (NAMED + 1, "t00", tokens)
        );
        let (other, tally, waiting) = rows.last().unwrap();
        assert_eq!((&**other, tally.tokens.output, *waiting), (OTHER, 4, 24));
        // Those a little more active wait for a row; those clearly more take it from the least.
        ledger.choose([many(0, 16, 1.0), many(30, 31, 1.5)].concat());
        assert!(!ledger.named.contains_key("t30"));
        ledger.choose([many(0, 15, 1.0), many(30, 31, 1.5)].concat());
        assert!(ledger.named.contains_key("t30") && !ledger.named.contains_key("t15"));
        assert_eq!(ledger.named.len(), NAMED);
    }
}
