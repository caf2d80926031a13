//! Demand: what the next window will ask for, from load windows and from what gateways have admitted.
//!
//! The plain prediction is an average that halves the past. Where windows hold many rows and the mix drifts, the last
//! window alone is nearer; where they hold few, it is noise. And a forecast of what was admitted knows of a shift before
//! any window does, or is worse than none. So each is tested on the windows that came, and used while it earns it.

use std::collections::{BTreeMap, BTreeSet};

use foregate_api::ids::Rank;
use foregate_api::load::LoadWindow;

use crate::backtest::{BackTest, variation};
use crate::noise::Noise;

/// Weights that the last window may have over the average, the plain way first.
const LAST: [f64; 3] = [0.0, 0.5, 1.0];
/// Weights that the forecast may have, the plain way first.
const FORECAST: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

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

/// A forecast that does not fit the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a forecast must have {layers} layers of {experts} experts, finite and not negative")]
pub struct ForecastShape {
    /// Layers of the model.
    pub layers: usize,
    /// Experts of the model.
    pub experts: usize,
}

/// Rows per layer and expert: `average ← ½·average + ½·last`, started at the first, and what is made of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Demand {
    layers: usize,
    experts: usize,
    average: Option<Vec<Vec<f64>>>,
    last: Vec<Vec<f64>>,
    /// Expected rows of admitted requests in the next window; empty without a forecast.
    forecast: Vec<Vec<f64>>,
    followed: BackTest<{ LAST.len() }>,
    trusted: BackTest<{ FORECAST.len() }>,
    noise: Noise,
    pending: Vec<Vec<u64>>,
    from: BTreeSet<Rank>,
    seen: BTreeMap<Rank, u64>,
    /// Steps of each rank's engine since its start, as of its last window.
    steps: BTreeMap<Rank, u64>,
    /// Rows of a layer in a step of each rank, in its last window with steps.
    per_step: BTreeMap<Rank, f64>,
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
            last: Vec::new(),
            forecast: Vec::new(),
            followed: BackTest::default(),
            trusted: BackTest::default(),
            noise: Noise::default(),
            pending: vec![vec![0; experts]; layers],
            from: BTreeSet::new(),
            seen: BTreeMap::new(),
            steps: BTreeMap::new(),
            per_step: BTreeMap::new(),
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
        self.count_steps(window);
        Ok(Observed::Counted)
    }

    fn count_steps(&mut self, window: &LoadWindow) {
        let steps = window.engine.steps;
        let before = self.steps.insert(window.rank, steps);
        let made = before.and_then(|before| steps.checked_sub(before));
        let rows = window.gate.iter().map(|row| row.iter().sum::<u64>()).max();
        if let (Some(made @ 1..), Some(rows)) = (made, rows) {
            self.per_step.insert(window.rank, rows as f64 / made as f64);
        }
    }

    /// Rows of a layer in a batch over all ranks, by the last windows of those in the last close; 0 if not known.
    #[must_use]
    pub fn batch_rows(&self) -> f64 {
        self.per_step.values().sum()
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
        self.judge();
        let real = |row: &Vec<u64>| row.iter().map(|x| *x as f64).collect();
        self.last = self.pending.iter().map(real).collect();
        match &mut self.average {
            None => self.average = Some(self.last.clone()),
            Some(average) => {
                for (mean, last) in average.iter_mut().flatten().zip(self.last.iter().flatten())
                {
                    *mean = 0.5 * *mean + 0.5 * last;
                }
            }
        }
        self.noise.window(&self.pending, rows);
        self.pending.iter_mut().for_each(|row| row.fill(0));
        self.rows = self.rows.saturating_add(rows);
        let from = &self.from;
        self.per_step.retain(|rank, _| from.contains(rank));
        Some(Closed {
            rows,
            ranks: std::mem::take(&mut self.from),
        })
    }

    /// What gateways expect of the requests they have admitted, `[layer][expert]` in any unit: its shares count, not
    /// its volume. It holds for the next window and is forgotten with its close.
    ///
    /// # Errors
    /// If it has another shape, or a value that is negative or not finite; it is then left out.
    pub fn expect(&mut self, forecast: Vec<Vec<f64>>) -> Result<(), ForecastShape> {
        let fits = |row: &Vec<f64>| {
            row.len() == self.experts && row.iter().all(|x| x.is_finite() && *x >= 0.0)
        };
        if forecast.len() != self.layers || !forecast.iter().all(fits) {
            return Err(ForecastShape {
                layers: self.layers,
                experts: self.experts,
            });
        }
        self.forecast = forecast;
        Ok(())
    }

    /// Notes what each way to predict the window that closes was off by.
    fn judge(&mut self) {
        if let Some(average) = &self.average {
            let way = |weight: f64| {
                let of = |l: usize, e: usize| {
                    (1.0 - weight) * average[l][e] + weight * self.last[l][e]
                };
                variation(of, &self.pending)
            };
            self.followed.note(LAST.map(way));
            if !self.forecast.is_empty() {
                let base = self.by_windows();
                let way = |weight: f64| {
                    let mixed = self.mixed(&base, weight);
                    variation(|l, e| mixed[l][e], &self.pending)
                };
                self.trusted.note(FORECAST.map(way));
            }
        }
        self.forecast.clear();
    }

    fn by_windows(&self) -> Vec<Vec<f64>> {
        let Some(average) = &self.average else {
            return vec![vec![0.0; self.experts]; self.layers];
        };
        let weight = self.last_weight();
        let row = |(average, last): (&Vec<f64>, &Vec<f64>)| {
            let mix = |(a, b): (&f64, &f64)| (1.0 - weight) * a + weight * b;
            average.iter().zip(last).map(mix).collect()
        };
        average.iter().zip(&self.last).map(row).collect()
    }

    /// The forecast at the rows of `base`, with a weight. A layer that it says nothing about stays.
    fn mixed(&self, base: &[Vec<f64>], weight: f64) -> Vec<Vec<f64>> {
        let row = |(base, forecast): (&Vec<f64>, &Vec<f64>)| {
            let (rows, expected): (f64, f64) = (base.iter().sum(), forecast.iter().sum());
            let scale = if expected > 0.0 { rows / expected } else { 0.0 };
            let weight = if scale > 0.0 { weight } else { 0.0 };
            let mix = |(b, f): (&f64, &f64)| (1.0 - weight) * b + weight * scale * f;
            base.iter().zip(forecast).map(mix).collect()
        };
        base.iter().zip(&self.forecast).map(row).collect()
    }

    /// Weight of the last window over the average, in [0, 1]: above 0 while it has been nearer to what came.
    #[must_use]
    pub fn last_weight(&self) -> f64 {
        LAST[self.followed.best()]
    }

    /// Weight of the forecast in the prediction, in [0, 1]: above 0 while there is one and it has earned it.
    #[must_use]
    pub fn forecast_weight(&self) -> f64 {
        if self.forecast.is_empty() {
            0.0
        } else {
            FORECAST[self.trusted.best()]
        }
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
        // The average halves the past: the last window counts half, the rest is worth three windows.
        let last = 0.5 + 0.5 * self.last_weight();
        let variance = last * last + (1.0 - last) * (1.0 - last) / 3.0;
        self.noise.evidence() / (3.0 * variance)
    }

    /// The prediction for the next window, `[layer][expert]` in rows per window; zero before the first close.
    #[must_use]
    pub fn prediction(&self) -> Vec<Vec<f64>> {
        let base = self.by_windows();
        let weight = self.forecast_weight();
        if weight > 0.0 {
            self.mixed(&base, weight)
        } else {
            base
        }
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
    fn a_batch_is_what_the_ranks_compute_in_a_step() {
        let mut demand = Demand::new(1, 2);
        let mut seen = |rank, sequence, rows, steps| {
            let mut window = window(rank, sequence, &[rows, rows]);
            window.engine.steps = steps;
            demand.observe(&window).unwrap();
            demand.batch_rows()
        };
        assert!(seen(0, 1, 100, 7).abs() < 1e-9, "since when is not known");
        assert!((seen(0, 2, 100, 17) - 20.0).abs() < 1e-9);
        seen(1, 1, 50, 3);
        assert!((seen(1, 2, 50, 8) - 40.0).abs() < 1e-9);
        assert!((seen(1, 3, 50, 2) - 40.0).abs() < 1e-9, "started anew");
        demand.close(1).unwrap();
        demand.observe(&window(0, 3, &[1, 1])).unwrap();
        demand.close(1).unwrap();
        assert!((demand.batch_rows() - 20.0).abs() < 1e-9, "rank 1 is gone");
    }

    /// A mix that turns by one expert each window, and what the next will be.
    fn turning(demand: &mut Demand, windows: u64, forecast: impl Fn(u64) -> Vec<Vec<f64>>) {
        for t in 0..windows {
            let mut gate = [100; 6];
            gate[(t % 6) as usize] = 4000;
            demand.expect(forecast(t)).unwrap();
            demand.observe(&window(0, t + 1, &gate)).unwrap();
            demand.close(1).unwrap();
        }
    }

    #[test]
    fn a_forecast_is_used_while_it_is_right() {
        let right = |t: u64| {
            let mut row = vec![1.0; 6];
            row[(t % 6) as usize] = 40.0;
            vec![row]
        };
        let mut demand = Demand::new(1, 6);
        turning(&mut demand, 12, right);
        assert!(
            demand.forecast_weight().abs() < 1e-9,
            "none for the next window"
        );
        demand.expect(right(12)).unwrap();
        assert!((demand.forecast_weight() - 1.0).abs() < 1e-9);
        let next = demand.prediction();
        assert!(next[0][0] > 5.0 * next[0][1], "{next:?}");
        // From now on it is late by one, as the windows are.
        turning(&mut demand, 12, |t| right(t + 5));
        demand.expect(right(0)).unwrap();
        assert!(demand.forecast_weight() < 1.0);
        assert!(demand.expect(vec![vec![1.0; 5]]).is_err());
        assert!(demand.expect(vec![vec![f64::NAN; 6]]).is_err());
    }

    #[test]
    fn many_rows_that_drift_follow_the_last_window_and_few_rows_do_not() {
        let mut drifting = Demand::new(1, 2);
        let mut noisy = Demand::new(1, 2);
        for t in 0..12_u64 {
            drifting
                .observe(&window(0, t + 1, &[10_000 + 500 * t, 20_000 - 500 * t]))
                .unwrap();
            let more = 20 * (t % 2);
            noisy
                .observe(&window(0, t + 1, &[40 + more, 60 - more]))
                .unwrap();
            drifting.close(1).unwrap();
            noisy.close(1).unwrap();
        }
        assert!((drifting.last_weight() - 1.0).abs() < 1e-9);
        assert!(noisy.last_weight().abs() < 1e-9);
        assert_eq!(drifting.prediction(), [[15_500.0, 14_500.0]]);
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
