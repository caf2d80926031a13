//! What a decode step takes, by how many experts it reads and how many rows it has. Pure: the caller measures.
//!
//! ```text
//!  t = base + expert · D + row · B        D: distinct experts, mean over layers;  B: rows
//! ```
//!
//! Least squares over the last steps, older ones fading, with no coefficient below 0: of all subsets of the three the
//! one with the least error whose coefficients are positive. Time that nothing explains goes into `base`.

use foregate_wire::generation::{StepFit, Steps};

/// What is left of a step's weight after each later one: about the last two thousand count.
const FADE: f64 = 1.0 - 1.0 / 2048.0;
/// Weight of steps below which nothing is said.
const LEAST: f64 = 256.0;
/// Standard deviation of the number of experts below which it says nothing about their cost.
const LEAST_SPREAD: f64 = 0.5;

/// Decode steps since the engine's start: those in which every sequence had one row.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Decoded {
    /// How many.
    pub steps: u64,
    /// Rows of all of them.
    pub rows: u64,
    /// Distinct experts that the rows of a step chose, mean over MoE layers; summed over steps.
    pub experts: f64,
    /// Milliseconds, summed over steps.
    pub ms: f64,
}

/// Decode steps: their totals, and the sums that a fit needs.
#[derive(Debug, Clone, Default)]
pub(super) struct Pace {
    totals: Decoded,
    sums: Sums,
    seen: Vec<bool>,
}

/// Sums over steps of `x·xᵀ`, `x·t` and `t²`, with `x = (1, D, B)`.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    squares: [[f64; 3]; 3],
    products: [f64; 3],
    time: f64,
}

impl Pace {
    /// Counts a step. `routes`: the experts of all its rows, row by row, each `layers × top_k`.
    pub(super) fn note(
        &mut self,
        routes: &[u32],
        rows: usize,
        shape: (usize, usize, usize),
        ms: f64,
    ) {
        let (layers, experts, top_k) = shape;
        let width = layers * top_k;
        if rows == 0 || width == 0 || routes.len() < rows * width || !ms.is_finite() {
            return;
        }
        self.seen.clear();
        self.seen.resize(layers * experts, false);
        let mut distinct = 0_u32;
        for row in routes.chunks_exact(width).take(rows) {
            for (layer, chosen) in row.chunks_exact(top_k).enumerate() {
                for expert in chosen {
                    if let Some(seen) = self.seen.get_mut(layer * experts + *expert as usize) {
                        distinct += u32::from(!std::mem::replace(seen, true));
                    }
                }
            }
        }
        self.add(f64::from(distinct) / layers as f64, rows, ms);
    }

    fn add(&mut self, distinct: f64, rows: usize, ms: f64) {
        self.totals.steps += 1;
        self.totals.rows += rows as u64;
        self.totals.experts += distinct;
        self.totals.ms += ms;
        self.sums.add([1.0, distinct, rows as f64], ms);
    }

    /// What was counted.
    pub(super) const fn totals(&self) -> Decoded {
        self.totals
    }

    /// What is known; `None` before the first decode step.
    pub(super) fn report(&self) -> Option<Steps> {
        let Decoded {
            steps,
            rows,
            experts,
            ms,
        } = self.totals;
        (steps > 0).then(|| Steps {
            steps,
            rows,
            experts,
            ms,
            fit: self.sums.fit(),
        })
    }
}

impl Sums {
    fn add(&mut self, x: [f64; 3], time: f64) {
        for (row, a) in self.squares.iter_mut().zip(x) {
            for (sum, b) in row.iter_mut().zip(x) {
                *sum = FADE * *sum + a * b;
            }
        }
        for (sum, a) in self.products.iter_mut().zip(x) {
            *sum = FADE * *sum + a * time;
        }
        self.time = FADE * self.time + time * time;
    }

    fn fit(&self) -> Option<StepFit> {
        let number = self.squares[0][0];
        let mean = self.squares[0][1] / number.max(1.0);
        let variance = self.squares[1][1] / number.max(1.0) - mean * mean;
        if number < LEAST || variance < LEAST_SPREAD * LEAST_SPREAD {
            return None;
        }
        let subsets = (1..8_usize).filter_map(|subset| {
            let found = self.solve(subset)?;
            found
                .iter()
                .all(|x| *x >= 0.0)
                .then(|| (self.error(&found), found))
        });
        let (error, found) = subsets.min_by(|a, b| a.0.total_cmp(&b.0))?;
        let mean = self.products[0] / number;
        let around = self.time - number * mean * mean;
        let explained = if around > 0.0 {
            1.0 - error / around
        } else {
            0.0
        };
        let [base, expert, row] = found;
        Some(StepFit {
            base_ms: base,
            expert_ms: expert,
            row_ms: row,
            explained: explained.clamp(0.0, 1.0),
        })
    }

    /// Least squares over the coefficients in `subset` (bits), the others 0; `None` if they are not independent.
    fn solve(&self, subset: usize) -> Option<[f64; 3]> {
        let used: Vec<usize> = (0..3).filter(|at| subset >> at & 1 == 1).collect();
        let n = used.len();
        let mut rows: Vec<Vec<f64>> = used
            .iter()
            .map(|i| {
                let row = used.iter().map(|j| self.squares[*i][*j]);
                row.chain([self.products[*i]]).collect()
            })
            .collect();
        for at in 0..n {
            // Positive definite where it can be solved, so that no row must be exchanged.
            let pivot = rows[at][at];
            if pivot <= 1e-9 * self.squares[used[at]][used[at]] {
                return None;
            }
            let (above, below) = rows.split_at_mut(at + 1);
            for row in below {
                let factor = row[at] / pivot;
                for (x, above) in row.iter_mut().zip(&above[at]) {
                    *x -= factor * above;
                }
            }
        }
        let mut found = [0.0; 3];
        for at in (0..n).rev() {
            let known: f64 = (at + 1..n).map(|j| rows[at][j] * found[used[j]]).sum();
            found[used[at]] = (rows[at][n] - known) / rows[at][at];
        }
        Some(found)
    }

    /// Sum of squared errors.
    fn error(&self, found: &[f64; 3]) -> f64 {
        let linear: f64 = found.iter().zip(self.products).map(|(x, p)| x * p).sum();
        let square = |(row, x): (&[f64; 3], &f64)| {
            x * row.iter().zip(found).map(|(s, y)| s * y).sum::<f64>()
        };
        let squares: f64 = self.squares.iter().zip(found).map(square).sum();
        self.time - 2.0 * linear + squares
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of this cost, of 1 to 16 rows that read about three experts each, with an error of up to a tenth.
    fn steps(number: u32, base: f64, expert: f64, row: f64) -> Pace {
        let mut pace = Pace::default();
        let mut state = 1_u32;
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1 << 24)
        };
        for _ in 0..number {
            let rows = 1 + (draw() * 16.0) as usize;
            let distinct = (3.0 * rows as f64).powf(0.8) + 4.0 * draw();
            let ms = base + expert * distinct + row * rows as f64;
            pace.add(distinct, rows, ms * (0.95 + 0.1 * draw()));
        }
        pace
    }

    #[test]
    fn the_cost_of_experts_and_rows_is_found() {
        let fit = steps(2000, 3.5, 0.4, 0.1).sums.fit().unwrap();
        assert!((fit.base_ms - 3.5).abs() < 0.5, "{fit:?}");
        assert!((fit.expert_ms - 0.4).abs() < 0.05, "{fit:?}");
        assert!((fit.row_ms - 0.1).abs() < 0.05, "{fit:?}");
        assert!(fit.explained > 0.9, "{fit:?}");
    }

    #[test]
    fn nothing_costs_less_than_nothing() {
        for (base, expert, row) in [(0.0, 0.0, 1.0), (5.0, 0.0, 0.0), (0.0, 0.3, 0.0)] {
            let fit = steps(2000, base, expert, row).sums.fit().unwrap();
            assert!(fit.base_ms >= 0.0 && fit.expert_ms >= 0.0 && fit.row_ms >= 0.0);
            assert!((fit.expert_ms - expert).abs() < 0.06, "{fit:?}");
        }
    }

    #[test]
    fn few_or_equal_steps_say_nothing() {
        assert!(steps(200, 3.5, 0.4, 0.1).sums.fit().is_none());
        let mut equal = Pace::default();
        (0..1000).for_each(|_| equal.add(8.0, 2, 5.0));
        assert!(equal.sums.fit().is_none());
        assert_eq!(equal.report().map(|steps| steps.steps), Some(1000));
        assert!(Pace::default().report().is_none());
    }

    #[test]
    fn a_step_reads_each_expert_once() {
        let mut pace = Pace::default();
        // Two rows, two layers, two experts each: {0, 1} and {1, 2} in the first layer, {3} twice in the second.
        pace.note(&[0, 1, 3, 0, 1, 2, 3, 0], 2, (2, 4, 2), 1.0);
        let steps = pace.report().unwrap();
        assert!((steps.experts - 2.5).abs() < 1e-9);
        assert_eq!((steps.rows, steps.steps), (2, 1));
        pace.note(&[0, 1], 2, (2, 4, 2), 1.0);
        assert_eq!(pace.report().unwrap().steps, 1, "too few routes");
    }
}
