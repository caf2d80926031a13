//! Sixteen lanes in four NEON registers.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "bit patterns of floats, and places of bits"
)]

use std::arch::aarch64::{
    float32x4_t, int32x4_t, uint32x4_t, vaddq_f32, vaddq_s32, vandq_u32, vbslq_f32, vceqq_u32,
    vcgtq_f32, vcltq_f32, vcvtq_f32_s32, vdivq_f32, vdupq_n_f32, vdupq_n_s32, vdupq_n_u32,
    vfmaq_f32, vld1q_f32, vld1q_s32, vld1q_u8, vmulq_f32, vorrq_u32, vreinterpretq_f32_s32,
    vreinterpretq_f32_u32, vreinterpretq_s32_f32, vreinterpretq_s32_u32, vreinterpretq_u32_f32,
    vreinterpretq_u32_u8, vshlq_n_s32, vshlq_n_u32, vshlq_u32, vshrq_n_s32, vst1q_f32,
    vsubq_f32, vsubq_s32,
};

use super::{Lanes, ROUND, Tiles, WIDTH};
use crate::codes;

/// Lanes 0–3, 4–7, 8–11, 12–15.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Neon([float32x4_t; 4]);

macro_rules! lane_by_lane {
    ($($name:ident($a:ident, $b:ident) = $value:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name(self, b: Self) -> Self {
            let mut out = self;
            for (out, $b) in out.0.iter_mut().zip(b.0) {
                let $a = *out;
                // SAFETY: NEON is part of every aarch64.
                *out = unsafe { $value };
            }
            out
        }
    )*};
}

/// Shifts each lane to the left, or for a negative count to the right.
#[inline(always)]
fn shift(lanes: uint32x4_t, left: i32) -> uint32x4_t {
    // SAFETY: NEON is part of every aarch64.
    unsafe { vshlq_u32(lanes, vdupq_n_s32(left)) }
}

/// The even and the odd numbers of a unit: `decode` gets four lanes, and the place of the lowest bit of their codes.
#[inline(always)]
unsafe fn decode(
    unit: *const u8,
    bit: i32,
    decode: impl Fn(usize, uint32x4_t, i32) -> float32x4_t,
) -> (Neon, Neon) {
    // SAFETY: 64 bytes are the caller's promise.
    let lanes =
        [0, 1, 2, 3].map(|i| unsafe { vreinterpretq_u32_u8(vld1q_u8(unit.add(16 * i))) });
    (
        Neon([0, 1, 2, 3].map(|i| decode(i, lanes[i], bit))),
        Neon([0, 1, 2, 3].map(|i| decode(i, lanes[i], bit + 16))),
    )
}

/// Small floats of `size` bits without the sign, of which the lowest is `bit`: with exponent and mantissa at the end
/// of a float32's exponent and the start of its mantissa they are `2^-scale` too small, also where they are subnormal.
#[inline(always)]
fn small_floats(
    lanes: uint32x4_t,
    bit: i32,
    size: i32,
    mantissa: i32,
    scale: u32,
) -> float32x4_t {
    // SAFETY: NEON is part of every aarch64.
    unsafe {
        let all = vdupq_n_u32(((1 << size) - 1) << (23 - mantissa));
        let bits = vandq_u32(shift(lanes, 23 - mantissa - bit), all);
        let sizes = vmulq_f32(
            vreinterpretq_f32_u32(bits),
            vdupq_n_f32(f32::from_bits((127 + scale) << 23)),
        );
        let sign = vandq_u32(shift(lanes, 31 - size - bit), vdupq_n_u32(1 << 31));
        vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(sizes), sign))
    }
}

impl Lanes for Neon {
    const TILES: Tiles = Tiles::Narrow;
    const PAIR_WORDS: usize = 2;
    /// The even ones and the odd ones, widened.
    type Pairs = (Self, Self);
    type Zeros = [int32x4_t; 4];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: NEON is part of every aarch64.
        Self([unsafe { vdupq_n_f32(x) }; 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 16 elements are the caller's promise.
        unsafe {
            Self([
                vld1q_f32(from),
                vld1q_f32(from.add(4)),
                vld1q_f32(from.add(8)),
                vld1q_f32(from.add(12)),
            ])
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        for (i, lanes) in self.0.into_iter().enumerate() {
            // SAFETY: 16 elements are the caller's promise.
            unsafe { vst1q_f32(to.add(4 * i), lanes) }
        }
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u8) -> (Self, Self) {
        // SAFETY: 64 bytes are the caller's promise.
        unsafe {
            let (mut even, mut odd) = (Self::splat(0.0), Self::splat(0.0));
            for i in 0..4 {
                let pairs = vreinterpretq_u32_u8(vld1q_u8(from.add(16 * i)));
                even.0[i] = vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs));
                odd.0[i] = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000)));
            }
            (even, odd)
        }
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
        let wide = halves.map(|b| half::f16::from_le_bytes(b).to_f32());
        // SAFETY: the array has 16 elements.
        unsafe { Self::load(wide.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn load_e8m0(from: *const u8) -> Self {
        // SAFETY: 16 bytes are the caller's promise.
        let wide = unsafe { from.cast::<[u8; WIDTH]>().read_unaligned() }.map(codes::e8m0);
        // SAFETY: the array has 16 elements.
        unsafe { Self::load(wide.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn load_zeros(from: *const u8) -> [int32x4_t; 4] {
        // SAFETY: 16 bytes are the caller's promise.
        let zeros = unsafe { from.cast::<[[u8; 4]; 4]>().read_unaligned() };
        // SAFETY: an array has four elements.
        zeros.map(|four| unsafe { vld1q_s32(four.map(i32::from).as_ptr()) })
    }

    #[inline(always)]
    unsafe fn int8(unit: *const u8, pair: usize) -> (Self, Self) {
        // SAFETY: 64 bytes are the caller's promise; NEON is part of every aarch64.
        unsafe {
            decode(unit, 8 * pair as i32, |_, lanes, bit| {
                let top = vreinterpretq_s32_u32(shift(lanes, 24 - bit));
                vcvtq_f32_s32(vshrq_n_s32::<24>(top))
            })
        }
    }

    #[inline(always)]
    unsafe fn e4m3(unit: *const u8, pair: usize) -> (Self, Self) {
        // SAFETY: 64 bytes are the caller's promise; NEON is part of every aarch64.
        unsafe {
            decode(unit, 8 * pair as i32, |_, lanes, bit| {
                let all = vdupq_n_u32(0x7f << 20);
                let bits = vandq_u32(shift(lanes, 20 - bit), all);
                let numbers = small_floats(lanes, bit, 7, 3, 120);
                // Where all bits are set, an or with ones is no number.
                let none = vceqq_u32(bits, all);
                vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(numbers), none))
            })
        }
    }

    #[inline(always)]
    unsafe fn e2m1(unit: *const u8, pair: usize) -> (Self, Self) {
        // SAFETY: 64 bytes are the caller's promise.
        unsafe {
            decode(unit, 4 * pair as i32, |_, lanes, bit| {
                small_floats(lanes, bit, 3, 1, 126)
            })
        }
    }

    #[inline(always)]
    unsafe fn int4(unit: *const u8, pair: usize, zeros: [int32x4_t; 4]) -> (Self, Self) {
        // SAFETY: 64 bytes are the caller's promise; NEON is part of every aarch64.
        unsafe {
            decode(unit, 4 * pair as i32, |i, lanes, bit| {
                let code = vandq_u32(shift(lanes, -bit), vdupq_n_u32(15));
                vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(code), zeros[i]))
            })
        }
    }

    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        let mut out = c;
        for i in 0..4 {
            // SAFETY: NEON is part of every aarch64.
            out.0[i] = unsafe { vfmaq_f32(c.0[i], self.0[i], b.0[i]) };
        }
        out
    }

    lane_by_lane! {
        add(a, b) = vaddq_f32(a, b);
        sub(a, b) = vsubq_f32(a, b);
        mul(a, b) = vmulq_f32(a, b);
        div(a, b) = vdivq_f32(a, b);
        max(a, b) = vbslq_f32(vcgtq_f32(a, b), a, b);
        min(a, b) = vbslq_f32(vcltq_f32(a, b), a, b);
    }

    #[inline(always)]
    unsafe fn powers_of_two(self) -> (Self, Self) {
        let (mut first, mut second) = (self, self);
        for i in 0..4 {
            // SAFETY: NEON is part of every aarch64.
            unsafe {
                let round = vdupq_n_s32(ROUND.to_bits() as i32);
                let n = vsubq_s32(vreinterpretq_s32_f32(self.0[i]), round);
                let (half, bias) = (vshrq_n_s32::<1>(n), vdupq_n_s32(127));
                let rest = vaddq_s32(vsubq_s32(n, half), bias);
                first.0[i] = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(half, bias)));
                second.0[i] = vreinterpretq_f32_s32(vshlq_n_s32::<23>(rest));
            }
        }
        (first, second)
    }
}
