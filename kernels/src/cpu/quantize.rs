//! Float32 weights into the canonical bytes of a format: what [`Dtype`] says, with scales that depend on the
//! weights alone. Blocks of rows are independent, so threads do not show.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "codes are small and rounded before the cast"
)]

use std::sync::atomic::{AtomicUsize, Ordering};

use super::Cpu;
use super::detect::Isa;
use super::lanes::{Lanes, ROUND, WIDTH, on_path};
use super::row;
use super::threads::{Parts, Threads};
use crate::codes::{E4M3_MAX, to_e2m1, to_e4m3};
use crate::dtype::{Dtype, MX_GROUP};
use crate::error::ShapeError;

/// Weights of one item of work, at least.
const ITEM: usize = 1 << 16;
/// A smaller scale would not be a normal number: its weights become zero.
const LEAST_SCALE: f32 = f32::MIN_POSITIVE;
/// Spans that are tried for a group of 4-bit integers: the whole, then one 32nd less each.
const SPANS: u8 = 9;

/// Rounds weights to a format: its canonical bytes, within the error that [`Dtype`] states. With one thread; see
/// [`Cpu::quantize`].
///
/// - bfloat16 and float16: the nearest, ties to even.
/// - int8: the scale is the greatest size of an output over 127.
/// - int4: of nine spans from all of a group's weights down to three quarters, the one of the least square error.
/// - float8: the scale is the greatest size of a block over 448.
/// - mxfp4: the scale is the power of two that the OCP specification gives the greatest size of a group.
///
/// # Errors
/// When `weights` does not have `n * k` values, when there is no such matrix, or, for a format of codes, when a
/// weight is not finite.
pub fn quantize(
    dtype: Dtype,
    n: usize,
    k: usize,
    weights: &[f32],
) -> Result<Vec<u8>, ShapeError> {
    all(
        Isa::best(),
        &Threads::new(&1.into()),
        dtype,
        (n, k),
        weights,
    )
}

impl Cpu {
    /// As [`quantize`], on all threads: the same bytes.
    ///
    /// # Errors
    /// As [`quantize`].
    pub fn quantize(
        &self,
        dtype: Dtype,
        n: usize,
        k: usize,
        weights: &[f32],
    ) -> Result<Vec<u8>, ShapeError> {
        let shared = &self.shared;
        all(shared.isa, &shared.threads, dtype, (n, k), weights)
    }
}

/// Some rows, and the part of the canonical bytes that is theirs.
struct Rows<'a> {
    dtype: Dtype,
    k: usize,
    weights: &'a [f32],
    /// Bytes of a row of codes.
    width: usize,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    zeros: &'a mut [u8],
}

fn all(
    isa: Isa,
    threads: &Threads,
    dtype: Dtype,
    (n, k): (usize, usize),
    weights: &[f32],
) -> Result<Vec<u8>, ShapeError> {
    const OP: &str = "quantize";
    ShapeError::check_area(OP, "weights", (n, k), weights.len())?;
    dtype.check(OP, k)?;
    let too_big = || ShapeError::new(OP, "size of the matrix", usize::MAX, weights.len());
    let parts = dtype.sections(n, k).ok_or_else(too_big)?;
    let mut out = vec![0; dtype.bytes(n, k).ok_or_else(too_big)?];
    let (codes, rest) = out.split_at_mut(parts.codes);
    let (scales, zeros) = rest.split_at_mut(parts.scales);
    let (codes, scales, zeros) = (Parts::of(codes), Parts::of(scales), Parts::of(zeros));
    // Whole blocks of outputs.
    let block_n = dtype.block(k).0.min(n.max(1));
    let blocks = n.div_ceil(block_n);
    let step = (ITEM / (block_n * k).max(1)).clamp(1, blocks.max(1));
    let (scale_row, zero_row) = (parts.scales / blocks.max(1), parts.zeros / blocks.max(1));
    let first_bad = AtomicUsize::new(usize::MAX);
    threads.run(blocks.div_ceil(step), &|item| {
        let block = item * step;
        let (from, to) = (block * block_n, n.min((block + step) * block_n));
        let rows = &weights[from * k..to * k];
        if dtype.code_bits().is_some()
            && let Some(bad) = rows.iter().position(|w| !w.is_finite())
        {
            first_bad.fetch_min(from * k + bad, Ordering::Relaxed);
            return;
        }
        // SAFETY: blocks of rows do not overlap, nor do their codes, scales and zero points.
        let mut rows = unsafe {
            Rows {
                dtype,
                k,
                weights: rows,
                width: parts.row,
                codes: codes.slice(from * parts.row, (to - from) * parts.row),
                scales: scales.slice(block * scale_row, step * scale_row),
                zeros: zeros.slice(block * zero_row, step * zero_row),
            }
        };
        // SAFETY: slices check themselves.
        unsafe { convert(isa, &mut rows) }
    });
    match first_bad.into_inner() {
        usize::MAX => Ok(out),
        bad => {
            let what = "weights before the first that is not finite";
            Err(ShapeError::new(OP, what, weights.len(), bad))
        }
    }
}

on_path! {
    /// Converts some rows.
    fn convert(rows: &mut Rows<'_>) = convert_kernel
}

/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
unsafe fn convert_kernel<L: Lanes>(rows: &mut Rows<'_>) {
    match rows.dtype {
        Dtype::F32 => each(rows, |w| w.to_le_bytes()),
        Dtype::Bf16 => each(rows, |w| half::bf16::from_f32(w).to_le_bytes()),
        Dtype::F16 => each(rows, |w| half::f16::from_f32(w).to_le_bytes()),
        Dtype::Int8 => int8(rows),
        // SAFETY: the instructions are the caller's promise.
        Dtype::Int4 { .. } => unsafe { int4::<L>(rows) },
        Dtype::Fp8 { .. } => fp8(rows),
        Dtype::Mxfp4 => mxfp4(rows),
    }
}

#[inline(always)]
fn each<const N: usize>(rows: &mut Rows<'_>, to: impl Fn(f32) -> [u8; N]) {
    for (bytes, w) in rows
        .codes
        .as_chunks_mut::<N>()
        .0
        .iter_mut()
        .zip(rows.weights)
    {
        *bytes = to(*w);
    }
}

/// The greatest size of finite numbers: their bits without the sign have the same order, and are quick to compare.
#[inline(always)]
fn greatest(x: &[f32]) -> f32 {
    let sizes = x.iter().map(|x| x.to_bits() & 0x7fff_ffff);
    f32::from_bits(sizes.fold(0, u32::max))
}

/// Nearest integer, ties to even; `x` is small.
#[inline(always)]
fn round(x: f32) -> f32 {
    (x + ROUND) - ROUND
}

/// A scale, or zero where it would be too small.
#[inline(always)]
fn scale(size: f32) -> f32 {
    if size < LEAST_SCALE { 0.0 } else { size }
}

#[inline(always)]
fn int8(rows: &mut Rows<'_>) {
    let k = rows.k;
    for (r, bytes) in rows.scales.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let weights = &rows.weights[r * k..(r + 1) * k];
        let scale = scale(greatest(weights) / 127.0);
        *bytes = scale.to_le_bytes();
        if scale == 0.0 {
            continue;
        }
        for (code, w) in rows.codes[r * k..(r + 1) * k].iter_mut().zip(weights) {
            *code = (round(w / scale) as i8).cast_unsigned();
        }
    }
}

#[inline(always)]
fn fp8(rows: &mut Rows<'_>) {
    let k = rows.k;
    let (block_n, block_k) = rows.dtype.block(k);
    let scales = rows.scales.as_chunks_mut::<4>().0;
    let groups = k.div_ceil(block_k);
    for (i, bytes) in scales.iter_mut().enumerate() {
        let (block, group) = (i / groups, i % groups);
        let columns = group * block_k..k.min((group + 1) * block_k);
        let first = block.saturating_mul(block_n);
        let outputs = first..(rows.weights.len() / k).min(first.saturating_add(block_n));
        let most = outputs
            .clone()
            .map(|n| greatest(&rows.weights[n * k..][columns.clone()]));
        let scale = scale(most.fold(0.0, f32::max) / E4M3_MAX);
        *bytes = scale.to_le_bytes();
        if scale == 0.0 {
            continue;
        }
        for n in outputs {
            let weights = &rows.weights[n * k..][columns.clone()];
            let codes = &mut rows.codes[n * k..][columns.clone()];
            for (code, w) in codes.iter_mut().zip(weights) {
                *code = to_e4m3(w / scale);
            }
        }
    }
}

#[inline(always)]
fn mxfp4(rows: &mut Rows<'_>) {
    let (k, width) = (rows.k, rows.width);
    let groups = k.div_ceil(MX_GROUP);
    for (i, scale) in rows.scales.iter_mut().enumerate() {
        let (r, group) = (i / groups, i % groups);
        let weights = &rows.weights[r * k..][group * MX_GROUP..k.min((group + 1) * MX_GROUP)];
        // The exponent of the greatest, less that of 4, the greatest power of two that e2m1 has.
        let exponent = (greatest(weights).to_bits() >> 23).saturating_sub(2);
        *scale = exponent as u8;
        let inverse = f32::from_bits((254 - exponent) << 23);
        let bytes = &mut rows.codes[r * width..][group * MX_GROUP / 2..];
        for (byte, pair) in bytes.iter_mut().zip(weights.as_chunks::<2>().0) {
            *byte = to_e2m1(pair[0] * inverse) | to_e2m1(pair[1] * inverse) << 4;
        }
    }
}

/// What turns weights of a group into codes: `clamp(round(w / scale) + zero, 0, 15)`.
#[derive(Clone, Copy)]
struct Grid {
    scale: f32,
    zero: f32,
}

impl Grid {
    /// The grid whose ends are nearest to `low` (at most zero) and `high` (at least zero).
    #[inline(always)]
    fn of(low: f32, high: f32) -> Self {
        let scale = scale(high / 15.0 - low / 15.0);
        let zero = if scale == 0.0 {
            0.0
        } else {
            round(-low / scale)
        };
        Self { scale, zero }
    }

    /// Codes of sixteen weights, less the zero point, and their weights in units of the scale.
    ///
    /// # Safety
    /// The processor has the instructions of `L`.
    #[inline(always)]
    unsafe fn codes<L: Lanes>(self, weights: L) -> (L, L) {
        // SAFETY: the instructions are the caller's promise.
        unsafe {
            let (magic, exact) = (L::splat(ROUND), weights.mul(L::splat(1.0 / self.scale)));
            let code = exact.add(magic).sub(magic);
            let code = code
                .max(L::splat(-self.zero))
                .min(L::splat(15.0 - self.zero));
            (code, exact)
        }
    }

    /// Sum of the squares of errors.
    ///
    /// # Safety
    /// The processor has the instructions of `L`.
    #[inline(always)]
    unsafe fn error<L: Lanes>(self, weights: &[f32]) -> f64 {
        // SAFETY: `i` stays in the group; the instructions are the caller's promise.
        let units = unsafe {
            let mut sum = L::splat(0.0);
            for i in (0..weights.len()).step_by(WIDTH) {
                let (code, exact) = self.codes(row::load::<L>(weights, i, 0.0));
                let off = code.sub(exact);
                sum = sum.add(off.mul(off));
            }
            sum.sum()
        };
        f64::from(units) * f64::from(self.scale).powi(2)
    }
}

/// The best of the grids that are tried.
///
/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
unsafe fn best_grid<L: Lanes>(weights: &[f32]) -> Grid {
    // SAFETY: `i` stays in the group; the instructions are the caller's promise.
    unsafe {
        let (mut low, mut high) = (L::splat(0.0), L::splat(0.0));
        for i in (0..weights.len()).step_by(WIDTH) {
            let w = row::load::<L>(weights, i, 0.0);
            (low, high) = (w.min(low), w.max(high));
        }
        let low = -L::splat(0.0).sub(low).greatest();
        let high = high.greatest();
        let mut best = Grid::of(low, high);
        if best.scale == 0.0 {
            return best;
        }
        let mut least = best.error::<L>(weights);
        for step in 1..SPANS {
            let span = 1.0 - f32::from(step) / 32.0;
            let grid = Grid::of(low * span, high * span);
            if grid.scale == 0.0 {
                break;
            }
            let error = grid.error::<L>(weights);
            if error < least {
                (best, least) = (grid, error);
            }
        }
        best
    }
}

/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
unsafe fn int4<L: Lanes>(rows: &mut Rows<'_>) {
    let (k, width) = (rows.k, rows.width);
    let group = rows.dtype.block(k).1;
    let groups = k.div_ceil(group);
    let scales = rows.scales.as_chunks_mut::<4>().0.iter_mut();
    for (i, (scale, zero)) in scales.zip(rows.zeros.iter_mut()).enumerate() {
        let (r, first) = (i / groups, i % groups * group);
        let weights = &rows.weights[r * k..][first..k.min(first + group)];
        // SAFETY: the instructions are the caller's promise.
        let grid = unsafe { best_grid::<L>(weights) };
        *scale = grid.scale.to_le_bytes();
        *zero = grid.zero as u8;
        if grid.scale == 0.0 {
            continue;
        }
        let bytes =
            &mut rows.codes[r * width..][first / 2..weights.len().div_ceil(2) + first / 2];
        for i in (0..weights.len()).step_by(WIDTH) {
            // SAFETY: `i` stays in the group; the instructions are the caller's promise.
            let codes = unsafe { grid.codes(row::load::<L>(weights, i, 0.0)).0.array() };
            let code = |code: f32| (code + grid.zero) as u8;
            let left = weights.len() - i;
            for (p, byte) in bytes[i / 2..].iter_mut().take(WIDTH / 2).enumerate() {
                let odd = if 2 * p + 1 < left {
                    code(codes[2 * p + 1])
                } else {
                    0
                };
                *byte = code(codes[2 * p]) | odd << 4;
            }
        }
    }
}
