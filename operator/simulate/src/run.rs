//! A run: one seed, all policies on the same load.

use foregate_api::ids::Rank;
use foregate_planner::demand::WindowShape;
use foregate_planner::split::SplitError;
use foregate_planner::{Cover, PlanError, Settings, bound, redundancy};

use crate::generator::{Generator, Regime, Rows};
use crate::homes::{components, doubled};
use crate::judge::{self, Judge, Judged};
use crate::loss::Lose;
use crate::policy::{Arm, EVERY, Forecast, Policy, Seen, orphaned_by_a_node};
use crate::shape::{Device, Shape};
use crate::source::Source;
use crate::sums::{mean, spread};

/// What is simulated.
#[derive(Debug, Clone)]
pub struct Case {
    /// Model and cluster.
    pub shape: Shape,
    /// Drift.
    pub regime: Regime,
    /// Steps of the load statistic, after ten of warm-up; every second one is judged.
    pub steps: usize,
    /// Who is compared.
    pub policies: Vec<Policy>,
    /// What the operator's planner may do.
    pub settings: Settings,
    /// What its copies shall span; a node is a failure domain.
    pub cover: Cover,
    /// What our planner is told of the step to come.
    pub forecast: Forecast,
    /// What the modelled times are of.
    pub device: Device,
}

/// What a run needs from outside: a clock, and somebody who is told how far it is.
pub trait Watch {
    /// Microseconds since some moment.
    fn micros(&self) -> f64;
    /// A policy has made a step.
    fn step(&self);
}

/// Why a run ended.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// Too short a run.
    #[error("{steps} steps: at least two are needed, every second one is judged")]
    Steps {
        /// Asked for.
        steps: usize,
    },
    /// Too few or too many slots.
    #[error(
        "{slots} slots on each of {ranks} ranks: {experts} experts need at least {least}, and more than {experts} \
         hold nothing"
    )]
    Slots {
        /// Asked for.
        slots: usize,
        /// Ranks.
        ranks: usize,
        /// Experts per layer.
        experts: usize,
        /// The least.
        least: usize,
    },
    /// Not every expert can be on two nodes.
    #[error(
        "cover all in setting {setting}: every expert on two of {nodes} nodes {}, {slots} slots on each rank are \
         given; take more slots, or cover spread or none",
        needs(.least.as_ref())
    )]
    Cover {
        /// The setting.
        setting: &'static str,
        /// Its nodes.
        nodes: usize,
        /// Slots of a rank.
        slots: usize,
        /// The fewest that do; `None`: none do.
        least: Option<usize>,
    },
    /// No windows were recorded.
    #[error("there is no load window in the recording")]
    NoWindows,
    /// Too few windows.
    #[error(
        "the recording is too short: ten windows are the warm-up, and two more are needed to judge"
    )]
    Short,
    /// A window of another model.
    #[error(
        "window {sequence} of rank {rank} is not of {layers} layers of {experts} experts, as the first one"
    )]
    OtherModel {
        /// Whose.
        rank: Rank,
        /// Its number.
        sequence: u64,
        /// Layers of the first.
        layers: usize,
        /// Experts of the first.
        experts: usize,
    },
    /// A window is there twice.
    #[error(
        "window {sequence} of rank {rank} is there twice: a worker that started anew, or two recordings in one folder"
    )]
    Twice {
        /// Whose.
        rank: Rank,
        /// Its number.
        sequence: u64,
    },
    /// A recording of another model than the setting's.
    #[error(
        "setting {setting} has {layers} layers of {experts} experts, the recording {recorded_layers} of \
         {recorded_experts}: leave the setting out, or name another one"
    )]
    OtherSetting {
        /// The setting.
        setting: &'static str,
        /// Its layers.
        layers: usize,
        /// Its experts.
        experts: usize,
        /// The recording's layers.
        recorded_layers: usize,
        /// The recording's experts.
        recorded_experts: usize,
    },
    /// A policy that makes no sense here.
    #[error("policy {policy} in setting {setting}: {why}")]
    Policy {
        /// The policy.
        policy: &'static str,
        /// The setting.
        setting: &'static str,
        /// What is missing.
        why: &'static str,
    },
    /// There is nothing of the kind to lose.
    #[error(
        "cannot lose {lose} in setting {setting}: it has {ranks} ranks on {nodes} nodes, and somebody must be left"
    )]
    Lose {
        /// Asked for.
        lose: Lose,
        /// The setting.
        setting: &'static str,
        /// Its ranks.
        ranks: usize,
        /// Its nodes.
        nodes: usize,
    },
    /// Nothing is sent between nodes.
    #[error("setting {setting} has one node: nothing is sent between nodes")]
    OneNode {
        /// The setting.
        setting: &'static str,
    },
    /// A forecast that does not fit the model.
    #[error(transparent)]
    Forecast(#[from] foregate_planner::demand::ForecastShape),
    /// The planner refused.
    #[error("the planner refused")]
    Plan(#[from] PlanError),
    /// The planner made no first plan.
    #[error("the planner made no first plan")]
    NoPlan,
    /// A window of another shape.
    #[error("a window was refused")]
    Window(#[from] WindowShape),
    /// A batch could not be split.
    #[error("a batch could not be split")]
    Split(#[from] SplitError),
    /// A placement has a copy outside of its ranks.
    #[error("layer {layer} has a copy outside of the placement's ranks")]
    Homeless {
        /// The layer.
        layer: usize,
    },
}

fn needs(least: Option<&usize>) -> String {
    match least {
        Some(least) => format!("takes {least} slots on each rank"),
        None => "is not possible".to_owned(),
    }
}

/// What one seed gave.
#[derive(Debug)]
pub struct Outcome {
    /// The seed.
    pub(crate) seed: u64,
    /// Largest over mean rows of an expert, mean over windows and layers.
    pub(crate) max_over_mean: f64,
    /// Coefficient of variation of the experts' rows.
    pub(crate) cv: f64,
    /// Balance that no placement can pass, mean over layers.
    pub(crate) bound: f64,
    pub(crate) arms: Vec<ArmOutcome>,
}

/// What one policy did.
#[derive(Debug)]
pub(crate) struct ArmOutcome {
    pub(crate) policy: Policy,
    pub(crate) judged: Judged,
    pub(crate) arm: Arm,
    /// At the end, mean over layers.
    pub(crate) components: f64,
    /// At the end, over all layers.
    pub(crate) doubled: usize,
    /// Largest part of the rows that the loss of one node would leave without a copy, mean over steps.
    pub(crate) orphaned_by_a_node: f64,
}

impl Case {
    /// Checks everything that a run relies on.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), SimulateError> {
        if self.steps < 2 {
            return Err(SimulateError::Steps { steps: self.steps });
        }
        let shape = &self.shape;
        if shape.copies < shape.experts || shape.slots() > shape.experts {
            return Err(SimulateError::Slots {
                slots: shape.slots(),
                ranks: shape.ranks,
                experts: shape.experts,
                least: shape.experts.div_ceil(shape.ranks),
            });
        }
        self.can_cover()?;
        self.policies.iter().try_for_each(|p| p.fits(shape))
    }

    fn can_cover(&self) -> Result<(), SimulateError> {
        let shape = &self.shape;
        let ranks = vec![shape.ranks / shape.nodes; shape.nodes];
        let slots: Vec<usize> = ranks.iter().map(|ranks| ranks * shape.slots()).collect();
        if self.cover != Cover::All || redundancy::can_cover(shape.experts, &slots) {
            return Ok(());
        }
        Err(SimulateError::Cover {
            setting: shape.name,
            nodes: shape.nodes,
            slots: shape.slots(),
            least: redundancy::slots_to_cover(shape.experts, &ranks),
        })
    }

    /// How often [`Watch::step`] is called in a run.
    #[must_use]
    pub fn ticks(&self) -> usize {
        self.policies.len() * (self.steps + 1)
    }
}

/// Runs one seed.
///
/// # Errors
/// A case that makes no sense, or a planner that refuses.
pub fn run(case: &Case, seed: u64, watch: &dyn Watch) -> Result<Outcome, SimulateError> {
    let source = Source::Generated {
        load: Box::new(Generator::new(&case.shape, case.regime, seed)),
        forecast: case.forecast,
        steps: case.steps,
    };
    simulate(case, source, seed, watch)
}

/// Runs a load to its end.
pub(crate) fn simulate(
    case: &Case,
    mut source: Source<'_>,
    seed: u64,
    watch: &dyn Watch,
) -> Result<Outcome, SimulateError> {
    case.validate()?;
    let shape = &case.shape;
    let mut seen = Seen::nothing(shape);
    for _ in 0..EVERY {
        seen.window(source.warm_up().ok_or(SimulateError::Short)?)?;
    }
    let mut arms = Vec::with_capacity(case.policies.len());
    for policy in &case.policies {
        let arm = Arm::new(*policy, case, &seen)?;
        arms.push((arm, Judged::default(), Vec::new()));
        watch.step();
    }
    let mut judge = Judge::new(shape, case.device);
    let mut bounds = Vec::new();
    // A step is drawn first, and nothing but the forecast is told of it before all have planned.
    while let Some(step) = source.step(bounds.len()) {
        let t = bounds.len();
        seen.foretell(step.forecast.clone())?;
        bounds.push(any_placement(&step.expected, shape));
        for (arm, into, orphaned) in &mut arms {
            arm.step(t, case, &seen, watch)?;
            if !step.decode.is_empty() {
                arm.solve_shares(&seen)?;
                judge::expected(&arm.placement, &step.expected, &mut into.expected);
                orphaned.push(orphaned_by_a_node(&arm.placement, shape, &step.expected));
            }
            for batch in &step.decode {
                judge.decode(&arm.placement, batch, watch, into)?;
            }
            if let Some(prefill) = &step.prefill {
                judge::solved(&arm.placement, prefill, &mut into.prefill)?;
            }
            watch.step();
        }
        seen.window(step.window)?;
    }
    if bounds.len() < 2 {
        return Err(SimulateError::Short);
    }
    let spreads: Vec<(f64, f64)> = seen.windows.iter().map(spread).collect();
    let of = |pick: fn(&(f64, f64)) -> f64| mean(&spreads.iter().map(pick).collect::<Vec<_>>());
    Ok(Outcome {
        seed,
        max_over_mean: of(|s| s.0),
        cv: of(|s| s.1),
        bound: mean(&bounds),
        arms: arms
            .into_iter()
            .map(|(arm, judged, orphaned)| ended(arm, judged, &orphaned))
            .collect(),
    })
}

fn ended(arm: Arm, judged: Judged, orphaned: &[f64]) -> ArmOutcome {
    let placement = &arm.placement;
    let count = |layer| components(layer, &placement.ranks) as f64;
    ArmOutcome {
        policy: arm.policy,
        judged,
        components: mean(&placement.layers.iter().map(count).collect::<Vec<_>>()),
        doubled: placement.layers.iter().map(doubled).sum(),
        orphaned_by_a_node: mean(orphaned),
        arm,
    }
}

/// Balance that no placement of as many copies can pass under this load, mean over layers.
fn any_placement(expected: &Rows, shape: &Shape) -> f64 {
    let of = |rows: &Vec<f64>| {
        let least = bound::any_placement(rows, shape.ranks, shape.copies);
        rows.iter().sum::<f64>() / shape.ranks as f64 / least
    };
    mean(&expected.iter().map(of).collect::<Vec<_>>())
}
