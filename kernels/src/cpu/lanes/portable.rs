//! Sixteen lanes in plain Rust, on every processor.
#![expect(
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "bit patterns of floats"
)]

use super::{Lanes, ROUND, Tiles, WIDTH};
use crate::codes;

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

/// All numbers of e4m3.
static E4M3: [f32; 256] = {
    let mut numbers = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        numbers[code] = codes::e4m3(code as u8);
        code += 1;
    }
    numbers
};

/// A pair of every lane out of a unit of codes of some bits.
///
/// # Safety
/// `unit` has 64 bytes.
#[inline(always)]
unsafe fn decode(
    unit: *const u8,
    bits: usize,
    pair: usize,
    value: impl Fn(u8, usize) -> f32,
) -> (Portable, Portable) {
    // SAFETY: the caller's promise.
    let words = unsafe { unit.cast::<[[[u8; 2]; 2]; WIDTH]>().read_unaligned() };
    let (mut even, mut odd) = ([0.0; WIDTH], [0.0; WIDTH]);
    for (lane, pairs) in words.into_iter().enumerate() {
        let code =
            |word| (u16::from_le_bytes(word) >> (pair * bits)) as u8 & (0xff >> (8 - bits));
        even[lane] = value(code(pairs[0]), lane);
        odd[lane] = value(code(pairs[1]), lane);
    }
    (Portable(even), Portable(odd))
}

impl Lanes for Portable {
    const TILES: Tiles = Tiles::One;
    const PAIR_WORDS: usize = 2;
    /// The even ones and the odd ones, widened.
    type Pairs = (Self, Self);
    type Zeros = [u8; WIDTH];

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
    unsafe fn store_pairs((even, odd): (Self, Self), to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { super::store_halves(even, odd, to) }
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
    unsafe fn load_halves(from: *const u8) -> Self {
        // SAFETY: 32 bytes are the caller's promise.
        let halves = unsafe { from.cast::<[[u8; 2]; WIDTH]>().read_unaligned() };
        Self(halves.map(|b| half::f16::from_le_bytes(b).to_f32()))
    }

    #[inline(always)]
    unsafe fn load_e8m0(from: *const u8) -> Self {
        // SAFETY: 16 bytes are the caller's promise.
        Self(unsafe { from.cast::<[u8; WIDTH]>().read_unaligned() }.map(codes::e8m0))
    }

    #[inline(always)]
    unsafe fn load_zeros(from: *const u8) -> [u8; WIDTH] {
        // SAFETY: 16 bytes are the caller's promise.
        unsafe { from.cast::<[u8; WIDTH]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn int8(unit: *const u8, pair: usize) -> (Self, Self) {
        // SAFETY: the caller's promise.
        unsafe { decode(unit, 8, pair, |code, _| f32::from(code.cast_signed())) }
    }

    #[inline(always)]
    unsafe fn e4m3(unit: *const u8, pair: usize) -> (Self, Self) {
        // SAFETY: the caller's promise.
        unsafe { decode(unit, 8, pair, |code, _| E4M3[usize::from(code)]) }
    }

    #[inline(always)]
    unsafe fn e2m1(unit: *const u8, pair: usize) -> (Self, Self) {
        // SAFETY: the caller's promise.
        unsafe { decode(unit, 4, pair, |code, _| codes::e2m1(code)) }
    }

    #[inline(always)]
    unsafe fn int4(unit: *const u8, pair: usize, zeros: [u8; WIDTH]) -> (Self, Self) {
        let value = |code: u8, lane: usize| f32::from(code) - f32::from(zeros[lane]);
        // SAFETY: the caller's promise.
        unsafe { decode(unit, 4, pair, value) }
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
