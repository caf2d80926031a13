//! `foregate simulate placement`: the operator's planner on synthetic loads beside published ones, without a cluster.
//! The loads, the anchors and the judge are `foregate-simulate`; here are arguments, files and the clock.

mod plot;

use std::path::PathBuf;

use foregate_planner::Settings;
use foregate_simulate::{
    Case, DEVICES, Device, Policy, Regime, SETTINGS, Shape, SimulateError, Watch, document,
    run as simulate,
};
use tokio::time::Instant;

use crate::bench::write_json;
use crate::error::{CliError, print};
use crate::progress::{Progress, Task};

/// Arguments of `foregate simulate placement`.
#[derive(Debug, clap::Args)]
pub(crate) struct PlacementArgs {
    /// Model and cluster: mixtral-8g, qwen3-32g, dsv3-32g, dsv3-64g, dsv3-72g, inet-320g-1slot, inet-320g-2slot.
    #[arg(long, value_parser = shape)]
    setting: Shape,
    /// How the load drifts: stationary, moderate, strong.
    #[arg(long, value_parser = regime, default_value = "moderate")]
    regime: Regime,
    /// Seeds.
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    seeds: Vec<u64>,
    /// Steps of the load statistic, after ten of warm-up; every second one is judged.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Policies: in-order, eplb-once, eplb-10, eplb-step, eplb-hierarchical-10, connected-once, connected-lazy (the
    /// operator's). All that fit the setting, if none is named.
    #[arg(long, value_delimiter = ',', value_parser = policy)]
    policy: Vec<Policy>,
    /// Slots of each rank, per layer, in place of the setting's.
    #[arg(long)]
    slots: Option<usize>,
    /// Most copies that the operator's planner may move per layer and step.
    #[arg(long, value_name = "COPIES")]
    limit: Option<usize>,
    /// Device of the modelled times: h100, h200, h20, b200.
    #[arg(long, value_parser = device, default_value = "h200")]
    device: Device,
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
    if args.seeds.is_empty() {
        return Err(CliError::Usage("--seeds needs at least one".into()));
    }
    let case = case(args);
    case.validate().map_err(|error| refused(&error))?;
    let clock = Clock {
        began: Instant::now(),
        task: progress.steps(case.shape.name, (case.ticks() * args.seeds.len()) as u64),
    };
    let mut outcomes = Vec::with_capacity(args.seeds.len());
    for seed in &args.seeds {
        outcomes.push(simulate(&case, *seed, &clock).map_err(|error| refused(&error))?);
    }
    clock.task.finish("done");
    let document = document(&case, &outcomes);
    if let Some(path) = &args.svg {
        plot::write(path, &document)?;
    }
    if let Some(path) = &args.json {
        print(&document.table());
        return write_json(path, &document);
    }
    let text = serde_json::to_string_pretty(&document);
    print(&text.map_err(|error| CliError::runtime("the document", &error))?);
    Ok(())
}

fn case(args: &PlacementArgs) -> Case {
    let shape = args
        .slots
        .map_or(args.setting, |slots| args.setting.with_slots(slots));
    let policies = if args.policy.is_empty() {
        let fits = |policy: &Policy| policy.fits(&shape).is_ok();
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
        regime: args.regime,
        steps: args.steps,
        policies,
        settings,
        device: args.device,
    }
}

/// What is wrong with the arguments is the user's, the rest is not.
fn refused(error: &SimulateError) -> CliError {
    match error {
        SimulateError::Steps { .. }
        | SimulateError::Slots { .. }
        | SimulateError::Policy { .. } => CliError::Usage(error.to_string()),
        SimulateError::Plan(_)
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

fn device(name: &str) -> Result<Device, String> {
    Device::named(name).ok_or_else(|| known(DEVICES.iter().map(|device| device.name)))
}

fn known(names: impl Iterator<Item = &'static str>) -> String {
    format!("known are {}", names.collect::<Vec<_>>().join(", "))
}
