//! The tile unit of the processor, by inline assembly: stable Rust has no intrinsics for it.
//!
//! Tiles keep their contents from one block of assembly to the next. Nothing comes between: the compiler uses tiles
//! for nothing but intrinsics that are not there, calls between functions keep none, and the system saves a
//! thread's tiles when it switches. Assembly that is not `pure` is neither dropped nor moved across other such
//! assembly, so the order is that of the calls.

use std::arch::asm;
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

use super::unit::{Config, TileUnit};

/// The tiles of the thread that made it.
#[derive(Debug)]
pub(in crate::cpu) struct Hardware {
    /// Tiles belong to a thread: this type goes to no other.
    _of_this_thread: std::marker::PhantomData<*mut ()>,
}

impl TileUnit for Hardware {
    #[inline(always)]
    unsafe fn new() -> Self {
        Self {
            _of_this_thread: std::marker::PhantomData,
        }
    }

    #[inline(always)]
    unsafe fn configure(&mut self, config: &Config) {
        // SAFETY: reads 64 bytes, which `Config` has; the processor has AMX by the promise of `new`.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                config = in(reg) std::ptr::from_ref(config),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags, readonly),
            );
        }
    }

    #[inline(always)]
    unsafe fn release(&mut self) {
        // SAFETY: as in `configure`.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags, nomem),
            );
        }
    }

    #[inline(always)]
    unsafe fn zero<const T: u8>(&mut self) {
        // SAFETY: the tile is configured by the caller's promise.
        unsafe {
            asm!("tilezero tmm{t}", t = const T, options(nostack, preserves_flags, nomem));
        }
    }

    #[inline(always)]
    unsafe fn load<const T: u8>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: the tile is configured and its rows can be read, by the caller's promise.
        unsafe {
            asm!(
                "tileloadd tmm{t}, [{from} + {stride}]",
                t = const T, from = in(reg) from, stride = in(reg) stride,
                options(nostack, preserves_flags, readonly),
            );
        }
    }

    #[inline(always)]
    unsafe fn store<const T: u8>(&mut self, to: *mut u8, stride: usize) {
        // SAFETY: the tile is configured and its rows can be written, by the caller's promise.
        unsafe {
            asm!(
                "tilestored [{to} + {stride}], tmm{t}",
                t = const T, to = in(reg) to, stride = in(reg) stride,
                options(nostack, preserves_flags),
            );
        }
    }

    #[inline(always)]
    unsafe fn multiply<const C: u8, const A: u8, const B: u8>(&mut self) {
        // SAFETY: the tiles are configured and fit each other, by the caller's promise.
        unsafe {
            asm!(
                "tdpbf16ps tmm{c}, tmm{a}, tmm{b}",
                c = const C, a = const A, b = const B,
                options(nostack, preserves_flags, nomem),
            );
        }
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: a prefetch of an invalid address has no effect.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}
