//! Demand: an average over load windows, half the past and half the last window.

use std::collections::{BTreeMap, BTreeSet};

use foregate_api::ids::Rank;
use foregate_api::load::LoadWindow;

use crate::noise::Noise;

/// What became of a load window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observed {
    /// Its rows count.
    Counted,
    /// This window of this rank was counted before.
    Duplicate,
}

/// A load window that does not fit the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "load window of rank {rank} counts {found_layers} layers of {found_experts} experts, the model has {layers} of \
     {experts}: the worker loaded another model"
)]
pub struct WindowShape {
    /// Whose window.
    pub rank: Rank,
    /// Its layers.
    pub found_layers: usize,
    /// Experts of its first wrong layer, or of its first.
    pub found_experts: usize,
    /// Layers of the model.
    pub layers: usize,
    /// Experts of the model.
    pub experts: usize,
}

/// A window that was closed: enough rows were seen to say something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed {
    /// Rows of the busiest layer since the last close, over all ranks.
    pub rows: u64,
    /// Ranks that contributed.
    pub ranks: BTreeSet<Rank>,
}

/// Rows per layer and expert, averaged over windows: `average ← ½·average + ½·last`, started at the first.
#[derive(Debug, Clone, PartialEq)]
pub struct Demand {
    layers: usize,
    experts: usize,
    average: Option<Vec<Vec<f64>>>,
    noise: Noise,
    pending: Vec<Vec<u64>>,
    from: BTreeSet<Rank>,
    seen: BTreeMap<Rank, u64>,
    rows: u64,
}

impl Demand {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(layers: usize, experts: usize) -> Self {
        Self {
            layers,
            experts,
            average: None,
            noise: Noise::default(),
            pending: vec![vec![0; experts]; layers],
            from: BTreeSet::new(),
            seen: BTreeMap::new(),
            rows: 0,
        }
    }

    /// Adds one rank's window to those that wait for [`Self::close`].
    ///
    /// A sequence number already seen from this rank is ignored; a lower one is a worker that started anew.
    ///
    /// # Errors
    /// If the window counts another model's layers or experts; nothing of it is counted.
    pub fn observe(&mut self, window: &LoadWindow) -> Result<Observed, WindowShape> {
        let wrong = window.gate.iter().find(|row| row.len() != self.experts);
        if window.gate.len() != self.layers || wrong.is_some() {
            return Err(WindowShape {
                rank: window.rank,
                found_layers: window.gate.len(),
                found_experts: wrong.or(window.gate.first()).map_or(0, Vec::len),
                layers: self.layers,
                experts: self.experts,
            });
        }
        if self.seen.insert(window.rank, window.sequence) == Some(window.sequence) {
            return Ok(Observed::Duplicate);
        }
        for (sum, row) in self.pending.iter_mut().zip(&window.gate) {
            for (sum, count) in sum.iter_mut().zip(row) {
                *sum = sum.saturating_add(*count);
            }
        }
        self.from.insert(window.rank);
        Ok(Observed::Counted)
    }

    /// Rows of the busiest layer that wait for the next close. (All layers see the same rows, unless a window
    /// closed in the middle of a step.)
    #[must_use]
    pub fn pending_rows(&self) -> u64 {
        let of = |row: &Vec<u64>| row.iter().fold(0_u64, |sum, x| sum.saturating_add(*x));
        self.pending.iter().map(of).max().unwrap_or(0)
    }

    /// Folds what was observed since the last close into the average. With fewer than `min_rows` rows (and
    /// always with none) it stays pending and adds up with what comes: `None`.
    pub fn close(&mut self, min_rows: u64) -> Option<Closed> {
        let rows = self.pending_rows();
        if rows < min_rows.max(1) {
            return None;
        }
        let last = self.pending.iter().map(|row| row.iter().map(|x| *x as f64));
        match &mut self.average {
            None => self.average = Some(last.map(Iterator::collect).collect()),
            Some(average) => {
                for (mean, last) in average.iter_mut().zip(last) {
                    for (mean, last) in mean.iter_mut().zip(last) {
                        *mean = 0.5 * *mean + 0.5 * last;
                    }
                }
            }
        }
        self.noise.window(&self.pending, rows);
        self.pending.iter_mut().for_each(|row| row.fill(0));
        self.rows = self.rows.saturating_add(rows);
        Some(Closed {
            rows,
            ranks: std::mem::take(&mut self.from),
        })
    }

    /// Rows of the busiest layer over all closed windows.
    #[must_use]
    pub const fn rows(&self) -> u64 {
        self.rows
    }

    /// How sure the prediction is: rows of a layer, drawn independently, that would be as sure. Windows whose rows
    /// come in bursts of the same experts (those of one sequence) count for less than their rows. 0 before the
    /// first close.
    #[must_use]
    pub fn evidence(&self) -> f64 {
        self.noise.evidence()
    }

    /// The prediction for the next window, `[layer][expert]` in rows per window; zero before the first close.
    #[must_use]
    pub fn prediction(&self) -> Vec<Vec<f64>> {
        self.average
            .clone()
            .unwrap_or_else(|| vec![vec![0.0; self.experts]; self.layers])
    }
}

#[cfg(test)]
mod tests {
    use foregate_api::ids::Epoch;
    use foregate_api::load::EngineLoad;

    use super::*;

    fn window(rank: u32, sequence: u64, gate: &[u64]) -> LoadWindow {
        LoadWindow {
            rank: Rank(rank),
            epoch: Epoch(1),
            sequence,
            span_ms: 1000,
            gate: vec![gate.to_vec()],
            served: vec![0],
            engine: EngineLoad::default(),
        }
    }

    #[test]
    fn halves_the_past_and_adds_up_ranks() {
        let mut demand = Demand::new(1, 2);
        assert_eq!(demand.prediction(), [[0.0, 0.0]]);
        demand.observe(&window(0, 1, &[10, 0])).unwrap();
        demand.observe(&window(1, 1, &[10, 20])).unwrap();
        let closed = demand.close(1).unwrap();
        assert_eq!((closed.rows, closed.ranks.len()), (40, 2));
        assert_eq!(demand.prediction(), [[20.0, 20.0]]);
        demand.observe(&window(0, 2, &[0, 40])).unwrap();
        demand.close(1).unwrap();
        assert_eq!(demand.prediction(), [[10.0, 30.0]]);
        assert_eq!(demand.rows(), 80);
    }

    #[test]
    fn a_window_counts_once_and_a_restart_counts_anew() {
        let mut demand = Demand::new(1, 1);
        assert_eq!(demand.observe(&window(0, 7, &[5])), Ok(Observed::Counted));
        assert_eq!(demand.observe(&window(0, 7, &[5])), Ok(Observed::Duplicate));
        assert_eq!(demand.observe(&window(0, 1, &[2])), Ok(Observed::Counted));
        assert_eq!(demand.pending_rows(), 7);
    }

    #[test]
    fn too_few_rows_wait_and_add_up() {
        let mut demand = Demand::new(1, 1);
        assert_eq!(demand.close(0), None);
        demand.observe(&window(0, 1, &[60])).unwrap();
        assert_eq!(demand.close(100), None);
        demand.observe(&window(0, 2, &[60])).unwrap();
        assert_eq!(demand.close(100).map(|c| c.rows), Some(120));
        assert_eq!(demand.prediction(), [[120.0]]);
    }

    #[test]
    fn another_models_window_is_refused_whole() {
        let mut demand = Demand::new(1, 2);
        let error = demand.observe(&window(3, 1, &[1])).unwrap_err();
        assert_eq!((error.rank, error.found_experts), (Rank(3), 1));
        assert_eq!(demand.pending_rows(), 0);
        assert_eq!(
            demand.observe(&window(3, 1, &[1, 1])),
            Ok(Observed::Counted)
        );
    }
}
