//! Waits until the cluster serves, and shows how far it is.

use std::sync::Arc;
use std::time::Duration;

use foregate_api::member::Phase;
use foregate_store::coord::{ClusterState, Coord};
use foregate_store::kv::Store;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::error::{CliError, print};
use crate::progress::Progress;

/// Loading a large model from a slow disk takes a while; longer than this it is stuck.
const LIMIT: Duration = Duration::from_secs(1800);
const POLL: Duration = Duration::from_millis(100);

/// What is waited for.
#[derive(Debug, Clone)]
pub(super) struct Awaited {
    /// Name of the cluster.
    pub(super) cluster: String,
    /// Name of the model.
    pub(super) served_name: String,
    /// Number of workers.
    pub(super) workers: usize,
    /// URL of the gateway.
    pub(super) url: String,
}

/// Resolves when the gateway says it is ready, and prints the ready line.
///
/// # Errors
/// When that takes unreasonably long.
pub(super) async fn ready(
    awaited: &Awaited,
    store: Arc<dyn Store>,
    progress: &Progress,
) -> Result<(), CliError> {
    let end = CancellationToken::new();
    let _end_with_us = end.clone().drop_guard();
    let state = Coord::new(store, &awaited.cluster).watch_cluster(end);
    let total = awaited.workers * 2 + 1;
    let task = progress.steps("loading", total as u64);
    let http = reqwest::Client::builder()
        .timeout(Duration::from_secs(2))
        .build()
        .map_err(|error| CliError::runtime("HTTP client", &error))?;
    let since = Instant::now();
    let mut shown = 0;
    loop {
        let done = steps(&state.borrow());
        if done != shown {
            task.set(done as u64);
            shown = done;
        }
        let answer = http.get(format!("{}/ready", awaited.url)).send().await;
        if answer.is_ok_and(|answer| answer.status().is_success()) {
            break;
        }
        if since.elapsed() > LIMIT {
            return Err(CliError::Runtime(format!(
                "not ready after {} s: {shown} of {total} steps done (every worker registers, then has its experts; then a plan is active)",
                LIMIT.as_secs()
            )));
        }
        sleep(POLL).await;
    }
    task.finish(&format!("done in {:.1} s", since.elapsed().as_secs_f64()));
    let workers = match awaited.workers {
        1 => "1 worker".to_owned(),
        n => format!("{n} workers"),
    };
    print(&format!(
        "Ready: {} serves {} on {workers}",
        awaited.url, awaited.served_name
    ));
    Ok(())
}

/// Every worker counts when it has registered and again when it is ready; the active plan counts one.
fn steps(state: &ClusterState) -> usize {
    let ready = state.members.values().filter(|m| m.phase == Phase::Ready);
    state.members.len() + ready.count() + usize::from(state.active.is_some())
}
