//! Why an expert has so many copies, and why they are where they are.

use std::fmt;

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::placement::{Placement, Reason};
use foregate_planner::Problem;
use serde::Serialize;

use crate::case::Case;
use crate::past::{Missing, Past};
use crate::text;

/// One copy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeldCopy {
    /// Its rank.
    pub rank: Rank,
    /// Its failure domain, empty if unknown.
    pub domain: String,
    /// Its part of the expert's rows when no batch is split anew.
    pub share: f64,
    /// Load of the rank in this layer over the mean of all, as published.
    pub rank_over_mean: f64,
}

/// What could have been done instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Kind {
    /// One copy less: the slot on this rank stays empty.
    Without {
        /// The rank.
        rank: Rank,
    },
    /// One copy more, on this rank, in the slot of another expert that has several.
    Added {
        /// The rank.
        rank: Rank,
        /// The expert that has one copy less.
        instead_of: ExpertId,
    },
    /// A copy elsewhere: it changes places with another expert's.
    Moved {
        /// Where the copy is.
        from: Rank,
        /// Where it would be.
        to: Rank,
        /// Whose copy comes in return.
        exchanged_for: ExpertId,
    },
}

/// An alternative, with what it would give and cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Alternative {
    /// What is done.
    #[serde(flatten)]
    pub kind: Kind,
    /// Balance of the layer's best split under the recorded prediction.
    pub balance: f64,
    /// Copies to load.
    pub copies: usize,
    /// Bytes to load.
    pub bytes: u64,
}

/// A change of an expert's homes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// The placement that changed them.
    pub epoch: Epoch,
    /// Why it was made.
    pub reason: Reason,
    /// When, in milliseconds since 1970; `None` if that decision is not kept.
    pub at_ms: Option<u64>,
    /// Ranks that got a copy.
    pub gained: Vec<Rank>,
    /// Ranks that gave one up.
    pub lost: Vec<Rank>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExpertAnswer {
    /// The layer.
    pub layer: LayerId,
    /// The expert.
    pub expert: ExpertId,
    /// The placement that is told of.
    pub epoch: Epoch,
    /// When the prediction was made that it is judged on.
    pub at_ms: u64,
    /// When the question was asked.
    pub now_ms: u64,
    /// Rows of the expert in a window, as predicted.
    pub rows: f64,
    /// Its part of the layer's rows.
    pub part: f64,
    /// Its place among the layer's experts, 1 for the most asked for.
    pub place: usize,
    /// Experts of the layer.
    pub experts: usize,
    /// Its copies.
    pub copies: Vec<HeldCopy>,
    /// Copies without which its rows alone would overload a rank in any placement.
    pub least_copies: usize,
    /// Balance of the layer's best split with the copies as they are.
    pub balance: f64,
    /// When its homes changed, newest first, as far as that is kept.
    pub changes: Vec<Change>,
    /// What else could be, best first within a kind.
    pub alternatives: Vec<Alternative>,
}

/// Answers about an expert, on the newest decision's prediction.
///
/// # Errors
/// What is not recorded, or is not there.
pub fn expert(
    past: &Past,
    layer: LayerId,
    expert: ExpertId,
    now_ms: u64,
) -> Result<ExpertAnswer, Missing> {
    let record = past.newest()?;
    let plan = past.placement(record.epoch)?;
    let (problem, bytes) = (&record.problem, record.expert_bytes);
    let case = Case::of(plan, problem, layer).ok_or(Missing::Layer {
        layer: layer.index(),
        layers: problem.layers,
    })?;
    if expert.index() >= problem.experts {
        return Err(Missing::Expert {
            expert: expert.index(),
            experts: problem.experts,
        });
    }
    let asked = &problem.demand[layer.index()];
    let rows = asked.get(expert.index()).copied().unwrap_or(0.0);
    let total: f64 = asked.iter().sum();
    Ok(ExpertAnswer {
        layer,
        expert,
        epoch: plan.epoch,
        at_ms: record.at_ms,
        now_ms,
        rows,
        part: if total > 0.0 { rows / total } else { 0.0 },
        place: 1 + asked.iter().filter(|other| **other > rows).count(),
        experts: problem.experts,
        copies: held(plan, problem, layer, expert),
        least_copies: case.least_copies(expert),
        balance: case.balance(),
        changes: changes(past, plan, layer, expert),
        alternatives: alternatives(&case, expert, bytes),
    })
}

/// Load of each rank of a layer under its published shares, over the mean.
pub(crate) fn over_mean(plan: &Placement, problem: &Problem, layer: LayerId) -> Vec<f64> {
    let mut loads = vec![0.0; plan.ranks.len()];
    let layers = plan
        .layers
        .get(layer.index())
        .zip(problem.demand.get(layer.index()));
    for (copies, rows) in layers
        .iter()
        .flat_map(|(plan, rows)| plan.copies.iter().zip(*rows))
    {
        for copy in copies {
            if let Ok(at) = plan.ranks.binary_search(&copy.rank) {
                loads[at] += f64::from(copy.share) * rows;
            }
        }
    }
    let mean = loads.iter().sum::<f64>() / loads.len().max(1) as f64;
    let over = |load: &f64| if mean > 0.0 { load / mean } else { 1.0 };
    loads.iter().map(over).collect()
}

fn held(
    plan: &Placement,
    problem: &Problem,
    layer: LayerId,
    expert: ExpertId,
) -> Vec<HeldCopy> {
    let loads = over_mean(plan, problem, layer);
    let copies = &plan.layers[layer.index()].copies[expert.index()];
    let domain = |rank: Rank| {
        let found = problem.ranks.iter().find(|room| room.rank == rank);
        found.map_or_else(String::new, |room| room.domain.clone())
    };
    let load = |rank| plan.ranks.binary_search(&rank).map_or(0.0, |at| loads[at]);
    let held = copies.iter().map(|copy| HeldCopy {
        rank: copy.rank,
        domain: domain(copy.rank),
        share: f64::from(copy.share),
        rank_over_mean: load(copy.rank),
    });
    held.collect()
}

fn homes(plan: &Placement, layer: LayerId, expert: ExpertId) -> Vec<Rank> {
    let copies = plan
        .layers
        .get(layer.index())
        .and_then(|layer| layer.copies.get(expert.index()));
    copies.into_iter().flatten().map(|copy| copy.rank).collect()
}

fn changes(past: &Past, now: &Placement, layer: LayerId, expert: ExpertId) -> Vec<Change> {
    let mut found = Vec::new();
    let mut plan = now;
    loop {
        let parent = past.placements.get(&plan.parent);
        if parent.is_none() && plan.parent != Epoch(0) {
            return found; // What was before is not kept.
        }
        let (new, old) = (
            homes(plan, layer, expert),
            parent.map_or_else(Vec::new, |parent| homes(parent, layer, expert)),
        );
        if new != old {
            let only = |these: &[Rank], those: &[Rank]| -> Vec<Rank> {
                let outside = these.iter().filter(|rank| !those.contains(rank));
                outside.copied().collect()
            };
            found.push(Change {
                epoch: plan.epoch,
                reason: plan.reason,
                at_ms: past.records.get(&plan.epoch).map(|record| record.at_ms),
                gained: only(&new, &old),
                lost: only(&old, &new),
            });
        }
        // A parent's epoch is lower, so this ends whatever the store holds.
        match parent {
            Some(parent) if parent.epoch < plan.epoch => plan = parent,
            _ => return found,
        }
    }
}

fn alternatives(case: &Case, expert: ExpertId, bytes: u64) -> Vec<Alternative> {
    let holders: Vec<usize> = (0..case.ranks.len())
        .filter(|g| case.holds(*g, expert))
        .collect();
    let others: Vec<usize> = (0..case.ranks.len())
        .filter(|g| !case.holds(*g, expert))
        .collect();
    let made = |kind, case: &Case, copies: usize| Alternative {
        kind,
        balance: case.balance(),
        copies,
        bytes: bytes.saturating_mul(copies as u64),
    };
    let mut found = Vec::new();
    if holders.len() > 1 {
        let without = holders.iter().map(|g| {
            let rank = case.ranks[*g];
            made(Kind::Without { rank }, &case.with(*g, expert, None), 0)
        });
        found.extend(sorted(without.collect()));
    }
    let added = others.iter().filter_map(|h| {
        let evicted = case.slots[*h].iter().filter(|f| case.count(**f) > 1);
        best(evicted.map(|f| {
            let kind = Kind::Added {
                rank: case.ranks[*h],
                instead_of: *f,
            };
            made(kind, &case.with(*h, *f, Some(expert)), 1)
        }))
    });
    found.extend(sorted(added.collect()));
    let moved = others.iter().filter_map(|h| {
        let pairs = holders
            .iter()
            .flat_map(|g| case.slots[*h].iter().map(move |f| (*g, *f)))
            .filter(|(g, f)| !case.holds(*g, *f));
        best(pairs.map(|(g, f)| {
            let kind = Kind::Moved {
                from: case.ranks[g],
                to: case.ranks[*h],
                exchanged_for: f,
            };
            let other = case.with(g, expert, Some(f)).with(*h, f, Some(expert));
            made(kind, &other, 2)
        }))
    });
    found.extend(sorted(moved.collect()));
    found
}

/// The one of the highest balance; of equals the first.
fn best(of: impl Iterator<Item = Alternative>) -> Option<Alternative> {
    of.reduce(|best, other| {
        if other.balance > best.balance {
            other
        } else {
            best
        }
    })
}

fn sorted(mut of: Vec<Alternative>) -> Vec<Alternative> {
    of.sort_by(|a, b| b.balance.total_cmp(&a.balance));
    of
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Without { rank } => write!(f, "without the copy on rank {rank}"),
            Self::Added { rank, instead_of } => {
                write!(
                    f,
                    "one more copy, on rank {rank}, instead of expert {instead_of}"
                )
            }
            Self::Moved {
                from,
                to,
                exchanged_for,
            } => write!(
                f,
                "the copy of rank {from} on rank {to}, exchanged for expert {exchanged_for}"
            ),
        }
    }
}

impl fmt::Display for ExpertAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let homes: Vec<Rank> = self.copies.iter().map(|copy| copy.rank).collect();
        writeln!(
            f,
            "Expert {} of layer {} has {}, on {} (epoch {}).",
            self.expert,
            self.layer,
            text::copies(self.copies.len()),
            text::ranks(&homes),
            self.epoch
        )?;
        writeln!(
            f,
            "It gets {:.1} % of the layer's rows ({:.0} a window; place {} of {}), as predicted {}.",
            100.0 * self.part,
            self.rows,
            self.place,
            self.experts,
            text::ago(self.at_ms, self.now_ms)
        )?;
        self.why(f)?;
        writeln!(f)?;
        for copy in &self.copies {
            let domain = if copy.domain.is_empty() {
                String::new()
            } else {
                format!(" ({})", copy.domain)
            };
            writeln!(
                f,
                "  rank {}{domain}: {:.0} % of its rows; the rank has {:.3} of the mean load",
                copy.rank,
                100.0 * copy.share,
                copy.rank_over_mean
            )?;
        }
        self.tell_changes(f)?;
        writeln!(
            f,
            "\nThe layer's balance is {:.3}. Instead there could be:",
            self.balance
        )?;
        for other in &self.alternatives {
            writeln!(
                f,
                "  {:.3} ({:+.3})  {}{}",
                other.balance,
                other.balance - self.balance,
                other.kind,
                cost(other)
            )?;
        }
        Ok(())
    }
}

impl ExpertAnswer {
    fn why(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, least) = (self.copies.len(), self.least_copies);
        if least > 1 {
            writeln!(
                f,
                "Its rows alone are more than a rank's part: {} are the least.",
                text::copies(least)
            )?;
        } else {
            writeln!(f, "One copy could carry its rows.")?;
        }
        if count > least {
            let drop = self.alternatives.iter().find_map(|other| match other.kind {
                Kind::Without { .. } => Some(other.balance),
                Kind::Added { .. } | Kind::Moved { .. } => None,
            });
            let worth = drop.map_or(0.0, |without| self.balance - without);
            writeln!(
                f,
                "The other{} link ranks, so that a split can level them: one copy less costs {worth:.3} of balance or more.",
                if count - least == 1 { "" } else { "s" }
            )?;
        }
        Ok(())
    }

    fn tell_changes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.changes.is_empty() {
            return writeln!(
                f,
                "Its homes have not changed in the placements that are kept."
            );
        }
        for change in self.changes.iter().take(3) {
            write!(f, "Epoch {} ({}", change.epoch, change.reason.name())?;
            if let Some(at) = change.at_ms {
                write!(f, ", {}", text::ago(at, self.now_ms))?;
            }
            write!(f, ")")?;
            if !change.gained.is_empty() {
                write!(f, " gave {} a copy", text::ranks(&change.gained))?;
            }
            if !change.lost.is_empty() {
                let and = if change.gained.is_empty() { "" } else { " and" };
                write!(f, "{and} took it from {}", text::ranks(&change.lost))?;
            }
            writeln!(f, ".")?;
        }
        Ok(())
    }
}

fn cost(of: &Alternative) -> String {
    match of.copies {
        0 => String::new(),
        n => format!("; {} to load, {}", text::copies(n), text::bytes(of.bytes)),
    }
}
