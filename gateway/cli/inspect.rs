//! `foregate inspect`: the sizes of a model, as the operator plans with them. In a pod it writes them where the kubelet picks them
//! up.

use std::path::PathBuf;

use foregate_api::model::ModelFacts;
use foregate_checkpoint::Checkpoint;

use crate::error::{CliError, print};
use crate::weights::WeightArgs;

/// Arguments of `foregate inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    /// Directory of the model.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    weights: WeightArgs,
    /// Write the JSON to this file instead of stdout.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Opens the model and tells its sizes.
///
/// # Errors
/// The model's, or the file's.
pub(crate) async fn run(args: InspectArgs) -> Result<(), CliError> {
    let what = format!("model {}", args.model.display());
    let weights = args.weights.settings();
    let directory = args.model.clone();
    let opened = tokio::task::spawn_blocking(move || {
        Checkpoint::open_with(&directory, &weights)
            .map(|checkpoint| ModelFacts::of(checkpoint.spec()))
    });
    let facts = opened
        .await
        .map_err(|error| CliError::runtime(&what, &error))?
        .map_err(|error| CliError::runtime(&what, &error))?;
    let text =
        serde_json::to_string(&facts).map_err(|error| CliError::runtime(&what, &error))?;
    match args.out {
        None => print(&text),
        Some(path) => std::fs::write(&path, text)
            .map_err(|error| CliError::runtime(&path.display().to_string(), &error))?,
    }
    Ok(())
}
