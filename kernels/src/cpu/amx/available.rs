//! Whether tiles can be used: the processor has them, the system saves them, and this process may use them.

use std::arch::x86_64::{__cpuid, __cpuid_count, __get_cpuid_max, _xgetbv};
use std::sync::OnceLock;

/// Bits of `CPUID.(7, 0).EDX`: bfloat16 products of tiles, and tiles.
const AMX_BF16: u32 = 1 << 22;
const AMX_TILE: u32 = 1 << 24;
/// Bit of `CPUID.1.ECX`: the system has enabled `XGETBV`.
const OSXSAVE: u32 = 1 << 27;
/// State components of tiles: their configuration, and their contents.
const TILE_CONFIG: u64 = 1 << 17;
const TILE_DATA: u32 = 18;

/// Asked once: the answer does not change, and the permission holds for every thread of the process.
pub(in crate::cpu) fn usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| has_instructions() && is_enabled() && is_permitted())
}

fn has_instructions() -> bool {
    let both = AMX_BF16 | AMX_TILE;
    __get_cpuid_max(0).0 >= 7 && __cpuid_count(7, 0).edx & both == both
}

/// The system saves tiles when it switches threads.
fn is_enabled() -> bool {
    #[target_feature(enable = "xsave")]
    fn enabled_states() -> u64 {
        // SAFETY: the caller has seen OSXSAVE.
        unsafe { _xgetbv(0) }
    }
    let both = TILE_CONFIG | 1 << TILE_DATA;
    // SAFETY: OSXSAVE says that the instruction is there.
    __cpuid(1).ecx & OSXSAVE != 0 && unsafe { enabled_states() } & both == both
}

/// Linux gives the memory for tiles only to a process that has asked (`Documentation/arch/x86/xstate.rst`).
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    // SAFETY: the call takes two numbers and touches no memory of this process.
    let refused =
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) };
    refused == 0
}

/// How other systems give them is not known here.
#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}
