//! Random numbers, and how far two may be apart.

use half::bf16;

/// The unit of float32's rounding.
pub(crate) const EPS: f64 = 1.0 / (1 << 24) as f64;

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Between -1 and 1.
    pub(crate) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }

    /// Values of a format of 16 bits, as its bits.
    pub(crate) fn halves(&mut self, count: usize) -> Vec<u16> {
        rounded(&self.floats(count))
    }
}

/// Rounded to bfloat16, as bits.
pub(crate) fn rounded(values: &[f32]) -> Vec<u16> {
    values
        .iter()
        .map(|v| bf16::from_f32(*v).to_bits())
        .collect()
}

pub(crate) fn widened(bits: &[u16]) -> Vec<f32> {
    bits.iter().map(|b| bf16::from_bits(*b).to_f32()).collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Every value is within `bound(i)` of what is wanted; not a number only where that is wanted.
pub(crate) fn assert_close(got: &[f32], want: &[f32], bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        if want.is_nan() || want.is_infinite() {
            assert!(
                got == want || got.is_nan() && want.is_nan(),
                "[{i}]: {got}, want {want}"
            );
            continue;
        }
        let apart = (f64::from(*got) - f64::from(*want)).abs();
        assert!(
            apart <= bound(i),
            "[{i}]: {got}, want {want}, bound {}",
            bound(i)
        );
    }
}
