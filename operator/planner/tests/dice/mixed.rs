//! Loads of a mix.

use crate::dice::Dice;

impl Dice {
    /// Log-normal with σ = 0.55, about the spread of a mixed load.
    pub(crate) fn mixed(&mut self) -> f64 {
        let (u, v) = (self.uniform(), self.uniform());
        let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
        (0.55 * normal).exp()
    }
}
