//! The exponential and what is made of it, lane by lane, the same bits on every path.
//!
//! `exp(x) = 2^n · exp(r)` with `n` the integer nearest to `x / ln 2` and `r = x - n ln 2` taken off in two
//! parts (Cody and Waite, Software Manual for the Elementary Functions, 1980), so `|r| <= ln 2 / 2`, where
//! the Taylor polynomial of degree 7 is below a tenth of a unit in the last place of float32 wrong.

use super::lanes::{Lanes, ROUND};

const LN2_HIGH: f32 = std::f32::consts::LN_2;
/// `ln 2 - LN2_HIGH`.
const LN2_LOW: f32 = -1.904_654_3e-9;
/// 1/2!, 1/3!, …, 1/7!.
const TAYLOR: [f32; 6] = [
    1.0 / 2.0,
    1.0 / 6.0,
    1.0 / 24.0,
    1.0 / 120.0,
    1.0 / 720.0,
    1.0 / 5040.0,
];
/// Beyond these the result is 0 or infinite.
const RANGE: (f32, f32) = (-104.0, 89.0);

/// `exp(x)`: exactly 0 for minus infinity, 1 for 0, NaN for NaN.
///
/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn exp<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's promise.
    unsafe {
        let x = L::splat(RANGE.1).min(L::splat(RANGE.0).max(x));
        let round = L::splat(ROUND);
        let t = x.fma(L::splat(std::f32::consts::LOG2_E), round);
        let n = t.sub(round);
        let r = n.fma(L::splat(-LN2_LOW), n.fma(L::splat(-LN2_HIGH), x));
        let mut p = L::splat(TAYLOR[5]);
        p = p.fma(r, L::splat(TAYLOR[4]));
        p = p.fma(r, L::splat(TAYLOR[3]));
        p = p.fma(r, L::splat(TAYLOR[2]));
        p = p.fma(r, L::splat(TAYLOR[1]));
        p = p.fma(r, L::splat(TAYLOR[0]));
        let p = p.fma(r.mul(r), r).add(L::splat(1.0));
        let (first, second) = t.powers_of_two();
        p.mul(first).mul(second)
    }
}

/// `1 / (1 + exp(-x))`.
///
/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn sigmoid<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's promise.
    unsafe {
        let one = L::splat(1.0);
        one.div(one.add(exp(L::splat(0.0).sub(x))))
    }
}

/// `x / (1 + exp(-x))`.
///
/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn silu<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's promise.
    unsafe { x.div(L::splat(1.0).add(exp(L::splat(0.0).sub(x)))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::detect::{Isa, Path};
    use crate::cpu::lanes::on_path;

    unsafe fn kernel<L: Lanes>(x: &[f32; 16], out: &mut [f32; 16]) {
        // SAFETY: both arrays have 16 elements.
        unsafe { exp(L::load(x.as_ptr())).store(out.as_mut_ptr()) }
    }
    on_path! { fn exp16(x: &[f32; 16], out: &mut [f32; 16]) = kernel }

    fn on(path: Path, x: [f32; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        // SAFETY: arrays of 16.
        unsafe { exp16(Isa::of(path).unwrap(), &x, &mut out) }
        out
    }

    #[test]
    fn close_to_the_library_and_equal_on_all_paths() {
        let mut bits = 0x1234_5678_u32;
        for _ in 0..20_000 {
            let x = [(); 16].map(|()| {
                bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (bits >> 8) as f32 / (1 << 24) as f32 * 200.0 - 108.0
            });
            let portable = on(Path::Portable, x);
            for (x, y) in x.iter().zip(portable) {
                let want = f64::from(*x).exp() as f32;
                let ulp = (i64::from(want.to_bits()) - i64::from(y.to_bits())).abs();
                assert!(ulp <= 2, "exp({x}) = {want}, got {y}");
            }
            for path in Path::present() {
                assert_eq!(
                    on(path, x).map(f32::to_bits),
                    portable.map(f32::to_bits),
                    "{path}"
                );
            }
        }
    }

    #[test]
    fn ends_of_the_range() {
        for path in Path::present() {
            let mut x = [0.0; 16];
            x[1] = f32::NEG_INFINITY;
            x[2] = f32::INFINITY;
            x[3] = f32::NAN;
            x[4] = -200.0;
            x[5] = 100.0;
            x[6] = -0.0;
            let y = on(path, x);
            assert_eq!((y[0], y[6]), (1.0, 1.0), "{path}");
            assert_eq!((y[1].to_bits(), y[4].to_bits()), (0, 0), "{path}");
            assert_eq!((y[2], y[5]), (f32::INFINITY, f32::INFINITY), "{path}");
            assert!(y[3].is_nan(), "{path}");
        }
    }
}
