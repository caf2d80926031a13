//! Loads as batches bring them: the prediction, and the prediction with the noise of a batch.
//!
//! A split levels the mean; what is served are batches, whose counts scatter around it. A placement that is level for
//! the mean with nothing to spare is not for most batches. So homes are judged on a few drawn batches as well. The
//! draws are fixed numbers, the same for every layer and call, and come in pairs of opposite sign, so that the mean
//! stays what it is.

/// Pairs of draws.
const PAIRS: usize = 2;
/// Largest relative standard deviation that is drawn.
const MOST: f64 = 0.3;
/// Rows per expert below which a batch is not drawn: it is mostly noise, which no homes are level for.
const FEWEST: f64 = 16.0;

/// Standard normal draws for `experts` experts.
#[derive(Debug, Clone)]
pub(crate) struct Draws(Vec<Vec<f64>>);

impl Draws {
    pub(crate) fn new(experts: usize) -> Self {
        let pair = |k: usize| (0..experts).map(|e| normal(k, e)).collect();
        Self((0..PAIRS).map(pair).collect())
    }

    /// The prediction `w`, then batches of `rows` rows each; the prediction alone if batches are not known (0) or small.
    ///
    /// Rows of an expert vary as independent rows do (Poisson): relative standard deviation √(1/rows of it).
    pub(crate) fn loads(&self, w: &[f64], rows: f64) -> Vec<Vec<f64>> {
        let mut loads = vec![w.to_vec()];
        let total: f64 = w.iter().sum();
        if rows < FEWEST * w.len() as f64 {
            return loads;
        }
        for z in &self.0 {
            for sign in [1.0, -1.0] {
                let drawn = |(w, z): (&f64, &f64)| {
                    let deviation = (total / (w * rows)).sqrt().min(MOST);
                    w * (1.0 + sign * deviation * z).max(0.1)
                };
                loads.push(w.iter().zip(z).map(drawn).collect());
            }
        }
        loads
    }
}

/// A standard normal number: twelve uniform ones of SplitMix64 (Steele, Lea, Flood 2014), less six.
fn normal(pair: usize, expert: usize) -> f64 {
    let mut state = ((pair as u64) << 32 | expert as u64).wrapping_mul(0xD134_2543_DE82_EF95);
    let mut sum = -6.0;
    for _ in 0..12 {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        sum += ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_normal_and_cancel() {
        let draws = Draws::new(4000);
        for z in &draws.0 {
            let mean = z.iter().sum::<f64>() / 4000.0;
            let variance = z.iter().map(|x| x * x).sum::<f64>() / 4000.0;
            assert!(
                mean.abs() < 0.06 && (variance - 1.0).abs() < 0.1,
                "{mean} {variance}"
            );
        }
        let w = [100.0, 300.0];
        let loads = Draws::new(2).loads(&w, 40_000.0);
        assert_eq!(loads.len(), 1 + 2 * PAIRS);
        for e in 0..2 {
            let mean = loads[1..].iter().map(|x| x[e]).sum::<f64>() / (2 * PAIRS) as f64;
            assert!((mean - w[e]).abs() < 1e-9);
        }
        assert_eq!(Draws::new(2).loads(&w, 0.0).len(), 1);
    }
}
