//! One call of the planner: layer by layer, then what it comes to.

use std::iter::StepBy;
use std::ops::Range;

use foregate_api::ids::{Epoch, LayerId, Rank};
use foregate_api::placement::{LayerPlacement, Placement, Reason};

use crate::budget::Offer;
use crate::flow::{Flow, Workspace};
use crate::layer::Layer;
use crate::likely::Draws;
use crate::problem::{FLOOR, PlanError, Problem, Room};
use crate::report::{Heaviest, LayerReport, Report, Step};
use crate::settings::Settings;
use crate::solve::{SOLVE_GAP, SOLVE_SWEEPS, balance, settled, shares};
use crate::steps::Homes;
use crate::table::SplitTable;
use crate::trigger::{Because, History, Verdict, Worth};
use crate::{bound, budget, check, cover, report, steps, trigger};

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Nothing: the placement in force stands.
    Keep {
        /// Why.
        report: Box<Report>,
    },
    /// New shares over the same homes.
    Reweigh {
        /// The placement to propose.
        placement: Box<Placement>,
        /// Why.
        report: Box<Report>,
    },
    /// Copies move: a first plan, drift, a repair or a resize (see [`Placement::reason`]).
    Move {
        /// The placement to propose.
        placement: Box<Placement>,
        /// Why.
        report: Box<Report>,
    },
}

impl Decision {
    /// The placement to propose, if any.
    #[must_use]
    pub fn placement(&self) -> Option<&Placement> {
        match self {
            Self::Keep { .. } => None,
            Self::Reweigh { placement, .. } | Self::Move { placement, .. } => Some(placement),
        }
    }

    /// Why.
    #[must_use]
    pub fn report(&self) -> &Report {
        match self {
            Self::Keep { report }
            | Self::Reweigh { report, .. }
            | Self::Move { report, .. } => report,
        }
    }
}

/// The first placement of a cluster.
///
/// # Errors
/// What is wrong with the problem, and its remedy.
pub fn initial(
    problem: &Problem,
    settings: &Settings,
) -> Result<(Placement, Report), PlanError> {
    first(plan(problem, None, settings, &mut History::default())?)
}

fn first(decision: Decision) -> Result<(Placement, Report), PlanError> {
    match decision {
        Decision::Move { placement, report } | Decision::Reweigh { placement, report } => {
            Ok((*placement, *report))
        }
        // Without a placement in force there is nothing to keep; told as an error rather than by a panic.
        Decision::Keep { .. } => Err(PlanError::Refused {
            findings: Vec::new(),
        }),
    }
}

/// The first placement of a cluster where tokens shall visit few nodes: `tokens[l]` are the experts of sampled tokens
/// of layer l, and a failure domain is a node. Experts that are used together come to one node, at loads of nodes that
/// stay level; inside nodes all is as in [`initial`], and copies leave a node only to link it.
///
/// # Errors
/// What is wrong with the problem, and its remedy.
pub fn initial_near(
    problem: &Problem,
    settings: &Settings,
    tokens: &[Vec<Vec<usize>>],
) -> Result<(Placement, Report), PlanError> {
    problem.validate()?;
    settings.validate()?;
    problem.validate_tokens(tokens)?;
    let planner = Planner {
        tokens: Some(tokens),
        ..Planner::new(problem, None, settings)
    };
    let mut history = History::default();
    history.fit(problem.layers);
    let layers = side_by_side(problem.layers, settings.threads, |l, work| {
        planner.layer(l, false, work)
    });
    first(planner.decide(layers, &mut history)?)
}

/// Decides what a window's demand asks for. Call it once per window: `history` counts the windows a layer rests.
///
/// `previous` is the placement in force (the *active* one, not a target that is still pending).
///
/// # Errors
/// What is wrong with the problem, and its remedy; `history` is then unchanged.
pub fn plan(
    problem: &Problem,
    previous: Option<&Placement>,
    settings: &Settings,
    history: &mut History,
) -> Result<Decision, PlanError> {
    problem.validate()?;
    settings.validate()?;
    if let Some(previous) = previous {
        problem.validate_previous(previous)?;
    }
    let planner = Planner::new(problem, previous, settings);
    let mut next = history.clone();
    next.fit(problem.layers);
    let layers = side_by_side(problem.layers, settings.threads, |l, work| {
        planner.layer(l, next.resting(l), work)
    });
    let layers = planner.gone_along(planner.admitted(layers));
    let decision = planner.decide(layers, &mut next)?;
    *history = next;
    Ok(decision)
}

/// `of(0)`, `of(1)`, … of `count` layers, computed by at most `threads` threads, each with buffers of its own.
fn side_by_side<T: Send>(
    count: usize,
    threads: usize,
    of: impl Fn(usize, &mut Workspace) -> T + Sync,
) -> Vec<T> {
    let threads = threads.clamp(1, count.max(1));
    let in_turn = |layers: StepBy<Range<usize>>| -> Vec<T> {
        let mut work = Workspace::default();
        layers.map(|l| of(l, &mut work)).collect()
    };
    if threads == 1 {
        return in_turn((0..count).step_by(1));
    }
    let in_turn = &in_turn;
    let mut parts: Vec<_> = std::thread::scope(|scope| {
        let mine = |t| move || in_turn((t..count).step_by(threads));
        let started: Vec<_> = (0..threads).map(|t| scope.spawn(mine(t))).collect();
        let ended = started.into_iter().map(std::thread::ScopedJoinHandle::join);
        ended
            .map(|part| {
                part.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                    .into_iter()
            })
            .collect()
    });
    (0..count)
        .filter_map(|l| parts[l % threads].next())
        .collect()
}

/// One layer's answer.
struct Planned {
    homes: Layer,
    /// `None`: the layer of the placement in force stands as it is.
    placement: Option<LayerPlacement>,
    /// Copies each rank has to load.
    to_load: Vec<usize>,
    /// Whether it closes a gap in cover.
    covers: bool,
    /// The best split of a layer that stands, if its shares are worth publishing once there is a new epoch anyway.
    better: Option<Flow>,
    report: LayerReport,
}

/// How a layer stood before.
#[derive(Debug, Clone, Copy, Default)]
struct Was {
    /// Predicted balance with the shares in force.
    before: f64,
    /// That of the best split.
    best: f64,
    /// Expected balance of a batch's best split.
    expected: f64,
}

impl Was {
    fn of(before: f64, now: &Homes<'_>) -> Self {
        Self {
            before,
            best: now.splits.predicted(),
            expected: now.splits.expected(),
        }
    }
}

struct Planner<'a> {
    problem: &'a Problem,
    previous: Option<&'a Placement>,
    settings: &'a Settings,
    room: Room,
    /// What is left of the placement in force, by layer; empty without one.
    adopted: Vec<Layer>,
    demand: Vec<Vec<f64>>,
    draws: Draws,
    /// Experts of sampled tokens, by layer, where few nodes shall be visited.
    tokens: Option<&'a [Vec<Vec<usize>>]>,
    lost: Vec<Rank>,
    joined: Vec<Rank>,
    /// Ranks, or slots of a rank, came or went.
    reshaped: bool,
}

impl<'a> Planner<'a> {
    fn new(
        problem: &'a Problem,
        previous: Option<&'a Placement>,
        settings: &'a Settings,
    ) -> Self {
        let room = Room::of(problem);
        let old = previous.map_or(&[][..], |p| p.ranks.as_slice());
        let outside = |of: &[Rank], not_in: &[Rank]| -> Vec<Rank> {
            of.iter()
                .filter(|r| not_in.binary_search(r).is_err())
                .copied()
                .collect()
        };
        let adopted: Vec<Layer> = previous.map_or_else(Vec::new, |p| {
            let layers = 0..p.layers.len();
            layers
                .map(|l| Layer::adopt(p, l, &room, problem.experts))
                .collect()
        });
        let full =
            |layer: &Layer| (0..layer.ranks()).all(|g| layer.slots(g).len() == room.slots[g]);
        let floored = |row: &Vec<f64>| row.iter().map(|x| x + FLOOR).collect();
        Self {
            lost: outside(old, &room.ranks),
            joined: outside(&room.ranks, old),
            reshaped: old != room.ranks || !adopted.iter().all(full),
            adopted,
            tokens: None,
            demand: problem.demand.iter().map(floored).collect(),
            draws: Draws::new(problem.experts),
            problem,
            previous,
            settings,
            room,
        }
    }

    fn layer(&self, l: usize, resting: bool, work: &mut Workspace) -> Planned {
        let loads = self.draws.loads(&self.demand[l], self.problem.batch_rows);
        let Some(previous) = self.previous else {
            let empty = Layer::empty(self.room.ranks.len(), self.problem.experts);
            let homes = match self.tokens {
                None => steps::from_scratch(&self.room, &loads, self.settings, None, work),
                Some(of) => steps::near(&self.room, &loads, self.settings, &of[l], work),
            };
            return self.moved(l, &empty, homes, Was::default(), work);
        };
        let old = &self.adopted[l];
        let in_force = Flow::published(old, &self.room, &previous.layers[l], &loads[0]);
        let before = balance(&in_force.loads);
        if self.reshaped {
            return self.reshape(l, old, &loads, before, work);
        }
        let now = Homes::as_is(old, &loads, &in_force, work);
        let was = Was::of(before, &now);
        let worth = Worth::in_service(self.doubt(l, &in_force), was.expected);
        let gap = cover::open(&self.room, &now.layer).next().is_some();
        let because = match trigger::may_move(was.expected, resting, self.settings) {
            Err(because) if !gap => because,
            Ok(()) | Err(_) => {
                match steps::lazy(&now, &self.room, &loads, self.settings, worth, work) {
                    Some(homes) => return self.moved(l, old, homes, was, work),
                    None => Because::NoGain,
                }
            }
        };
        self.stays(l, now, &in_force, was, because, work)
    }

    /// The layer as it stands, with new shares if they gain enough; for a move that is not made.
    fn stay(&self, l: usize, because: Because, work: &mut Workspace) -> Option<Planned> {
        let previous = self.previous?;
        let loads = self.draws.loads(&self.demand[l], self.problem.batch_rows);
        let old = &self.adopted[l];
        let in_force = Flow::published(old, &self.room, &previous.layers[l], &loads[0]);
        let now = Homes::as_is(old, &loads, &in_force, work);
        let was = Was::of(balance(&in_force.loads), &now);
        Some(self.stays(l, now, &in_force, was, because, work))
    }

    /// Takes back moves that do not pay, or that the bytes of this call do not carry.
    fn admitted(&self, mut layers: Vec<Planned>) -> Vec<Planned> {
        if self.reshaped {
            return layers;
        }
        let offers = layers
            .iter()
            .filter(|planned| planned.report.verdict == Verdict::Move)
            .map(|planned| {
                let report = &planned.report;
                let gain = report.expected_after - report.expected_before;
                Offer {
                    layer: report.layer.index(),
                    gain: if planned.covers { f64::INFINITY } else { gain },
                    copies: report.copies_moved,
                    seconds: (report.saves_s, report.costs_s),
                }
            })
            .collect();
        let mut work = Workspace::default();
        for (l, because) in budget::refused(offers, self.problem.expert_bytes, self.settings) {
            if let Some(stays) = self.stay(l, because, &mut work) {
                layers[l] = stays;
            }
        }
        layers
    }

    /// Ranks or slots came or went: what survived is completed, or, if that is less than half, planned afresh.
    fn reshape(
        &self,
        l: usize,
        old: &Layer,
        loads: &[Vec<f64>],
        before: f64,
        work: &mut Workspace,
    ) -> Planned {
        let was = Was {
            before,
            best: before,
            expected: before,
        };
        if old.copies() * 2 < self.room.total() {
            let homes = steps::from_scratch(&self.room, loads, self.settings, Some(old), work);
            return self.moved(l, old, homes, was, work);
        }
        let mut homes = steps::from_survivors(old, &self.room, loads, self.settings, work);
        // Nothing is missing if none were lost, so the lazy step may follow at once; else orphans come first and alone.
        if self.lost.is_empty()
            && homes.splits.expected() < self.settings.threshold
            && let Some(mut more) = steps::lazy(
                &homes,
                &self.room,
                loads,
                self.settings,
                Worth::anyway(),
                work,
            )
        {
            homes.steps.append(&mut more.steps);
            more.steps = homes.steps;
            homes = more;
        }
        self.moved(l, old, homes, was, work)
    }

    /// See [`trigger::doubt`].
    fn doubt(&self, l: usize, in_force: &Flow) -> f64 {
        let w = &self.demand[l];
        let rows: f64 = w.iter().sum();
        let per_row = rows / self.problem.evidence;
        let highest = in_force.variances(w).into_iter().fold(0.0, f64::max);
        let ranks = in_force.loads.len();
        let mean = in_force.loads.iter().sum::<f64>() / ranks.max(1) as f64;
        let trials = ranks * self.problem.layers;
        trigger::doubt((highest * per_row).sqrt() / mean, trials)
    }

    fn moved(
        &self,
        l: usize,
        old: &Layer,
        homes: Homes<'_>,
        was: Was,
        work: &mut Workspace,
    ) -> Planned {
        let covers = homes
            .steps
            .iter()
            .any(|step| matches!(step, Step::Cover { copies, .. } if *copies > 0));
        let mut planned = self.shared(l, homes, was, work);
        planned.to_load = (0..old.ranks())
            .map(|g| planned.homes.moved_on(old, g))
            .collect();
        planned.report.copies_moved = planned.to_load.iter().sum();
        planned.report.verdict = Verdict::Move;
        planned.report.because = Because::Moves;
        planned.covers = covers;
        if let (Some(economy), false) = (&self.settings.economy, self.reshaped) {
            let shape = (self.problem.layers, self.problem.expert_bytes);
            let balance = (was.expected, planned.report.expected_after);
            let most = planned.to_load.iter().copied().max().unwrap_or(0);
            (planned.report.saves_s, planned.report.costs_s) =
                budget::seconds(economy, shape, balance, most);
        }
        if self.previous.is_some() {
            let w = &self.demand[l];
            let orphans = (0..w.len()).filter(|e| old.count(*e) == 0);
            planned.report.orphans = orphans.clone().count();
            // From 0.0 by hand: the empty sum of floats is -0.0.
            let orphaned = orphans.fold(0.0, |sum, e| sum + w[e]);
            planned.report.orphaned_rows = orphaned / w.iter().sum::<f64>();
        }
        planned
    }

    fn stays(
        &self,
        l: usize,
        homes: Homes<'_>,
        in_force: &Flow,
        was: Was,
        because: Because,
        work: &mut Workspace,
    ) -> Planned {
        let doubt = self.doubt(l, in_force);
        let verdict = trigger::without_move(was.before, was.best, doubt);
        let mut planned = if verdict == Verdict::Keep {
            // The shares in force stand, so it is their loads that the report is about.
            let expected = homes.splits.expected();
            let layer = homes.layer.into_owned();
            let mut kept = self.told(l, layer, (was, expected), &in_force.loads);
            kept.report.after = was.before;
            if trigger::goes_along(was.before, was.best) {
                kept.better = Some(homes.splits.into_prediction());
            }
            kept
        } else {
            self.shared(l, homes, was, work)
        };
        planned.report.because = because;
        planned.report.doubt = doubt;
        planned.report.verdict = verdict;
        planned
    }

    /// Publishes better shares of layers that would stand, if other layers make a new epoch anyway: that costs nothing
    /// more.
    fn gone_along(&self, mut layers: Vec<Planned>) -> Vec<Planned> {
        if layers.iter().all(|p| p.report.verdict == Verdict::Keep) {
            return layers;
        }
        let mut work = Workspace::default();
        for (l, planned) in layers.iter_mut().enumerate() {
            let Some(flow) = planned.better.take() else {
                continue;
            };
            let LayerReport {
                before,
                best,
                expected_before: expected,
                expected_after,
                because,
                doubt,
                ..
            } = planned.report;
            let was = Was {
                before,
                best,
                expected,
            };
            let layer = std::mem::replace(&mut planned.homes, Layer::empty(0, 0));
            let told = (was, expected_after);
            *planned = self.with_shares(l, layer, flow, told, Vec::new(), &mut work);
            planned.report.because = because;
            planned.report.doubt = doubt;
        }
        layers
    }

    /// Solves the split of new homes; verdict and reason are the caller's.
    fn shared(&self, l: usize, homes: Homes<'_>, was: Was, work: &mut Workspace) -> Planned {
        let Homes {
            layer,
            splits,
            exact,
            steps,
        } = homes;
        let told = (was, splits.expected());
        let flow = exact.unwrap_or_else(|| splits.into_prediction());
        self.with_shares(l, layer.into_owned(), flow, told, steps, work)
    }

    /// Turns a split into shares and says how the layer stands.
    fn with_shares(
        &self,
        l: usize,
        layer: Layer,
        flow: Flow,
        told: (Was, f64),
        mut steps: Vec<Step>,
        work: &mut Workspace,
    ) -> Planned {
        let w = &self.demand[l];
        let solved = settled(flow, w, SOLVE_SWEEPS, SOLVE_GAP, work);
        steps.push(Step::Split {
            sweeps: solved.sweeps,
            gap: solved.max() / solved.certificate - 1.0,
        });
        let mut placement = layer.placement(&self.room);
        placement.copies = shares(&layer.table(&self.room), &solved);
        let loads = SplitTable::of(&self.room.ranks, &placement)
            .map_or_else(|| solved.loads.clone(), |table| table.fixed_loads(w));
        let mut planned = self.told(l, layer, told, &loads);
        planned.placement = Some(placement);
        planned.report.steps = steps;
        planned
    }

    /// How a layer stands with these homes and the loads its shares give.
    fn told(
        &self,
        l: usize,
        homes: Layer,
        (was, expected_after): (Was, f64),
        loads: &[f64],
    ) -> Planned {
        let w = &self.demand[l];
        let mean = w.iter().sum::<f64>() / homes.ranks() as f64;
        let bound = bound::any_placement(w, homes.ranks(), homes.copies());
        let report = LayerReport {
            layer: LayerId(l as u32),
            verdict: Verdict::Reweigh,
            because: Because::Balanced,
            before: was.before,
            best: was.best,
            after: balance(loads),
            expected_before: was.expected,
            expected_after,
            saves_s: 0.0,
            costs_s: 0.0,
            bound: (mean / bound).min(1.0),
            doubt: 0.0,
            copies_moved: 0,
            components: homes.components(),
            components_least: homes.least_components(),
            orphans: 0,
            orphaned_rows: 0.0,
            heaviest: self.heaviest(&homes.table(&self.room), w, loads),
            steps: Vec::new(),
        };
        Planned {
            homes,
            placement: None,
            to_load: Vec::new(),
            covers: false,
            better: None,
            report,
        }
    }

    fn heaviest(&self, table: &SplitTable, w: &[f64], loads: &[f64]) -> Heaviest {
        let found = bound::certificate(table, w, loads);
        let at = (0..loads.len())
            .min_by(|a, b| loads[*b].total_cmp(&loads[*a]).then(a.cmp(b)))
            .unwrap_or(0);
        let mean = loads.iter().sum::<f64>() / loads.len().max(1) as f64;
        Heaviest {
            rank: self.room.ranks[at],
            over_mean: loads[at] / mean,
            set: found.set.iter().map(|g| self.room.ranks[*g]).collect(),
        }
    }

    fn reason(&self, verdict: Verdict) -> Option<Reason> {
        match verdict {
            Verdict::Keep => None,
            Verdict::Reweigh => Some(Reason::Reweigh),
            Verdict::Move if self.previous.is_none() => Some(Reason::Initial),
            Verdict::Move if !self.lost.is_empty() => Some(Reason::Repair),
            Verdict::Move if self.reshaped => Some(Reason::Resize),
            Verdict::Move => Some(Reason::Move),
        }
    }

    fn decide(
        &self,
        layers: Vec<Planned>,
        history: &mut History,
    ) -> Result<Decision, PlanError> {
        let mut report = self.report(&layers);
        for planned in &layers {
            let moved = planned.report.verdict == Verdict::Move && !self.reshaped;
            history.passed(planned.report.layer.index(), moved);
        }
        let Some(reason) = report.reason else {
            report.layers = layers.into_iter().map(|p| p.report).collect();
            return Ok(Decision::Keep {
                report: Box::new(report),
            });
        };
        let mut placement = Placement {
            epoch: report.epoch,
            parent: report.parent,
            reason,
            ranks: self.room.ranks.clone(),
            layers: Vec::with_capacity(layers.len()),
            balance_before: report.balance_before,
            balance_after: report.balance_after,
        };
        for (l, planned) in layers.into_iter().enumerate() {
            let stands = || self.previous.and_then(|p| p.layers.get(l)).cloned();
            placement.layers.extend(planned.placement.or_else(stands));
            report.layers.push(planned.report);
        }
        let findings = check::check(&placement, self.problem, self.previous);
        if check::refused(&findings) {
            return Err(PlanError::Refused { findings });
        }
        report.findings = findings;
        let (placement, report) = (Box::new(placement), Box::new(report));
        Ok(match report.verdict {
            Verdict::Move => Decision::Move { placement, report },
            Verdict::Keep | Verdict::Reweigh => Decision::Reweigh { placement, report },
        })
    }

    /// The report but for its layers and findings.
    fn report(&self, layers: &[Planned]) -> Report {
        let verdict = layers
            .iter()
            .map(|p| p.report.verdict)
            .max()
            .unwrap_or(Verdict::Keep);
        let mean = |of: fn(&LayerReport) -> f64| {
            layers.iter().map(|p| of(&p.report)).sum::<f64>() / layers.len().max(1) as f64
        };
        let to_one = |g: usize| {
            layers
                .iter()
                .map(|p| p.to_load.get(g).copied().unwrap_or(0))
                .sum()
        };
        let seconds =
            |of: fn(&LayerReport) -> f64| layers.iter().fold(0.0, |sum, p| sum + of(&p.report));
        let copies_moved = layers.iter().map(|p| p.report.copies_moved).sum();
        let homes: Vec<&Layer> = layers.iter().map(|p| &p.homes).collect();
        let parent = self.previous.map_or(Epoch(0), |p| p.epoch);
        let reason = self.reason(verdict);
        let next = parent.max(self.problem.above).next();
        Report {
            verdict,
            reason,
            parent,
            epoch: if reason.is_some() { next } else { parent },
            balance_before: mean(|l| l.before),
            balance_after: mean(|l| l.after),
            copies_moved,
            bytes_moved: self
                .problem
                .expert_bytes
                .saturating_mul(copies_moved as u64),
            saves_s: seconds(|l| l.saves_s),
            costs_s: seconds(|l| l.costs_s),
            most_to_one_rank: (0..self.room.ranks.len()).map(to_one).max().unwrap_or(0),
            lost: self.lost.clone(),
            joined: self.joined.clone(),
            at_risk: report::at_risk(&homes, &self.demand, &self.room),
            findings: Vec::new(),
            layers: Vec::with_capacity(layers.len()),
        }
    }
}
