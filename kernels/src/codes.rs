//! Numbers of 4 and 8 bits, as their standards define them: OCP 8-bit Floating Point Specification 1.0 (e4m3)
//! and OCP Microscaling Formats Specification 1.0 (e2m1, e8m0).
/// The greatest e4m3 and e2m1.
pub(crate) const E4M3_MAX: f32 = 448.0;
pub(crate) const E2M1_MAX: f32 = 6.0;

/// One sign, four exponent (bias 7) and three mantissa bits; exponent 0 is subnormal; all seven ones are no number.
pub(crate) const fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (code as u32 >> 3 & 15, code as u32 & 7);
    let size = if code & 0x7f == 0x7f {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 / 512.0
    } else {
        f32::from_bits((exponent + 120) << 23 | mantissa << 20)
    };
    if code & 0x80 == 0 { size } else { -size }
}

/// One sign, two exponent (bias 1) and one mantissa bit.
pub(crate) const fn e2m1(code: u8) -> f32 {
    const SIZES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let size = SIZES[(code & 7) as usize];
    if code & 8 == 0 { size } else { -size }
}

/// A power of two, `2^(code - 127)`; 255 is no number.
pub(crate) const fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits((code as u32) << 23),
    }
}

/// The e4m3 nearest to a finite number, ties to even; what is too great becomes the greatest.
#[inline(always)]
pub(crate) fn to_e4m3(x: f32) -> u8 {
    let size = x.abs().min(E4M3_MAX);
    // At 2¹⁴ the last place of a float32 is 2⁻⁹, the step of the subnormals: the addition rounds.
    let small = (size + 16_384.0).to_bits() & 0xf;
    let bits = size.to_bits();
    // Nearest at 20 bits fewer, and the other bias. For a subnormal it is not used.
    let normal = ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20).wrapping_sub(120 << 3);
    let code = if size < 1.0 / 64.0 { small } else { normal };
    (code | x.to_bits() >> 24 & 0x80) as u8
}

/// The e2m1 nearest to a finite number, ties to even; what is too great becomes the greatest.
#[inline(always)]
pub(crate) fn to_e2m1(x: f32) -> u8 {
    let size = x.abs().min(E2M1_MAX);
    // At 2²² the last place of a float32 is 1/2, the step of the subnormals.
    let small = (size + 4_194_304.0).to_bits() & 3;
    let bits = size.to_bits();
    let normal = ((bits + 0x1f_ffff + (bits >> 22 & 1)) >> 22).wrapping_sub(126 << 1);
    let code = if size < 1.0 { small } else { normal };
    (code | x.to_bits() >> 28 & 8) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every finite code, with its number.
    fn all(codes: u16, value: fn(u8) -> f32) -> Vec<(u8, f32)> {
        (0..codes)
            .map(|c| (c as u8, value(c as u8)))
            .filter(|(_, v)| v.is_finite())
            .collect()
    }

    /// By search through all codes; of two at the same distance the even code.
    fn nearest(codes: &[(u8, f32)], x: f32) -> f32 {
        let far = |v: f32| (f64::from(v) - f64::from(x)).abs();
        codes
            .iter()
            .copied()
            .reduce(|a, b| match far(a.1).total_cmp(&far(b.1)) {
                std::cmp::Ordering::Less => a,
                std::cmp::Ordering::Greater => b,
                std::cmp::Ordering::Equal if a.0 % 2 == 0 => a,
                std::cmp::Ordering::Equal => b,
            })
            .unwrap()
            .1
    }

    #[test]
    fn numbers_of_the_standards() {
        assert_eq!(e4m3(0x7e), 448.0);
        assert_eq!(e4m3(0x08), 2.0_f32.powi(-6));
        assert_eq!(e4m3(0x01), 2.0_f32.powi(-9));
        assert_eq!(e4m3(0xb8), -1.0);
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert_eq!(e4m3(0x80).to_bits(), (-0.0_f32).to_bits());
        assert_eq!(e2m1(0xf), -6.0);
        assert_eq!(e8m0(127), 1.0);
        assert_eq!(e8m0(0), 2.0_f32.powi(-127));
        assert_eq!(e8m0(254), 2.0_f32.powi(127));
        assert!(e8m0(255).is_nan());
    }

    #[test]
    fn every_code_is_a_bfloat16_and_its_own_nearest() {
        for (code, x) in all(256, e4m3) {
            assert_eq!(half::bf16::from_f32(x).to_f32(), x);
            assert_eq!(to_e4m3(x), code);
        }
        for (code, x) in all(16, e2m1) {
            assert_eq!(half::bf16::from_f32(x).to_f32(), x);
            assert_eq!(to_e2m1(x), code);
        }
    }

    #[test]
    fn rounding_is_to_the_nearest() {
        let (eights, fours) = (all(256, e4m3), all(16, e2m1));
        let mut bits = 1_u32;
        for i in 0..20_000_u32 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Half of them at midpoints and other sixteenths.
            let x = if i % 2 == 0 {
                (bits >> 16) as f32 / 4096.0 - 8.0
            } else {
                f32::from_bits(bits & 0x8fff_ffff | 0x3000_0000)
            };
            assert_eq!(e4m3(to_e4m3(x)), nearest(&eights, x), "{x:e}");
            assert_eq!(e4m3(to_e4m3(x / 64.0)), nearest(&eights, x / 64.0), "{x:e}");
            assert_eq!(e2m1(to_e2m1(x)), nearest(&fours, x), "{x:e}");
        }
    }
}
