//! `foregate trace`: records the expert traces of live traffic, looks into them, and runs the planner on them.

mod replay;
mod summary;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use foregate_trace::{Event, Header, TraceError};
use futures::StreamExt as _;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::error::{CliError, print};
use crate::progress::Progress;
use summary::Summary;

/// Longest silence of a gateway; windows come more often.
const SILENCE: Duration = Duration::from_secs(60);

/// Arguments of `foregate trace`.
#[derive(Debug, clap::Args)]
pub(crate) struct TraceArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Write which experts live traffic asks for to a file: counts per window and request, no text.
    Record(RecordArgs),
    /// Tell what a trace holds.
    Inspect {
        /// The trace.
        file: PathBuf,
        /// Write it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run the planner on a trace's windows, as the operator would have.
    Replay(replay::ReplayArgs),
}

#[derive(Debug, clap::Args)]
struct RecordArgs {
    /// URL of the gateway.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// File to write; one that exists is not overwritten.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Seconds to record; default: until ctrl-c.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
}

/// Runs a sub-command.
///
/// # Errors
/// A gateway that does not answer, files that cannot be read or written.
pub(crate) async fn run(
    args: TraceArgs,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    match args.what {
        What::Record(args) => record(&args, progress, drain).await,
        What::Inspect { file, json } => {
            let (header, events, broken) = read(&file)?;
            print(&Summary::of(&header, &events, broken).told(json)?);
            Ok(())
        }
        What::Replay(args) => replay::run(&args).await,
    }
}

async fn record(
    args: &RecordArgs,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    let url = format!("{}/debug/trace", args.url.trim_end_matches('/'));
    let failed = |error: &dyn std::error::Error| CliError::runtime(&url, error);
    let answer = reqwest::get(&url).await.map_err(|error| failed(&error))?;
    let mut events = answer
        .error_for_status()
        .map_err(|error| failed(&error))?
        .bytes_stream();
    let name = args.out.display().to_string();
    let written = |error: std::io::Error| CliError::runtime(&name, &error);
    let mut file = std::fs::File::create_new(&args.out).map_err(written)?;
    let end = args
        .seconds
        .map(|seconds| Instant::now() + Duration::from_secs(seconds));
    progress.say(&format!("recording to {name}"));
    let mut bytes = 0_usize;
    loop {
        let chunk = tokio::select! {
            chunk = tokio::time::timeout(SILENCE, events.next()) => chunk.map_err(|_| {
                CliError::Runtime(format!("{url}: nothing came for {} s", SILENCE.as_secs()))
            })?,
            () = until(end) => break,
            () = drain.cancelled() => break,
        };
        let Some(chunk) = chunk else { break };
        let chunk = chunk.map_err(|error| failed(&error))?;
        bytes += chunk.len();
        file.write_all(&chunk).map_err(written)?;
    }
    file.sync_all().map_err(written)?;
    let (header, events, broken) = read(&args.out)?;
    print(&format!("{name}: {bytes} bytes"));
    print(&Summary::of(&header, &events, broken).told(false)?);
    Ok(())
}

async fn until(end: Option<Instant>) {
    match end {
        Some(end) => sleep_until(end).await,
        None => std::future::pending().await,
    }
}

/// A trace's header and events, and whether it breaks off.
fn read(path: &Path) -> Result<(Header, Vec<Event>, bool), CliError> {
    let failed = |error: &dyn std::error::Error| {
        CliError::runtime(&format!("trace {}", path.display()), error)
    };
    let bytes = std::fs::read(path).map_err(|error| failed(&error))?;
    let (header, found) = foregate_trace::read(&bytes).map_err(|error| failed(&error))?;
    let (mut events, mut broken) = (Vec::new(), false);
    for event in found {
        match event {
            Ok(event) => events.push(event),
            Err(TraceError::BreaksOff(_)) => broken = true,
            Err(error) => return Err(failed(&error)),
        }
    }
    Ok((header, events, broken))
}
