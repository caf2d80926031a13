//! Sixteen lanes in one AVX-512 register.
#![expect(clippy::cast_possible_wrap, reason = "bit patterns of floats")]

use std::arch::x86_64::{
    __m256, __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32,
    _mm_loadu_si128, _mm_max_ps, _mm_max_ss, _mm_movehl_ps, _mm_prefetch, _mm_shuffle_ps,
    _mm256_add_ps, _mm256_castpd_ps, _mm256_castps256_ps128, _mm256_extractf128_ps,
    _mm256_loadu_si256, _mm256_max_ps, _mm512_abs_epi8, _mm512_add_epi16, _mm512_add_epi32,
    _mm512_add_ps, _mm512_and_si512, _mm512_castps_pd, _mm512_castps_si512,
    _mm512_castps512_ps256, _mm512_castsi512_ps, _mm512_cmpeq_epi8_mask, _mm512_cvtepu8_epi32,
    _mm512_cvtph_ps, _mm512_div_ps, _mm512_dpbf16_ps, _mm512_extractf64x4_pd, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_blend_epi16, _mm512_mask_mov_epi8,
    _mm512_mask_or_epi32, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps, _mm512_or_si512,
    _mm512_permutex2var_epi8, _mm512_permutex2var_epi16, _mm512_permutexvar_epi16,
    _mm512_set1_epi8, _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi16,
    _mm512_slli_epi32, _mm512_srai_epi32, _mm512_srli_epi16, _mm512_srli_epi32,
    _mm512_storeu_ps, _mm512_storeu_si512, _mm512_sub_epi16, _mm512_sub_epi32, _mm512_sub_ps,
    _mm512_ternarylogic_epi32, _mm512_test_epi16_mask, _mm512_testn_epi32_mask,
};
use std::marker::PhantomData;

use super::{Lanes, ROUND, Tiles};
use crate::codes;

/// All lanes; `P` is what becomes of pairs of bfloat16.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx512<P>(__m512, PhantomData<P>);

/// Pairs stay packed and are multiplied by one instruction (BF16). Codes are looked up bytewise (VBMI).
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Packed;

/// Pairs are widened, weights once for all rows that meet them and inputs when they are rounded: a product is two fused
/// multiply-adds and nothing else.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Widened;

/// What becomes of pairs of bfloat16.
///
/// # Safety
/// As for [`Lanes`].
pub(in crate::cpu) trait PairForm: Copy {
    /// See [`Lanes::PAIR_WORDS`].
    const WORDS: usize;
    /// A pair per lane.
    type Pairs: Copy;

    /// From packed pairs.
    unsafe fn of(packed: __m512i) -> Self::Pairs;
    /// Packed again.
    unsafe fn pack(pairs: Self::Pairs) -> __m512i;
    /// See [`Lanes::splat_pair`].
    unsafe fn splat(from: *const u32) -> Self::Pairs;
    /// See [`Lanes::dot`].
    unsafe fn dot(acc: __m512, x: Self::Pairs, w: Self::Pairs) -> __m512;
    /// See [`Lanes::int8`].
    unsafe fn int8(codes: __m512i, pair: usize) -> Self::Pairs;
    /// See [`Lanes::e4m3`].
    unsafe fn e4m3(codes: __m512i, pair: usize) -> Self::Pairs;
}

impl PairForm for Packed {
    const WORDS: usize = 1;
    type Pairs = __m512i;

    #[inline(always)]
    unsafe fn of(packed: __m512i) -> __m512i {
        packed
    }

    #[inline(always)]
    unsafe fn pack(pairs: __m512i) -> __m512i {
        pairs
    }

    #[inline(always)]
    unsafe fn splat(from: *const u32) -> __m512i {
        // SAFETY: one word and the instructions are the caller's promise.
        unsafe { _mm512_set1_epi32(from.read_unaligned() as i32) }
    }

    #[inline(always)]
    unsafe fn dot(acc: __m512, x: __m512i, w: __m512i) -> __m512 {
        // SAFETY: the instructions are the caller's promise; a register of pairs is a register. Two fused multiply-adds, the
        // odd one first.
        unsafe {
            let (x, w) = (
                std::mem::transmute::<__m512i, __m512bh>(x),
                std::mem::transmute::<__m512i, __m512bh>(w),
            );
            _mm512_dpbf16_ps(acc, w, x)
        }
    }

    #[inline(always)]
    unsafe fn int8(codes: __m512i, pair: usize) -> __m512i {
        // SAFETY: the instructions are the caller's promise.
        unsafe {
            // The size of -128 has no place in the table: as an index it is 0, of which the lower byte fits.
            let least = _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(i8::MIN));
            let (low, high) = look_up(_mm512_abs_epi8(codes), &INT8_LOW, &INT8_HIGH);
            let size = _mm512_set1_epi8((128.0_f32.to_bits() >> 24) as i8);
            let high = _mm512_mask_mov_epi8(high, least, size);
            line(low, with_sign(high, codes), pair)
        }
    }

    #[inline(always)]
    unsafe fn e4m3(codes: __m512i, pair: usize) -> __m512i {
        // SAFETY: the instructions are the caller's promise.
        unsafe {
            let (low, high) = look_up(codes, &E4M3_LOW, &E4M3_HIGH);
            line(low, with_sign(high, codes), pair)
        }
    }
}

impl PairForm for Widened {
    const WORDS: usize = 2;
    type Pairs = (__m512, __m512);

    #[inline(always)]
    unsafe fn of(packed: __m512i) -> (__m512, __m512) {
        // SAFETY: the instructions are the caller's promise.
        unsafe { widen(packed) }
    }

    #[inline(always)]
    unsafe fn pack((even, odd): (__m512, __m512)) -> __m512i {
        // SAFETY: the instructions are the caller's promise.
        unsafe {
            let even = _mm512_srli_epi32::<16>(_mm512_castps_si512(even));
            _mm512_or_si512(even, _mm512_castps_si512(odd))
        }
    }

    #[inline(always)]
    unsafe fn splat(from: *const u32) -> (__m512, __m512) {
        let from = from.cast::<f32>();
        // SAFETY: two words and the instructions are the caller's promise.
        unsafe { (_mm512_set1_ps(*from), _mm512_set1_ps(*from.add(1))) }
    }

    #[inline(always)]
    unsafe fn dot(acc: __m512, x: (__m512, __m512), w: (__m512, __m512)) -> __m512 {
        // SAFETY: the instructions are the caller's promise.
        unsafe { _mm512_fmadd_ps(x.0, w.0, _mm512_fmadd_ps(x.1, w.1, acc)) }
    }

    #[inline(always)]
    unsafe fn int8(codes: __m512i, pair: usize) -> (__m512, __m512) {
        // SAFETY: the instructions are the caller's promise.
        unsafe {
            let (even, odd) = (codes, _mm512_srli_epi32::<16>(codes));
            if pair == 0 {
                (
                    signed::<0x4b00_0080, 0xff>(even),
                    signed::<0x4b00_0080, 0xff>(odd),
                )
            } else {
                (
                    signed::<0x4700_8000, 0xff00>(even),
                    signed::<0x4700_8000, 0xff00>(odd),
                )
            }
        }
    }

    #[inline(always)]
    unsafe fn e4m3(codes: __m512i, pair: usize) -> (__m512, __m512) {
        // SAFETY: the instructions are the caller's promise; the table has four vectors.
        unsafe {
            let (codes, signs) = if pair == 0 {
                (codes, _mm512_slli_epi16::<8>(codes))
            } else {
                (_mm512_srli_epi16::<8>(codes), codes)
            };
            let table = E4M3.as_ptr().cast::<__m512i>();
            let [a, b, c, d] = [
                _mm512_loadu_si512(table),
                _mm512_loadu_si512(table.add(1)),
                _mm512_loadu_si512(table.add(2)),
                _mm512_loadu_si512(table.add(3)),
            ];
            let low = _mm512_permutex2var_epi16(a, codes, b);
            let high = _mm512_permutex2var_epi16(c, codes, d);
            let upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
            let sizes = _mm512_mask_blend_epi16(upper, low, high);
            // sizes | (signs & sign bit)
            let sign = _mm512_set1_epi16(i16::MIN);
            widen(_mm512_ternarylogic_epi32::<0xf8>(sizes, signs, sign))
        }
    }
}

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

/// bfloat16 of the sizes of e4m3; of e2m1, twice; of the integers from -16 on.
static E4M3: [u16; 128] = {
    let mut bits = [0; 128];
    let mut code = 0;
    while code < 128 {
        bits[code] = (codes::e4m3(code as u8).to_bits() >> 16) as u16;
        code += 1;
    }
    bits
};
static E2M1: [u16; 32] = {
    let mut bits = [0; 32];
    let mut code = 0;
    while code < 32 {
        bits[code] = (codes::e2m1(code as u8 & 15).to_bits() >> 16) as u16;
        code += 1;
    }
    bits
};
static SMALL: [u16; 32] = {
    let mut bits = [0; 32];
    let mut i = 0;
    while i < 32 {
        bits[i] = ((i as f32 - 16.0).to_bits() >> 16) as u16;
        i += 1;
    }
    bits
};

/// The lower (`SHIFT` 16) or upper (24) bytes of the bfloat16 of sizes 0 to 127 of a format.
const fn bytes_of<const SHIFT: u32>(e4m3: bool) -> [u8; 128] {
    let mut bytes = [0; 128];
    let mut code = 0;
    while code < 128 {
        let size = if e4m3 {
            codes::e4m3(code as u8)
        } else {
            code as f32
        };
        bytes[code] = (size.to_bits() >> SHIFT) as u8;
        code += 1;
    }
    bytes
}
static INT8_LOW: [u8; 128] = bytes_of::<16>(false);
static INT8_HIGH: [u8; 128] = bytes_of::<24>(false);
static E4M3_LOW: [u8; 128] = bytes_of::<16>(true);
static E4M3_HIGH: [u8; 128] = bytes_of::<24>(true);

/// What two tables have at the lower seven bits of each byte.
#[inline(always)]
unsafe fn look_up(codes: __m512i, low: &[u8; 128], high: &[u8; 128]) -> (__m512i, __m512i) {
    // SAFETY: the instructions (VBMI) are the caller's promise; a table has two vectors.
    unsafe {
        let (low, high) = (
            low.as_ptr().cast::<__m512i>(),
            high.as_ptr().cast::<__m512i>(),
        );
        (
            _mm512_permutex2var_epi8(
                _mm512_loadu_si512(low),
                codes,
                _mm512_loadu_si512(low.add(1)),
            ),
            _mm512_permutex2var_epi8(
                _mm512_loadu_si512(high),
                codes,
                _mm512_loadu_si512(high.add(1)),
            ),
        )
    }
}

/// `sizes` with the sign bits of the bytes of `codes`.
#[inline(always)]
unsafe fn with_sign(sizes: __m512i, codes: __m512i) -> __m512i {
    // SAFETY: the instructions are the caller's promise.
    unsafe {
        // sizes | (codes & sign bit)
        _mm512_ternarylogic_epi32::<0xf8>(sizes, codes, _mm512_set1_epi8(i8::MIN))
    }
}

/// The lower or the upper codes of all words, whose lower and upper bytes are known.
#[inline(always)]
unsafe fn line(low: __m512i, high: __m512i, pair: usize) -> __m512i {
    // SAFETY: the instructions are the caller's promise.
    unsafe {
        let lower = _mm512_set1_epi16(0xff);
        // Of each word, where `lower` is set the first, else the second.
        if pair == 0 {
            _mm512_ternarylogic_epi32::<0xca>(lower, low, _mm512_slli_epi16::<8>(high))
        } else {
            _mm512_ternarylogic_epi32::<0xca>(lower, _mm512_srli_epi16::<8>(low), high)
        }
    }
}

/// Words shifted down by `pair` codes of four bits.
#[inline(always)]
unsafe fn shift(words: __m512i, pair: usize) -> __m512i {
    // SAFETY: the instructions are the caller's promise.
    unsafe {
        match pair {
            0 => words,
            1 => _mm512_srli_epi16::<4>(words),
            2 => _mm512_srli_epi16::<8>(words),
            _ => _mm512_srli_epi16::<12>(words),
        }
    }
}

/// The signed byte of each lane that `MASK` selects, as float32. `MAGIC` is a float32 whose mantissa has the unit at
/// the byte's lowest bit, plus 128: the exclusive or of a byte and 128 is the byte plus 128.
#[inline(always)]
unsafe fn signed<const MAGIC: i32, const MASK: i32>(lanes: __m512i) -> __m512 {
    // SAFETY: the instructions are the caller's promise.
    unsafe {
        let magic = _mm512_set1_epi32(MAGIC);
        // (lanes & mask) ^ magic
        let sum = _mm512_ternarylogic_epi32::<0x78>(magic, lanes, _mm512_set1_epi32(MASK));
        _mm512_sub_ps(_mm512_castsi512_ps(sum), _mm512_castsi512_ps(magic))
    }
}

/// Lanes 0 to 7.
#[inline(always)]
unsafe fn low_half(x: __m512) -> __m256 {
    // SAFETY: the instructions are the caller's promise.
    unsafe { _mm512_castps512_ps256(x) }
}

/// Lanes 8 to 15.
#[inline(always)]
unsafe fn high_half(x: __m512) -> __m256 {
    // SAFETY: the instructions are the caller's promise.
    unsafe { _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x))) }
}

macro_rules! lane_by_lane {
    ($($name:ident = $intrinsic:ident;)*) => {$(
        #[inline(always)]
        unsafe fn $name(self, b: Self) -> Self {
            // SAFETY: the instructions are the caller's promise.
            unsafe { Self::of($intrinsic(self.0, b.0)) }
        }
    )*};
}

impl<P> Avx512<P> {
    #[inline(always)]
    const fn of(lanes: __m512) -> Self {
        Self(lanes, PhantomData)
    }
}

impl<P: PairForm> Lanes for Avx512<P> {
    const TILES: Tiles = Tiles::Wide;
    const PAIR_WORDS: usize = P::WORDS;
    type Pairs = P::Pairs;
    /// 16 less the zero point, for both numbers of a pair.
    type Zeros = __m512i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the instructions are the caller's promise.
        unsafe { Self::of(_mm512_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 16 elements and the instructions are the caller's promise.
        unsafe { Self::of(_mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 elements and the instructions are the caller's promise.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u8) -> P::Pairs {
        // SAFETY: 64 bytes and the instructions are the caller's promise.
        unsafe { P::of(_mm512_loadu_si512(from.cast::<__m512i>())) }
    }

    #[inline(always)]
    unsafe fn store_pairs(pairs: P::Pairs, to: *mut u8) {
        // SAFETY: 64 bytes and the instructions are the caller's promise.
        unsafe { _mm512_storeu_si512(to.cast::<__m512i>(), P::pack(pairs)) }
    }

    #[inline(always)]
    unsafe fn splat_pair(from: *const u32) -> P::Pairs {
        // SAFETY: the caller's promise.
        unsafe { P::splat(from) }
    }

    #[inline(always)]
    unsafe fn dot(self, x: P::Pairs, w: P::Pairs) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::of(P::dot(self.0, x, w)) }
    }

    #[inline(always)]
    unsafe fn load_halves(from: *const u8) -> Self {
        // SAFETY: 32 bytes and the instructions are the caller's promise.
        unsafe { Self::of(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_e8m0(from: *const u8) -> Self {
        // SAFETY: 16 bytes and the instructions are the caller's promise.
        unsafe {
            let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            // Code 0 is half of what its bits alone are, code 255 no number: both want one bit more.
            let next = _mm512_add_epi32(codes, _mm512_set1_epi32(1));
            let ends = _mm512_testn_epi32_mask(next, _mm512_set1_epi32(0xfe));
            let exponents = _mm512_slli_epi32::<23>(codes);
            let more = _mm512_set1_epi32(1 << 22);
            let bits = _mm512_mask_or_epi32(exponents, ends, exponents, more);
            Self::of(_mm512_castsi512_ps(bits))
        }
    }

    #[inline(always)]
    unsafe fn load_zeros(from: *const u8) -> __m512i {
        // SAFETY: 16 bytes and the instructions are the caller's promise.
        unsafe {
            let zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            let both = _mm512_or_si512(zeros, _mm512_slli_epi32::<16>(zeros));
            _mm512_sub_epi16(_mm512_set1_epi16(16), both)
        }
    }

    #[inline(always)]
    unsafe fn int8(unit: *const u8, pair: usize) -> P::Pairs {
        // SAFETY: 64 bytes and the instructions are the caller's promise.
        unsafe { P::int8(_mm512_loadu_si512(unit.cast::<__m512i>()), pair) }
    }

    #[inline(always)]
    unsafe fn e4m3(unit: *const u8, pair: usize) -> P::Pairs {
        // SAFETY: 64 bytes and the instructions are the caller's promise.
        unsafe { P::e4m3(_mm512_loadu_si512(unit.cast::<__m512i>()), pair) }
    }

    #[inline(always)]
    unsafe fn e2m1(unit: *const u8, pair: usize) -> P::Pairs {
        // SAFETY: 64 bytes and the instructions are the caller's promise; the table is one vector.
        unsafe {
            let codes = shift(_mm512_loadu_si512(unit.cast::<__m512i>()), pair);
            // Of an index the lower five bits count, of which the last is of no code: the table repeats.
            let table = _mm512_loadu_si512(E2M1.as_ptr().cast::<__m512i>());
            P::of(_mm512_permutexvar_epi16(codes, table))
        }
    }

    #[inline(always)]
    unsafe fn int4(unit: *const u8, pair: usize, zeros: __m512i) -> P::Pairs {
        // SAFETY: 64 bytes and the instructions are the caller's promise; the table is one vector.
        unsafe {
            let codes = shift(_mm512_loadu_si512(unit.cast::<__m512i>()), pair);
            let codes = _mm512_and_si512(codes, _mm512_set1_epi16(15));
            let index = _mm512_add_epi16(codes, zeros);
            let table = _mm512_loadu_si512(SMALL.as_ptr().cast::<__m512i>());
            P::of(_mm512_permutexvar_epi16(index, table))
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
        unsafe { Self::of(_mm512_fmadd_ps(self.0, b.0, c.0)) }
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
    unsafe fn sum(self) -> f32 {
        // SAFETY: the instructions are the caller's promise.
        unsafe {
            let eight = _mm256_add_ps(low_half(self.0), high_half(self.0));
            let four = _mm_add_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    unsafe fn greatest(self) -> f32 {
        // SAFETY: the instructions are the caller's promise. Of two that do not compare, `max` gives its second operand:
        // the lower lane, as the tree of the definition does.
        unsafe {
            let eight = _mm256_max_ps(high_half(self.0), low_half(self.0));
            let four = _mm_max_ps(
                _mm256_extractf128_ps::<1>(eight),
                _mm256_castps256_ps128(eight),
            );
            let two = _mm_max_ps(_mm_movehl_ps(four, four), four);
            _mm_cvtss_f32(_mm_max_ss(_mm_shuffle_ps::<1>(two, two), two))
        }
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
                Self::of(_mm512_castsi512_ps(first)),
                Self::of(_mm512_castsi512_ps(second)),
            )
        }
    }
}
