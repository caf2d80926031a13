//! Sixteen lanes in plain Rust, on every processor.
#![expect(
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "bit patterns of floats"
)]

use super::{Lanes, ROUND, Tiles, WIDTH};

/// An array, lane by lane.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Portable([f32; WIDTH]);

#[inline(always)]
fn zip(a: Portable, b: Portable, f: impl Fn(f32, f32) -> f32) -> Portable {
    let mut out = a;
    for (a, b) in out.0.iter_mut().zip(b.0) {
        *a = f(*a, b);
    }
    out
}

impl Lanes for Portable {
    const TILES: Tiles = Tiles::One;
    const PAIR_WORDS: usize = 2;
    /// The even ones and the odd ones, widened.
    type Pairs = (Self, Self);

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; WIDTH])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 16 elements are valid by the caller's promise.
        Self(unsafe { from.cast::<[f32; WIDTH]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 elements are valid by the caller's promise.
        unsafe { to.cast::<[f32; WIDTH]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u8) -> (Self, Self) {
        // SAFETY: 64 bytes are valid by the caller's promise.
        let bytes = unsafe { from.cast::<[[u8; 4]; WIDTH]>().read_unaligned() };
        let (mut even, mut odd) = ([0.0; WIDTH], [0.0; WIDTH]);
        for (lane, pair) in bytes.into_iter().enumerate() {
            let pair = u32::from_le_bytes(pair);
            even[lane] = f32::from_bits(pair << 16);
            odd[lane] = f32::from_bits(pair & 0xffff_0000);
        }
        (Self(even), Self(odd))
    }

    #[inline(always)]
    unsafe fn splat_pair(from: *const u32) -> (Self, Self) {
        let from = from.cast::<f32>();
        // SAFETY: two words and the instructions are the caller's promise.
        unsafe { (Self::splat(*from), Self::splat(*from.add(1))) }
    }

    #[inline(always)]
    unsafe fn dot(self, x: (Self, Self), w: (Self, Self)) -> Self {
        // SAFETY: the instructions are the caller's promise.
        unsafe { x.0.fma(w.0, x.1.fma(w.1, self)) }
    }

    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        let mut out = c;
        for ((out, a), b) in out.0.iter_mut().zip(self.0).zip(b.0) {
            *out = a.mul_add(b, *out);
        }
        out
    }

    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        zip(self, b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        zip(self, b, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        zip(self, b, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        zip(self, b, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        zip(self, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        zip(self, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn powers_of_two(self) -> (Self, Self) {
        let (mut first, mut second) = (self, self);
        for (first, second) in first.0.iter_mut().zip(&mut second.0) {
            let n = (first.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
            let half = n >> 1;
            let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
            (*first, *second) = (power(half), power(n.wrapping_sub(half)));
        }
        (first, second)
    }
}
