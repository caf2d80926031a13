//! `foregate simulate lookahead`: the gateway's routing and the workers' expert caches on a token model, without a
//! cluster. The policies are the product's code; only workers and tokens are simulated.

mod arm;
mod caches;
mod cluster;
mod figures;
mod plot;
mod report;
mod settings;
mod tokens;
mod traffic;

use std::path::PathBuf;

use foregate_gateway::signature::Profile;

use crate::bench::write_json;
use crate::error::{CliError, print};
use crate::progress::{Progress, Task};
use arm::{Arm, PATIENCE, Policy};
use cluster::Run;
use figures::Figures;
use report::{CacheReport, OfPolicy, Report};
use settings::{Cluster, Setting, Subject};
use traffic::Traffic;

/// Arguments of `foregate simulate lookahead`.
#[derive(Debug, clap::Args)]
pub(crate) struct LookaheadArgs {
    /// What is simulated.
    #[arg(long, value_enum)]
    setting: Setting,
    /// Policies, the first is the baseline: least, round-robin, prefix, band, ms:W (the window over W requests),
    /// label:W (only a topic label is known), placebo:W (signatures exchanged). Caches are always compared with all
    /// of theirs.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "least,round-robin,prefix,band,ms:16,ms:64,label:64,placebo:64"
    )]
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
    if args.policies.is_empty() || args.seeds.is_empty() {
        return Err(CliError::Usage(
            "--policies and --seeds need at least one each".into(),
        ));
    }
    if args
        .control
        .is_some_and(|share| !(0.0..=1.0).contains(&share))
    {
        return Err(CliError::Usage("--control must be from 0 to 1".into()));
    }
    match args.setting.subject() {
        Subject::Router(cluster) => route(args, cluster, progress),
        Subject::Cache { .. } if args.svg.is_some() => {
            Err(CliError::Usage("--svg: there is no plot of caches".into()))
        }
        Subject::Cache { fit, share, decay } => {
            let task = progress.steps(args.setting.name(), caches::cases() as u64);
            let rows = caches::run(fit, share, decay, &args.seeds, || task.add(1));
            task.finish("done");
            let report = CacheReport {
                setting: args.setting.name(),
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

fn route(args: &LookaheadArgs, cluster: Cluster, progress: &Progress) -> Result<(), CliError> {
    let steps = args.seeds.len() * (args.policies.len() + 1);
    let task = progress.steps(args.setting.name(), steps as u64);
    let draw = |seed: &u64| {
        let traffic = Traffic::new(cluster, *seed);
        task.add(1);
        traffic
    };
    let traffic: Vec<Traffic> = args.seeds.iter().map(draw).collect();
    let mut policies: Vec<OfPolicy> = Vec::new();
    let mut base: Option<Vec<Figures>> = None;
    for policy in &args.policies {
        let runs = simulate(*policy, cluster, &traffic, args.control, &task);
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
        setting: args.setting.name(),
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
    cluster: Cluster,
    traffic: &[Traffic],
    control: Option<f64>,
    task: &Task,
) -> Vec<Run> {
    let run = |traffic: &Traffic| {
        let profiles = told(policy, traffic);
        let arm = Arm::new(policy, traffic, control);
        let run = cluster::run(traffic, &profiles, cluster.slots, arm, PATIENCE);
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
