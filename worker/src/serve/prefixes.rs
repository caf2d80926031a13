//! The stream of prefixes: what the KV cache holds, then every change. A reader that is too slow gets all anew.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use foregate_wire::generation::PrefixEvent;
use foregate_wire::tonic::Status;
use futures::{Stream, stream};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;

use super::refusal;
use crate::engine::{EngineHandle, Follower};
use crate::kv_cache::Changes;

/// Names of one message; a cache of a million pages takes sixteen.
const NAMES: usize = 1 << 16;
/// Longest wait for the engine to say what it holds: a step at most, and steps are short.
const ANSWER: Duration = Duration::from_secs(30);

struct Told {
    engine: EngineHandle,
    changes: Option<Receiver<Arc<Changes>>>,
    pending: VecDeque<PrefixEvent>,
    _follower: Follower,
}

/// Events until the engine ends.
pub(super) fn events(
    engine: EngineHandle,
    follower: Follower,
) -> impl Stream<Item = Result<PrefixEvent, Status>> + Send {
    let told = Told {
        engine,
        changes: None,
        pending: VecDeque::new(),
        _follower: follower,
    };
    stream::try_unfold(told, next)
}

async fn next(mut told: Told) -> Result<Option<(PrefixEvent, Told)>, Status> {
    loop {
        if let Some(event) = told.pending.pop_front() {
            return Ok(Some((event, told)));
        }
        let Some(changes) = &mut told.changes else {
            let found = timeout(ANSWER, told.engine.prefixes()).await;
            let found = found.map_err(|_| Status::unavailable("the engine does not answer"))?;
            let (names, changes) = found.map_err(|error| refusal(&error))?;
            told.pending = snapshot(&names);
            told.changes = Some(changes);
            continue;
        };
        match changes.recv().await {
            Ok(changes) => told.pending.push_back(PrefixEvent {
                reset: false,
                added: changes.added.clone(),
                removed: changes.removed.clone(),
            }),
            // What was missed is not known, so everything is told anew.
            Err(RecvError::Lagged(_)) => told.changes = None,
            Err(RecvError::Closed) => return Ok(None),
        }
    }
}

fn snapshot(names: &[u64]) -> VecDeque<PrefixEvent> {
    let event = |reset: bool, names: &[u64]| PrefixEvent {
        reset,
        added: names.to_vec(),
        removed: Vec::new(),
    };
    let (first, rest) = names.split_at(names.len().min(NAMES));
    let rest = rest.chunks(NAMES).map(|names| event(false, names));
    [event(true, first)].into_iter().chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_cache_is_told_in_parts_of_which_the_first_resets() {
        let names: Vec<u64> = (0..NAMES as u64 * 2 + 5).collect();
        let events = snapshot(&names);
        let resets: Vec<bool> = events.iter().map(|event| event.reset).collect();
        assert_eq!(resets, [true, false, false]);
        let told: Vec<u64> = events
            .iter()
            .flat_map(|event| event.added.clone())
            .collect();
        assert_eq!(told, names);
        assert_eq!(snapshot(&[]).len(), 1, "an empty cache is told as well");
    }
}
