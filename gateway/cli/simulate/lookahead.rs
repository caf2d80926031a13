//! `foregate simulate lookahead`: the gateway's routing and the workers' expert caches on a token model, without a
//! cluster. The policies are the product's code; only workers and tokens are simulated.

mod arm;
mod caches;
mod cluster;
mod figures;
mod plot;
mod recorded;
mod report;
mod settings;
mod tokens;
mod traffic;

use std::path::{Path, PathBuf};

use foregate_gateway::signature::Profile;

use crate::bench::write_json;
use crate::error::{CliError, print};
use crate::progress::{Progress, Task};
use arm::{Arm, PATIENCE, Policy};
use cluster::Run;
use figures::Figures;
use recorded::Recorded;
use report::{CacheReport, OfPolicy, Report};
use settings::{Setting, Subject};
use traffic::Traffic;

/// Arguments of `foregate simulate lookahead`.
#[derive(Debug, clap::Args)]
pub(crate) struct LookaheadArgs {
    /// What is simulated.
    #[arg(
        long,
        value_enum,
        required_unless_present = "replay",
        conflicts_with = "replay"
    )]
    setting: Option<Setting>,
    /// Route the requests of the recorded traces (*.fgt) of this folder, in place of a setting's.
    #[arg(long, value_name = "DIR")]
    replay: Option<PathBuf>,
    /// Slots of each of eight workers, for a replay.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096), requires = "replay")]
    slots: u32,
    /// Arrivals, as a part of what full batches of random requests serve, for a replay.
    #[arg(long, default_value_t = 1.25, value_parser = load, requires = "replay")]
    load: f64,
    /// Policies, the first is the baseline: least, round-robin, prefix, band, ms:W (the window over W requests),
    /// label:W (only a topic label is known; not in a replay), placebo:W (signatures exchanged). Default: all of them. Caches
    /// are always compared with all of theirs.
    #[arg(long, value_delimiter = ',')]
    policies: Vec<Policy>,
    /// Seeds.
    #[arg(long, value_delimiter = ',', default_value = "0,1,2,3,4")]
    seeds: Vec<u64>,
    /// Share of requests placed at random, in place of the policy's own slice; 0 also stops the guard from judging.
    #[arg(long)]
    control: Option<f64>,
    /// Write the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the plot as SVG to this file (not for caches).
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// Simulates, prints a table and writes the files.
///
/// # Errors
/// Wrong arguments; files that cannot be written; a request that waited longer than it may.
pub(super) fn run(args: &LookaheadArgs, progress: &Progress) -> Result<(), CliError> {
    if args.seeds.is_empty() {
        return Err(CliError::Usage("--seeds needs at least one".into()));
    }
    if args
        .control
        .is_some_and(|share| !(0.0..=1.0).contains(&share))
    {
        return Err(CliError::Usage("--control must be from 0 to 1".into()));
    }
    if let Some(folder) = &args.replay {
        return replay(args, folder, progress);
    }
    let Some(setting) = args.setting else {
        return Err(CliError::Usage("--setting or --replay is needed".into()));
    };
    match setting.subject() {
        Subject::Router(cluster) => {
            let draw = |seed| Traffic::new(cluster, seed);
            route(
                args,
                setting.name().to_owned(),
                cluster.slots,
                draw,
                progress,
            )
        }
        Subject::Cache { .. } if args.svg.is_some() => {
            Err(CliError::Usage("--svg: there is no plot of caches".into()))
        }
        Subject::Cache { fit, share, decay } => {
            let task = progress.steps(setting.name(), caches::cases() as u64);
            let rows = caches::run(fit, share, decay, &args.seeds, || task.add(1));
            task.finish("done");
            let report = CacheReport {
                setting: setting.name(),
                seeds: args.seeds.clone(),
                share,
                decay,
                rows,
            };
            print(&report.text());
            args.json
                .as_ref()
                .map_or(Ok(()), |path| write_json(path, &report))
        }
    }
}

/// The requests of recorded traces. They have no topics, so no policy can be told of one.
fn replay(args: &LookaheadArgs, folder: &Path, progress: &Progress) -> Result<(), CliError> {
    if args
        .policies
        .iter()
        .any(|policy| matches!(policy, Policy::Label(_)))
    {
        return Err(CliError::Usage(
            "--policies label:W: a trace has no topics; leave it out of a replay".into(),
        ));
    }
    let recorded = Recorded::read(folder)?;
    progress.say(&recorded.told());
    let draw = |seed| recorded.traffic(args.slots, args.load, seed);
    let name = format!("replay of {}", folder.display());
    route(args, name, args.slots, draw, progress)
}

fn load(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    number
        .filter(|load: &f64| load.is_finite() && *load > 0.0)
        .ok_or_else(|| "give a number above 0, such as 1.25".to_owned())
}

/// All policies, unless some are named.
fn policies(args: &LookaheadArgs) -> Vec<Policy> {
    if !args.policies.is_empty() {
        return args.policies.clone();
    }
    let mut all = vec![
        Policy::Least,
        Policy::RoundRobin,
        Policy::Prefix,
        Policy::Band,
        Policy::Window(16),
        Policy::Window(64),
        Policy::Label(64),
        Policy::Placebo(64),
    ];
    all.retain(|policy| args.replay.is_none() || !matches!(policy, Policy::Label(_)));
    all
}

fn route(
    args: &LookaheadArgs,
    setting: String,
    slots: u32,
    draw: impl Fn(u64) -> Traffic,
    progress: &Progress,
) -> Result<(), CliError> {
    let chosen = policies(args);
    let steps = args.seeds.len() * (chosen.len() + 1);
    let task = progress.steps(&setting, steps as u64);
    let draw = |seed: &u64| {
        let traffic = draw(*seed);
        task.add(1);
        traffic
    };
    let traffic: Vec<Traffic> = args.seeds.iter().map(draw).collect();
    let mut policies: Vec<OfPolicy> = Vec::new();
    let mut base: Option<Vec<Figures>> = None;
    for policy in &chosen {
        let runs = simulate(*policy, slots, &traffic, args.control, &task);
        if let Some(run) = runs.iter().find(|run| run.overtaken > 0) {
            return Err(CliError::Runtime(format!(
                "{policy}: {} requests that had waited for their patience were overtaken",
                run.overtaken
            )));
        }
        let own = OfPolicy::new(policy.to_string(), &runs, base.as_deref().unwrap_or(&[]));
        if base.is_none() {
            base = Some(own.by_seed.clone());
        }
        policies.push(own);
    }
    task.finish("done");
    let mean =
        |of: fn(&Traffic) -> f64| traffic.iter().map(of).sum::<f64>() / traffic.len() as f64;
    let report = Report {
        setting,
        seeds: args.seeds.clone(),
        correlation: mean(|traffic| traffic.correlation),
        random_batch: mean(|traffic| traffic.random_batch),
        policies,
    };
    print(&report.text());
    if let Some(path) = &args.svg {
        plot::write(path, &report)?;
    }
    args.json
        .as_ref()
        .map_or(Ok(()), |path| write_json(path, &report))
}

fn simulate(
    policy: Policy,
    slots: u32,
    traffic: &[Traffic],
    control: Option<f64>,
    task: &Task,
) -> Vec<Run> {
    let run = |traffic: &Traffic| {
        let profiles = told(policy, traffic);
        let arm = Arm::new(policy, traffic, control);
        let run = cluster::run(traffic, &profiles, slots, arm, PATIENCE);
        task.add(1);
        run
    };
    traffic.iter().map(run).collect()
}

/// What a policy is told of the requests.
fn told(policy: Policy, traffic: &Traffic) -> Vec<Profile> {
    match policy {
        Policy::Label(_) => traffic.labels.clone(),
        // Everybody's goes to somebody far away in the order of arrival.
        Policy::Placebo(_) => {
            let n = traffic.profiles.len();
            let other = |at: usize| traffic.profiles[(at * 337 + 11) % n].clone();
            (0..n).map(other).collect()
        }
        Policy::Least
        | Policy::RoundRobin
        | Policy::Prefix
        | Policy::Band
        | Policy::Window(_) => traffic.profiles.clone(),
    }
}
