//! What other workers or slots would give and cost, before anybody pays for them.

use std::fmt;
use std::str::FromStr;

use foregate_api::ids::{LayerId, Rank};
use foregate_api::placement::Placement;
use foregate_planner::redundancy::slots_to_link;
use foregate_planner::split::balance;
use foregate_planner::{History, PlanError, Problem, RankSlots, Settings, plan};
use serde::Serialize;

use crate::case::Case;
use crate::past::{Missing, Past};
use crate::text;

/// Most workers and slots that may be asked about.
const MOST: u32 = 4096;

/// What is asked about: `workers=6,slots=9`. What is not named stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wish {
    /// Workers with expert slots.
    pub workers: Option<u32>,
    /// Expert slots of each worker per layer.
    pub slots: Option<u32>,
}

/// Why a wish cannot be read, or not be fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum WishError {
    /// It is not of the form `workers=6,slots=9`.
    #[error(
        "{0:?}: give workers=N, slots=N or both, such as workers=6,slots=9, each from 1 to {MOST}"
    )]
    Form(String),
    /// No placement is possible.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Nothing to start from.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// The placement in force and the wish are the same.
    #[error(
        "a plan was refused that should have been possible; this is a defect of the planner"
    )]
    Nothing,
}

impl FromStr for Wish {
    type Err = WishError;

    fn from_str(text: &str) -> Result<Self, WishError> {
        let wrong = || WishError::Form(text.to_owned());
        let mut wish = Self::default();
        for part in text.split(',') {
            let (name, number) = part.split_once('=').ok_or_else(wrong)?;
            let number: u32 = number.trim().parse().map_err(|_| wrong())?;
            if !(1..=MOST).contains(&number) {
                return Err(wrong());
            }
            let field = match name.trim() {
                "workers" => &mut wish.workers,
                "slots" => &mut wish.slots,
                _ => return Err(wrong()),
            };
            if field.replace(number).is_some() {
                return Err(wrong());
            }
        }
        Ok(wish)
    }
}

/// What there is.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// Ranks, model and load.
    pub problem: Problem,
    /// What the planner is allowed.
    pub settings: Settings,
    /// The placement in force, if there is one.
    pub previous: Option<Placement>,
    /// Bytes of one expert of one layer.
    pub expert_bytes: u64,
    /// Bytes of the weights that every worker holds.
    pub dense_bytes: u64,
    /// Bytes that one rank loads in a second, if known.
    pub bytes_per_second: Option<f64>,
}

impl Machine {
    /// A running cluster under its newest prediction.
    ///
    /// # Errors
    /// If nothing is recorded of it.
    pub fn of(past: &Past) -> Result<Self, Missing> {
        let record = past.newest()?;
        let mut rates: Vec<f64> = past
            .records
            .values()
            .filter_map(|record| {
                let seconds = record.measured.seconds.filter(|seconds| *seconds > 0.0)?;
                let most = record.predicted.cost.most_to_one_rank as u64;
                let bytes = most.saturating_mul(record.expert_bytes) as f64;
                (most > 0).then_some(bytes / seconds)
            })
            .collect();
        rates.sort_by(f64::total_cmp);
        Ok(Self {
            problem: record.problem.clone(),
            settings: record.settings,
            previous: Some(past.placement(record.epoch)?.clone()),
            expert_bytes: record.expert_bytes,
            dense_bytes: record.dense_bytes,
            bytes_per_second: rates.get(rates.len() / 2).copied(),
        })
    }
}

/// Workers and slots, with what they give.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Offer {
    /// Workers with expert slots.
    pub workers: usize,
    /// Slots of each per layer; of the largest, if they differ.
    pub slots: usize,
    /// Copies of a layer.
    pub copies: usize,
    /// Copies beyond one of each expert.
    pub redundant: usize,
    /// Redundant copies that link all ranks, so that a split can level almost any batch.
    pub redundant_needed: usize,
    /// Slots of each worker that link all ranks.
    pub slots_needed: usize,
    /// The same when one worker is lost.
    pub slots_needed_after_loss: usize,
    /// Slots of each worker that give every expert a second copy.
    pub slots_needed_for_cover: usize,
    /// Groups of linked ranks, most of all layers; 1 is best.
    pub components: usize,
    /// Bytes of a worker's experts.
    pub expert_bytes: u64,
    /// Bytes of a worker's weights, with those that every worker holds. Keys and values of sequences come on top.
    pub weight_bytes: u64,
    /// Balance (mean over maximum load) if rows were split evenly over copies, mean over layers.
    pub balance_even: f64,
    /// Balance of the best split, mean over layers.
    pub balance: f64,
    /// Rows whose only copy goes with a worker, on average over the workers.
    pub orphaned: f64,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WhatIf {
    /// What there is now, if something runs.
    pub now: Option<Offer>,
    /// What there would be.
    pub then: Offer,
    /// Copies to load over all ranks, to come there.
    pub copies: usize,
    /// Bytes to load over all ranks.
    pub bytes: u64,
    /// Bytes of the rank that loads most.
    pub most_to_one_rank: u64,
    /// Seconds that takes; `None` if nobody knows how fast a rank loads.
    pub seconds: Option<f64>,
    /// Whether the load is that of a cluster, or unknown and every expert counts the same.
    pub load_known: bool,
}

/// Answers what `wish` would give and cost. Ranks with the lowest numbers stay; new ones are numbered above.
///
/// # Errors
/// If there is no such placement, with the remedy.
pub fn what_if(machine: &Machine, wish: Wish) -> Result<WhatIf, WishError> {
    let problem = wished(&machine.problem, wish);
    let previous = machine.previous.as_ref();
    let decision = plan(
        &problem,
        previous,
        &machine.settings,
        &mut History::default(),
    )?;
    let report = decision.report();
    let plan = decision
        .placement()
        .or(previous)
        .ok_or(WishError::Nothing)?;
    let most = (report.most_to_one_rank as u64).saturating_mul(machine.expert_bytes);
    Ok(WhatIf {
        now: previous.map(|plan| offer(plan, &machine.problem, machine)),
        then: offer(plan, &problem, machine),
        copies: report.copies_moved,
        bytes: machine
            .expert_bytes
            .saturating_mul(report.copies_moved as u64),
        most_to_one_rank: most,
        seconds: machine.bytes_per_second.map(|rate| most as f64 / rate),
        load_known: problem.demand.iter().flatten().any(|rows| *rows > 0.0),
    })
}

fn wished(problem: &Problem, wish: Wish) -> Problem {
    let mut wished = problem.clone();
    let ranks = &mut wished.ranks;
    ranks.retain(|room| room.slots > 0);
    let slots = ranks.iter().map(|room| room.slots).max().unwrap_or(0);
    if let Some(workers) = wish.workers {
        ranks.truncate(workers as usize);
        let mut next = ranks.last().map_or(0, |room| room.rank.0.saturating_add(1));
        while ranks.len() < workers as usize {
            ranks.push(RankSlots {
                rank: Rank(next),
                slots,
                // Its own: nothing is known to fail with it.
                domain: String::new(),
            });
            next = next.saturating_add(1);
        }
    }
    if let Some(slots) = wish.slots {
        for room in ranks {
            room.slots = slots as usize;
        }
    }
    wished
}

fn offer(plan: &Placement, problem: &Problem, machine: &Machine) -> Offer {
    let (ranks, experts, layers) = (plan.ranks.len(), problem.experts, plan.layers.len());
    let slots = plan
        .layers
        .iter()
        .flat_map(|layer| layer.slots.iter().map(Vec::len))
        .max()
        .unwrap_or(0);
    let copies = plan
        .layers
        .first()
        .map_or(0, |layer| layer.slots.iter().map(Vec::len).sum());
    let cases: Vec<Case> = (0..layers)
        .filter_map(|l| Case::of(plan, problem, LayerId(l as u32)))
        .collect();
    let mean = |of: &dyn Fn(&Case) -> f64| {
        cases.iter().map(of).sum::<f64>() / cases.len().max(1) as f64
    };
    let expert_bytes = machine
        .expert_bytes
        .saturating_mul(slots as u64)
        .saturating_mul(layers as u64);
    let smaller = ranks.saturating_sub(1);
    Offer {
        workers: ranks,
        slots,
        copies,
        redundant: copies.saturating_sub(experts),
        redundant_needed: ranks.saturating_sub(1),
        slots_needed: slots_to_link(experts, ranks),
        slots_needed_after_loss: slots_to_link(experts, smaller),
        slots_needed_for_cover: (2 * experts).div_ceil(ranks.max(1)).min(experts),
        components: cases.iter().map(Case::components).max().unwrap_or(0),
        expert_bytes,
        weight_bytes: expert_bytes.saturating_add(machine.dense_bytes),
        balance_even: mean(&|case| balance(&case.even_loads())),
        balance: mean(&Case::balance),
        orphaned: mean(&|case| case.alone() / ranks.max(1) as f64),
    }
}

/// A sentence about a rule.
fn rule(slots: usize, needed: usize) -> &'static str {
    if slots >= needed {
        "holds"
    } else {
        "does not hold"
    }
}

impl fmt::Display for WhatIf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.load_known {
            writeln!(f, "The load is not known: every expert counts the same.\n")?;
        }
        let row = |f: &mut fmt::Formatter<'_>, what: &str, of: &dyn Fn(&Offer) -> String| {
            let now = self.now.as_ref().map(of).unwrap_or_default();
            writeln!(f, "  {what:<34}{now:>14}{:>14}", of(&self.then))
        };
        let now = if self.now.is_some() { "now" } else { "" };
        writeln!(f, "  {:<34}{now:>14}{:>14}", "", "then")?;
        row(f, "workers x slots per layer", &|o| {
            format!("{} x {}", o.workers, o.slots)
        })?;
        row(f, "experts of a worker", &|o| text::bytes(o.expert_bytes))?;
        row(f, "weights of a worker", &|o| text::bytes(o.weight_bytes))?;
        row(f, "redundant copies (needed to link)", &|o| {
            format!("{} ({})", o.redundant, o.redundant_needed)
        })?;
        row(f, "groups of linked ranks", &|o| o.components.to_string())?;
        row(f, "balance, even split", &|o| {
            format!("{:.3}", o.balance_even)
        })?;
        row(f, "balance, best split", &|o| format!("{:.3}", o.balance))?;
        row(f, "rows orphaned by a worker's loss", &|o| {
            format!("{:.1} %", 100.0 * o.orphaned)
        })?;
        let then = &self.then;
        writeln!(f)?;
        for (what, needed) in [
            ("All ranks linked", then.slots_needed),
            (
                "The same after the loss of a worker",
                then.slots_needed_after_loss,
            ),
            ("Every expert twice", then.slots_needed_for_cover),
        ] {
            writeln!(
                f,
                "{what}: {} ({needed} slots needed).",
                rule(then.slots, needed)
            )?;
        }
        writeln!(
            f,
            "To come there: {} to load, {}; at most {} by one rank, {}.",
            text::copies(self.copies),
            text::bytes(self.bytes),
            text::bytes(self.most_to_one_rank),
            self.seconds.map_or_else(
                || "for which no speed was measured (give --bandwidth)".to_owned(),
                |seconds| format!("about {seconds:.1} s")
            )
        )
    }
}
