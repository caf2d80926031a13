//! Sixteen lanes in one AVX-512 register.
#![expect(clippy::cast_possible_wrap, reason = "bit patterns of floats")]

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_add_epi32, _mm512_add_ps,
    _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_div_ps,
    _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_max_ps,
    _mm512_min_ps, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32,
    _mm512_srai_epi32, _mm512_storeu_ps, _mm512_sub_epi32, _mm512_sub_ps,
};

use super::{Lanes, ROUND, Tiles};

/// All lanes; with or without the instructions for bfloat16.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx512<const BF16: bool>(__m512);

/// The even and the odd values of bfloat16 pairs, widened.
#[inline(always)]
unsafe fn widen(pairs: __m512i) -> (__m512, __m512) {
    // SAFETY: the instructions are the caller's promise.
    unsafe {
        let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        let even = _mm512_slli_epi32::<16>(pairs);
        (_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd))
    }
}

macro_rules! lane_by_lane {
    ($($name:ident = $intrinsic:ident;)*) => {$(
        #[inline(always)]
        unsafe fn $name(self, b: Self) -> Self {
            // SAFETY: the instructions are the caller's promise.
            unsafe { Self($intrinsic(self.0, b.0)) }
        }
    )*};
}

impl<const BF16: bool> Lanes for Avx512<BF16> {
    const TILES: Tiles = Tiles::Wide;
    const PAIR_WORDS: usize = 1;
    type Pairs = __m512i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the instructions are the caller's promise.
        unsafe { Self(_mm512_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 16 elements and the instructions are the caller's promise.
        unsafe { Self(_mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 elements and the instructions are the caller's promise.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u8) -> __m512i {
        // SAFETY: 64 bytes and the instructions are the caller's promise.
        unsafe { _mm512_loadu_si512(from.cast::<__m512i>()) }
    }

    #[inline(always)]
    unsafe fn splat_pair(from: *const u32) -> __m512i {
        // SAFETY: one word and the instructions are the caller's promise.
        unsafe { _mm512_set1_epi32(from.read_unaligned() as i32) }
    }

    #[inline(always)]
    unsafe fn dot(self, x: __m512i, w: __m512i) -> Self {
        // SAFETY: the instructions are the caller's promise; a register of pairs is a register.
        unsafe {
            if BF16 {
                // Two fused multiply-adds, the odd one first.
                let (x, w) = (
                    std::mem::transmute::<__m512i, __m512bh>(x),
                    std::mem::transmute::<__m512i, __m512bh>(w),
                );
                return Self(_mm512_dpbf16_ps(self.0, w, x));
            }
            let ((x_even, x_odd), (w_even, w_odd)) = (widen(x), widen(w));
            let sum = _mm512_fmadd_ps(x_odd, w_odd, self.0);
            Self(_mm512_fmadd_ps(x_even, w_even, sum))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: a prefetch of an invalid address has no effect.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: the instructions are the caller's promise.
        unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }

    lane_by_lane! {
        add = _mm512_add_ps;
        sub = _mm512_sub_ps;
        mul = _mm512_mul_ps;
        div = _mm512_div_ps;
        max = _mm512_max_ps;
        min = _mm512_min_ps;
    }

    #[inline(always)]
    unsafe fn powers_of_two(self) -> (Self, Self) {
        // SAFETY: the instructions are the caller's promise.
        unsafe {
            let round = _mm512_set1_epi32(ROUND.to_bits() as i32);
            let n = _mm512_sub_epi32(_mm512_castps_si512(self.0), round);
            let (half, bias) = (_mm512_srai_epi32::<1>(n), _mm512_set1_epi32(127));
            let first = _mm512_slli_epi32::<23>(_mm512_add_epi32(half, bias));
            let rest = _mm512_add_epi32(_mm512_sub_epi32(n, half), bias);
            let second = _mm512_slli_epi32::<23>(rest);
            (
                Self(_mm512_castsi512_ps(first)),
                Self(_mm512_castsi512_ps(second)),
            )
        }
    }
}
