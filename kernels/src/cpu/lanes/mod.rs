//! Sixteen float32 lanes: the one vocabulary in which every kernel is written.
//!
//! A kernel is a generic function over [`Lanes`], compiled once per instruction path. Each lane operation
//! is a single IEEE 754 operation with the same rounding everywhere, so that paths cannot differ in bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::{Avx512, Packed, Widened};
#[cfg(target_arch = "aarch64")]
pub(super) use neon::Neon;
pub(super) use portable::Portable;

/// Lanes of a vector.
pub(super) const WIDTH: usize = 16;

/// Adding and subtracting this rounds a small float32 to an integer (to nearest, ties to even), and the
/// sum has that integer in its low bits.
pub(super) const ROUND: f32 = 12_582_912.0;

/// How many vectors of sixteen lanes fit the registers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tiles {
    /// None: tiles bring nothing.
    One,
    /// Eight.
    #[cfg_attr(
        not(any(target_arch = "x86_64", target_arch = "aarch64")),
        expect(dead_code, reason = "the portable path has no tiles")
    )]
    Narrow,
    /// Thirty-two.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "only AVX-512 has so many")
    )]
    Wide,
}

/// A vector of sixteen float32.
///
/// # Safety
/// Every function must only be called on a processor with the instructions of the implementing path;
/// pointers must be valid for the stated number of elements, of any alignment.
pub(super) trait Lanes: Copy {
    /// How large tiles of sums may be.
    const TILES: Tiles;
    /// Words of 32 bits that a pair of prepared bfloat16 inputs takes: 1 packed, 2 widened.
    const PAIR_WORDS: usize;
    /// A pair of bfloat16 per lane: of an even and the following odd input.
    type Pairs: Copy;
    /// A small integer per lane.
    type Zeros: Copy;

    /// `x` in all lanes.
    unsafe fn splat(x: f32) -> Self;
    /// Sixteen values.
    unsafe fn load(from: *const f32) -> Self;
    /// Sixteen values.
    unsafe fn store(self, to: *mut f32);
    /// 64 bytes of bfloat16 pairs.
    unsafe fn load_pairs(from: *const u8) -> Self::Pairs;
    /// The inverse of [`Lanes::load_pairs`].
    unsafe fn store_pairs(pairs: Self::Pairs, to: *mut u8);
    /// One prepared pair, of `PAIR_WORDS` words, in all lanes.
    unsafe fn splat_pair(from: *const u32) -> Self::Pairs;
    /// `even * even + (odd * odd + self)`, rounded after each of the two.
    unsafe fn dot(self, x: Self::Pairs, w: Self::Pairs) -> Self;
    /// Sixteen float16, widened.
    unsafe fn load_halves(from: *const u8) -> Self;
    /// Sixteen powers of two as e8m0 has them.
    unsafe fn load_e8m0(from: *const u8) -> Self;
    /// Sixteen zero points.
    unsafe fn load_zeros(from: *const u8) -> Self::Zeros;
    /// Pair `pair` (below 2) of a unit of signed bytes: see `crate::matrix::coded`.
    unsafe fn int8(unit: *const u8, pair: usize) -> Self::Pairs;
    /// Pair `pair` (below 2) of a unit of e4m3.
    unsafe fn e4m3(unit: *const u8, pair: usize) -> Self::Pairs;
    /// Pair `pair` (below 4) of a unit of e2m1.
    unsafe fn e2m1(unit: *const u8, pair: usize) -> Self::Pairs;
    /// Pair `pair` (below 4) of a unit of 4-bit integers, less the zero points of their outputs.
    unsafe fn int4(unit: *const u8, pair: usize, zeros: Self::Zeros) -> Self::Pairs;
    /// Asks for the cache line at an address that need not be valid.
    unsafe fn prefetch(from: *const u8);
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// Sum.
    unsafe fn add(self, b: Self) -> Self;
    /// Difference.
    unsafe fn sub(self, b: Self) -> Self;
    /// Product.
    unsafe fn mul(self, b: Self) -> Self;
    /// Quotient.
    unsafe fn div(self, b: Self) -> Self;
    /// `if self > b { self } else { b }`.
    unsafe fn max(self, b: Self) -> Self;
    /// `if self < b { self } else { b }`.
    unsafe fn min(self, b: Self) -> Self;
    /// For lanes `n + ROUND` with integer `n` in `-252..=254`: two powers of two whose product is `2^n`.
    unsafe fn powers_of_two(self) -> (Self, Self);

    /// The lanes as an array.
    #[inline(always)]
    unsafe fn array(self) -> [f32; WIDTH] {
        let mut lanes = [0.0; WIDTH];
        // SAFETY: the array has 16 elements; the instructions are the caller's promise.
        unsafe { self.store(lanes.as_mut_ptr()) }
        lanes
    }

    /// The first `count` (at most 16) values, the other lanes `fill`.
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize, fill: f32) -> Self {
        if count == WIDTH {
            // SAFETY: the caller's promise.
            return unsafe { Self::load(from) };
        }
        let mut lanes = [fill; WIDTH];
        // SAFETY: `from` has `count` elements by the caller's promise, the array has 16.
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
            Self::load(lanes.as_ptr())
        }
    }

    /// Stores the first `count` (at most 16) lanes.
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        if count == WIDTH {
            // SAFETY: the caller's promise.
            return unsafe { self.store(to) };
        }
        // SAFETY: `to` has room for `count` elements by the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(self.array().as_ptr(), to, count) }
    }

    /// Sum of all lanes, as a tree: lane `i` and `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller's promise.
        let mut lanes = unsafe { self.array() };
        let mut half = WIDTH / 2;
        while half > 0 {
            let mut i = 0;
            while i < half {
                lanes[i] += lanes[i + half];
                i += 1;
            }
            half /= 2;
        }
        lanes[0]
    }

    /// Greatest of all lanes, as a tree.
    #[inline(always)]
    unsafe fn greatest(self) -> f32 {
        // SAFETY: the caller's promise.
        let mut lanes = unsafe { self.array() };
        let mut half = WIDTH / 2;
        while half > 0 {
            let mut i = 0;
            while i < half {
                if lanes[i + half] > lanes[i] {
                    lanes[i] = lanes[i + half];
                }
                i += 1;
            }
            half /= 2;
        }
        lanes[0]
    }
}

/// Narrows and stores a pair of every lane that is widened bfloat16.
///
/// # Safety
/// `to` has 64 bytes; the instructions are the caller's promise.
#[inline(always)]
unsafe fn store_halves<L: Lanes>(even: L, odd: L, to: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe {
        let (even, odd) = (even.array(), odd.array());
        for lane in 0..WIDTH {
            let pair = even[lane].to_bits() >> 16 | odd[lane].to_bits() & 0xffff_0000;
            to.cast::<[u8; 4]>().add(lane).write(pair.to_le_bytes());
        }
    }
}

/// Defines `fn $name(isa, …)` that runs the generic kernel `$kernel::<L>(…)` compiled for the path of `isa`.
macro_rules! on_path {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $out:ty)? = $kernel:ident) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// What the kernel asks of its pointers.
        $vis unsafe fn $name(isa: $crate::cpu::detect::Isa, $($arg: $ty),*) $(-> $out)? {
            use $crate::cpu::lanes;

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $ty),*) $(-> $out)? {
                // SAFETY: the instructions are enabled here, the pointers are the caller's promise.
                unsafe { $kernel::<lanes::Avx2>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
            unsafe fn avx512($($arg: $ty),*) $(-> $out)? {
                // SAFETY: as above.
                unsafe { $kernel::<lanes::Avx512<lanes::Widened>>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512bf16,avx512vbmi,avx512f,avx512bw,avx2,fma")]
            unsafe fn avx512bf16($($arg: $ty),*) $(-> $out)? {
                // SAFETY: as above.
                unsafe { $kernel::<lanes::Avx512<lanes::Packed>>($($arg),*) }
            }

            match isa.lanes() {
                // SAFETY: an `Isa` exists only for a path that this processor has.
                #[cfg(target_arch = "x86_64")]
                $crate::Path::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Path::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Path::Avx512Bf16 => unsafe { avx512bf16($($arg),*) },
                // SAFETY: NEON is part of every aarch64.
                #[cfg(target_arch = "aarch64")]
                $crate::Path::Neon => unsafe { $kernel::<lanes::Neon>($($arg),*) },
                // SAFETY: plain Rust; the pointers are the caller's promise.
                _ => unsafe { $kernel::<lanes::Portable>($($arg),*) },
            }
        }
    };
}
pub(super) use on_path;
