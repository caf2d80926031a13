//! Counts how many rows each expert is asked for, and hands them out window by window.
//!
//! Every row of every step is counted, none is sampled: one relaxed atomic addition per (row, layer,
//! choice), without a lock on the step. `benches/step.rs` shows the cost.

use std::sync::atomic::{AtomicU64, Ordering};

use foregate_api::ids::{Epoch, LayerId, Rank};
use foregate_api::load::{EngineLoad, LoadWindow};

/// Counters of one worker. The engine adds what its gate chose, the exchange what its experts served.
#[derive(Debug)]
pub struct LoadCounters {
    experts: usize,
    gate: Vec<AtomicU64>,
    served: Vec<AtomicU64>,
}

/// What a window says besides the counts.
#[derive(Debug, Clone, Copy)]
pub struct WindowHeader {
    /// This worker.
    pub rank: Rank,
    /// The placement that is active now.
    pub epoch: Epoch,
    /// Number of the window, from 1.
    pub sequence: u64,
    /// Time since the last drain in milliseconds.
    pub span_ms: u64,
    /// The engine's state now.
    pub engine: EngineLoad,
}

impl LoadCounters {
    /// Zeroes for `layers` MoE layers with `experts` experts each.
    #[must_use]
    pub fn new(layers: usize, experts: usize) -> Self {
        let zeroes = |n: usize| (0..n).map(|_| AtomicU64::new(0)).collect();
        Self {
            experts,
            gate: zeroes(layers * experts),
            served: zeroes(layers),
        }
    }

    /// Counts the choices of one row: `layers × top_k` expert ids, layer-major.
    pub fn count_row(&self, routes: &[u32]) {
        let layers = self.served.len();
        if layers == 0 {
            return;
        }
        let top_k = (routes.len() / layers).max(1);
        for (layer, chosen) in routes.chunks_exact(top_k).enumerate() {
            for expert in chosen {
                let at = layer * self.experts + *expert as usize;
                if let Some(counter) = self.gate.get(at) {
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    /// Counts rows that this worker's experts of a layer computed, for whoever asked.
    pub fn count_served(&self, layer: LayerId, rows: u64) {
        if let Some(counter) = self.served.get(layer.index()) {
            counter.fetch_add(rows, Ordering::Relaxed);
        }
    }

    /// Closes a window: the counts since the last call. An addition that runs at the same time is
    /// in this window or in the next, never in both or in none.
    #[must_use]
    pub fn drain(&self, header: WindowHeader) -> LoadWindow {
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        LoadWindow {
            rank: header.rank,
            epoch: header.epoch,
            sequence: header.sequence,
            span_ms: header.span_ms,
            gate: self
                .gate
                .chunks(self.experts.max(1))
                .map(|layer| layer.iter().map(take).collect())
                .collect(),
            served: self.served.iter().map(take).collect(),
            engine: header.engine,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> WindowHeader {
        WindowHeader {
            rank: Rank(3),
            epoch: Epoch(2),
            sequence: 1,
            span_ms: 500,
            engine: EngineLoad::default(),
        }
    }

    #[test]
    fn counts_by_layer_and_expert_and_starts_anew() {
        let load = LoadCounters::new(2, 4);
        load.count_row(&[0, 3, 1, 3]);
        load.count_row(&[0, 1, 1, 2]);
        load.count_served(LayerId(1), 7);
        let window = load.drain(header());
        assert_eq!(window.gate, vec![vec![2, 1, 0, 1], vec![0, 2, 1, 1]]);
        assert_eq!(window.served, vec![0, 7]);
        assert_eq!(load.drain(header()).gate, vec![vec![0; 4]; 2]);
    }

    #[test]
    fn nothing_is_lost_between_threads() {
        let load = LoadCounters::new(1, 2);
        let mut seen = 0;
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..2)
                .map(|_| scope.spawn(|| (0..10_000).for_each(|_| load.count_row(&[0, 1]))))
                .collect();
            while workers.iter().any(|worker| !worker.is_finished()) {
                seen += load.drain(header()).gate[0].iter().sum::<u64>();
            }
        });
        seen += load.drain(header()).gate[0].iter().sum::<u64>();
        assert_eq!(seen, 40_000);
    }

    #[test]
    fn outside_ids_are_ignored() {
        let load = LoadCounters::new(1, 2);
        load.count_row(&[9]);
        load.count_served(LayerId(4), 1);
        assert_eq!(load.drain(header()).gate, vec![vec![0, 0]]);
    }
}
