//! Rotary position embedding and its angles.
#![expect(
    clippy::cast_possible_truncation,
    reason = "float64 results are rounded to float32"
)]

use super::detect::Isa;
use super::lanes::{Lanes, WIDTH, on_path};
use super::norm::scale_kernel;
use super::threads::{Parts, Threads};
use crate::ops::{Norm, Rope, RopeTable};

/// Elements below which a second thread is not worth it.
const SMALL: usize = 1 << 15;

impl RopeTable {
    /// One row of `inv_freq.len()` angles per position, so for heads of `2 * inv_freq.len()`.
    #[must_use]
    pub fn new(inv_freq: &[f32], positions: &[u32]) -> Self {
        let mut table = Self::default();
        table.fill(inv_freq, positions);
        table
    }

    /// As [`RopeTable::new`], in the memory of this table.
    ///
    /// The angle is `position * inv_freq` in float32; its cosine and sine are computed in float64 and
    /// rounded once.
    pub fn fill(&mut self, inv_freq: &[f32], positions: &[u32]) {
        self.half = inv_freq.len();
        self.cos.clear();
        self.sin.clear();
        for position in positions {
            for frequency in inv_freq {
                let (sin, cos) = sin_cos(f64::from(*position as f32 * frequency));
                self.sin.push(sin as f32);
                self.cos.push(cos as f32);
            }
        }
    }
}

/// π/2 in three parts of which the first two have 33 bits: exact products with a quadrant below 2²⁰.
const HALF_PI: [f64; 3] = [
    1.570_796_326_734_125_6,
    6.077_100_506_303_966e-11,
    2.022_266_248_795_950_6e-21,
];
/// Rounds to an integer by adding and subtracting.
const ROUND: f64 = 6_755_399_441_055_744.0;

/// Sine and cosine by plain float64 operations, so that they do not depend on a system library.
///
/// Taylor polynomials on `[-π/4, π/4]`, whose first missing terms are below 2⁻⁵³.
fn sin_cos(angle: f64) -> (f64, f64) {
    let quadrant = (angle * std::f64::consts::FRAC_2_PI + ROUND) - ROUND;
    let r = ((angle - quadrant * HALF_PI[0]) - quadrant * HALF_PI[1]) - quadrant * HALF_PI[2];
    let r2 = r * r;
    let (mut sin, mut cos) = (1.0, 1.0);
    // sin = r (1 - r²/(2·3) (1 - r²/(4·5) (…))), cos = 1 - r²/(1·2) (1 - r²/(3·4) (…))
    for i in (1..=9).rev() {
        let even = f64::from(2 * i);
        sin = 1.0 - r2 / (even * (even + 1.0)) * sin;
        cos = 1.0 - r2 / ((even - 1.0) * even) * cos;
    }
    sin *= r;
    match (quadrant as i64).rem_euclid(4) {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

/// # Safety
/// The processor has the instructions of `L`; `x` has `2 * cos.len()` values, `sin` as many as `cos`.
#[inline(always)]
unsafe fn head_kernel<L: Lanes>(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (low, high) = x.split_at_mut(half);
    let mut i = 0;
    while i < half {
        let count = WIDTH.min(half - i);
        // SAFETY: `count` values from `i` on are in range; the rest is the caller's promise.
        unsafe {
            let a = L::load_first(low.as_ptr().add(i), count, 0.0);
            let b = L::load_first(high.as_ptr().add(i), count, 0.0);
            let c = L::load_first(cos.as_ptr().add(i), count, 0.0);
            let s = L::load_first(sin.as_ptr().add(i), count, 0.0);
            // As the products and the sum are written in the definition: each is rounded.
            a.mul(c)
                .sub(b.mul(s))
                .store_first(low.as_mut_ptr().add(i), count);
            b.mul(c)
                .add(a.mul(s))
                .store_first(high.as_mut_ptr().add(i), count);
        }
        i += WIDTH;
    }
}

/// # Safety
/// As for one head; `x` has whole heads, and whole widths of the norm.
#[inline(always)]
unsafe fn row_kernel<L: Lanes>(x: &mut [f32], before: Before<'_>, cos: &[f32], sin: &[f32]) {
    if let Some(norm) = before.norm {
        for part in x.chunks_exact_mut(norm.weight.len()) {
            // SAFETY: the part has the norm's width; the instructions are the caller's promise.
            unsafe { scale_kernel::<L>(part.as_ptr(), norm, part.as_mut_ptr()) }
        }
    }
    if let Some(clip) = before.clip {
        for value in x.iter_mut() {
            *value = value.clamp(-clip, clip);
        }
    }
    for head in x.chunks_exact_mut(2 * cos.len()) {
        // SAFETY: the caller's promise.
        unsafe { head_kernel::<L>(head, cos, sin) }
    }
}

/// What happens to a row before it is rotated.
#[derive(Clone, Copy)]
struct Before<'a> {
    norm: Option<Norm<'a>>,
    clip: Option<f32>,
}

on_path! {
    /// Norm, clip and rotation of all heads of one row.
    fn rotate(x: &mut [f32], before: Before<'_>, cos: &[f32], sin: &[f32]) = row_kernel
}

/// Runs a checked rotation.
pub(super) fn rope(isa: Isa, threads: &Threads, op: Rope<'_>) {
    let Rope {
        x,
        rows,
        heads,
        head_dim,
        norm,
        clip,
        table,
    } = op;
    let before = Before { norm, clip };
    let (half, width) = (table.half, heads * head_dim);
    if width == 0 {
        return;
    }
    let x = Parts::of(x);
    // So many rows that they are worth a thread.
    let step = (SMALL / width).max(1);
    threads.run(rows.div_ceil(step), &|item| {
        for row in item * step..rows.min((item + 1) * step) {
            let angles = row * half..(row + 1) * half;
            // SAFETY: rows do not overlap; a row has heads of twice `half` values.
            unsafe {
                let x = x.slice(row * width, width);
                rotate(
                    isa,
                    x,
                    before,
                    &table.cos[angles.clone()],
                    &table.sin[angles],
                );
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sine_and_cosine_are_those_of_the_library() {
        for i in 0..200_000_u32 {
            let angle = f64::from((i as f32) * 5.37);
            let (sin, cos) = sin_cos(angle);
            assert!((sin - angle.sin()).abs() < 1e-13, "sin({angle}) = {sin}");
            assert!((cos - angle.cos()).abs() < 1e-13, "cos({angle}) = {cos}");
        }
    }

    #[test]
    fn position_zero_turns_nothing() {
        let table = RopeTable::new(&[1.0, 0.5], &[0]);
        assert_eq!(table.cos, [1.0, 1.0]);
        assert_eq!(table.sin, [0.0, 0.0]);
    }
}
