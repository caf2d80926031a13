//! What a placement costs, in milliseconds.

use super::kinds::Kinds;
use crate::signature::{Profile, probability};

/// Length of a worker's step in milliseconds: `base + expert × D + sequence × B` for `D` distinct experts (mean over
/// layers) and `B` sequences.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepModel {
    /// What a step takes in any case.
    pub base: f64,
    /// Reading one expert's weights in every layer: its bytes over the memory's bandwidth.
    pub expert: f64,
    /// One sequence more.
    pub sequence: f64,
}

impl Default for StepModel {
    /// Qwen3-30B-A3B in 16 bits on a device with 2.4 TB/s: an expert has 9.4 MB in each of 48 layers.
    fn default() -> Self {
        Self {
            base: 3.5,
            expert: 0.19,
            sequence: 0.03,
        }
    }
}

impl StepModel {
    /// Milliseconds of a step.
    #[must_use]
    pub fn step(&self, distinct: f64, batch: f64) -> f64 {
        self.expert
            .mul_add(distinct, self.sequence.mul_add(batch, self.base))
    }

    /// Share of a step that goes into reading experts.
    #[must_use]
    pub fn expert_share(&self, distinct: f64, batch: f64) -> f64 {
        let step = self.step(distinct, batch);
        if step > 0.0 {
            self.expert * distinct / step
        } else {
            0.0
        }
    }
}

/// Probability that a usual batch of a kind leaves an expert unused, `(1 − c)^b`, for every kind and for all.
#[derive(Debug, Clone)]
pub(super) struct Unused {
    /// The batch, sequences.
    pub(super) batch: f64,
    /// Number of this table; what was computed with an older one is stale.
    pub(super) version: u64,
    layers: f32,
    kinds: Vec<Vec<f32>>,
    all: Vec<f32>,
    stranger: Vec<f32>,
}

impl Unused {
    pub(super) fn new(kinds: &Kinds, batch: f64, version: u64) -> Self {
        let table = |kind: Option<usize>| -> Vec<f32> {
            let power = |root: &f32| (1.0 - (root * root).min(0.98)).powf(batch as f32);
            kinds.centre(kind).iter().map(power).collect()
        };
        let mut unused = Self {
            batch,
            version,
            layers: kinds.layers().max(1) as f32,
            kinds: (0..kinds.len()).map(|kind| table(Some(kind))).collect(),
            all: table(None),
            stranger: Vec::new(),
        };
        let mean: Vec<f32> = kinds
            .centre(None)
            .iter()
            .map(|root| probability(root * root))
            .collect();
        unused.stranger = unused.added(Some(&mean));
        unused
    }

    /// Experts that one token of a request would add to a usual batch, mean over layers: per kind, and last for a
    /// worker without one. Of a request that nothing is known of it is what the mean of all would add.
    pub(super) fn added(&self, probabilities: Option<&[f32]>) -> Vec<f32> {
        let Some(probabilities) = probabilities else {
            return self.stranger.clone();
        };
        let tables = self.kinds.iter().chain([&self.all]);
        tables
            .map(|table| product(probabilities, table) / self.layers)
            .collect()
    }
}

/// Scalar product, in eight lanes so that the processor may add them at once.
pub(super) fn product(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a
        .remainder()
        .iter()
        .zip(b.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (a, b) in a.zip(b) {
        for (lane, (x, y)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += x * y;
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// Use of experts by what a worker runs: `Σ ln(1 − p)` per entry over its sequences, and the power of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Running {
    log_unused: Vec<f64>,
    unused: Vec<f32>,
}

impl Running {
    /// Counts a sequence in (`sign` 1) or out (−1).
    pub(super) fn add(&mut self, profile: &Profile, sign: f64) {
        if self.log_unused.len() != profile.len() {
            self.log_unused = vec![0.0; profile.len()];
            self.unused = vec![1.0; profile.len()];
        }
        let sums = self.log_unused.iter_mut().zip(&mut self.unused);
        for ((sum, unused), p) in sums.zip(profile.probabilities()) {
            *sum += sign * f64::from((1.0 - p).ln());
            *unused = (*sum as f32).exp();
        }
    }

    /// Experts that a token with these probabilities adds to what runs here, mean over `layers`; `None` if the model
    /// is another one. Of an idle worker nothing is known: `None` too.
    pub(super) fn added(&self, likely: &[f32], layers: f64) -> Option<f64> {
        let known = !likely.is_empty() && self.unused.len() == likely.len();
        known.then(|| f64::from(product(likely, &self.unused)) / layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_of_ones_like_leaves_little_to_add() {
        let same = Profile::from_shares(4, &[1.0, 1.0, 0.0, 0.0]).unwrap();
        let other = Profile::from_shares(4, &[0.0, 0.0, 1.0, 1.0]).unwrap();
        let likely = |profile: &Profile| profile.probabilities().collect::<Vec<f32>>();
        let mut running = Running::default();
        assert!(running.added(&likely(&same), 1.0).is_none());
        running.add(&same, 1.0);
        assert!(running.added(&likely(&same), 1.0).unwrap() < 0.1);
        assert!(running.added(&likely(&other), 1.0).unwrap() > 1.9);
        running.add(&same, -1.0);
        assert!((running.added(&likely(&same), 1.0).unwrap() - 1.96).abs() < 0.01);
        assert!(running.added(&[0.5; 3], 1.0).is_none());
    }

    #[test]
    fn a_product_is_a_sum_over_all_entries() {
        for n in [0, 1, 7, 8, 19] {
            let a: Vec<f32> = (0..n).map(|x| x as f32).collect();
            let plain: f32 = a.iter().map(|x| x * 2.0).sum();
            assert!((product(&a, &vec![2.0; n]) - plain).abs() < 1e-3);
        }
    }
}
