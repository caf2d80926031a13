//! Who heats which expert: routed rows of ended sequences by tenant, layer and expert, old ones fading.
//!
//! Bounded: so many tenants have counts of their own; when another comes, the one with the fewest rows is added to the
//! others. Pure: the caller says what time it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::traffic::Tenant;

/// Tenants that have counts of their own.
const TENANTS: usize = 32;
/// Tenants that are shown by name.
const SHOWN: usize = 16;
/// Time in which a row loses half of its weight, in milliseconds.
const HALF_LIFE_MS: f64 = 300_000.0;
/// Time between two losses of weight, in milliseconds.
const FADE_MS: f64 = 10_000.0;
/// What the tenants without a name of their own are called.
pub const OTHERS: &str = "other";

/// Counts of one tenant, layer-major; 32 bits of float hold a share as exactly as it is shown.
#[derive(Debug, Clone, Default)]
struct Counts {
    rows: f64,
    by_expert: Vec<f32>,
}

/// Counts of all tenants of one model.
#[derive(Debug, Default)]
pub struct Heat {
    experts: usize,
    by_tenant: BTreeMap<Tenant, Counts>,
    others: Counts,
    faded_ms: f64,
}

/// What one tenant asks of the experts.
#[derive(Debug, Clone, PartialEq)]
pub struct OfTenant {
    /// Its name; [`OTHERS`] for all that have none of their own.
    pub tenant: String,
    /// Routed rows that have not faded.
    pub rows: f64,
    /// Part of all tenants' routed rows.
    pub share: f64,
    /// The experts that it uses most, the most used first.
    pub hottest: Vec<Hot>,
}

/// One expert of a tenant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hot {
    /// MoE layer.
    pub layer: usize,
    /// Expert.
    pub expert: usize,
    /// Part of the tenant's routed rows in this layer that it gets.
    pub of_tenant: f64,
    /// Part of the expert's routed rows that the tenant brings.
    pub of_expert: f64,
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        if self.by_expert.len() < other.by_expert.len() {
            self.by_expert.resize(other.by_expert.len(), 0.0);
        }
        for (sum, more) in self.by_expert.iter_mut().zip(&other.by_expert) {
            *sum += more;
        }
    }

    fn fade(&mut self, factor: f64) {
        self.rows *= factor;
        self.by_expert
            .iter_mut()
            .for_each(|count| *count *= factor as f32);
    }

    fn at(&self, at: usize) -> f64 {
        self.by_expert.get(at).copied().map_or(0.0, f64::from)
    }
}

impl Heat {
    /// Counts a sequence: its rows by layer and expert, layer-major with `experts` each. Another shape begins anew.
    pub fn note(&mut self, now_ms: f64, tenant: &Tenant, experts: usize, counts: &[u32]) {
        if experts == 0 || counts.is_empty() || !counts.len().is_multiple_of(experts) {
            return;
        }
        let entries = counts.len();
        let known = self
            .everybody()
            .next()
            .map_or(entries, |any| any.by_expert.len());
        if self.experts != experts || known != entries {
            *self = Self {
                experts,
                faded_ms: now_ms,
                ..Self::default()
            };
        }
        self.fade(now_ms);
        let more = Counts {
            rows: counts.iter().copied().map(f64::from).sum(),
            by_expert: counts.iter().map(|count| *count as f32).collect(),
        };
        let room = self.by_tenant.len() < TENANTS || self.by_tenant.contains_key(tenant);
        if !room {
            self.make_room();
        }
        self.by_tenant
            .entry(Arc::clone(tenant))
            .or_default()
            .add(&more);
    }

    fn everybody(&self) -> impl Iterator<Item = &Counts> {
        let others = (!self.others.by_expert.is_empty()).then_some(&self.others);
        self.by_tenant.values().chain(others)
    }

    fn make_room(&mut self) {
        let least = self
            .by_tenant
            .iter()
            .min_by(|a, b| a.1.rows.total_cmp(&b.1.rows));
        if let Some(tenant) = least.map(|(tenant, _)| Arc::clone(tenant))
            && let Some(counts) = self.by_tenant.remove(&tenant)
        {
            self.others.add(&counts);
        }
    }

    fn fade(&mut self, now_ms: f64) {
        let since = now_ms - self.faded_ms;
        if since < FADE_MS {
            return;
        }
        self.faded_ms = now_ms;
        let factor = 0.5_f64.powf(since / HALF_LIFE_MS);
        self.others.fade(factor);
        self.by_tenant
            .values_mut()
            .for_each(|counts| counts.fade(factor));
    }

    /// The most active tenants by name, then all others; each with up to `hottest` experts.
    #[must_use]
    pub fn tenants(&self, hottest: usize) -> Vec<OfTenant> {
        let groups = self.groups();
        let all: f64 = groups.iter().map(Group::rows).sum();
        let of = |group: &Group<'_>| OfTenant {
            tenant: group.name.to_owned(),
            rows: group.rows(),
            share: group.rows() / all,
            hottest: self.hottest(group, &groups, hottest),
        };
        if all > 0.0 {
            groups.iter().map(of).collect()
        } else {
            Vec::new()
        }
    }

    /// Parts that tenants bring of one expert's rows, as in [`Heat::tenants`].
    #[must_use]
    pub fn of_expert(&self, layer: usize, expert: usize) -> Vec<(String, f64)> {
        let at = layer * self.experts + expert;
        let groups = self.groups();
        let all: f64 = groups.iter().map(|group| group.at(at)).sum();
        if all <= 0.0 || expert >= self.experts {
            return Vec::new();
        }
        let part = |group: &Group<'_>| (group.name.to_owned(), group.at(at) / all);
        groups.iter().map(part).collect()
    }

    /// The most active ones, then the rest as one. A tenant that calls itself as the rest is called counts there: a name
    /// stands for one series.
    fn groups(&self) -> Vec<Group<'_>> {
        let mut order: Vec<(&str, &Counts)> = self
            .by_tenant
            .iter()
            .map(|(name, counts)| (&**name, counts))
            .collect();
        order.sort_by(|a, b| b.1.rows.total_cmp(&a.1.rows).then(a.0.cmp(b.0)));
        let mut rest = Group {
            name: OTHERS,
            counts: vec![&self.others],
        };
        let mut groups = Vec::new();
        for (name, counts) in order {
            if name == OTHERS || groups.len() >= SHOWN {
                rest.counts.push(counts);
            } else {
                groups.push(Group {
                    name,
                    counts: vec![counts],
                });
            }
        }
        if rest.rows() > 0.0 {
            groups.push(rest);
        }
        groups
    }

    fn hottest(&self, own: &Group<'_>, all: &[Group<'_>], most: usize) -> Vec<Hot> {
        if most == 0 {
            return Vec::new();
        }
        let entries = own.counts.iter().map(|counts| counts.by_expert.len()).max();
        let entries = entries.unwrap_or(0);
        let layers = (entries / self.experts.max(1)).max(1) as f64;
        let mut order: Vec<(usize, f64)> = (0..entries).map(|at| (at, own.at(at))).collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        order.truncate(most);
        order.retain(|(_, rows)| *rows > 0.0);
        let hot = |(at, rows): (usize, f64)| Hot {
            layer: at / self.experts,
            expert: at % self.experts,
            // Every layer has the same number of rows.
            of_tenant: rows * layers / own.rows(),
            of_expert: rows / all.iter().map(|group| group.at(at)).sum::<f64>(),
        };
        order.into_iter().map(hot).collect()
    }
}

/// Those that are shown under one name.
struct Group<'a> {
    name: &'a str,
    counts: Vec<&'a Counts>,
}

impl Group<'_> {
    fn rows(&self) -> f64 {
        self.counts.iter().map(|counts| counts.rows).sum()
    }

    fn at(&self, at: usize) -> f64 {
        self.counts.iter().map(|counts| counts.at(at)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> Tenant {
        Tenant::from(name)
    }

    #[test]
    fn each_tenant_has_its_experts_and_its_part_of_them() {
        let mut heat = Heat::default();
        heat.note(0.0, &tenant("a"), 4, &[30, 10, 0, 0, 0, 0, 40, 0]);
        heat.note(0.0, &tenant("b"), 4, &[10, 0, 0, 10, 0, 0, 0, 20]);
        let tenants = heat.tenants(2);
        assert_eq!(tenants.len(), 2);
        assert_eq!(tenants[0].tenant, "a");
        assert!((tenants[0].share - 80.0 / 120.0).abs() < 1e-9);
        let hot = tenants[0].hottest.clone();
        assert_eq!((hot[0].layer, hot[0].expert), (1, 2));
        assert!((hot[0].of_tenant - 1.0).abs() < 1e-6 && (hot[0].of_expert - 1.0).abs() < 1e-6);
        assert_eq!((hot[1].layer, hot[1].expert), (0, 0));
        assert!(
            (hot[1].of_tenant - 0.75).abs() < 1e-6 && (hot[1].of_expert - 0.75).abs() < 1e-6
        );
        assert_eq!(
            heat.of_expert(0, 3),
            [("a".to_owned(), 0.0), ("b".to_owned(), 1.0)]
        );
        assert!(heat.of_expert(0, 2).is_empty() && heat.of_expert(9, 0).is_empty());
    }

    #[test]
    fn names_are_bounded_and_nobody_is_lost() {
        let mut heat = Heat::default();
        for number in 0..500_u32 {
            let name = tenant(&format!("t{number}"));
            heat.note(0.0, &name, 2, &[1 + number, 0]);
        }
        let tenants = heat.tenants(1);
        assert_eq!(tenants.len(), SHOWN + 1);
        assert_eq!(tenants.last().unwrap().tenant, OTHERS);
        let sum: f64 = tenants.iter().map(|one| one.rows).sum();
        assert!((sum - 125_250.0).abs() < 1.0, "{sum}");
        assert!((tenants.iter().map(|one| one.share).sum::<f64>() - 1.0).abs() < 1e-9);
        assert_eq!(tenants[0].tenant, "t499");
    }

    #[test]
    fn old_rows_fade_and_another_model_begins_anew() {
        let mut heat = Heat::default();
        heat.note(0.0, &tenant("a"), 2, &[100, 0]);
        heat.note(HALF_LIFE_MS, &tenant("b"), 2, &[0, 50]);
        let tenants = heat.tenants(1);
        assert!((tenants[0].rows - 50.0).abs() < 1e-3 && (tenants[1].rows - 50.0).abs() < 1e-3);
        heat.note(HALF_LIFE_MS, &tenant("c"), 4, &[1, 1, 1, 1]);
        assert_eq!(heat.tenants(1).len(), 1);
        heat.note(HALF_LIFE_MS, &tenant("c"), 0, &[1]);
        heat.note(HALF_LIFE_MS, &tenant("c"), 4, &[1, 1, 1]);
        assert!((heat.tenants(1)[0].rows - 4.0).abs() < 1e-9);
    }

    #[test]
    fn a_tenant_of_the_name_of_the_others_is_one_of_them() {
        let mut heat = Heat::default();
        heat.note(0.0, &tenant(OTHERS), 2, &[3, 0]);
        for number in 0..40_u32 {
            heat.note(0.0, &tenant(&format!("t{number}")), 2, &[5, 0]);
        }
        let named = heat.tenants(1);
        let others = named.iter().filter(|one| one.tenant == OTHERS);
        assert_eq!(others.count(), 1);
    }
}
