//! Ranks are lost: what is gone, what a repair loads, and how balance comes back.

use foregate_api::ids::Rank;
use foregate_api::placement::Placement;
use foregate_planner::{History, plan};

use crate::eplb::{Cluster, eplb};
use crate::generator::{Counts, Generator, Rows};
use crate::homes::{self, moved, without};
use crate::judge;
use crate::policy::{EVERY, Seen, problem};
use crate::run::{Case, SimulateError, Watch};
use crate::shape::Shape;
use crate::source::Window;
use crate::sums::mean;

/// Decode batches that a placement is judged on.
const BATCHES: usize = 2;

/// What is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lose {
    /// A rank; `None`: each in turn.
    Rank(Option<usize>),
    /// A node with all its ranks; `None`: each in turn.
    Node(Option<usize>),
}

impl Lose {
    /// `rank:N`, `rank:each`, `node:N` or `node:each`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, which) = text.split_once(':')?;
        let which = match which {
            "each" => None,
            number => Some(number.parse().ok()?),
        };
        match kind {
            "rank" => Some(Self::Rank(which)),
            "node" => Some(Self::Node(which)),
            _ => None,
        }
    }

    /// The ranks that are lost together, case by case.
    ///
    /// # Errors
    /// If there is no such rank or node, or nobody would be left.
    pub fn cases(self, shape: &Shape) -> Result<Vec<Vec<Rank>>, SimulateError> {
        let (which, of) = match self {
            Self::Rank(which) => (which, shape.ranks),
            Self::Node(which) => (which, shape.nodes),
        };
        if of < 2 || which.is_some_and(|n| n >= of) {
            return Err(SimulateError::Lose {
                lose: self,
                setting: shape.name,
                ranks: shape.ranks,
                nodes: shape.nodes,
            });
        }
        let dead = |n: usize| match self {
            Self::Rank(_) => vec![Rank(n as u32)],
            Self::Node(_) => homes::ranks(shape.ranks)
                .into_iter()
                .filter(|rank| shape.node(rank.index()) == n)
                .collect(),
        };
        let each = which.map_or_else(|| (0..of).collect(), |n| vec![n]);
        Ok(each.into_iter().map(dead).collect())
    }
}

impl std::fmt::Display for Lose {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (kind, which) = match self {
            Self::Rank(which) => ("rank", which),
            Self::Node(which) => ("node", which),
        };
        match which {
            Some(n) => write!(f, "{kind}:{n}"),
            None => write!(f, "{kind}:each"),
        }
    }
}

/// One seed: before anything is lost, and case by case.
#[derive(Debug, Default)]
pub struct LossOutcome {
    pub(crate) seed: u64,
    pub(crate) before: Vec<f64>,
    pub(crate) cases: Vec<Lost>,
}

/// One case.
#[derive(Debug, Default)]
pub(crate) struct Lost {
    /// Experts without a copy, mean over layers.
    pub(crate) orphans: f64,
    /// Share of the rows of experts without a copy, by layer.
    pub(crate) orphaned: Vec<f64>,
    /// Balance of the best split of the rows that are left, by layer and batch.
    pub(crate) at_once: Vec<f64>,
    /// The repair, then window by window.
    pub(crate) after: Vec<After>,
    /// EPLB afresh on the ranks that are left, as it labels them, and with ranks renamed.
    pub(crate) afresh: [After; 2],
}

/// How far things are.
#[derive(Debug, Clone, Default)]
pub(crate) struct After {
    /// Copies loaded since the loss.
    pub(crate) copies: usize,
    /// Balance of the best split, by layer and batch.
    pub(crate) split: Vec<f64>,
}

/// Runs one seed: the operator's first plan, then each case from there, with as many windows as the case has steps.
///
/// # Errors
/// A case that makes no sense, or a planner that refuses.
pub fn lose(
    case: &Case,
    lose: Lose,
    seed: u64,
    watch: &dyn Watch,
) -> Result<LossOutcome, SimulateError> {
    case.validate()?;
    let cases = lose.cases(&case.shape)?;
    let shape = &case.shape;
    let mut load = Generator::new(shape, case.regime, seed);
    let mut seen = Seen::nothing(shape);
    for _ in 0..EVERY {
        load.advance();
        seen.window(Window::of(&mut load))?;
    }
    let mut history = History::default();
    let first = plan(
        &problem(case, &seen, &[]),
        None,
        &case.settings,
        &mut history,
    )?;
    let start = Start {
        case,
        placement: first.placement().cloned().ok_or(SimulateError::NoPlan)?,
        eplb: fresh(shape, &seen, &homes::ranks(shape.ranks)),
        history,
        seen,
        load: load.clone(),
    };
    let batches: Vec<Counts> = (0..BATCHES).map(|_| load.decode()).collect();
    let mut outcome = LossOutcome {
        seed,
        before: split(&start.placement, &batches)?,
        cases: Vec::new(),
    };
    for lost in &cases {
        outcome.cases.push(start.after(lost)?);
        watch.step();
    }
    Ok(outcome)
}

/// The moment of the loss.
struct Start<'a> {
    case: &'a Case,
    placement: Placement,
    eplb: Placement,
    history: History,
    seen: Seen,
    load: Generator,
}

impl Start<'_> {
    fn after(&self, lost: &[Rank]) -> Result<Lost, SimulateError> {
        let shape = &self.case.shape;
        // Ranks take the same tokens as before; those of the lost ones are gone with them.
        let part = 1.0 - lost.len() as f64 / shape.ranks as f64;
        let mut load = self.load.clone();
        let batches: Vec<Counts> = (0..BATCHES).map(|_| load.decode_part(part)).collect();
        let (mut seen, mut history) = (self.seen.clone(), self.history.clone());
        let left = without(&self.placement, lost);
        let (orphans, orphaned) = orphans(&left, &load.expected());
        let mut found = Lost {
            orphans,
            orphaned,
            at_once: split(&left, &batches)?,
            afresh: self.afresh(lost, &batches)?,
            after: Vec::new(),
        };
        let (mut in_force, mut copies) = (self.placement.clone(), 0);
        for step in 0..=self.case.steps {
            let problem = problem(self.case, &seen, lost);
            let decided = plan(&problem, Some(&in_force), &self.case.settings, &mut history)?;
            if let Some(next) = decided.placement() {
                copies += moved(&in_force, next, shape).copies;
                in_force = next.clone();
            }
            let batches = if step == 0 {
                batches.clone()
            } else {
                (0..BATCHES).map(|_| load.decode_part(part)).collect()
            };
            let split = split(&in_force, &batches)?;
            found.after.push(After { copies, split });
            load.advance();
            seen.window(Window::of(&mut load))?;
        }
        Ok(found)
    }

    fn afresh(&self, lost: &[Rank], batches: &[Counts]) -> Result<[After; 2], SimulateError> {
        let shape = &self.case.shape;
        let left = without(&self.eplb, lost);
        let new = fresh(shape, &self.seen, &left.ranks);
        let renamed = homes::renamed(&left, &new);
        let judged = |placement: &Placement| -> Result<After, SimulateError> {
            Ok(After {
                copies: moved(&left, placement, shape).copies,
                split: split(placement, batches)?,
            })
        };
        Ok([judged(&new)?, judged(&renamed)?])
    }
}

fn split(placement: &Placement, batches: &[Counts]) -> Result<Vec<f64>, SimulateError> {
    let mut into = Vec::new();
    for batch in batches {
        judge::solved(placement, batch, &mut into)?;
    }
    Ok(into)
}

/// EPLB on these ranks.
fn fresh(shape: &Shape, seen: &Seen, ranks: &[Rank]) -> Placement {
    let cluster = Cluster {
        copies: shape.slots() * ranks.len(),
        ranks: ranks.len(),
        nodes: 1,
        groups: 1,
    };
    homes::placement(
        ranks.to_vec(),
        &eplb(&seen.sum(EVERY), cluster),
        shape.experts,
    )
}

/// Experts without a copy, mean over layers, and the share of the rows that are theirs, by layer.
fn orphans(left: &Placement, expected: &Rows) -> (f64, Vec<f64>) {
    let (mut count, mut shares) = (Vec::new(), Vec::new());
    for (layer, rows) in left.layers.iter().zip(expected) {
        let gone = || (0..rows.len()).filter(|e| layer.copies[*e].is_empty());
        count.push(gone().count() as f64);
        shares.push(gone().fold(0.0, |sum, e| sum + rows[e]) / rows.iter().sum::<f64>());
    }
    (mean(&count), shares)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_read_as_it_is_written() {
        let shape = Shape::named("dsv3-64g").unwrap();
        for text in ["rank:7", "rank:each", "node:0", "node:each"] {
            assert_eq!(Lose::parse(text).unwrap().to_string(), text);
        }
        for text in ["rank", "rank:-1", "rack:1", "node:all"] {
            assert_eq!(Lose::parse(text), None, "{text}");
        }
        assert_eq!(Lose::Rank(Some(7)).cases(&shape).unwrap(), [[Rank(7)]]);
        assert_eq!(Lose::Rank(None).cases(&shape).unwrap().len(), 64);
        let nodes = Lose::Node(None).cases(&shape).unwrap();
        assert_eq!(nodes.len(), 8);
        assert_eq!(nodes[1], (8..16).map(Rank).collect::<Vec<_>>());
        assert!(Lose::Rank(Some(64)).cases(&shape).is_err());
        let one = Shape::named("mixtral-8g").unwrap();
        assert!(Lose::Node(None).cases(&one).is_err(), "it is the only node");
    }
}
