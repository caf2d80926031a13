//! The end of a worker: take nothing new, finish what runs, be there for peers that still call, leave.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::engine::EngineHandle;
use crate::exchange::Endpoint;

/// How long running sequences, here and at peers, may take after a shutdown was asked for.
const DRAIN_DEADLINE: Duration = Duration::from_secs(20);
/// How long a thread may take to end after its step.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
/// A peer that decodes calls every few milliseconds; when none has called for this long, none needs us.
const QUIET: Duration = Duration::from_millis(300);

/// Lets the engine finish its sequences, then waits until no peer calls any more; together at most
/// [`DRAIN_DEADLINE`]. Streams that are cut off end with an error after which another worker can go on.
///
/// The second half is for a cluster that stops as a whole: a worker without sequences of its own still
/// holds experts that the others need for theirs.
pub(crate) async fn drain(engine: Option<&EngineHandle>, endpoint: &Endpoint) {
    let deadline = Instant::now() + DRAIN_DEADLINE;
    if let Some(engine) = engine {
        if timeout_at(deadline, engine.drain()).await.is_err() {
            tracing::warn!(seconds = DRAIN_DEADLINE.as_secs(), "engine_drain_cut_off");
            if timeout(STOP_DEADLINE, engine.stop()).await.is_err() {
                tracing::error!("engine_did_not_stop");
            }
            return;
        }
        tracing::info!("engine_drained");
    }
    if timeout_at(deadline, quiet(endpoint)).await.is_err() {
        tracing::warn!("peers_still_call");
    }
}

async fn quiet(endpoint: &Endpoint) {
    let mut calls = endpoint.server().calls();
    loop {
        sleep(QUIET).await;
        let now = endpoint.server().calls();
        if now == calls {
            return;
        }
        calls = now;
    }
}
