//! Exponential and logarithm from IEEE additions and multiplications only.
//!
//! A C library may choose another code path per processor; two workers would then disagree in the
//! last bit. These give the same bits everywhere, with errors far below the float32 they serve.

const LOG2_E: f64 = std::f64::consts::LOG2_E;
/// ln 2 in two parts; the first has so few bits that its product with an exponent is exact.
const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// Adding and subtracting this rounds to the nearest integer.
const ROUND: f64 = 6_755_399_441_055_744.0;

/// `1 / k!` for k from 11 down to 0. Constants, because a division per term would be what takes the time.
const TAYLOR: [f64; 12] = [
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// `e^x` for `x <= 0` (what a softmax asks); 0 below -700. Relative error below 1e-14: with
/// `|r| <= ln 2 / 2` the first term left out is `r^12 / 12!`.
#[must_use]
pub fn exp(x: f64) -> f64 {
    if x < -700.0 {
        return 0.0;
    }
    let n = (x * LOG2_E + ROUND) - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut sum = 0.0;
    for term in TAYLOR {
        sum = sum * r + term;
    }
    sum * f64::from_bits(((n as i64 + 1023) as u64) << 52)
}

/// Natural logarithm of a normal positive number.
#[must_use]
pub fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut mantissa = f64::from_bits(bits & 0x000f_ffff_ffff_ffff | 0x3ff0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    // ln m = 2 artanh t with |t| <= 0.1716: the first term left out is below 1e-20.
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let square = t * t;
    let mut sum = 0.0;
    let mut k = 25.0;
    while k >= 1.0 {
        sum = sum * square + 1.0 / k;
        k -= 2.0;
    }
    let n = exponent as f64;
    n * LN2_HIGH + (2.0 * t * sum + n * LN2_LOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close() {
        for i in 0..70_000 {
            let x = f64::from(i) * -0.01;
            let relative = (exp(x) - x.exp()).abs() / x.exp();
            assert!(relative < 1e-14, "{x}: {relative}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
    }

    #[test]
    fn ln_is_close() {
        for i in 0..100_000 {
            let x = 1.0 + f64::from(i) * 3.7;
            assert!((ln(x) - x.ln()).abs() <= 4e-16 * x.ln().max(1.0), "{x}");
        }
        assert_eq!(ln(1.0), 0.0);
    }
}
