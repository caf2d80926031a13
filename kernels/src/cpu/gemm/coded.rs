//! Products with weights that are codes with scales. Codes become bfloat16 in registers, without loss; a group of
//! inputs is one chain from 0, and the total takes `fma(chain, scale, total)`, groups ascending.
#![expect(
    clippy::needless_range_loop,
    reason = "indices of tiles with constant bounds unroll"
)]

use super::tile::{AHEAD, Panels, Results};
use crate::cpu::lanes::{Lanes, Tiles, WIDTH};
use crate::dtype::Dtype;
use crate::matrix::coded::{Packing, UNIT};

/// A format of codes.
pub(super) trait Code<L: Lanes> {
    /// Pairs of inputs in a unit.
    const PAIRS: usize;
    /// What the codes of a group need beside their unit.
    type Zeros: Copy;

    /// Scales and zero points of a group's header.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; there is a header.
    unsafe fn header(from: *const u8) -> (L, Self::Zeros);

    /// One pair of a unit.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; there is a unit.
    unsafe fn pair(unit: *const u8, pair: usize, zeros: Self::Zeros) -> L::Pairs;
}

pub(super) struct Int8;
pub(super) struct Int4;
pub(super) struct Fp8;
pub(super) struct Mxfp4;

impl<L: Lanes> Code<L> for Int8 {
    const PAIRS: usize = 2;
    type Zeros = ();

    #[inline(always)]
    unsafe fn header(from: *const u8) -> (L, ()) {
        // SAFETY: the caller's promise.
        (unsafe { L::load(from.cast()) }, ())
    }

    #[inline(always)]
    unsafe fn pair(unit: *const u8, pair: usize, (): ()) -> L::Pairs {
        // SAFETY: the caller's promise.
        unsafe { L::int8(unit, pair) }
    }
}

impl<L: Lanes> Code<L> for Fp8 {
    const PAIRS: usize = 2;
    type Zeros = ();

    #[inline(always)]
    unsafe fn header(from: *const u8) -> (L, ()) {
        // SAFETY: the caller's promise.
        (unsafe { L::load(from.cast()) }, ())
    }

    #[inline(always)]
    unsafe fn pair(unit: *const u8, pair: usize, (): ()) -> L::Pairs {
        // SAFETY: the caller's promise.
        unsafe { L::e4m3(unit, pair) }
    }
}

impl<L: Lanes> Code<L> for Int4 {
    const PAIRS: usize = 4;
    type Zeros = L::Zeros;

    #[inline(always)]
    unsafe fn header(from: *const u8) -> (L, L::Zeros) {
        // SAFETY: the caller's promise.
        unsafe { (L::load(from.cast()), L::load_zeros(from.add(WIDTH * 4))) }
    }

    #[inline(always)]
    unsafe fn pair(unit: *const u8, pair: usize, zeros: L::Zeros) -> L::Pairs {
        // SAFETY: the caller's promise.
        unsafe { L::int4(unit, pair, zeros) }
    }
}

impl<L: Lanes> Code<L> for Mxfp4 {
    const PAIRS: usize = 4;
    type Zeros = ();

    #[inline(always)]
    unsafe fn header(from: *const u8) -> (L, ()) {
        // SAFETY: the caller's promise.
        (unsafe { L::load_e8m0(from) }, ())
    }

    #[inline(always)]
    unsafe fn pair(unit: *const u8, pair: usize, (): ()) -> L::Pairs {
        // SAFETY: the caller's promise.
        unsafe { L::e2m1(unit, pair) }
    }
}

/// Some rows times some panels, as [`super::tile::product`].
///
/// # Safety
/// As there; `packing` is that of `w`.
#[inline(always)]
pub(super) unsafe fn product<L: Lanes>(
    rows: &[*const u32],
    w: Panels,
    packing: &Packing,
    count: usize,
    out: &mut Results,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match w.dtype {
            Dtype::Int4 { .. } => tiles::<L, Int4>(rows, w, packing, count, out),
            Dtype::Fp8 { .. } => tiles::<L, Fp8>(rows, w, packing, count, out),
            Dtype::Mxfp4 => tiles::<L, Mxfp4>(rows, w, packing, count, out),
            Dtype::Int8 | Dtype::F32 | Dtype::Bf16 | Dtype::F16 => {
                tiles::<L, Int8>(rows, w, packing, count, out);
            }
        }
    }
}

/// The tiles of a path: a row times all panels, or more rows times as many panels as the registers hold beside the
/// constants that decoding needs.
///
/// # Safety
/// As for [`product`].
#[inline(always)]
unsafe fn tiles<L: Lanes, C: Code<L>>(
    rows: &[*const u32],
    w: Panels,
    packing: &Packing,
    count: usize,
    out: &mut Results,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (const { L::TILES }, rows.len()) {
            (Tiles::One, _) => {
                for (r, row) in rows.iter().enumerate() {
                    each::<L, C, 1, 1>(&[*row], w, packing, count, &mut out[r..]);
                }
            }
            (_, 1) => each::<L, C, 1, 4>(rows, w, packing, count, out),
            (_, 2) => each::<L, C, 2, 1>(rows, w, packing, count, out),
            (_, 3) => each::<L, C, 3, 1>(rows, w, packing, count, out),
            (_, 4) => each::<L, C, 4, 1>(rows, w, packing, count, out),
            (_, 5) => each::<L, C, 5, 1>(rows, w, packing, count, out),
            (_, _) => each::<L, C, 6, 1>(rows, w, packing, count, out),
        }
    }
}

/// `R` rows by `count` panels, `P` at a time as far as that goes.
///
/// # Safety
/// As for [`product`].
#[inline(always)]
unsafe fn each<L: Lanes, C: Code<L>, const R: usize, const P: usize>(
    rows: &[*const u32],
    w: Panels,
    packing: &Packing,
    count: usize,
    out: &mut Results,
) {
    let mut x = [std::ptr::null(); R];
    x.copy_from_slice(&rows[..R]);
    let mut at = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while at + P <= count {
            multiply::<L, C, R, P>(&x, w.skip(at), packing, at, out);
            at += P;
        }
        while at < count {
            multiply::<L, C, R, 1>(&x, w.skip(at), packing, at, out);
            at += 1;
        }
    }
}

/// `out[r][16 (at + p) + lane]` is the total over all groups.
///
/// # Safety
/// As for [`product`]; there are `P` panels.
#[inline(always)]
unsafe fn multiply<L: Lanes, C: Code<L>, const R: usize, const P: usize>(
    x: &[*const u32; R],
    w: Panels,
    packing: &Packing,
    at: usize,
    out: &mut Results,
) {
    // SAFETY: the caller's promise; all reads stay within the pairs of a row and the groups of a panel.
    unsafe {
        let mut totals = [[L::splat(0.0); P]; R];
        let (mut from, mut x) = (w.first, *x);
        for group in 0..packing.groups {
            let pairs = packing.inputs(group).div_ceil(2);
            let first = C::header(from);
            let mut headers = [first; P];
            for p in 1..P {
                headers[p] = C::header(from.add(p * w.bytes));
            }
            from = from.add(packing.header);
            let mut acc = [[L::splat(0.0); P]; R];
            for _ in 0..pairs / C::PAIRS {
                for p in 0..P {
                    L::prefetch(from.add(p * w.bytes).wrapping_add(AHEAD));
                }
                for pair in 0..C::PAIRS {
                    step::<L, C, R, P>(&x, pair, from, w.bytes, &headers, &mut acc);
                }
                x = x.map(|x| x.add(C::PAIRS * L::PAIR_WORDS));
                from = from.add(UNIT);
            }
            let rest = pairs % C::PAIRS;
            for pair in 0..rest {
                step::<L, C, R, P>(&x, pair, from, w.bytes, &headers, &mut acc);
            }
            if rest > 0 {
                x = x.map(|x| x.add(rest * L::PAIR_WORDS));
                from = from.add(UNIT);
            }
            for r in 0..R {
                for p in 0..P {
                    totals[r][p] = acc[r][p].fma(headers[p].0, totals[r][p]);
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                totals[r][p].store(out[r].as_mut_ptr().add((at + p) * WIDTH));
            }
        }
    }
}

/// One pair of inputs.
///
/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn step<L: Lanes, C: Code<L>, const R: usize, const P: usize>(
    x: &[*const u32; R],
    pair: usize,
    unit: *const u8,
    panel: usize,
    headers: &[(L, C::Zeros); P],
    acc: &mut [[L; P]; R],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut weights = [C::pair(unit, pair, headers[0].1); P];
        for p in 1..P {
            weights[p] = C::pair(unit.add(p * panel), pair, headers[p].1);
        }
        for r in 0..R {
            let x = L::splat_pair(x[r].add(pair * L::PAIR_WORDS));
            for p in 0..P {
                acc[r][p] = acc[r][p].dot(x, weights[p]);
            }
        }
    }
}
