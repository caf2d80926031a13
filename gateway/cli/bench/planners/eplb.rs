//! EPLB as a planner of a running cluster: it follows the load windows and proposes through the store.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::placement::{Placement, Reason};
use foregate_simulate::{Rows, eplb_layers};
use foregate_store::{ClusterState, Coord};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::error::CliError;

/// Windows of all ranks together, the last ones.
#[derive(Debug, Default)]
struct Windows {
    seen: BTreeMap<Rank, u64>,
    open: Rows,
    last: VecDeque<Rows>,
}

impl Windows {
    /// Adds what ranks published since the last look.
    fn observe(&mut self, state: &ClusterState) {
        for (rank, window) in &state.loads {
            if self.seen.insert(*rank, window.sequence) == Some(window.sequence) {
                continue;
            }
            let experts = window.gate.first().map_or(0, Vec::len);
            if self.open.len() != window.gate.len() {
                self.open = vec![vec![0.0; experts]; window.gate.len()];
            }
            for (sum, rows) in self.open.iter_mut().zip(&window.gate) {
                for (sum, rows) in sum.iter_mut().zip(rows) {
                    *sum += *rows as f64;
                }
            }
        }
    }

    /// Ends a window; true if it had any rows.
    fn close(&mut self, keep: usize) -> bool {
        let window = std::mem::take(&mut self.open);
        let any = window.iter().flatten().any(|rows| *rows > 0.0);
        if any {
            self.last.push_back(window);
            while self.last.len() > keep {
                self.last.pop_front();
            }
        }
        any
    }

    fn sum(&self) -> Rows {
        let mut windows = self.last.iter();
        let first = windows.next().cloned().unwrap_or_default();
        windows.fold(first, |mut sum, window| {
            for (sum, rows) in sum.iter_mut().flatten().zip(window.iter().flatten()) {
                *sum += rows;
            }
            sum
        })
    }
}

/// Proposes EPLB's placement after every so many windows, on their sum, until it is told to stop.
///
/// # Errors
/// The store's.
pub(super) async fn plan(
    coord: Coord,
    mut states: watch::Receiver<Arc<ClusterState>>,
    every: usize,
    window: Duration,
    stop: CancellationToken,
) -> Result<(), CliError> {
    let mut windows = Windows::default();
    let mut since = 0;
    let mut ticks = interval(window);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = states.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                windows.observe(&states.borrow_and_update());
                continue;
            }
            _ = ticks.tick() => {}
        }
        since += usize::from(windows.close(every));
        if since < every {
            continue;
        }
        let state = Arc::clone(&states.borrow());
        if let Some((plan, seen)) = proposal(&state, &windows.sum()) {
            // Whoever writes first has it; the next look is one window away.
            let proposed = coord.propose(&plan, Some(seen)).await;
            if proposed.map_err(|error| CliError::runtime("EPLB's proposal", &error))? {
                since = 0;
            }
        }
    }
}

/// EPLB's placement as the one after the active, with the revision of the target that it takes the place of; none
/// while a change is under way.
fn proposal(state: &ClusterState, load: &Rows) -> Option<(Placement, u64)> {
    let ((active, _), (target, seen)) = (state.active.as_ref()?, state.target.as_ref()?);
    if active.epoch != target.epoch {
        return None;
    }
    let slots = active.ranks.iter().map(|rank| state.members.get(rank));
    let slots = slots
        .map(|member| member.map(|member| member.slots))
        .min()??;
    let layers = eplb_layers(load, &active.ranks, slots as usize);
    let plan = Placement {
        epoch: active.epoch.next(),
        parent: active.epoch,
        reason: Reason::Move,
        layers,
        ..active.as_ref().clone()
    };
    Some((plan, *seen))
}

#[cfg(test)]
mod tests {
    use foregate_api::ids::Epoch;
    use foregate_api::load::{EngineLoad, LoadWindow};

    use super::*;

    fn state(windows: &[(u32, u64, [u64; 2])]) -> ClusterState {
        let mut state = ClusterState::default();
        for (rank, sequence, rows) in windows {
            let window = LoadWindow {
                rank: Rank(*rank),
                epoch: Epoch(1),
                sequence: *sequence,
                span_ms: 1000,
                gate: vec![rows.to_vec()],
                served: vec![0],
                engine: EngineLoad::default(),
            };
            state.loads.insert(Rank(*rank), Arc::new(window));
        }
        state
    }

    #[test]
    fn a_window_of_a_rank_counts_once_and_the_last_ones_are_summed() {
        let mut windows = Windows::default();
        windows.observe(&state(&[(0, 1, [1, 2]), (1, 1, [10, 20])]));
        windows.observe(&state(&[(0, 1, [1, 2]), (1, 2, [100, 200])]));
        assert!(windows.close(2));
        assert_eq!(windows.sum(), [[111.0, 222.0]]);
        assert!(!windows.close(2), "nothing came");
        for sequence in 3..5 {
            windows.observe(&state(&[(1, sequence, [1, 1])]));
            assert!(windows.close(2));
        }
        assert_eq!(windows.sum(), [[2.0, 2.0]]);
    }
}
