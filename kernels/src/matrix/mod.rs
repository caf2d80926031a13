//! Weights packed for streaming.
//!
//! A matrix of `n` outputs and `k` inputs is cut into panels of [`PANEL`] outputs, so that one vector
//! holds the same input's weight for 16 outputs and a panel is read front to back:
//! - float32 and float16: `[panel][k][16]`;
//! - bfloat16: `[panel][ceil(k / 2)][16][2]`: one 64-byte line holds inputs `2i` and `2i + 1`, each as one
//!   half of 16 words, so that widening is a shift or a mask;
//! - codes with scales: see [`coded`].
//!
//! Outputs beyond `n` and the input beyond an odd `k` are zero.

pub(crate) mod coded;

use crate::buffer::Buffer;
use crate::dtype::{Dtype, Sections};
use crate::error::{OpError, ShapeError};
use crate::place::Region;
use coded::{Canonical, CanonicalMut, Packing};

/// Outputs of a panel.
pub const PANEL: usize = 16;

/// A packed weight matrix of `n` outputs × `k` inputs.
#[derive(Debug)]
pub struct Matrix {
    dtype: Dtype,
    n: usize,
    k: usize,
    panel_bytes: usize,
    data: Buffer,
}

impl Matrix {
    /// Packs canonical `bytes` of any alignment: see [`Dtype`].
    ///
    /// # Errors
    /// When `bytes` does not have exactly [`Dtype::bytes`], when there is no such matrix, or when a code or a zero
    /// point is out of its range.
    pub fn pack(dtype: Dtype, n: usize, k: usize, bytes: &[u8]) -> Result<Self, ShapeError> {
        let mut matrix = Self::empty(dtype, n, k, bytes.len())?;
        let source = Source::of(&matrix, bytes);
        for (panel, out) in matrix.panels_mut().enumerate() {
            source.pack(panel, out)?;
        }
        Ok(matrix)
    }

    /// A matrix whose canonical bytes (see [`Dtype`]) a device has, from the start of `region` on; what follows them is
    /// the device's own affair.
    ///
    /// # Errors
    /// When there is no such matrix, or the region is too small.
    pub fn on_device(
        dtype: Dtype,
        n: usize,
        k: usize,
        region: Box<dyn Region>,
    ) -> Result<Self, ShapeError> {
        const OP: &str = "matrix on a device";
        dtype.check(OP, k)?;
        let want = dtype.bytes(n, k).unwrap_or(usize::MAX);
        if region.bytes() < want {
            return Err(ShapeError::new(OP, "bytes, at least", want, region.bytes()));
        }
        Ok(Self {
            dtype,
            n,
            k,
            panel_bytes: 0,
            data: Buffer::Device(region),
        })
    }

    /// The device's memory that it is in, if it is on one.
    #[must_use]
    pub fn region(&self) -> Option<&dyn Region> {
        match &self.data {
            Buffer::Device(region) => Some(&**region),
            Buffer::Small(_) | Buffer::Piece(_) | Buffer::Mapped(_) => None,
        }
    }

    /// A zero matrix, after checking that `got` bytes are what its weights have.
    pub(crate) fn empty(
        dtype: Dtype,
        n: usize,
        k: usize,
        got: usize,
    ) -> Result<Self, ShapeError> {
        let too_big = || ShapeError::new("pack", "size of the matrix", usize::MAX, got);
        dtype.check("pack", k)?;
        let want = dtype.bytes(n, k).ok_or_else(too_big)?;
        ShapeError::check("pack", "bytes", want, got)?;
        let panel_bytes = match Packing::of(dtype, n, k) {
            Some(packing) => packing.panel_bytes(),
            None if dtype == Dtype::F32 => k.checked_mul(PANEL * 4),
            None if dtype == Dtype::F16 => k.checked_mul(PANEL * 2),
            None => k.div_ceil(2).checked_mul(PANEL * 4),
        };
        let panel_bytes = panel_bytes.ok_or_else(too_big)?;
        let bytes = panel_bytes
            .checked_mul(n.div_ceil(PANEL))
            .ok_or_else(too_big)?;
        let data = Buffer::zeroed(bytes).ok_or_else(too_big)?;
        Ok(Self {
            dtype,
            n,
            k,
            panel_bytes,
            data,
        })
    }

    pub(crate) fn panels_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let (bytes, panels) = (self.panel_bytes.max(1), self.panels());
        self.data.as_mut_slice().chunks_mut(bytes).take(panels)
    }

    /// Outputs.
    #[must_use]
    pub const fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    #[must_use]
    pub const fn k(&self) -> usize {
        self.k
    }

    /// Format of the weights.
    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of memory that it takes where it is.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self.region() {
            Some(region) => region.bytes(),
            None => self.panel_bytes * self.panels(),
        }
    }

    pub(crate) const fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Start of panel `panel`; later panels follow at `panel_bytes`.
    pub(crate) fn panel(&self, panel: usize) -> &[u8] {
        &self.data.as_slice()[panel * self.panel_bytes..(panel + 1) * self.panel_bytes]
    }

    /// Where the codes are, for a format that has them.
    pub(crate) fn packing(&self) -> Option<Packing> {
        Packing::of(self.dtype, self.n, self.k)
    }

    /// Lengths of the parts of the canonical bytes.
    fn sections(&self) -> Sections {
        // The matrix was made, so it has a size.
        self.dtype.sections(self.n, self.k).unwrap_or_default()
    }

    /// Weight of input `k` for output `n`: exact, as a number and its scale.
    pub(crate) fn parts(&self, n: usize, k: usize) -> coded::Parts {
        let (panel, lane) = (self.panel(n / PANEL), n % PANEL);
        if let Some(packing) = self.packing() {
            return packing.at(panel, lane, k);
        }
        let element = match self.dtype {
            Dtype::F32 => k * PANEL + lane,
            _ => half(self.dtype, lane, k),
        };
        coded::Parts {
            value: self.dtype.get(panel, element).unwrap_or(0.0),
            scale: 1.0,
        }
    }

    /// Writes the weights of output `index`, widened to float32 (a code times its scale, rounded once), into `out`
    /// (`k` values).
    ///
    /// # Errors
    /// When there is no such output, or `out` has another length.
    pub fn row(&self, index: usize, out: &mut [f32]) -> Result<(), ShapeError> {
        if index >= self.n {
            return Err(ShapeError::new("row", "index below n", self.n, index));
        }
        ShapeError::check("row", "out", self.k, out.len())?;
        if self.region().is_some() {
            return Err(ShapeError::new(
                "row",
                "bytes in this process",
                self.bytes(),
                0,
            ));
        }
        for (k, value) in out.iter_mut().enumerate() {
            let weight = self.parts(index, k);
            *value = weight.value * weight.scale;
        }
        Ok(())
    }

    /// Writes the weights of several outputs one after the other; `out` has room for as many.
    pub(crate) fn rows(&self, ids: &[u32], out: &mut [f32]) -> Result<(), ShapeError> {
        let rows = out.chunks_exact_mut(self.k.max(1));
        ids.iter()
            .zip(rows)
            .try_for_each(|(id, row)| self.row(*id as usize, row))
    }

    /// The exact inverse of [`Matrix::pack`]: the same bytes as were packed.
    ///
    /// # Errors
    /// When a device that has the matrix fails.
    pub fn unpack(&self) -> Result<Vec<u8>, OpError> {
        let parts = self.sections();
        let mut out = vec![0; parts.codes + parts.scales + parts.zeros];
        if let Some(region) = self.region() {
            region.read(0, &mut out)?;
        } else if let Some(packing) = self.packing() {
            let mut to = CanonicalMut::of(parts, &mut out);
            for panel in 0..self.panels() {
                packing.unpack(self.panel(panel), panel, &mut to);
            }
        } else {
            for (panel, rows) in out.chunks_mut((PANEL * parts.row).max(1)).enumerate() {
                unpack_panel(self.dtype, self.k, self.panel(panel), rows);
            }
        }
        Ok(out)
    }
}

/// Canonical bytes on their way into panels.
pub(crate) enum Source<'a> {
    Coded(Packing, Canonical<'a>),
    /// Rows of `k` numbers.
    Plain(Dtype, usize, &'a [u8]),
}

impl<'a> Source<'a> {
    /// `bytes` are as long as `matrix` wants them.
    pub(crate) fn of(matrix: &Matrix, bytes: &'a [u8]) -> Self {
        match matrix.packing() {
            Some(packing) => Self::Coded(packing, Canonical::of(matrix.sections(), bytes)),
            None => Self::Plain(matrix.dtype, matrix.k, bytes),
        }
    }

    /// Packs one panel.
    ///
    /// # Errors
    /// When a code or a zero point is out of its range.
    pub(crate) fn pack(&self, panel: usize, out: &mut [u8]) -> Result<(), ShapeError> {
        match self {
            Self::Coded(packing, canonical) => packing.pack(*canonical, panel, out),
            Self::Plain(dtype, k, bytes) => {
                let size = PANEL * k * if *dtype == Dtype::F32 { 4 } else { 2 };
                let rows = &bytes[panel * size..bytes.len().min((panel + 1) * size)];
                pack_panel(*dtype, *k, rows, out);
                Ok(())
            }
        }
    }
}

/// Place of a number of 16 bits in a panel.
const fn half(dtype: Dtype, lane: usize, k: usize) -> usize {
    match dtype {
        Dtype::F16 => k * PANEL + lane,
        _ => (k / 2) * 2 * PANEL + 2 * lane + k % 2,
    }
}

/// Lays up to 16 rows side by side.
fn pack_panel(dtype: Dtype, k: usize, rows: &[u8], out: &mut [u8]) {
    if dtype == Dtype::F32 {
        let (out, rows) = (out.as_chunks_mut::<4>().0, rows.as_chunks::<4>().0);
        for (lane, row) in rows.chunks_exact(k.max(1)).enumerate() {
            for (k, value) in row.iter().enumerate() {
                out[k * PANEL + lane] = *value;
            }
        }
        return;
    }
    let (out, rows) = (out.as_chunks_mut::<2>().0, rows.as_chunks::<2>().0);
    for (lane, row) in rows.chunks_exact(k.max(1)).enumerate() {
        for (k, value) in row.iter().enumerate() {
            out[half(dtype, lane, k)] = *value;
        }
    }
}

fn unpack_panel(dtype: Dtype, k: usize, panel: &[u8], out: &mut [u8]) {
    if dtype == Dtype::F32 {
        let (panel, out) = (panel.as_chunks::<4>().0, out.as_chunks_mut::<4>().0);
        for (lane, row) in out.chunks_exact_mut(k.max(1)).enumerate() {
            for (k, value) in row.iter_mut().enumerate() {
                *value = panel[k * PANEL + lane];
            }
        }
        return;
    }
    let (panel, out) = (panel.as_chunks::<2>().0, out.as_chunks_mut::<2>().0);
    for (lane, row) in out.chunks_exact_mut(k.max(1)).enumerate() {
        for (k, value) in row.iter_mut().enumerate() {
            *value = panel[half(dtype, lane, k)];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [Dtype; 9] = [
        Dtype::F32,
        Dtype::Bf16,
        Dtype::F16,
        Dtype::Int8,
        Dtype::Int4 { group: 32 },
        Dtype::Int4 { group: 6 },
        Dtype::Fp8 {
            block_n: 3,
            block_k: 10,
        },
        Dtype::Fp8 {
            block_n: usize::MAX,
            block_k: usize::MAX,
        },
        Dtype::Mxfp4,
    ];

    #[test]
    fn unpack_inverts_pack_from_any_alignment() {
        for dtype in FORMATS {
            for (n, k) in [(1, 1), (16, 2), (17, 3), (33, 64), (20, 70), (5, 0), (0, 5)] {
                let Some(size) = dtype.bytes(n, k) else {
                    continue;
                };
                let mut bytes: Vec<u8> = (0..=size).map(|i| (i * 7) as u8).collect();
                let parts = dtype.sections(n, k).unwrap();
                for zero in &mut bytes[1 + parts.codes + parts.scales..] {
                    *zero %= 17;
                }
                if dtype.code_bits() == Some(4) && k % 2 == 1 {
                    for row in bytes[1..=parts.codes].chunks_exact_mut(parts.row) {
                        row[parts.row - 1] &= 15;
                    }
                }
                let matrix = Matrix::pack(dtype, n, k, &bytes[1..]).unwrap();
                assert_eq!(matrix.unpack().unwrap(), &bytes[1..], "{dtype} {n}x{k}");
            }
        }
    }

    #[test]
    fn a_weight_is_a_code_times_its_scale() {
        let float = |x: f32| x.to_le_bytes();
        // Two outputs of three inputs, groups of two.
        let mut int4 = vec![0x5f, 0x01, 0x20, 0x0c];
        for scale in [0.5, 2.0, 1.0, -1.0] {
            int4.extend(float(scale));
        }
        int4.extend([8, 16, 0, 1]);
        let fp8 = [
            &[0x38, 0xb8, 0x01, 0x7e, 0x00, 0x30][..],
            &float(2.0),
            &float(4.0),
        ];
        let int8 = [&[1, 0x80, 0xff, 0x7f, 2, 3][..], &float(0.5), &float(2.0)];
        let mut mx = vec![0x21, 0x00, 0xf7, 0x00];
        mx.extend([127, 128]);
        let tiny = 2.0_f32.powi(-9);
        let blocks = Dtype::Fp8 {
            block_n: 2,
            block_k: 2,
        };
        for (dtype, k, bytes, want) in [
            (
                Dtype::Int4 { group: 2 },
                3,
                int4,
                [[3.5, -1.5, -30.0], [0.0, 2.0, -11.0]],
            ),
            (
                blocks,
                3,
                fp8.concat(),
                [[2.0, -2.0, 4.0 * tiny], [896.0, 0.0, 2.0]],
            ),
            (
                Dtype::Int8,
                3,
                int8.concat(),
                [[0.5, -64.0, -0.5], [254.0, 4.0, 6.0]],
            ),
            (Dtype::Mxfp4, 4, mx, [[0.5, 1.0, 0.0], [12.0, -12.0, 0.0]]),
        ] {
            let matrix = Matrix::pack(dtype, 2, k, &bytes).unwrap();
            for (n, want) in want.iter().enumerate() {
                let mut row = vec![f32::NAN; k];
                matrix.row(n, &mut row).unwrap();
                assert_eq!(row[..3], want[..], "{dtype} {n}");
            }
        }
    }

    #[test]
    fn a_row_is_the_row_that_was_packed() {
        let bytes: Vec<u8> = (0..18 * 3_u32)
            .flat_map(|i| (i as f32).to_le_bytes())
            .collect();
        let matrix = Matrix::pack(Dtype::F32, 18, 3, &bytes).unwrap();
        let mut row = [0.0; 3];
        matrix.row(17, &mut row).unwrap();
        assert_eq!(row, [51.0, 52.0, 53.0]);
        assert!(matrix.row(18, &mut row).is_err());
        assert!(matrix.row(0, &mut row[..2]).is_err());
    }

    #[test]
    fn a_wrong_length_is_refused() {
        let error = Matrix::pack(Dtype::Bf16, 2, 2, &[0; 7]).unwrap_err();
        assert_eq!(error.to_string(), "pack: bytes: want 8, got 7");
        let refused = |dtype, n, k, bytes: &[u8], what: &str| {
            let error = Matrix::pack(dtype, n, k, bytes).unwrap_err().to_string();
            assert!(error.contains(what), "{error} does not name {what:?}");
        };
        refused(Dtype::Bf16, usize::MAX, 2, &[], "size");
        refused(Dtype::Int8, usize::MAX, usize::MAX, &[], "size");
        refused(Dtype::Int8, 2, 2, &[0; 4], "bytes: want 12, got 4");
        refused(
            Dtype::Mxfp4,
            1,
            3,
            &[0; 3],
            "inputs of mxfp4, even: want 4, got 3",
        );
        refused(Dtype::Int4 { group: 0 }, 1, 2, &[], "group of int4");
        let mut int4 = [0; 2 + 4 + 1];
        int4[6] = 17;
        refused(
            Dtype::Int4 { group: 4 },
            1,
            3,
            &int4,
            "zero point, at most: want 16, got 17",
        );
        let codes = [0, 0x10, 0, 0, 0, 0, 0];
        refused(
            Dtype::Int4 { group: 4 },
            1,
            3,
            &codes,
            "code beyond the inputs",
        );
        let block = |block_n, block_k| Dtype::Fp8 { block_n, block_k };
        refused(block(0, 2), 1, 3, &[], "block_n");
        refused(block(1, 1), 1, 3, &[], "block_k");
    }
}
