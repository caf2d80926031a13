//! Sixteen lanes in two AVX2 registers.
#![expect(clippy::cast_possible_wrap, reason = "bit patterns of floats")]

use std::arch::x86_64::{
    __m256, __m256i, _MM_HINT_T0, _mm_prefetch, _mm256_add_epi32, _mm256_add_ps,
    _mm256_and_si256, _mm256_castps_si256, _mm256_castsi256_ps, _mm256_div_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_srai_epi32, _mm256_storeu_ps,
    _mm256_sub_epi32, _mm256_sub_ps,
};

use super::{Lanes, ROUND, Tiles};

/// Lanes 0–7 and 8–15.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx2(__m256, __m256);

macro_rules! lane_by_lane {
    ($($name:ident = $intrinsic:ident;)*) => {$(
        #[inline(always)]
        unsafe fn $name(self, b: Self) -> Self {
            // SAFETY: the instructions are the caller's promise.
            unsafe { Self($intrinsic(self.0, b.0), $intrinsic(self.1, b.1)) }
        }
    )*};
}

#[inline(always)]
unsafe fn pair(from: *const u8) -> (__m256, __m256) {
    // SAFETY: 32 bytes and the instructions are the caller's promise.
    unsafe {
        let pairs = _mm256_loadu_si256(from.cast::<__m256i>());
        let upper = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
        (
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)),
            _mm256_castsi256_ps(upper),
        )
    }
}

#[inline(always)]
unsafe fn powers(t: __m256) -> (__m256, __m256) {
    // SAFETY: the instructions are the caller's promise.
    unsafe {
        let n = _mm256_sub_epi32(
            _mm256_castps_si256(t),
            _mm256_set1_epi32(ROUND.to_bits() as i32),
        );
        let (half, bias) = (_mm256_srai_epi32::<1>(n), _mm256_set1_epi32(127));
        let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
        let rest = _mm256_add_epi32(_mm256_sub_epi32(n, half), bias);
        (
            _mm256_castsi256_ps(first),
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(rest)),
        )
    }
}

impl Lanes for Avx2 {
    const TILES: Tiles = Tiles::Narrow;
    const PAIR_WORDS: usize = 2;
    /// The even ones and the odd ones, widened.
    type Pairs = (Self, Self);

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the instructions are the caller's promise.
        unsafe { Self(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 16 elements and the instructions are the caller's promise.
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 elements and the instructions are the caller's promise.
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u8) -> (Self, Self) {
        // SAFETY: 64 bytes and the instructions are the caller's promise.
        unsafe {
            let ((even, odd), (even_high, odd_high)) = (pair(from), pair(from.add(32)));
            (Self(even, even_high), Self(odd, odd_high))
        }
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
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: a prefetch of an invalid address has no effect.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: the instructions are the caller's promise.
        unsafe {
            Self(
                _mm256_fmadd_ps(self.0, b.0, c.0),
                _mm256_fmadd_ps(self.1, b.1, c.1),
            )
        }
    }

    lane_by_lane! {
        add = _mm256_add_ps;
        sub = _mm256_sub_ps;
        mul = _mm256_mul_ps;
        div = _mm256_div_ps;
        max = _mm256_max_ps;
        min = _mm256_min_ps;
    }

    #[inline(always)]
    unsafe fn powers_of_two(self) -> (Self, Self) {
        // SAFETY: the instructions are the caller's promise.
        unsafe {
            let ((first, second), (first_high, second_high)) = (powers(self.0), powers(self.1));
            (Self(first, first_high), Self(second, second_high))
        }
    }
}
