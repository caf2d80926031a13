//! `foregate simulate`: the product's decisions on synthetic loads, without a cluster.

pub(crate) mod bars;
mod lookahead;
mod placement;

use crate::error::CliError;
use crate::progress::Progress;

/// Arguments of `foregate simulate`.
#[derive(Debug, clap::Args)]
pub(crate) struct SimulateArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Routing and batching by predicted experts, and expert caches, beside their baselines.
    Lookahead(lookahead::LookaheadArgs),
    /// The operator's planner on drifting expert loads, beside published ones.
    Placement(placement::PlacementArgs),
}

/// Runs a simulation.
///
/// # Errors
/// Wrong arguments, or files that cannot be written.
pub(crate) async fn run(args: SimulateArgs, progress: &Progress) -> Result<(), CliError> {
    let progress = progress.clone();
    // On a thread of its own, so that the signal to stop is heard.
    let work = tokio::task::spawn_blocking(move || match args.what {
        What::Lookahead(args) => lookahead::run(&args, &progress),
        What::Placement(args) => placement::run(&args, &progress),
    });
    work.await
        .map_err(|error| CliError::runtime("the simulation broke off", &error))?
}
