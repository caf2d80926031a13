//! Products by a tile unit. bfloat16 panels are multiplied as they are. Codes become bfloat16 first, without loss, a run
//! of inputs at a time: the sum over a run is what the tiles make of it from zero, and the total takes
//! `fma(sum, scale, total)`, runs ascending. A run is a group, or [`RUN`] inputs of a greater one.

use super::coded::{Code, Fp8, Int4, Int8, Mxfp4};
use super::tile::{MAX_PANELS, Panels, Results};
use crate::cpu::amx::{self, Inputs, Session, Software, Weights};
use crate::cpu::detect::{Isa, Unit};
use crate::cpu::lanes::{Lanes, WIDTH, on_path};
use crate::dtype::Dtype;
use crate::matrix::coded::{Packing, UNIT};

/// Most inputs of a run: four panels of them, decoded, fit the first-level cache.
const RUN: usize = 256;
/// Bytes of a line: a pair of bfloat16 for each output of a panel.
const LINE: usize = 4 * WIDTH;
/// Bytes of a decoded panel.
const DECODED: usize = RUN / 2 * LINE;

/// A run of decoded panels, and what the tiles make of it.
#[repr(C, align(64))]
struct Run {
    lines: [[u8; DECODED]; MAX_PANELS],
    sums: [[f32; MAX_PANELS * WIDTH]; amx::ROWS],
}

/// The unit with the tiles of this thread.
enum Held {
    #[cfg(target_arch = "x86_64")]
    Hardware(Session<amx::Hardware>),
    Software(Box<Session<Software>>),
}

/// The tiles of this thread, for blocks of a number of rows.
pub(super) struct Tiles {
    isa: Isa,
    rows: usize,
    session: Held,
    /// Made when codes come.
    run: Option<Box<Run>>,
}

/// Pairs of a run and where they are: the first byte of their group, counted from that of the panel, and the first pair
/// in the group.
#[derive(Clone, Copy)]
struct Place {
    group: usize,
    first: usize,
    pairs: usize,
}

impl Tiles {
    /// For blocks of `rows` rows, 1 to [`amx::ROWS`].
    pub(super) fn begin(isa: Isa, unit: Unit, rows: usize) -> Self {
        let session = match unit {
            // SAFETY: an `Isa` has the unit only if its instructions can be executed.
            #[cfg(target_arch = "x86_64")]
            Unit::Hardware => Held::Hardware(unsafe { Session::begin(rows) }),
            // SAFETY: plain Rust.
            Unit::Software => Held::Software(Box::new(unsafe { Session::begin(rows) })),
        };
        Self {
            isa,
            rows,
            session,
            run: None,
        }
    }

    /// The rows from `x` on by `count` panels of a format whose inputs are rounded.
    ///
    /// # Safety
    /// This number of rows is there, `w.k` inputs each; so are the panels, at most [`MAX_PANELS`]; `out` has the rows.
    pub(super) unsafe fn product(
        &mut self,
        x: Inputs,
        w: Panels,
        count: usize,
        out: &mut Results,
    ) {
        let Some(packing) = w.packing else {
            let w = Weights {
                first: w.first,
                bytes: w.bytes,
                k: w.k,
            };
            // SAFETY: the caller's promise.
            return unsafe { self.session.product(x, w, count, out) };
        };
        out[..self.rows].fill([0.0; MAX_PANELS * WIDTH]);
        let run = self.run.get_or_insert_with(|| {
            Box::new(Run {
                lines: [[0; DECODED]; MAX_PANELS],
                sums: [[0.0; MAX_PANELS * WIDTH]; amx::ROWS],
            })
        });
        for group in 0..packing.groups {
            let inputs = packing.inputs(group);
            for first in (0..inputs).step_by(RUN) {
                let k = RUN.min(inputs - first);
                let place = Place {
                    group: packing.start(group),
                    first: first / 2,
                    pairs: k.div_ceil(2),
                };
                let sums = &mut run.sums[..self.rows];
                // SAFETY: the caller's promise; groups and runs begin at even inputs, so at words of a row.
                unsafe {
                    let before = (group * packing.group + first) / 2 * 4;
                    let x = Inputs {
                        first: x.first.add(before),
                        ..x
                    };
                    decode(self.isa, w, &packing, place, count, &mut run.lines);
                    let w_run = Weights {
                        first: run.lines.as_ptr().cast(),
                        bytes: DECODED,
                        k,
                    };
                    self.session.product(x, w_run, count, sums);
                    scale(self.isa, w, place.group, count, sums, out);
                }
            }
        }
    }
}

impl Held {
    /// # Safety
    /// As for [`Session::product`].
    unsafe fn product(&mut self, x: Inputs, w: Weights, count: usize, out: &mut Results) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Hardware(session) => session.product(x, w, count, out),
                Self::Software(session) => session.product(x, w, count, out),
            }
        }
    }
}

/// Lines of bfloat16 out of the pairs of a run.
///
/// # Safety
/// The processor has the instructions of `L`; the panels are there and have the run.
#[inline(always)]
unsafe fn decode_kernel<L: Lanes>(
    w: Panels,
    packing: &Packing,
    place: Place,
    count: usize,
    to: &mut [[u8; DECODED]; MAX_PANELS],
) {
    for (p, to) in to.iter_mut().take(count).enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let group = w.first.add(p * w.bytes + place.group);
            match w.dtype {
                Dtype::Int4 { .. } => lines::<L, Int4>(group, packing.header, place, to),
                Dtype::Fp8 { .. } => lines::<L, Fp8>(group, packing.header, place, to),
                Dtype::Mxfp4 => lines::<L, Mxfp4>(group, packing.header, place, to),
                Dtype::Int8 | Dtype::F32 | Dtype::Bf16 | Dtype::F16 => {
                    lines::<L, Int8>(group, packing.header, place, to);
                }
            }
        }
    }
}

/// One panel of it; a run begins with a unit.
///
/// # Safety
/// As for [`decode_kernel`].
#[inline(always)]
unsafe fn lines<L: Lanes, C: Code<L>>(
    group: *const u8,
    header: usize,
    place: Place,
    to: &mut [u8; DECODED],
) {
    let (lines, _) = to.as_chunks_mut::<LINE>();
    // SAFETY: the caller's promise; as many lines as pairs are written.
    unsafe {
        let (_, zeros) = C::header(group);
        let units = group.add(header + place.first / C::PAIRS * UNIT);
        for (unit, lines) in lines[..place.pairs].chunks_mut(C::PAIRS).enumerate() {
            for (pair, line) in lines.iter_mut().enumerate() {
                let pair = C::pair(units.add(unit * UNIT), pair, zeros);
                L::store_pairs(pair, line.as_mut_ptr());
            }
        }
    }
}

on_path! {
    /// Decodes a run of some panels.
    fn decode(w: Panels, packing: &Packing, place: Place, count: usize, to: &mut [[u8; DECODED]; MAX_PANELS])
        = decode_kernel
}

/// `totals = fma(sums, scale, totals)`, with the scales of a group of each panel.
///
/// # Safety
/// The processor has the instructions of `L`; the panels are there and have the group.
#[inline(always)]
unsafe fn scale_kernel<L: Lanes>(
    w: Panels,
    group: usize,
    count: usize,
    sums: &Results,
    totals: &mut Results,
) {
    for p in 0..count {
        // SAFETY: the caller's promise; a row has `MAX_PANELS` vectors.
        unsafe {
            let header = w.first.add(p * w.bytes + group);
            let scale = match w.dtype {
                Dtype::Mxfp4 => L::load_e8m0(header),
                _ => L::load(header.cast()),
            };
            for (sums, totals) in sums.iter().zip(totals.iter_mut()) {
                let total = totals.as_mut_ptr().add(p * WIDTH);
                let sum = L::load(sums.as_ptr().add(p * WIDTH));
                sum.fma(scale, L::load(total)).store(total);
            }
        }
    }
}

on_path! {
    /// Adds a run to the totals.
    fn scale(w: Panels, group: usize, count: usize, sums: &Results, totals: &mut Results)
        = scale_kernel
}
