//! Recorded load windows in place of generated ones.

use std::collections::{BTreeMap, BTreeSet};

use foregate_api::ids::Rank;
use foregate_api::load::{LoadWindow, sum_gate};
use foregate_planner::redundancy;

use crate::policy::EVERY;
use crate::run::{Case, Outcome, SimulateError, Watch, simulate};
use crate::shape::Shape;
use crate::source::{Source, Window};

/// Windows of a cluster, oldest first: the rows of all ranks together.
#[derive(Debug, Clone)]
pub struct Recording {
    windows: Vec<Window>,
    ranks: usize,
}

impl Recording {
    /// Puts windows together that have the same number.
    ///
    /// # Errors
    /// If there are none, if they are of different models, or if a rank has a number twice (a worker that started
    /// anew, or two recordings in one).
    pub fn new(windows: &[LoadWindow]) -> Result<Self, SimulateError> {
        let Some(first) = windows.first() else {
            return Err(SimulateError::NoWindows);
        };
        let (layers, experts) = shape_of(first);
        let mut of: BTreeMap<u64, Vec<&LoadWindow>> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for window in windows {
            let odd = window.gate.iter().any(|row| row.len() != experts);
            if window.gate.len() != layers || odd || layers * experts == 0 {
                return Err(SimulateError::OtherModel {
                    rank: window.rank,
                    sequence: window.sequence,
                    layers,
                    experts,
                });
            }
            if !seen.insert((window.rank, window.sequence)) {
                return Err(SimulateError::Twice {
                    rank: window.rank,
                    sequence: window.sequence,
                });
            }
            of.entry(window.sequence).or_default().push(window);
        }
        let ranks: BTreeSet<Rank> = windows.iter().map(|window| window.rank).collect();
        let mut before = 0;
        let together = |windows: &Vec<&LoadWindow>| {
            // Engines count from their start; the one that is furthest stands for all.
            let made = windows.iter().map(|window| window.engine.steps).max();
            let made = made.unwrap_or(0).max(before);
            let steps = made - std::mem::replace(&mut before, made);
            Window {
                rows: sum_gate(windows.iter().copied(), layers, experts),
                steps,
            }
        };
        Ok(Self {
            windows: of.values().map(together).collect(),
            ranks: ranks.len(),
        })
    }

    /// Windows.
    #[must_use]
    pub const fn windows(&self) -> usize {
        self.windows.len()
    }

    /// Steps that can be judged.
    ///
    /// # Errors
    /// If there are fewer than two.
    pub fn steps(&self) -> Result<usize, SimulateError> {
        let steps = self.windows.len().saturating_sub(EVERY);
        if steps < 2 {
            return Err(SimulateError::Short);
        }
        Ok(steps)
    }

    /// The cluster that was recorded: its ranks, on one node, with the fewest slots that link them. What a token and an
    /// expert weigh is not recorded.
    #[must_use]
    pub fn shape(&self) -> Shape {
        let experts = self.windows[0].rows[0].len();
        let slots = redundancy::slots_to_link(experts, self.ranks);
        Shape {
            name: "replay",
            layers: self.windows[0].rows.len(),
            experts,
            top_k: 0,
            ranks: self.ranks,
            nodes: 1,
            copies: slots * self.ranks,
            groups: 1,
            hidden: 0,
            inner: 0,
        }
    }
}

fn shape_of(window: &LoadWindow) -> (usize, usize) {
    (window.gate.len(), window.gate.first().map_or(0, Vec::len))
}

/// Runs a recording: ten windows of warm-up, then every policy is judged on each window that follows.
///
/// # Errors
/// A recording that is too short or of another model than the case, or a planner that refuses.
pub fn replay(
    case: &Case,
    recording: &Recording,
    watch: &dyn Watch,
) -> Result<Outcome, SimulateError> {
    let (shape, recorded) = (&case.shape, recording.shape());
    if (shape.layers, shape.experts) != (recorded.layers, recorded.experts) {
        return Err(SimulateError::OtherSetting {
            setting: shape.name,
            layers: shape.layers,
            experts: shape.experts,
            recorded_layers: recorded.layers,
            recorded_experts: recorded.experts,
        });
    }
    simulate(case, Source::Recorded(recording.windows.iter()), 0, watch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generator::Regime;
    use crate::judge::Still;
    use crate::policy::{Forecast, Policy};
    use crate::shape::DEVICES;
    use foregate_api::ids::Epoch;
    use foregate_api::load::EngineLoad;
    use foregate_planner::{Cover, Settings};

    fn window(rank: u32, sequence: u64, rows: &[u64]) -> LoadWindow {
        LoadWindow {
            rank: Rank(rank),
            epoch: Epoch(1),
            sequence,
            span_ms: 1000,
            gate: vec![rows.to_vec()],
            served: vec![0],
            engine: EngineLoad {
                steps: 10 * sequence,
                ..EngineLoad::default()
            },
        }
    }

    #[test]
    fn windows_of_one_number_add_up_in_the_order_of_numbers() {
        let both = [
            window(0, 2, &[5, 5]),
            window(0, 1, &[1, 2]),
            window(1, 1, &[3, 4]),
        ];
        let recording = Recording::new(&both).unwrap();
        let rows: Vec<_> = recording.windows.iter().map(|w| w.rows.clone()).collect();
        assert_eq!(rows, [vec![vec![4, 6]], vec![vec![5, 5]]]);
        let steps: Vec<u64> = recording.windows.iter().map(|w| w.steps).collect();
        assert_eq!(steps, [10, 10], "20 by the second, as rank 0 counts them");
        let shape = recording.shape();
        assert_eq!((shape.ranks, shape.experts, shape.slots()), (2, 2, 2));
    }

    #[test]
    fn a_recording_is_judged_on_each_window_after_the_warm_up() {
        let of = |n: u64| window(0, n, &[100, 40, 20, 40]);
        let few: Vec<LoadWindow> = (0..11).map(of).collect();
        assert!(matches!(
            Recording::new(&few).unwrap().steps(),
            Err(SimulateError::Short)
        ));
        let enough: Vec<LoadWindow> = (0..13)
            .flat_map(|n| [of(n), window(1, n, &[0; 4])])
            .collect();
        let recording = Recording::new(&enough).unwrap();
        let case = Case {
            shape: recording.shape(),
            regime: Regime::Stationary,
            steps: recording.steps().unwrap(),
            policies: vec![Policy::InOrder, Policy::ConnectedLazy],
            settings: Settings::default(),
            cover: Cover::default(),
            forecast: Forecast::Off,
            device: DEVICES[0],
        };
        let outcome = replay(&case, &recording, &Still).unwrap();
        let [order, ours] = &outcome.arms[..] else {
            panic!("two policies");
        };
        // Three slots on two ranks: in order 0 1 2 and 3 0 1, so 90 and 110 rows.
        assert_eq!(ours.judged.split.len(), 3);
        assert!(
            (order.judged.even[0] - 100.0 / 110.0).abs() < 1e-9,
            "{:?}",
            order.judged.even
        );
        assert!(ours.judged.split.iter().all(|balance| *balance > 0.999));
        assert!(ours.judged.prefill.is_empty());
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        assert!(matches!(Recording::new(&[]), Err(SimulateError::NoWindows)));
        let twice = [window(3, 7, &[1, 1]), window(3, 7, &[1, 1])];
        let error = Recording::new(&twice).unwrap_err().to_string();
        assert!(error.contains("rank 3") && error.contains('7'), "{error}");
        let other = [window(0, 1, &[1, 1]), window(1, 1, &[1, 1, 1])];
        assert!(matches!(
            Recording::new(&other),
            Err(SimulateError::OtherModel { rank: Rank(1), .. })
        ));
    }
}
