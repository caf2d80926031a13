//! Seeded random numbers. Each purpose has a stream of its own, so that no policy disturbs what another one meets.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A stream of random numbers: ChaCha with eight rounds.
#[derive(Debug, Clone)]
pub struct Dice(ChaCha8Rng);

impl Dice {
    /// Stream `stream` of a seed.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self(rng)
    }

    /// Uniform in (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.0.next_u64() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    /// Two independent standard normals (Box and Muller 1958).
    pub fn normals(&mut self) -> [f64; 2] {
        let (u, v) = (self.uniform(), self.uniform());
        let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
        let radius = (-2.0 * u.ln()).sqrt();
        [radius * cos, radius * sin]
    }

    /// Fills with standard normals.
    pub fn fill(&mut self, out: &mut [f64]) {
        for pair in out.chunks_mut(2) {
            let drawn = self.normals();
            pair.copy_from_slice(&drawn[..pair.len()]);
        }
    }

    /// Standard exponential.
    pub fn exponential(&mut self) -> f64 {
        -self.uniform().ln()
    }

    /// Trials up to the first success of probability 1 / `mean`.
    pub fn geometric(&mut self, mean: f64) -> u32 {
        ((self.uniform().ln() / (1.0 - 1.0 / mean).ln()).ceil() as u32).max(1)
    }

    /// An index with these weights.
    pub fn choice(&mut self, weights: &[f64]) -> usize {
        let mut left = self.uniform() * weights.iter().sum::<f64>();
        for (at, weight) in weights.iter().enumerate() {
            left -= weight;
            if left <= 0.0 {
                return at;
            }
        }
        weights.len().saturating_sub(1)
    }

    /// Poisson with this mean: by inversion below ten, else by transformed rejection (Hörmann 1993, PTRS).
    pub fn poisson(&mut self, mean: f64) -> u64 {
        if mean < 10.0 {
            return self.poisson_of_few(mean);
        }
        let b = 0.931 + 2.53 * mean.sqrt();
        let a = 0.02483 * b - 0.059;
        let inverse_alpha = 1.1239 + 1.1328 / (b - 3.4);
        let surely = 0.9277 - 3.6224 / (b - 2.0);
        loop {
            let u = self.uniform() - 0.5;
            let v = self.uniform();
            let edge = 0.5 - u.abs();
            let k = ((2.0 * a / edge + b) * u + mean + 0.43).floor();
            if edge >= 0.07 && v <= surely {
                return k as u64;
            }
            if k < 0.0 || (edge < 0.013 && v > edge) {
                continue;
            }
            let height = (v * inverse_alpha / (a / (edge * edge) + b)).ln();
            if height <= k * mean.ln() - mean - ln_factorial(k) {
                return k as u64;
            }
        }
    }

    fn poisson_of_few(&mut self, mean: f64) -> u64 {
        let (mut left, mut part, mut k) = (self.uniform(), (-mean).exp(), 0_u64);
        while left > part && k < 1000 {
            left -= part;
            k += 1;
            part *= mean / k as f64;
        }
        k
    }

    /// Gamma of this shape and scale 1 (Marsaglia and Tsang 2000).
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            return self.gamma(shape + 1.0) * self.uniform().powf(1.0 / shape);
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let [x, _] = self.normals();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.uniform().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }

    /// Shares that sum to 1, around those of `alpha`; the larger its sum, the closer.
    pub fn dirichlet<const N: usize>(&mut self, alpha: [f64; N]) -> [f64; N] {
        let drawn = alpha.map(|a| self.gamma(a));
        let sum: f64 = drawn.iter().sum();
        drawn.map(|x| x / sum)
    }
}

/// ln k! for a whole k ≥ 0: the product up to 15, then Stirling's series, exact to 10⁻¹¹.
fn ln_factorial(k: f64) -> f64 {
    if k < 16.0 {
        return (2..=k as u32).map(|i| f64::from(i).ln()).sum();
    }
    let series = (1.0 - (1.0 / 30.0 - 1.0 / (105.0 * k * k)) / (k * k)) / (12.0 * k);
    (k + 0.5) * k.ln() - k + 0.5 * std::f64::consts::TAU.ln() + series
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean and variance of draws.
    fn moments(n: usize, mut draw: impl FnMut() -> f64) -> (f64, f64) {
        let drawn: Vec<f64> = (0..n).map(|_| draw()).collect();
        let mean = drawn.iter().sum::<f64>() / n as f64;
        let squares: f64 = drawn.iter().map(|x| (x - mean).powi(2)).sum();
        (mean, squares / n as f64)
    }

    #[test]
    fn the_factorial_is_continuous_where_the_series_begins() {
        let product = |k: u32| (2..=k).map(|i| f64::from(i).ln()).sum::<f64>();
        for k in [0, 1, 5, 15, 16, 17, 40, 150] {
            assert!(
                (ln_factorial(f64::from(k)) - product(k)).abs() < 1e-9,
                "{k}"
            );
        }
    }

    #[test]
    fn poisson_has_its_mean_as_variance_on_both_ways() {
        let mut dice = Dice::new(1, 0);
        for mean in [0.3, 4.0, 9.9, 10.0, 30.0, 6400.0] {
            let n = 40_000;
            let (found, variance) = moments(n, || dice.poisson(mean) as f64);
            let error = (mean / n as f64).sqrt();
            assert!((found - mean).abs() < 4.0 * error, "{mean}: {found}");
            assert!((variance / mean - 1.0).abs() < 0.05, "{mean}: {variance}");
        }
        assert_eq!(dice.poisson(0.0), 0);
    }

    #[test]
    fn poisson_by_rejection_has_the_right_probabilities() {
        let (mut dice, mean, n) = (Dice::new(2, 0), 12.0, 200_000);
        let mut seen = [0_u32; 40];
        for _ in 0..n {
            seen[(dice.poisson(mean) as usize).min(39)] += 1;
        }
        for k in 4..24_u32 {
            let expected = f64::from(n)
                * (f64::from(k) * mean.ln() - mean - ln_factorial(f64::from(k))).exp();
            let off = (f64::from(seen[k as usize]) - expected) / expected.sqrt();
            assert!(off.abs() < 4.5, "{k}: {off}");
        }
    }

    #[test]
    fn gamma_and_dirichlet_have_their_moments() {
        let mut dice = Dice::new(3, 0);
        for shape in [0.2, 1.0, 7.5, 400.0] {
            let n = 40_000;
            let (mean, variance) = moments(n, || dice.gamma(shape));
            assert!((mean / shape - 1.0).abs() < 0.05, "{shape}: {mean}");
            assert!((variance / shape - 1.0).abs() < 0.1, "{shape}: {variance}");
        }
        let (mean, variance) = moments(20_000, || dice.dirichlet([2.0, 6.0, 12.0])[1]);
        assert!((mean - 0.3).abs() < 0.005 && (variance - 0.01).abs() < 5e-4);
    }
}
