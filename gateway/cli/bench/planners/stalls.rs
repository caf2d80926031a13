//! What switches of epoch cost steps, as the workers tell of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use foregate_api::ids::{Epoch, Rank};
use foregate_store::ClusterState;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The delay of a step by each switch, of each rank, in microseconds, until it is told to stop. The first epoch that a
/// rank is seen with is not counted: nothing was served before it.
pub(super) async fn gather(
    mut states: watch::Receiver<Arc<ClusterState>>,
    stop: CancellationToken,
) -> Vec<f64> {
    let mut told: BTreeMap<Rank, Epoch> = BTreeMap::new();
    let mut stalls = Vec::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return stalls,
            changed = states.changed() => {
                if changed.is_err() {
                    return stalls;
                }
            }
        }
        for (rank, window) in &states.borrow_and_update().loads {
            let before = told.insert(*rank, window.epoch);
            if before.is_some_and(|before| before < window.epoch) {
                stalls.push(window.engine.switch_stall_us as f64);
            }
        }
    }
}
