//! What happens, for whoever records it: requests that end, and load windows. Costs nothing while nobody listens.
//!
//! Every recorder has a bounded queue. One that is too slow loses the oldest events, and is told how many.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use foregate_api::ids::Rank;
use foregate_store::coord::ClusterState;
use foregate_trace::{Event, Header};
use tokio::sync::broadcast;

use crate::signature::Signature;

/// Events that wait for a slow recorder.
const QUEUE: usize = 256;

/// A request that has ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Its number, from 1.
    pub number: u64,
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// Tokens of its answer.
    pub answer_tokens: u64,
    /// Rows of the prompt.
    pub prompt: Arc<Signature>,
    /// Rows of prompt and answer.
    pub total: Vec<u32>,
}

impl Ended {
    /// As an event of a trace; `None` if it is of another model.
    #[must_use]
    pub fn event(&self, header: &Header, at_ms: u64) -> Option<Event> {
        let wide = |counts: &[u32]| counts.iter().copied().map(u64::from).collect::<Vec<_>>();
        let (prompt, total) = (wide(&self.prompt.counts), wide(&self.total));
        let fits = prompt.len() == header.pairs() && total.len() == header.pairs();
        fits.then_some(Event::Request {
            at_ms,
            number: self.number,
            prompt_tokens: self.prompt_tokens,
            answer_tokens: self.answer_tokens,
            prompt,
            total,
        })
    }
}

/// Where events come from.
#[derive(Debug)]
pub struct Feed {
    sender: broadcast::Sender<Arc<Ended>>,
    number: AtomicU64,
}

impl Default for Feed {
    fn default() -> Self {
        Self {
            sender: broadcast::channel(QUEUE).0,
            number: AtomicU64::new(0),
        }
    }
}

impl Feed {
    /// Events from now on.
    #[must_use]
    pub fn listen(&self) -> broadcast::Receiver<Arc<Ended>> {
        self.sender.subscribe()
    }

    /// Tells of a request that has ended, if somebody listens.
    pub fn ended(&self, of: impl FnOnce(u64) -> Option<Ended>) {
        if self.sender.receiver_count() == 0 {
            return;
        }
        let number = self.number.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(ended) = of(number) {
            // Who listened may be gone since.
            let _told = self.sender.send(Arc::new(ended));
        }
    }
}

/// Which windows were told of: a rank's last, and the steps that it had made.
#[derive(Debug, Default)]
pub struct Windows {
    seen: BTreeMap<Rank, (u64, u64)>,
}

impl Windows {
    /// The windows of `state` that are new. The first of a rank is not told: it began before anybody listened.
    pub fn new_in(&mut self, state: &ClusterState, header: &Header, at_ms: u64) -> Vec<Event> {
        let mut events = Vec::new();
        for (rank, window) in &state.loads {
            let this = (window.sequence, window.engine.steps);
            let Some(before) = self.seen.insert(*rank, this) else {
                continue;
            };
            if before.0 == window.sequence {
                continue;
            }
            // 0 of a worker that started anew.
            let steps = this.1.saturating_sub(before.1);
            events.extend(Event::window(window, header, at_ms, steps));
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use foregate_api::ids::Epoch;
    use foregate_api::load::{EngineLoad, LoadWindow};

    use super::*;

    fn header() -> Header {
        Header {
            model: "m".to_owned(),
            layers: 1,
            experts: 2,
            top_k: 1,
            started_ms: 0,
        }
    }

    fn state(sequence: u64, steps: u64) -> ClusterState {
        let window = LoadWindow {
            rank: Rank(1),
            epoch: Epoch(4),
            sequence,
            span_ms: 1000,
            gate: vec![vec![3, 4]],
            served: vec![7],
            engine: EngineLoad {
                steps,
                ..EngineLoad::default()
            },
        };
        ClusterState {
            loads: BTreeMap::from([(Rank(1), Arc::new(window))]),
            ..ClusterState::default()
        }
    }

    #[test]
    fn a_window_is_told_once_with_its_own_steps() {
        let mut windows = Windows::default();
        assert!(
            windows.new_in(&state(7, 100), &header(), 0).is_empty(),
            "it began before"
        );
        assert!(windows.new_in(&state(7, 100), &header(), 1).is_empty());
        let new = windows.new_in(&state(8, 112), &header(), 2);
        let [
            Event::Window {
                steps,
                counts,
                at_ms,
                ..
            },
        ] = new.as_slice()
        else {
            panic!("{new:?}");
        };
        assert_eq!((*steps, counts.as_slice(), *at_ms), (12, &[3, 4][..], 2));
        let other = Header {
            experts: 3,
            ..header()
        };
        assert!(
            windows.new_in(&state(9, 120), &other, 3).is_empty(),
            "another model"
        );
    }

    #[test]
    fn nobody_listens_and_nothing_is_made() {
        let feed = Feed::default();
        let mut asked = false;
        feed.ended(|_| {
            asked = true;
            None
        });
        assert!(!asked);
        let mut listener = feed.listen();
        feed.ended(|number| {
            Some(Ended {
                number,
                prompt_tokens: 1,
                answer_tokens: 1,
                prompt: Arc::new(Signature::new(2, vec![1, 0])?),
                total: vec![1, 1],
            })
        });
        let ended = listener.try_recv().unwrap();
        assert_eq!(ended.number, 1);
        assert!(ended.event(&header(), 5).is_some());
        assert!(
            ended
                .event(
                    &Header {
                        layers: 2,
                        ..header()
                    },
                    5
                )
                .is_none()
        );
    }
}
