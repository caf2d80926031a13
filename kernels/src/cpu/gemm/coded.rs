//! Products with weights that are codes with scales. Codes become bfloat16 without loss; a group of inputs is one
//! chain from 0, and the total takes `fma(chain, scale, total)`, groups ascending.
#![expect(
    clippy::needless_range_loop,
    reason = "indices of tiles with constant bounds unroll"
)]

use std::mem::MaybeUninit;

use super::tile::{MAX_PANELS, MAX_ROWS, Panels, Results};
use crate::cpu::lanes::{Lanes, Tiles, WIDTH, on_path};
use crate::dtype::Dtype;
use crate::matrix::coded::{Packing, UNIT};

/// A format of codes.
pub(super) trait Code<L: Lanes> {
    /// Pairs of inputs in a unit: 2 or 4. Loops over them are written out, so that each pair's shifts are constants.
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

/// Pairs of inputs that are decoded at once for several rows: with those of four panels they take 16 KiB, and should stay
/// in the first-level cache. Whole units.
const fn chunk<L: Lanes>() -> usize {
    if size_of::<L::Pairs>() > 64 { 32 } else { 64 }
}
const MAX_CHUNK: usize = 64;
/// Bytes of a line of bfloat16: a pair for each output of a panel.
const LINE: usize = 4 * WIDTH;

/// Some rows times some panels.
///
/// # Safety
/// As for [`super::tile::product`], but for any number of rows; `w` has codes, and `out` and `chains` are as long as
/// `rows`.
#[inline(always)]
unsafe fn product_kernel<L: Lanes>(
    rows: &[*const u32],
    w: Panels,
    count: usize,
    out: &mut Results,
    chains: &mut Results,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match w.dtype {
            Dtype::Int4 { .. } => tiles::<L, Int4>(rows, w, count, out, chains),
            Dtype::Fp8 { .. } => tiles::<L, Fp8>(rows, w, count, out, chains),
            Dtype::Mxfp4 => tiles::<L, Mxfp4>(rows, w, count, out, chains),
            Dtype::Int8 | Dtype::F32 | Dtype::Bf16 | Dtype::F16 => {
                tiles::<L, Int8>(rows, w, count, out, chains);
            }
        }
    }
}

on_path! {
    /// Some rows times some panels of codes.
    pub(super) fn product(
        rows: &[*const u32],
        w: Panels,
        count: usize,
        out: &mut Results,
        chains: &mut Results,
    ) = product_kernel
}

/// Some rows times some panels of bfloat16, which are widened once for all of them: `out` has the chains.
///
/// # Safety
/// As for [`product_kernel`], but `w` is bfloat16.
#[inline(always)]
unsafe fn widened_kernel<L: Lanes>(
    rows: &[*const u32],
    w: Panels,
    count: usize,
    out: &mut Results,
) {
    let mut widened = Decoded::<L::Pairs>([const { MaybeUninit::uninit() }; _]);
    let memory = widened.0.as_mut_ptr().cast::<L::Pairs>();
    let pairs = w.k.div_ceil(2);
    // SAFETY: the caller's promise; all reads stay within the pairs of a row and a panel.
    unsafe {
        for done in (0..pairs).step_by(const { chunk::<L>() }) {
            let now = (pairs - done).min(const { chunk::<L>() });
            for p in 0..count {
                let lines = w.first.add(p * w.bytes + done * LINE);
                let to = memory.add(p * MAX_CHUNK);
                for pair in 0..now {
                    let line = lines.add(pair * LINE);
                    // What the next call widens.
                    L::prefetch(line.wrapping_add(const { chunk::<L>() * LINE }));
                    to.add(pair).write(L::load_pairs(line));
                }
            }
            let piece = Piece::<L> {
                weights: memory,
                pairs: now,
                skip: done * L::PAIR_WORDS,
                first: done == 0,
                last: None,
            };
            piece.times(rows, count, &mut [], out);
        }
    }
}

on_path! {
    /// Some rows times some panels of bfloat16, widened once for all of them.
    pub(super) fn widened(rows: &[*const u32], w: Panels, count: usize, out: &mut Results)
        = widened_kernel
}

/// A few rows decode in registers; more rows share what is decoded once.
///
/// # Safety
/// As for [`product_kernel`].
#[inline(always)]
unsafe fn tiles<L: Lanes, C: Code<L>>(
    rows: &[*const u32],
    w: Panels,
    count: usize,
    out: &mut Results,
    chains: &mut Results,
) {
    let Some(packing) = &w.packing else {
        return;
    };
    // SAFETY: the caller's promise.
    unsafe {
        match (const { L::TILES }, rows.len()) {
            (_, 0) => {}
            (Tiles::One, 1) => each::<L, C, 1, 1>(rows, w, packing, count, out),
            (Tiles::Narrow, 1) => each::<L, C, 1, 2>(rows, w, packing, count, out),
            (Tiles::Wide, 1) => each::<L, C, 1, 4>(rows, w, packing, count, out),
            (Tiles::Wide, 2) => each::<L, C, 2, 4>(rows, w, packing, count, out),
            (Tiles::Wide, 3) => each::<L, C, 3, 2>(rows, w, packing, count, out),
            (Tiles::Wide, 4) => each::<L, C, 4, 2>(rows, w, packing, count, out),
            (_, _) => shared::<L, C>(rows, w, packing, count, out, chains),
        }
    }
}

/// `R` rows by `count` panels, `P` at a time as far as that goes.
///
/// # Safety
/// As for [`product_kernel`]; there are `R` rows.
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

/// `R` rows by `P` panels: `out[r][16 (at + p) + lane]` is the total over all groups.
///
/// # Safety
/// As for [`product_kernel`]; there are `P` panels.
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
        let (mut from, mut skip) = (w.first, 0);
        for group in 0..packing.groups {
            let pairs = packing.inputs(group).div_ceil(2);
            let headers = headers::<L, C, P>(from, w.bytes);
            from = from.add(packing.header);
            let mut acc = [[L::splat(0.0); P]; R];
            for _ in 0..pairs / C::PAIRS {
                let ahead = w.ahead::<P>(from);
                for p in 0..P {
                    L::prefetch(from.add(p * w.bytes).wrapping_add(ahead));
                }
                step::<L, C, R, P>(x, skip, (from, 0), w.bytes, &headers, &mut acc);
                step::<L, C, R, P>(x, skip + 1, (from, 1), w.bytes, &headers, &mut acc);
                if const { C::PAIRS == 4 } {
                    step::<L, C, R, P>(x, skip + 2, (from, 2), w.bytes, &headers, &mut acc);
                    step::<L, C, R, P>(x, skip + 3, (from, 3), w.bytes, &headers, &mut acc);
                }
                skip += C::PAIRS;
                from = from.add(UNIT);
            }
            let rest = pairs % C::PAIRS;
            if rest > 0 {
                for pair in 0..rest {
                    step::<L, C, R, P>(
                        x,
                        skip + pair,
                        (from, pair),
                        w.bytes,
                        &headers,
                        &mut acc,
                    );
                }
                skip += rest;
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
                totals[r][p].store(out[r][(at + p) * WIDTH..].as_mut_ptr());
            }
        }
    }
}

/// # Safety
/// The processor has the instructions of `L`; there are `P` panels.
#[inline(always)]
unsafe fn headers<L: Lanes, C: Code<L>, const P: usize>(
    from: *const u8,
    panel: usize,
) -> [(L, C::Zeros); P] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut headers = [C::header(from); P];
        for p in 1..P {
            headers[p] = C::header(from.add(p * panel));
        }
        headers
    }
}

/// Pair `input` of the inputs, with a pair of a unit.
///
/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn step<L: Lanes, C: Code<L>, const R: usize, const P: usize>(
    x: &[*const u32; R],
    input: usize,
    (unit, pair): (*const u8, usize),
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
            let x = L::splat_pair(x[r].add(input * L::PAIR_WORDS));
            for p in 0..P {
                acc[r][p] = acc[r][p].dot(x, weights[p]);
            }
        }
    }
}

/// Memory for decoded pairs of `MAX_PANELS` panels.
#[repr(align(64))]
struct Decoded<T>([MaybeUninit<T>; MAX_PANELS * MAX_CHUNK]);

/// Some pairs of a group, decoded, times rows.
struct Piece<'a, L: Lanes> {
    /// `MAX_CHUNK` for each panel.
    weights: *const L::Pairs,
    pairs: usize,
    /// The inputs of these pairs begin here in each row.
    skip: usize,
    first: bool,
    /// At the end of a group, its scales.
    last: Option<&'a [L; MAX_PANELS]>,
}

/// Several rows: decodes some pairs of all panels, then multiplies them with all rows, and so on.
///
/// # Safety
/// As for [`product_kernel`].
#[inline(always)]
unsafe fn shared<L: Lanes, C: Code<L>>(
    rows: &[*const u32],
    w: Panels,
    packing: &Packing,
    count: usize,
    out: &mut Results,
    chains: &mut Results,
) {
    for row in out.iter_mut().take(rows.len()) {
        row.fill(0.0);
    }
    let mut decoded = Decoded::<L::Pairs>([const { MaybeUninit::uninit() }; _]);
    let memory = decoded.0.as_mut_ptr().cast::<L::Pairs>();
    // SAFETY: the caller's promise; all reads stay within the pairs of a row and the groups of a panel.
    unsafe {
        let (mut from, mut skip) = (w.first, 0);
        for group in 0..packing.groups {
            let pairs = packing.inputs(group).div_ceil(2);
            let mut scales = [L::splat(0.0); MAX_PANELS];
            let mut done = 0;
            loop {
                let now = (pairs - done).min(const { chunk::<L>() });
                let units = from.add(packing.header + done / C::PAIRS * UNIT);
                for p in 0..count {
                    let (scale, zeros) = C::header(from.add(p * w.bytes));
                    scales[p] = scale;
                    let to = memory.add(p * MAX_CHUNK);
                    decode::<L, C>(units.add(p * w.bytes), now, zeros, to);
                }
                let piece = Piece::<L> {
                    weights: memory,
                    pairs: now,
                    skip: skip * L::PAIR_WORDS,
                    first: done == 0,
                    last: (done + now == pairs).then_some(&scales),
                };
                piece.times(rows, count, out, chains);
                done += now;
                skip += now;
                if done == pairs {
                    break;
                }
            }
            from = from.add(packing.header + pairs.div_ceil(C::PAIRS) * UNIT);
        }
    }
}

/// Decodes `pairs` pairs of a panel.
///
/// # Safety
/// The processor has the instructions of `L`; the units are there, and `to` has room.
#[inline(always)]
unsafe fn decode<L: Lanes, C: Code<L>>(
    units: *const u8,
    pairs: usize,
    zeros: C::Zeros,
    to: *mut L::Pairs,
) {
    // SAFETY: the caller's promise.
    unsafe {
        for unit in 0..pairs / C::PAIRS {
            let from = units.add(unit * UNIT);
            // What the next call decodes.
            L::prefetch(from.wrapping_add(const { chunk::<L>() } / C::PAIRS * UNIT));
            let to = to.add(unit * C::PAIRS);
            // All before the first is written: a unit of bytes is looked up once for both.
            let (first, second) = (C::pair(from, 0, zeros), C::pair(from, 1, zeros));
            to.write(first);
            to.add(1).write(second);
            if const { C::PAIRS == 4 } {
                to.add(2).write(C::pair(from, 2, zeros));
                to.add(3).write(C::pair(from, 3, zeros));
            }
        }
        for pair in pairs / C::PAIRS * C::PAIRS..pairs {
            let from = units.add(pair / C::PAIRS * UNIT);
            to.add(pair).write(C::pair(from, pair % C::PAIRS, zeros));
        }
    }
}

impl<L: Lanes> Piece<'_, L> {
    /// Adds these pairs to the chains of all rows, and ends the chains of a group; `out` may be empty where none ends.
    ///
    /// # Safety
    /// As for [`product_kernel`].
    #[inline(always)]
    unsafe fn times(
        &self,
        rows: &[*const u32],
        count: usize,
        out: &mut Results,
        chains: &mut Results,
    ) {
        for row in (0..rows.len()).step_by(MAX_ROWS) {
            let ends = row.min(out.len());
            let (x, out, chains) = (&rows[row..], &mut out[ends..], &mut chains[row..]);
            // SAFETY: the caller's promise.
            unsafe {
                match (const { L::TILES }, x.len()) {
                    (Tiles::One, left) => {
                        for r in 0..left.min(MAX_ROWS) {
                            let ends = r.min(out.len());
                            self.panels::<1, 1>(
                                &x[r..],
                                count,
                                &mut out[ends..],
                                &mut chains[r..],
                            );
                        }
                    }
                    (Tiles::Narrow, 1) => self.panels::<1, 1>(x, count, out, chains),
                    (Tiles::Narrow, 2) => self.panels::<2, 1>(x, count, out, chains),
                    (Tiles::Narrow, 3) => self.panels::<3, 1>(x, count, out, chains),
                    (Tiles::Narrow, 4) => self.panels::<4, 1>(x, count, out, chains),
                    (Tiles::Narrow, 5) => self.panels::<5, 1>(x, count, out, chains),
                    (Tiles::Narrow, _) => self.panels::<6, 1>(x, count, out, chains),
                    (Tiles::Wide, 1) => self.panels::<1, 4>(x, count, out, chains),
                    (Tiles::Wide, 2) => self.panels::<2, 4>(x, count, out, chains),
                    (Tiles::Wide, 3) => self.panels::<3, 4>(x, count, out, chains),
                    (Tiles::Wide, 4) => self.panels::<4, 4>(x, count, out, chains),
                    (Tiles::Wide, 5) => self.panels::<5, 4>(x, count, out, chains),
                    (Tiles::Wide, _) => self.panels::<6, 4>(x, count, out, chains),
                }
            }
        }
    }

    /// `R` rows by `count` panels, `P` at a time as far as that goes.
    ///
    /// # Safety
    /// As for [`product_kernel`]; there are `R` rows.
    #[inline(always)]
    unsafe fn panels<const R: usize, const P: usize>(
        &self,
        rows: &[*const u32],
        count: usize,
        out: &mut Results,
        chains: &mut Results,
    ) {
        let mut x = [std::ptr::null(); R];
        x.copy_from_slice(&rows[..R]);
        let mut at = 0;
        // SAFETY: the caller's promise.
        unsafe {
            let x = x.map(|x: *const u32| x.add(self.skip));
            while at + P <= count {
                self.tile::<R, P>(&x, at, out, chains);
                at += P;
            }
            while at < count {
                self.tile::<R, 1>(&x, at, out, chains);
                at += 1;
            }
        }
    }

    /// `R` rows by `P` panels from `at` on.
    ///
    /// # Safety
    /// As for [`product_kernel`]; there are `R` rows and `P` panels.
    #[inline(always)]
    unsafe fn tile<const R: usize, const P: usize>(
        &self,
        x: &[*const u32; R],
        at: usize,
        out: &mut Results,
        chains: &mut Results,
    ) {
        // SAFETY: the caller's promise; `decode` wrote as many pairs.
        unsafe {
            let mut acc = [[L::splat(0.0); P]; R];
            if !self.first {
                for r in 0..R {
                    for p in 0..P {
                        acc[r][p] = L::load(chains[r][(at + p) * WIDTH..].as_ptr());
                    }
                }
            }
            let weights = self.weights.add(at * MAX_CHUNK);
            for pair in 0..self.pairs {
                for r in 0..R {
                    let x = L::splat_pair(x[r].add(pair * L::PAIR_WORDS));
                    for p in 0..P {
                        acc[r][p] = acc[r][p].dot(x, *weights.add(p * MAX_CHUNK + pair));
                    }
                }
            }
            for r in 0..R {
                for p in 0..P {
                    let lanes = (at + p) * WIDTH;
                    if let Some(scales) = self.last {
                        let total = out[r][lanes..].as_mut_ptr();
                        acc[r][p].fma(scales[at + p], L::load(total)).store(total);
                    } else {
                        acc[r][p].store(chains[r][lanes..].as_mut_ptr());
                    }
                }
            }
        }
    }
}
