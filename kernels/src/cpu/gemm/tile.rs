//! The innermost product: a few rows times a few panels, each element one chain over the inputs.
#![expect(
    clippy::needless_range_loop,
    reason = "indices of tiles with constant bounds unroll"
)]

use crate::cpu::lanes::{Lanes, Tiles, WIDTH, on_path};
use crate::dtype::Dtype;
use crate::matrix::coded::Packing;

/// Rows of the largest tile, and its panels.
pub(super) const MAX_ROWS: usize = 6;
pub(super) const MAX_PANELS: usize = 4;
/// Bytes ahead of the running position of each panel that are asked for: of 256 to 4096 the fastest with any rows.
const AHEAD: usize = 512;

/// Where a tile's results go: a row of `MAX_PANELS` panels for each of its rows.
pub(super) type Results = [[f32; MAX_PANELS * WIDTH]];

/// Panels of a weight: their first byte, the bytes of one, and the inputs.
#[derive(Clone, Copy)]
pub(super) struct Panels {
    pub(super) dtype: Dtype,
    pub(super) first: *const u8,
    pub(super) bytes: usize,
    pub(super) k: usize,
    /// Of codes.
    pub(super) packing: Option<Packing>,
}

impl Panels {
    /// Those that follow.
    ///
    /// # Safety
    /// There are at least `count` panels.
    #[inline(always)]
    pub(super) unsafe fn skip(self, count: usize) -> Self {
        // SAFETY: the caller's promise.
        let first = unsafe { self.first.add(count * self.bytes) };
        Self { first, ..self }
    }

    /// Bytes from `line` of the first of `P` panels to the line to ask for: behind the end of these panels come the next
    /// ones, each of which begins `P` panels on.
    #[inline(always)]
    pub(super) fn ahead<const P: usize>(&self, line: *const u8) -> usize {
        let inside = line.addr() + AHEAD < self.first.addr() + self.bytes;
        AHEAD + if inside { 0 } else { (P - 1) * self.bytes }
    }
}

/// `R` rows by `count` panels.
///
/// # Safety
/// As for [`product_kernel`].
#[inline(always)]
unsafe fn rows_by_panels<L: Lanes, const R: usize>(
    rows: &[*const u32],
    w: Panels,
    count: usize,
    out: &mut Results,
) {
    let mut x = [std::ptr::null(); R];
    x.copy_from_slice(&rows[..R]);
    // SAFETY: the caller's promise.
    unsafe {
        match count {
            4 => multiply::<L, R, 4>(&x, w, 0, out),
            3 => multiply::<L, R, 3>(&x, w, 0, out),
            2 => multiply::<L, R, 2>(&x, w, 0, out),
            _ => multiply::<L, R, 1>(&x, w, 0, out),
        }
    }
}

/// `R` rows by `count` panels, one panel after the other.
///
/// # Safety
/// As for [`product_kernel`].
#[inline(always)]
unsafe fn rows_by_each_panel<L: Lanes, const R: usize>(
    rows: &[*const u32],
    w: Panels,
    count: usize,
    out: &mut Results,
) {
    let mut x = [std::ptr::null(); R];
    x.copy_from_slice(&rows[..R]);
    for p in 0..count {
        // SAFETY: the caller's promise.
        unsafe { multiply::<L, R, 1>(&x, w.skip(p), p, out) }
    }
}

/// The tile of a path: all rows × all panels, or what its registers hold.
///
/// # Safety
/// The processor has the instructions of `L`; there are at most [`MAX_ROWS`] rows, prepared for `w`'s format
/// (see `super::inputs`), and `count` (at most [`MAX_PANELS`]) panels.
#[inline(always)]
unsafe fn product_kernel<L: Lanes>(
    rows: &[*const u32],
    w: Panels,
    count: usize,
    out: &mut Results,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (const { L::TILES }, rows.len()) {
            (Tiles::One, _) => {
                for (r, row) in rows.iter().enumerate() {
                    rows_by_each_panel::<L, 1>(&[*row], w, count, &mut out[r..]);
                }
            }
            (_, 1) => rows_by_panels::<L, 1>(rows, w, count, out),
            (Tiles::Narrow, 2) => rows_by_each_panel::<L, 2>(rows, w, count, out),
            (Tiles::Narrow, 3) => rows_by_each_panel::<L, 3>(rows, w, count, out),
            (Tiles::Narrow, 4) => rows_by_each_panel::<L, 4>(rows, w, count, out),
            (Tiles::Narrow, 5) => rows_by_each_panel::<L, 5>(rows, w, count, out),
            (Tiles::Narrow, _) => rows_by_each_panel::<L, 6>(rows, w, count, out),
            (Tiles::Wide, 2) => rows_by_panels::<L, 2>(rows, w, count, out),
            (Tiles::Wide, 3) => rows_by_panels::<L, 3>(rows, w, count, out),
            (Tiles::Wide, 4) => rows_by_panels::<L, 4>(rows, w, count, out),
            (Tiles::Wide, 5) => rows_by_panels::<L, 5>(rows, w, count, out),
            (Tiles::Wide, _) => rows_by_panels::<L, 6>(rows, w, count, out),
        }
    }
}

on_path! {
    /// Some rows times some panels.
    pub(super) fn product(rows: &[*const u32], w: Panels, count: usize, out: &mut Results)
        = product_kernel
}

/// Multiplies `R` rows by `P` panels; `out[r][16 (at + p) + lane]` is the chain `acc = fma(x[k], w[k], acc)`, over
/// ascending `k` for float32 and float16, and for bfloat16 over pairs of inputs, the odd one of a pair first.
///
/// # Safety
/// The processor has the instructions of `L`; each row has `w.k` prepared values; there are `P` panels.
#[inline(always)]
unsafe fn multiply<L: Lanes, const R: usize, const P: usize>(
    x: &[*const u32; R],
    w: Panels,
    at: usize,
    out: &mut Results,
) {
    // SAFETY: the caller's promise; all reads stay within `k` values of a row and the bytes of a panel.
    unsafe {
        let mut acc = [[L::splat(0.0); P]; R];
        match w.dtype {
            Dtype::F32 => singles::<L, false, R, P>(x, w, &mut acc),
            Dtype::F16 => singles::<L, true, R, P>(x, w, &mut acc),
            _ => pairs(x, w, &mut acc),
        }
        for r in 0..R {
            for p in 0..P {
                acc[r][p].store(out[r].as_mut_ptr().add((at + p) * WIDTH));
            }
        }
    }
}

#[inline(always)]
unsafe fn singles<L: Lanes, const HALVES: bool, const R: usize, const P: usize>(
    x: &[*const u32; R],
    w: Panels,
    acc: &mut [[L; P]; R],
) {
    // SAFETY: the promise of `multiply`.
    unsafe {
        for k in 0..w.k {
            let line = w.first.add(k * WIDTH * if HALVES { 2 } else { 4 });
            let ahead = w.ahead::<P>(line);
            for p in 0..P {
                let at = line.add(p * w.bytes);
                L::prefetch(at.wrapping_add(ahead));
                let weight = if HALVES {
                    L::load_halves(at)
                } else {
                    L::load(at.cast())
                };
                for r in 0..R {
                    acc[r][p] = L::splat(f32::from_bits(*x[r].add(k))).fma(weight, acc[r][p]);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn pairs<L: Lanes, const R: usize, const P: usize>(
    x: &[*const u32; R],
    w: Panels,
    acc: &mut [[L; P]; R],
) {
    // SAFETY: the promise of `multiply`.
    unsafe {
        for pair in 0..w.k.div_ceil(2) {
            let line = w.first.add(pair * WIDTH * 4);
            let ahead = w.ahead::<P>(line);
            let mut weights = [L::load_pairs(line); P];
            for p in 0..P {
                let at = line.add(p * w.bytes);
                L::prefetch(at.wrapping_add(ahead));
                weights[p] = L::load_pairs(at);
            }
            for r in 0..R {
                let x = L::splat_pair(x[r].add(pair * L::PAIR_WORDS));
                for p in 0..P {
                    acc[r][p] = acc[r][p].dot(x, weights[p]);
                }
            }
        }
    }
}
