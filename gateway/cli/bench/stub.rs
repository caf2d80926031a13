//! `foregate bench stub`: back ends that answer every request with the same tokens at the same moments.
//!
//! They compute nothing, so what a gateway in front of them adds is not lost in what a model takes. Each has three faces over
//! one schedule: Foregate's own gRPC, OpenAI's HTTP, and the part of SGLang's gRPC that other gateways speak.

mod generation;
mod openai;
mod schedule;
mod sglang;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use foregate_api::model::ModelSpec;
use foregate_checkpoint::Checkpoint;
use foregate_gateway::output::Detokenizer;
use foregate_gateway::prompt::Prompter;
use foregate_gateway::serve::{self as server, End, Limits};
use foregate_wire::generation::generation_server::GenerationServer;
use foregate_wire::serve::{serve, server as grpc};
use foregate_wire::sglang::sglang_scheduler_server::SglangSchedulerServer;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub(super) use schedule::Delays;
use schedule::Schedule;

use crate::error::{CliError, print};
use crate::roles::{listen, watch_parent};

/// What every answer says, over and over. Plain words: no token ends within a character.
const SAYS: &str = "In the beginning there was a gateway, and every word that came to it went through it without a rest. \
                    It took what was asked, found who would answer, and gave back each word as soon as it had it. ";
/// The model's name.
pub(super) const NAME: &str = "stub";
/// Requests that a back end takes at a time.
const REQUESTS: usize = 4096;

/// Arguments of `foregate bench stub`.
#[derive(Debug, clap::Args)]
pub(crate) struct StubArgs {
    /// Model directory whose tokenizer gives the answers' tokens.
    #[arg(long)]
    model: PathBuf,
    /// Back ends.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    backends: u32,
    #[command(flatten)]
    delays: Delays,
}

/// Where the back ends listen: `host:port`, one of each kind per back end.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Faces {
    pub(super) http: Vec<String>,
    pub(super) generation: Vec<String>,
    pub(super) sglang: Vec<String>,
}

/// What all faces answer with.
#[derive(Debug)]
struct Script {
    /// Where the model's files are.
    model: String,
    spec: ModelSpec,
    /// Tokens of an answer, over and over, each with its text.
    tokens: Vec<(u32, String)>,
    schedule: Schedule,
}

impl Script {
    fn load(model: &Path, delays: Delays) -> Result<Self, CliError> {
        let prompter =
            Prompter::load(model).map_err(|error| CliError::runtime("model", &error))?;
        let ids = prompter
            .encode("answer", SAYS, false)
            .map_err(|error| CliError::Runtime(format!("model: {}", error.message)))?;
        let mut text = Detokenizer::new(prompter, &[], true);
        Ok(Self {
            model: model.display().to_string(),
            spec: spec(model)?,
            tokens: ids.into_iter().map(|id| (id, text.push(id))).collect(),
            schedule: Schedule::new(delays),
        })
    }

    fn token(&self, index: u32) -> (u32, &str) {
        let (id, text) = &self.tokens[index as usize % self.tokens.len()];
        (*id, text)
    }
}

/// What the model is, by its files.
pub(super) fn spec(model: &Path) -> Result<ModelSpec, CliError> {
    let checkpoint =
        Checkpoint::open(model).map_err(|error| CliError::runtime("model", &error))?;
    Ok(checkpoint.spec().clone())
}

/// Says on stdout where the back ends listen, and serves until stdin ends or `drain`.
///
/// # Errors
/// A model that cannot be read, no port.
pub(super) async fn run(args: &StubArgs, drain: CancellationToken) -> Result<(), CliError> {
    let script = Arc::new(Script::load(&args.model, args.delays)?);
    watch_parent(drain.clone())?;
    let (mut faces, mut tasks) = (Faces::default(), JoinSet::new());
    for _ in 0..args.backends {
        let (listener, address) = port().await?;
        let (router, end) = (openai::router(&script), drain.clone());
        let limits = Limits::for_requests(REQUESTS);
        tasks.spawn(async move {
            server::serve(listener, router, limits, End::at_once(end)).await;
            Ok(())
        });
        faces.http.push(address);
        let (listener, address) = port().await?;
        let service = GenerationServer::new(generation::Face(Arc::clone(&script)));
        tasks.spawn(serve(
            grpc().add_service(service),
            listener,
            None,
            drain.clone(),
        ));
        faces.generation.push(address);
        let (listener, address) = port().await?;
        let service = SglangSchedulerServer::new(sglang::Face(Arc::clone(&script)));
        tasks.spawn(serve(
            grpc().add_service(service),
            listener,
            None,
            drain.clone(),
        ));
        faces.sglang.push(address);
    }
    let line =
        serde_json::to_string(&faces).map_err(|error| CliError::runtime("stub", &error))?;
    print(&line);
    drain.cancelled().await;
    // Whoever measured is gone: nobody waits for the rest of an answer.
    tasks.shutdown().await;
    Ok(())
}

async fn port() -> Result<(TcpListener, String), CliError> {
    let listener = listen("stub", "127.0.0.1:0").await?;
    let address = listener
        .local_addr()
        .map_err(|error| CliError::runtime("stub", &error))?;
    Ok((listener, address.to_string()))
}

#[cfg(test)]
mod tests;
