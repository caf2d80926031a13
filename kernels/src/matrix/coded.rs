//! Panels of formats whose weights are a code times a scale.
//!
//! A panel is `[group of inputs][header, units]`. The header has the scales of the 16 outputs (float32, or the
//! bytes of e8m0), then their zero points (bytes), if the format has any. A unit is 64 bytes: 32 words of 16 bits,
//! one for each output and each of the two inputs of a pair, as in a line of bfloat16. Each word holds the codes
//! of several pairs that follow each other, the first in its lowest bits: so any pair of a unit is taken out with
//! one shift, and lies where a pair of bfloat16 has to be. Outputs beyond `n` and inputs beyond a group are 0.

use crate::codes::{e2m1, e4m3, e8m0};
use crate::dtype::{Dtype, MAX_ZERO, Sections};
use crate::error::ShapeError;
use crate::matrix::PANEL;

/// Bytes of a unit, and of the words of one output in it.
pub(crate) const UNIT: usize = 64;
const OUTPUT: usize = 4;

/// Where the codes of a format are in a panel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packing {
    dtype: Dtype,
    bits: usize,
    n: usize,
    k: usize,
    /// Outputs that share a scale.
    block_n: usize,
    /// Inputs of a group, and groups.
    pub(crate) group: usize,
    pub(crate) groups: usize,
    /// Bytes of the scales of 16 outputs, and of those with their zero points.
    scales: usize,
    pub(crate) header: usize,
}

/// A code and what turns it into a weight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    /// Exact.
    pub(crate) value: f32,
    pub(crate) scale: f32,
}

impl Packing {
    /// `None` for a format without codes. The format fits `k`.
    pub(crate) fn of(dtype: Dtype, n: usize, k: usize) -> Option<Self> {
        let bits = dtype.code_bits()?;
        let (block_n, group) = dtype.block(k);
        let scales = PANEL * if dtype == Dtype::Mxfp4 { 1 } else { 4 };
        let zeros = PANEL * usize::from(matches!(dtype, Dtype::Int4 { .. }));
        Some(Self {
            dtype,
            bits,
            n,
            k,
            block_n,
            group,
            groups: dtype.groups(k),
            scales,
            header: scales + zeros,
        })
    }

    /// Inputs of one group.
    pub(crate) fn inputs(&self, group: usize) -> usize {
        self.group.min(self.k - group * self.group)
    }

    fn group_bytes(&self, inputs: usize) -> Option<usize> {
        let pairs = inputs.div_ceil(2);
        let units = pairs.div_ceil(16 / self.bits).checked_mul(UNIT)?;
        units.checked_add(self.header)
    }

    /// Bytes of a panel.
    pub(crate) fn panel_bytes(&self) -> Option<usize> {
        let Some(last) = self.groups.checked_sub(1) else {
            return Some(0);
        };
        let full = self
            .group_bytes(self.group.min(self.k))?
            .checked_mul(last)?;
        full.checked_add(self.group_bytes(self.inputs(last))?)
    }

    /// First byte of a group of a panel that exists.
    pub(crate) fn start(&self, group: usize) -> usize {
        let pairs = self.group.min(self.k).div_ceil(2);
        group * (self.header + pairs.div_ceil(16 / self.bits) * UNIT)
    }

    /// Byte and bit of the code of the even input of a pair of a group; that of the odd one is two bytes on.
    fn place(&self, start: usize, lane: usize, pair: usize) -> (usize, usize) {
        let pairs = 16 / self.bits;
        let bit = pair % pairs * self.bits;
        let unit = start + self.header + pair / pairs * UNIT;
        (unit + lane * OUTPUT + bit / 8, bit % 8)
    }

    fn mask(&self) -> u8 {
        0xff >> (8 - self.bits)
    }

    /// Weight of input `k` for output `lane` of a panel.
    pub(crate) fn at(&self, panel: &[u8], lane: usize, k: usize) -> Parts {
        let (group, k) = (k / self.group, k % self.group);
        let start = self.start(group);
        let (byte, bit) = self.place(start, lane, k / 2);
        let code = panel[byte + k % 2 * 2] >> bit & self.mask();
        let value = match self.dtype {
            Dtype::Int4 { .. } => {
                f32::from(code) - f32::from(panel[start + self.scales + lane])
            }
            Dtype::Fp8 { .. } => e4m3(code),
            Dtype::Mxfp4 => e2m1(code),
            Dtype::F32 | Dtype::Bf16 | Dtype::F16 | Dtype::Int8 => {
                f32::from(code.cast_signed())
            }
        };
        Parts {
            value,
            scale: self.scale(&panel[start..], lane),
        }
    }

    /// Scale of an output, out of a group's header.
    fn scale(&self, header: &[u8], lane: usize) -> f32 {
        if self.dtype == Dtype::Mxfp4 {
            return e8m0(header[lane]);
        }
        Dtype::F32.get(header, lane).unwrap_or(f32::NAN)
    }

    /// Outputs of a panel.
    fn outputs(&self, panel: usize) -> std::ops::Range<usize> {
        panel * PANEL..self.n.min((panel + 1) * PANEL)
    }

    /// Packs a panel out of canonical bytes.
    ///
    /// # Errors
    /// When a zero point is out of range, or the half byte beside a last odd input is not zero.
    pub(crate) fn pack(
        &self,
        canonical: Canonical<'_>,
        panel: usize,
        out: &mut [u8],
    ) -> Result<(), ShapeError> {
        let size = self.scales / PANEL;
        for (lane, n) in self.outputs(panel).enumerate() {
            self.pack_row(canonical.row(n), lane, out)?;
            for group in 0..self.groups {
                let header = &mut out[self.start(group)..];
                let from = n / self.block_n * self.groups + group;
                header[lane * size..][..size]
                    .copy_from_slice(&canonical.scales[from * size..][..size]);
                if let Some(zero) = canonical.zeros.get(from) {
                    if *zero > MAX_ZERO {
                        let (most, got) = (usize::from(MAX_ZERO), usize::from(*zero));
                        return Err(ShapeError::new("pack", "zero point, at most", most, got));
                    }
                    header[self.scales + lane] = *zero;
                }
            }
        }
        Ok(())
    }

    fn pack_row(&self, row: &[u8], lane: usize, out: &mut [u8]) -> Result<(), ShapeError> {
        for group in 0..self.groups {
            let (start, first, inputs) =
                (self.start(group), group * self.group, self.inputs(group));
            for pair in 0..inputs.div_ceil(2) {
                let (byte, bit) = self.place(start, lane, pair);
                if self.bits == 4 {
                    let codes = row[first / 2 + pair];
                    if 2 * pair + 1 == inputs && codes > 15 {
                        let got = usize::from(codes >> 4);
                        return Err(ShapeError::new("pack", "code beyond the inputs", 0, got));
                    }
                    out[byte] |= (codes & 15) << bit;
                    out[byte + 2] |= codes >> 4 << bit;
                } else {
                    out[byte] = row[first + 2 * pair];
                    if let Some(odd) = row.get(first + 2 * pair + 1) {
                        out[byte + 2] = *odd;
                    }
                }
            }
        }
        Ok(())
    }

    /// The inverse of [`Packing::pack`].
    pub(crate) fn unpack(&self, from: &[u8], panel: usize, to: &mut CanonicalMut<'_>) {
        let size = self.scales / PANEL;
        for (lane, n) in self.outputs(panel).enumerate() {
            self.unpack_row(from, lane, to.row(n));
            if n % self.block_n != 0 {
                continue;
            }
            for group in 0..self.groups {
                let header = &from[self.start(group)..];
                let at = n / self.block_n * self.groups + group;
                to.scales[at * size..][..size].copy_from_slice(&header[lane * size..][..size]);
                if let Some(zero) = to.zeros.get_mut(at) {
                    *zero = header[self.scales + lane];
                }
            }
        }
    }

    fn unpack_row(&self, from: &[u8], lane: usize, row: &mut [u8]) {
        for group in 0..self.groups {
            let (start, first) = (self.start(group), group * self.group);
            for pair in 0..self.inputs(group).div_ceil(2) {
                let (byte, bit) = self.place(start, lane, pair);
                if self.bits == 4 {
                    row[first / 2 + pair] = from[byte] >> bit & 15 | from[byte + 2] >> bit << 4;
                } else {
                    row[first + 2 * pair] = from[byte];
                    if let Some(odd) = row.get_mut(first + 2 * pair + 1) {
                        *odd = from[byte + 2];
                    }
                }
            }
        }
    }
}

/// The parts of canonical bytes.
#[derive(Clone, Copy)]
pub(crate) struct Canonical<'a> {
    width: usize,
    codes: &'a [u8],
    scales: &'a [u8],
    zeros: &'a [u8],
}

impl<'a> Canonical<'a> {
    /// `bytes` has the length of all sections.
    pub(crate) fn of(sections: Sections, bytes: &'a [u8]) -> Self {
        let (codes, rest) = bytes.split_at(sections.codes);
        let (scales, zeros) = rest.split_at(sections.scales);
        Self {
            width: sections.row,
            codes,
            scales,
            zeros,
        }
    }

    fn row(&self, n: usize) -> &'a [u8] {
        &self.codes[n * self.width..(n + 1) * self.width]
    }
}

/// The parts of canonical bytes, to be written.
pub(crate) struct CanonicalMut<'a> {
    width: usize,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    zeros: &'a mut [u8],
}

impl<'a> CanonicalMut<'a> {
    /// `bytes` has the length of all sections.
    pub(crate) fn of(sections: Sections, bytes: &'a mut [u8]) -> Self {
        let (codes, rest) = bytes.split_at_mut(sections.codes);
        let (scales, zeros) = rest.split_at_mut(sections.scales);
        Self {
            width: sections.row,
            codes,
            scales,
            zeros,
        }
    }

    fn row(&mut self, n: usize) -> &mut [u8] {
        &mut self.codes[n * self.width..(n + 1) * self.width]
    }
}
