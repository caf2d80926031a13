//! `foregate explain`: why the experts are where they are, from what a running cluster has recorded.

use std::time::Duration;

use clap::Subcommand;
use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_explain::{Missing, Past};
use serde::Serialize;
use serde_json::Value;

use crate::error::{CliError, print};

/// Longest wait for the answer: of a large model it is megabytes.
const DEADLINE: Duration = Duration::from_secs(30);

/// Arguments of `foregate explain`.
#[derive(Debug, clap::Args)]
pub(crate) struct ExplainArgs {
    /// URL of the gateway.
    #[arg(long, default_value = "http://127.0.0.1:8000", global = true)]
    url: String,
    /// Write the answer as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    about: Option<About>,
}

#[derive(Debug, Subcommand)]
enum About {
    /// Why an expert has so many copies, why they are where they are, and what else could be.
    Expert {
        /// MoE layer and expert, both counted from 0.
        #[arg(value_name = "LAYER:EXPERT", value_parser = layer_and_expert)]
        which: (u32, u32),
    },
    /// What a rank holds and carries, and what its loss would mean.
    Rank {
        /// The rank.
        rank: u32,
    },
    /// What triggered the last change, what it was to bring, and what it brought. The default.
    Last,
    /// The same of the change to a placement, as far back as is kept.
    Epoch {
        /// The placement's number.
        epoch: u64,
    },
    /// When the next decision is due, and how near each layer is to a move.
    Next,
}

fn layer_and_expert(text: &str) -> Result<(u32, u32), String> {
    let parts = text
        .split_once(':')
        .and_then(|(layer, expert)| Some((layer.parse().ok()?, expert.parse().ok()?)));
    parts.ok_or_else(|| "give layer and expert such as 3:17".to_owned())
}

/// What a gateway tells of the past.
pub(crate) struct Told {
    /// Milliseconds since 1970, at the gateway.
    pub(crate) now_ms: u64,
    pub(crate) past: Past,
}

/// Asks, computes and prints.
///
/// # Errors
/// A gateway that does not answer; what is not recorded.
pub(crate) async fn run(args: &ExplainArgs) -> Result<(), CliError> {
    let Told { now_ms, past } = ask(&args.url).await?;
    for what in &past.unreadable {
        tracing::warn!(%what, "left out");
    }
    // Alternatives of a large layer take a while.
    let (about, json) = (args.about.as_ref().map(question), args.json);
    let answered = tokio::task::spawn_blocking(move || answer(&past, about, now_ms, json));
    let text = answered
        .await
        .map_err(|error| CliError::runtime("the answer broke off", &error))??;
    print(&text);
    Ok(())
}

#[derive(Debug, Clone, Copy)]
enum Question {
    Expert(LayerId, ExpertId),
    Rank(Rank),
    Change(Epoch),
    Last,
    Next,
}

const fn question(about: &About) -> Question {
    match about {
        About::Expert { which } => Question::Expert(LayerId(which.0), ExpertId(which.1)),
        About::Rank { rank } => Question::Rank(Rank(*rank)),
        About::Epoch { epoch } => Question::Change(Epoch(*epoch)),
        About::Last => Question::Last,
        About::Next => Question::Next,
    }
}

fn answer(
    past: &Past,
    about: Option<Question>,
    now_ms: u64,
    json: bool,
) -> Result<String, CliError> {
    match about.unwrap_or(Question::Last) {
        Question::Expert(layer, expert) => {
            show(foregate_explain::expert(past, layer, expert, now_ms), json)
        }
        Question::Rank(rank) => show(foregate_explain::rank(past, rank, now_ms), json),
        Question::Change(epoch) => show(foregate_explain::change(past, epoch, now_ms), json),
        Question::Last => show(foregate_explain::last(past, now_ms), json),
        Question::Next => show(foregate_explain::next(past, now_ms), json),
    }
}

fn show<T: Serialize + std::fmt::Display>(
    answer: Result<T, Missing>,
    json: bool,
) -> Result<String, CliError> {
    let answer = answer.map_err(|missing| CliError::Runtime(missing.to_string()))?;
    if json {
        serde_json::to_string_pretty(&answer)
            .map_err(|error| CliError::runtime("the answer has no JSON form", &error))
    } else {
        Ok(answer.to_string().trim_end().to_owned())
    }
}

/// Reads what the gateway at `url` tells of the past.
///
/// # Errors
/// If it does not answer, or with something else.
pub(crate) async fn ask(url: &str) -> Result<Told, CliError> {
    let document = get(url, "/debug/plan").await?;
    let what = || CliError::Runtime(format!("{url}/debug/plan is not what was expected"));
    let now_ms = document["now_ms"].as_u64().ok_or_else(what)?;
    let entries = document["entries"].as_object().ok_or_else(what)?;
    let stored: Vec<(&str, Vec<u8>)> = entries
        .iter()
        .map(|(name, value)| (name.as_str(), value.to_string().into_bytes()))
        .collect();
    let past = Past::read(stored.iter().map(|(name, bytes)| (*name, bytes.as_slice())));
    Ok(Told { now_ms, past })
}

/// Reads a JSON document of the gateway at `url`.
///
/// # Errors
/// If it does not answer, or with something else.
pub(crate) async fn get(url: &str, path: &str) -> Result<Value, CliError> {
    let url = format!("{}{path}", url.trim_end_matches('/'));
    let failed = |error: reqwest::Error| CliError::runtime(&url, &error);
    let http = reqwest::Client::builder()
        .timeout(DEADLINE)
        .build()
        .map_err(failed)?;
    let answer = http.get(&url).send().await.map_err(failed)?;
    let answer = answer.error_for_status().map_err(failed)?;
    answer.json().await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_is_named_by_layer_and_number() {
        assert_eq!(layer_and_expert("3:17"), Ok((3, 17)));
        for wrong in ["3", "3:", ":17", "a:1", "1:2:3", "-1:2"] {
            assert!(layer_and_expert(wrong).is_err(), "{wrong}");
        }
    }
}
