//! `foregate simulate placement`: the operator's planner on synthetic loads beside published ones, without a cluster.
//! The loads, the anchors and the judge are `foregate-simulate`; here are arguments, files and the clock.

mod plot;
mod recording;

use std::path::{Path, PathBuf};

use foregate_planner::{Cover, Settings};
use foregate_simulate::{
    Case, DEVICES, Device, Document, Forecast, Lose, Policy, Recording, Regime, SETTINGS,
    Shape, SimulateError, Watch, document, internode, internode_document, internode_policies,
    lose, loss_document, replay, replay_document, run as simulate,
};
use serde::Serialize;
use tokio::time::Instant;

use crate::bench::write_json;
use crate::error::{CliError, print};
use crate::progress::{Progress, Task};

/// Steps, if it is not said how many.
const STEPS: usize = 20;
/// Seeds, if none are named.
const SEEDS: [u64; 3] = [0, 1, 2];

/// Arguments of `foregate simulate placement`.
#[derive(Debug, clap::Args)]
pub(crate) struct PlacementArgs {
    /// Model and cluster: mixtral-8g, qwen3-32g, dsv3-32g, dsv3-64g, dsv3-72g, inet-320g-1slot, inet-320g-2slot.
    #[arg(long, value_parser = shape, required_unless_present = "replay")]
    setting: Option<Shape>,
    /// How the load drifts: stationary, moderate (the default), strong.
    #[arg(long, value_parser = regime)]
    regime: Option<Regime>,
    /// Seeds. Default: 0,1,2.
    #[arg(long, value_delimiter = ',')]
    seeds: Vec<u64>,
    /// Steps of the load statistic, after ten of warm-up; every second one is judged. Default: 20.
    #[arg(long)]
    steps: Option<usize>,
    /// Policies: in-order, eplb-once, eplb-10, eplb-10-renamed, eplb-step, eplb-hierarchical-10, flashlb-like-10, connected-once, connected-step,
    /// connected-lazy (the operator's). All that fit the setting but connected-step, if none is named.
    #[arg(long, value_delimiter = ',', value_parser = policy)]
    policy: Vec<Policy>,
    /// Slots of each rank, per layer, in place of the setting's.
    #[arg(long)]
    slots: Option<usize>,
    /// Most copies that the operator's planner may move per layer and step.
    #[arg(long, value_name = "COPIES")]
    limit: Option<usize>,
    /// What the operator's planner is told of the step to come, in place of the windows' average: off (the
    /// default), topics (the topics of 500 of its requests), noisy (its load with an error of 15 % for each expert),
    /// exact (its load).
    #[arg(long, value_parser = forecast)]
    forecast: Option<Forecast>,
    /// What the copies of the operator's planner shall span, where a node is a failure domain: none, spread (the
    /// default: experts that have several copies have them on two nodes), all (every expert has copies on two nodes).
    #[arg(long, value_parser = cover)]
    cover: Option<Cover>,
    /// Loses ranks after the first plan, and tells how balance comes back: rank:N, node:N, rank:each or node:each (each
    /// in turn, each from the same start). Only the operator's planner, beside EPLB afresh.
    #[arg(long, value_parser = lost)]
    lose: Option<Lose>,
    /// Counts what nodes send each other, on sampled tokens whose experts are used together; for the planners that
    /// place once.
    #[arg(long, conflicts_with = "lose")]
    internode: bool,
    /// Takes load windows from the files *.jsonl of this folder instead of generating them: one window a line, as
    /// workers publish them. Without a setting the cluster is the recorded one, with the fewest slots that link its
    /// ranks, or --slots.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["lose", "internode"])]
    replay: Option<PathBuf>,
    /// Device of the modelled times: h100, h200 (the default), h20, b200.
    #[arg(long, value_parser = device)]
    device: Option<Device>,
    /// Write the document to this file, and print a table.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the plot as SVG to this file.
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// Simulates; prints the document, or writes it and prints a table.
///
/// # Errors
/// Wrong arguments; files that cannot be written; a planner that refuses.
pub(super) fn run(args: &PlacementArgs, progress: &Progress) -> Result<(), CliError> {
    if let Some(folder) = &args.replay {
        return recorded(args, folder, progress);
    }
    let Some(setting) = args.setting else {
        return Err(CliError::Usage("--setting or --replay is needed".into()));
    };
    let case = case(args, setting);
    case.validate().map_err(|error| refused(&error))?;
    match args.lose {
        None if args.internode => between_nodes(args, &case, progress),
        None => compare(args, &case, progress),
        Some(what) => lost_ranks(args, &case, what, progress),
    }
}

fn seeds(args: &PlacementArgs) -> Vec<u64> {
    if args.seeds.is_empty() {
        return SEEDS.to_vec();
    }
    args.seeds.clone()
}

/// All policies on recorded windows.
fn recorded(args: &PlacementArgs, folder: &Path, progress: &Progress) -> Result<(), CliError> {
    let given = [
        (args.regime.is_some(), "--regime"),
        (args.steps.is_some(), "--steps"),
        (!args.seeds.is_empty(), "--seeds"),
        (args.forecast.is_some(), "--forecast"),
    ];
    if let Some((_, name)) = given.into_iter().find(|(given, _)| *given) {
        return Err(CliError::Usage(format!("{name} does not go with --replay")));
    }
    if args.setting.is_none() && args.device.is_some() {
        let why = "--device: the sizes of experts are not recorded; name the setting";
        return Err(CliError::Usage(why.into()));
    }
    let recording =
        Recording::new(&recording::read(folder)?).map_err(|error| refused(&error))?;
    let mut case = case(args, args.setting.unwrap_or_else(|| recording.shape()));
    case.steps = recording.steps().map_err(|error| refused(&error))?;
    let clock = Clock::new(progress, case.shape.name, case.ticks());
    let outcome = replay(&case, &recording, &clock).map_err(|error| refused(&error))?;
    clock.task.finish("done");
    told(args, &replay_document(&case, outcome, recording.windows()))
}

/// All policies on the same load.
fn compare(args: &PlacementArgs, case: &Case, progress: &Progress) -> Result<(), CliError> {
    let clock = Clock::new(progress, case.shape.name, case.ticks() * seeds(args).len());
    let one = |seed: &u64| simulate(case, *seed, &clock).map_err(|error| refused(&error));
    let outcomes: Vec<_> = seeds(args).iter().map(one).collect::<Result<_, _>>()?;
    clock.task.finish("done");
    told(args, &document(case, &outcomes))
}

/// Draws the plot, if it is asked for, and tells the rest.
fn told(args: &PlacementArgs, document: &Document) -> Result<(), CliError> {
    if let Some(path) = &args.svg {
        plot::write(path, document)?;
    }
    tell(args, document, &document.table())
}

/// Ranks are lost.
fn lost_ranks(
    args: &PlacementArgs,
    case: &Case,
    what: Lose,
    progress: &Progress,
) -> Result<(), CliError> {
    alone(args, "--lose", &[])?;
    let cases = what.cases(&case.shape).map_err(|error| refused(&error))?;
    let clock = Clock::new(progress, case.shape.name, cases.len() * seeds(args).len());
    let one = |seed: &u64| lose(case, what, *seed, &clock).map_err(|error| refused(&error));
    let outcomes: Vec<_> = seeds(args).iter().map(one).collect::<Result<_, _>>()?;
    clock.task.finish("done");
    let document = loss_document(case, what, &outcomes);
    tell(args, &document, &document.table())
}

/// Bytes between nodes.
fn between_nodes(
    args: &PlacementArgs,
    case: &Case,
    progress: &Progress,
) -> Result<(), CliError> {
    let more = [
        (args.regime.is_some(), "--regime"),
        (args.steps.is_some(), "--steps"),
        (args.limit.is_some(), "--limit"),
    ];
    alone(args, "--internode", &more)?;
    let policies = internode_policies(&case.shape).map_err(|error| refused(&error))?;
    let clock = Clock::new(
        progress,
        case.shape.name,
        policies.len() * seeds(args).len(),
    );
    let one = |seed: &u64| internode(case, *seed, &clock).map_err(|error| refused(&error));
    let outcomes: Vec<_> = seeds(args).iter().map(one).collect::<Result<_, _>>()?;
    clock.task.finish("done");
    let document = internode_document(case, &outcomes);
    tell(args, &document, &document.table())
}

/// Refuses what only the comparison of all policies hears, and `more`.
fn alone(
    args: &PlacementArgs,
    with: &str,
    more: &[(bool, &'static str)],
) -> Result<(), CliError> {
    let given = [
        (!args.policy.is_empty(), "--policy"),
        (args.svg.is_some(), "--svg"),
        (args.forecast.is_some(), "--forecast"),
        (args.device.is_some(), "--device"),
    ];
    match given.iter().chain(more).find(|(given, _)| *given) {
        Some((_, name)) => Err(CliError::Usage(format!("{name} does not go with {with}"))),
        None => Ok(()),
    }
}

/// Prints the document, or writes it and prints the table.
fn tell(args: &PlacementArgs, document: &impl Serialize, table: &str) -> Result<(), CliError> {
    if let Some(path) = &args.json {
        print(table);
        return write_json(path, document);
    }
    let text = serde_json::to_string_pretty(document);
    print(&text.map_err(|error| CliError::runtime("the document", &error))?);
    Ok(())
}

fn case(args: &PlacementArgs, setting: Shape) -> Case {
    let shape = args
        .slots
        .map_or(setting, |slots| setting.with_slots(slots));
    let policies = if args.policy.is_empty() {
        // A bound, not a rival, and it takes minutes.
        let fits =
            |policy: &Policy| policy.fits(&shape).is_ok() && *policy != Policy::ConnectedStep;
        Policy::ALL.into_iter().filter(fits).collect()
    } else {
        args.policy.clone()
    };
    let mut settings = Settings::default();
    if let Some(limit) = args.limit {
        settings.max_moves_per_layer = limit;
    }
    Case {
        shape,
        regime: args.regime.unwrap_or(Regime::Moderate),
        steps: args.steps.unwrap_or(STEPS),
        policies,
        settings,
        cover: args.cover.unwrap_or_default(),
        forecast: args.forecast.unwrap_or(Forecast::Off),
        device: args.device.unwrap_or(DEVICES[0]),
    }
}

/// What is wrong with the arguments is the user's, the rest is not.
fn refused(error: &SimulateError) -> CliError {
    match error {
        SimulateError::Steps { .. }
        | SimulateError::Slots { .. }
        | SimulateError::Cover { .. }
        | SimulateError::Lose { .. }
        | SimulateError::OneNode { .. }
        | SimulateError::NoWindows
        | SimulateError::Short
        | SimulateError::OtherModel { .. }
        | SimulateError::Twice { .. }
        | SimulateError::OtherSetting { .. }
        | SimulateError::Policy { .. } => CliError::Usage(error.to_string()),
        SimulateError::Plan(_)
        | SimulateError::Forecast(_)
        | SimulateError::NoPlan
        | SimulateError::Window(_)
        | SimulateError::Split(_)
        | SimulateError::Homeless { .. } => {
            CliError::runtime("the simulation broke off", error)
        }
    }
}

/// The time, and the bar that shows how far it is.
struct Clock {
    began: Instant,
    task: Task,
}

impl Clock {
    fn new(progress: &Progress, name: &str, steps: usize) -> Self {
        Self {
            began: Instant::now(),
            task: progress.steps(name, steps as u64),
        }
    }
}

impl Watch for Clock {
    fn micros(&self) -> f64 {
        self.began.elapsed().as_secs_f64() * 1e6
    }

    fn step(&self) {
        self.task.add(1);
    }
}

fn shape(name: &str) -> Result<Shape, String> {
    Shape::named(name).ok_or_else(|| known(SETTINGS.iter().map(|shape| shape.name)))
}

fn regime(name: &str) -> Result<Regime, String> {
    let found = Regime::ALL.into_iter().find(|regime| regime.name() == name);
    found.ok_or_else(|| known(Regime::ALL.into_iter().map(Regime::name)))
}

fn policy(name: &str) -> Result<Policy, String> {
    let found = Policy::ALL.into_iter().find(|policy| policy.name() == name);
    found.ok_or_else(|| known(Policy::ALL.into_iter().map(Policy::name)))
}

fn forecast(name: &str) -> Result<Forecast, String> {
    let found = Forecast::ALL
        .into_iter()
        .find(|forecast| forecast.name() == name);
    found.ok_or_else(|| known(Forecast::ALL.into_iter().map(Forecast::name)))
}

fn cover(name: &str) -> Result<Cover, String> {
    let found = Cover::ALL.into_iter().find(|cover| cover.name() == name);
    found.ok_or_else(|| known(Cover::ALL.into_iter().map(Cover::name)))
}

fn lost(text: &str) -> Result<Lose, String> {
    Lose::parse(text).ok_or_else(|| "say rank:N, node:N, rank:each or node:each".into())
}

fn device(name: &str) -> Result<Device, String> {
    Device::named(name).ok_or_else(|| known(DEVICES.iter().map(|device| device.name)))
}

fn known(names: impl Iterator<Item = &'static str>) -> String {
    format!("known are {}", names.collect::<Vec<_>>().join(", "))
}
