//! `foregate bench`: numbers, measured from outside where a user would see them.

mod client;
mod engine;
mod gateway;
mod kernels;
mod lookahead;
mod migrate;
mod model;
mod perplexity;
mod planners;
mod plot;
mod rebalance;
mod record;
mod report;
mod serve;
mod stub;
mod workload;

use tokio_util::sync::CancellationToken;

pub(crate) use plot::text;
pub(crate) use serve::write_json;

use crate::error::CliError;
use crate::progress::Progress;

/// Arguments of `foregate bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Load an OpenAI server and report time to first token, inter-token latency, throughput and goodput.
    Serve(serve::ServeArgs),
    /// Shift the mix of texts under a running gateway and record how the plan follows.
    Rebalance(rebalance::RebalanceArgs),
    /// The operator's planner, EPLB and a placement that stays, each on a cluster of its own under the same shifting mix.
    Planners(planners::PlannersArgs),
    /// Routing by expected experts against least loaded, on a running cluster, with a placebo.
    Lookahead(lookahead::LookaheadArgs),
    /// What Foregate's gateway, and SMG beside it, add to back ends that compute nothing: latency, requests per second.
    Gateway(gateway::GatewayArgs),
    /// What a live migration adds to the time between two tokens, in this process.
    Migrate(migrate::MigrateArgs),
    /// Decode and prefill speed of the engine alone, in this process.
    Engine(engine::EngineArgs),
    /// Each operation of the engine alone, beside what memory and arithmetic allow.
    Kernels(kernels::KernelsArgs),
    /// Write a random model of a known shape to measure with.
    Model(model::ModelArgs),
    /// How well a model predicts a text, with its weights in any format.
    Perplexity(perplexity::PerplexityArgs),
    /// A worker of `bench engine --workers`, which starts it.
    #[command(hide = true)]
    EngineWorker(engine::ChildArgs),
    /// The back ends of `bench gateway`, which starts them.
    #[command(hide = true)]
    Stub(stub::StubArgs),
}

/// Runs a benchmark.
///
/// # Errors
/// Wrong arguments, or nothing to measure.
pub(crate) async fn run(
    args: BenchArgs,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    match args.what {
        What::Serve(args) => Box::pin(serve::run(&args, progress, drain)).await,
        What::Rebalance(args) => Box::pin(rebalance::run(&args, progress, drain)).await,
        What::Planners(args) => Box::pin(planners::run(&args, progress, drain)).await,
        What::Lookahead(args) => Box::pin(lookahead::run(&args, progress, drain)).await,
        What::Gateway(args) => Box::pin(gateway::run(&args, progress, drain)).await,
        What::Migrate(args) => Box::pin(migrate::run(&args, progress, &drain)).await,
        What::Engine(args) => Box::pin(engine::run(&args, progress)).await,
        What::Kernels(args) => kernels::run(&args, progress),
        What::Model(args) => model::run(&args, progress),
        What::Perplexity(args) => Box::pin(perplexity::run(args, progress)).await,
        What::EngineWorker(args) => Box::pin(engine::run_worker(&args)).await,
        What::Stub(args) => Box::pin(stub::run(&args, drain)).await,
    }
}
