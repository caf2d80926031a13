//! `foregate plan --what-if workers=6,slots=9`: what other workers or slots would give and cost, before anybody pays.

use std::path::{Path, PathBuf};

use foregate_api::ids::{Epoch, Rank};
use foregate_api::model::ModelSpec;
use foregate_checkpoint::Checkpoint;
use foregate_explain::{Machine, Wish, WishError, what_if};
use foregate_planner::redundancy::slots_to_link;
use foregate_planner::{Problem, RankSlots, Settings};
use foregate_trace::Event;

use crate::error::{CliError, print};
use crate::explain;
use crate::weights::WeightArgs;

/// Arguments of `foregate plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    /// Workers and slots to ask about, such as workers=6,slots=9. What is not named stays as it is.
    #[arg(long, value_name = "WISH")]
    what_if: Wish,
    /// URL of the gateway whose cluster is asked about.
    #[arg(
        long,
        default_value = "http://127.0.0.1:8000",
        conflicts_with = "model"
    )]
    url: String,
    /// Ask about this model, without a cluster.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    #[command(flatten)]
    weights: WeightArgs,
    /// Judge by the load of this expert trace, in place of the cluster's last prediction.
    #[arg(long, value_name = "TRACE")]
    load: Option<PathBuf>,
    /// Bytes that one worker loads in a second; default: as measured at the cluster's last moves.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    bandwidth: Option<u64>,
    /// Write the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Computes and prints the answer.
///
/// # Errors
/// A gateway that does not answer, a model or trace that cannot be read, a wish without a placement.
pub(crate) async fn run(args: PlanArgs) -> Result<(), CliError> {
    let mut machine = match &args.model {
        Some(directory) => of_model(directory, &args).await?,
        None => {
            let told = explain::ask(&args.url).await?;
            Machine::of(&told.past).map_err(|missing| CliError::Runtime(missing.to_string()))?
        }
    };
    if let Some(path) = &args.load {
        machine.problem.demand = load(path, &machine.problem)?;
    }
    if let Some(bandwidth) = args.bandwidth {
        machine.bytes_per_second = Some(bandwidth as f64);
    }
    let wish = args.what_if;
    let answered = tokio::task::spawn_blocking(move || what_if(&machine, wish)).await;
    let answer = answered
        .map_err(|error| CliError::runtime("the answer broke off", &error))?
        .map_err(|error| match error {
            WishError::Form(_) | WishError::Plan(_) => CliError::Usage(error.to_string()),
            WishError::Missing(_) | WishError::Nothing => CliError::Runtime(error.to_string()),
        })?;
    let text = if args.json {
        serde_json::to_string_pretty(&answer)
            .map_err(|error| CliError::runtime("the answer has no JSON form", &error))?
    } else {
        answer.to_string().trim_end().to_owned()
    };
    print(&text);
    Ok(())
}

/// A cluster that nobody has started: two workers and the slots that link them, where the wish does not say.
async fn of_model(directory: &Path, args: &PlanArgs) -> Result<Machine, CliError> {
    let what = format!("model {}", directory.display());
    let (directory, weights) = (directory.to_owned(), args.weights.settings());
    let opened = tokio::task::spawn_blocking(move || {
        Checkpoint::open_with(&directory, &weights).map(|checkpoint| checkpoint.spec().clone())
    });
    let spec: ModelSpec = opened
        .await
        .map_err(|error| CliError::runtime(&what, &error))?
        .map_err(|error| CliError::runtime(&what, &error))?;
    let workers = args.what_if.workers.unwrap_or(2);
    let slots = slots_to_link(spec.experts, workers as usize);
    let ranks = (0..workers).map(|rank| RankSlots {
        rank: Rank(rank),
        slots,
        domain: String::new(),
    });
    let mut problem = Problem::uniform(ranks.collect(), spec.moe_layers(), spec.experts);
    problem.above = Epoch(0);
    Ok(Machine {
        problem,
        settings: Settings::default(),
        previous: None,
        expert_bytes: spec.expert_bytes() as u64,
        dense_bytes: spec.dense_bytes() as u64,
        bytes_per_second: None,
    })
}

/// Rows by layer and expert over a whole trace.
fn load(path: &Path, problem: &Problem) -> Result<Vec<Vec<f64>>, CliError> {
    let failed = |error: &dyn std::error::Error| {
        CliError::runtime(&format!("trace {}", path.display()), error)
    };
    let bytes = std::fs::read(path).map_err(|error| failed(&error))?;
    let (header, events) = foregate_trace::read(&bytes).map_err(|error| failed(&error))?;
    if (header.layers, header.experts) != (problem.layers, problem.experts) {
        return Err(CliError::Usage(format!(
            "trace {}: it is of {} layers of {} experts, the model has {} of {}",
            path.display(),
            header.layers,
            header.experts,
            problem.layers,
            problem.experts
        )));
    }
    let mut sums = vec![0.0; header.pairs()];
    for event in events {
        if let Event::Window { counts, .. } = event.map_err(|error| failed(&error))? {
            for (sum, count) in sums.iter_mut().zip(counts) {
                *sum += count as f64;
            }
        }
    }
    Ok(sums.chunks(header.experts).map(<[f64]>::to_vec).collect())
}
