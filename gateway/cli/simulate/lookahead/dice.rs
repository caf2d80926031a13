//! Seeded random numbers. Each purpose has a stream of its own, so that no policy disturbs what another one meets.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A stream of random numbers: ChaCha with eight rounds.
#[derive(Debug)]
pub(super) struct Dice(ChaCha8Rng);

impl Dice {
    /// Stream `stream` of a seed.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self(rng)
    }

    /// Uniform in (0, 1).
    pub(super) fn uniform(&mut self) -> f64 {
        ((self.0.next_u64() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    /// Two independent standard normals (Box and Muller 1958).
    pub(super) fn normals(&mut self) -> [f64; 2] {
        let (u, v) = (self.uniform(), self.uniform());
        let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
        let radius = (-2.0 * u.ln()).sqrt();
        [radius * cos, radius * sin]
    }

    /// Fills with standard normals.
    pub(super) fn fill(&mut self, out: &mut [f64]) {
        for pair in out.chunks_mut(2) {
            let drawn = self.normals();
            pair.copy_from_slice(&drawn[..pair.len()]);
        }
    }

    /// Standard exponential.
    pub(super) fn exponential(&mut self) -> f64 {
        -self.uniform().ln()
    }

    /// Trials up to the first success of probability 1 / `mean`.
    pub(super) fn geometric(&mut self, mean: f64) -> u32 {
        ((self.uniform().ln() / (1.0 - 1.0 / mean).ln()).ceil() as u32).max(1)
    }

    /// An index with these weights.
    pub(super) fn choice(&mut self, weights: &[f64]) -> usize {
        let mut left = self.uniform() * weights.iter().sum::<f64>();
        for (at, weight) in weights.iter().enumerate() {
            left -= weight;
            if left <= 0.0 {
                return at;
            }
        }
        weights.len().saturating_sub(1)
    }
}
