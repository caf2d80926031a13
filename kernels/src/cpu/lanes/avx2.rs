//! Sixteen lanes in two AVX2 registers.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "bit patterns of floats, and places of bits"
)]

use std::arch::x86_64::{
    __m256, __m256i, _MM_HINT_T0, _mm_loadl_epi64, _mm_loadu_si128, _mm_prefetch,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_castps_si256,
    _mm256_castsi256_ps, _mm256_cmpeq_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi32,
    _mm256_cvtph_ps, _mm256_div_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_or_ps, _mm256_or_si256,
    _mm256_permutevar8x32_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_ps,
    _mm256_setzero_si256, _mm256_slli_epi32, _mm256_sllv_epi32, _mm256_srai_epi32,
    _mm256_srlv_epi32, _mm256_storeu_ps, _mm256_sub_epi32, _mm256_sub_ps,
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

/// Shifts each lane to the left, or for a negative count to the right.
#[inline(always)]
unsafe fn shift(lanes: __m256i, left: i32) -> __m256i {
    // SAFETY: the instructions are the caller's promise.
    unsafe {
        if left >= 0 {
            _mm256_sllv_epi32(lanes, _mm256_set1_epi32(left))
        } else {
            _mm256_srlv_epi32(lanes, _mm256_set1_epi32(-left))
        }
    }
}

/// The even and the odd numbers of a unit, whose lanes 0–7 and 8–15 are one register each: an expression of one
/// register, its index, and the place of the lowest bit of its code. A closure would be a function of its own,
/// without the instructions.
macro_rules! decode {
    ($unit:expr, $first:expr, |$half:pat_param, $lanes:ident, $bit:ident| $number:expr) => {{
        let low = _mm256_loadu_si256($unit.cast());
        let high = _mm256_loadu_si256($unit.add(32).cast());
        macro_rules! number {
            ($index:expr, $register:expr, $place:expr) => {{
                let ($half, $lanes, $bit) = ($index, $register, $place);
                $number
            }};
        }
        let bit = $first as i32;
        (
            Self(number!(0, low, bit), number!(1, high, bit)),
            Self(number!(0, low, bit + 16), number!(1, high, bit + 16)),
        )
    }};
}

/// The sign of codes whose highest bit is `bit`, at the place of a float32's.
#[inline(always)]
unsafe fn sign(lanes: __m256i, bit: i32) -> __m256i {
    // SAFETY: the instructions are the caller's promise.
    unsafe { _mm256_and_si256(shift(lanes, 31 - bit), _mm256_set1_epi32(i32::MIN)) }
}

/// Eight bytes, widened.
#[inline(always)]
unsafe fn bytes(from: *const u8) -> __m256i {
    // SAFETY: 8 bytes and the instructions are the caller's promise.
    unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())) }
}

#[inline(always)]
unsafe fn powers_of_e8m0(from: *const u8) -> __m256 {
    // SAFETY: 8 bytes and the instructions are the caller's promise.
    unsafe {
        let codes = bytes(from);
        // Code 0 is half of what its bits alone are, code 255 no number: both want one bit more.
        let first = _mm256_cmpeq_epi32(codes, _mm256_setzero_si256());
        let last = _mm256_cmpeq_epi32(codes, _mm256_set1_epi32(255));
        let ends = _mm256_or_si256(first, last);
        let more = _mm256_and_si256(ends, _mm256_set1_epi32(1 << 22));
        _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32::<23>(codes), more))
    }
}

impl Lanes for Avx2 {
    const TILES: Tiles = Tiles::Narrow;
    const PAIR_WORDS: usize = 2;
    /// The even ones and the odd ones, widened.
    type Pairs = (Self, Self);
    type Zeros = (__m256i, __m256i);

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
        // SAFETY: 32 bytes and the instructions are the caller's promise.
        unsafe {
            Self(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast())),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_e8m0(from: *const u8) -> Self {
        // SAFETY: 16 bytes and the instructions are the caller's promise.
        unsafe { Self(powers_of_e8m0(from), powers_of_e8m0(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn load_zeros(from: *const u8) -> (__m256i, __m256i) {
        // SAFETY: 16 bytes and the instructions are the caller's promise.
        unsafe { (bytes(from), bytes(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn int8(unit: *const u8, pair: usize) -> (Self, Self) {
        // SAFETY: 64 bytes and the instructions are the caller's promise.
        unsafe {
            decode!(unit, 8 * pair, |_, lanes, bit| {
                let top = shift(lanes, 24 - bit);
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(top))
            })
        }
    }

    #[inline(always)]
    unsafe fn e4m3(unit: *const u8, pair: usize) -> (Self, Self) {
        // SAFETY: 64 bytes and the instructions are the caller's promise.
        unsafe {
            decode!(unit, 8 * pair, |_, lanes, bit| {
                // As a float32 the seven lower bits are 2¹²⁰ times too small, also where they are subnormal.
                let all = _mm256_set1_epi32(0x7f << 20);
                let bits = _mm256_and_si256(shift(lanes, 20 - bit), all);
                let size = _mm256_mul_ps(
                    _mm256_castsi256_ps(bits),
                    _mm256_set1_ps(f32::from_bits(247 << 23)),
                );
                // Where all are set, an or with all is no number.
                let none = _mm256_or_si256(_mm256_cmpeq_epi32(bits, all), sign(lanes, bit + 7));
                _mm256_or_ps(size, _mm256_castsi256_ps(none))
            })
        }
    }

    #[inline(always)]
    unsafe fn e2m1(unit: *const u8, pair: usize) -> (Self, Self) {
        // SAFETY: 64 bytes and the instructions are the caller's promise.
        unsafe {
            let sizes = _mm256_setr_ps(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0);
            decode!(unit, 4 * pair, |_, lanes, bit| {
                // Of an index the lower three bits count.
                let size = _mm256_permutevar8x32_ps(sizes, shift(lanes, -bit));
                _mm256_or_ps(size, _mm256_castsi256_ps(sign(lanes, bit + 3)))
            })
        }
    }

    #[inline(always)]
    unsafe fn int4(unit: *const u8, pair: usize, zeros: (__m256i, __m256i)) -> (Self, Self) {
        // SAFETY: 64 bytes and the instructions are the caller's promise.
        unsafe {
            decode!(unit, 4 * pair, |half, lanes, bit| {
                let code = _mm256_and_si256(shift(lanes, -bit), _mm256_set1_epi32(15));
                let zero = if half == 0 { zeros.0 } else { zeros.1 };
                _mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero))
            })
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
