//! Weights packed for streaming.
//!
//! A matrix of `n` outputs and `k` inputs is cut into panels of [`PANEL`] outputs, so that one vector
//! holds the same input's weight for 16 outputs and a panel is read front to back:
//! - float32: `[panel][k][16]`;
//! - bfloat16: `[panel][ceil(k / 2)][16][2]`: one 64-byte line holds inputs `2i` and `2i + 1`, each as one
//!   half of 16 words, so that widening is a shift or a mask.
//!
//! Outputs beyond `n` and the input beyond an odd `k` are zero.

use crate::buffer::Buffer;
use crate::dtype::Dtype;
use crate::error::ShapeError;

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
    /// Packs little-endian row-major `bytes` (`n × k`, one output per row) of any alignment.
    ///
    /// # Errors
    /// When `bytes` does not have exactly `n * k * dtype.size()` bytes.
    pub fn pack(dtype: Dtype, n: usize, k: usize, bytes: &[u8]) -> Result<Self, ShapeError> {
        let mut matrix = Self::empty(dtype, n, k, bytes.len())?;
        let row = k * dtype.size();
        for (panel, out) in matrix.panels_mut().enumerate() {
            let from = panel * PANEL * row;
            pack_panel(
                dtype,
                k,
                &bytes[from..(from + PANEL * row).min(bytes.len())],
                out,
            );
        }
        Ok(matrix)
    }

    /// A zero matrix, after checking that `got` bytes are what its rows have.
    pub(crate) fn empty(
        dtype: Dtype,
        n: usize,
        k: usize,
        got: usize,
    ) -> Result<Self, ShapeError> {
        let too_big = || ShapeError::new("pack", "size of the matrix", usize::MAX, got);
        let want = n
            .checked_mul(k)
            .and_then(|e| e.checked_mul(dtype.size()))
            .ok_or_else(too_big)?;
        if want != got {
            return Err(ShapeError::new("pack", "bytes", want, got));
        }
        let lines = match dtype {
            Dtype::F32 => k,
            Dtype::Bf16 => k.div_ceil(2),
        };
        let panel_bytes = lines.checked_mul(PANEL * 4).ok_or_else(too_big)?;
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

    /// Bytes of memory that the packed form takes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.panel_bytes * self.panels()
    }

    pub(crate) const fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Start of panel `panel`; later panels follow at `panel_bytes`.
    pub(crate) fn panel(&self, panel: usize) -> &[u8] {
        &self.data.as_slice()[panel * self.panel_bytes..(panel + 1) * self.panel_bytes]
    }

    /// Weight of input `k` for output `n`, widened.
    pub(crate) fn at(&self, n: usize, k: usize) -> f32 {
        let (panel, lane) = (self.panel(n / PANEL), n % PANEL);
        let element = match self.dtype {
            Dtype::F32 => k * PANEL + lane,
            Dtype::Bf16 => (k / 2) * 2 * PANEL + 2 * lane + k % 2,
        };
        self.dtype.get(panel, element).unwrap_or(0.0)
    }

    /// Writes the weights of output `index`, widened to float32, into `out` (`k` values).
    ///
    /// # Errors
    /// When there is no such output, or `out` has another length.
    pub fn row(&self, index: usize, out: &mut [f32]) -> Result<(), ShapeError> {
        if index >= self.n {
            return Err(ShapeError::new("row", "index below n", self.n, index));
        }
        ShapeError::check("row", "out", self.k, out.len())?;
        for (k, value) in out.iter_mut().enumerate() {
            *value = self.at(index, k);
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
    #[must_use]
    pub fn unpack(&self) -> Vec<u8> {
        let size = self.dtype.size();
        let mut out = vec![0; self.n * self.k * size];
        for panel in 0..self.panels() {
            let rows = PANEL.min(self.n - panel * PANEL);
            let from = panel * PANEL * self.k * size;
            let to = &mut out[from..from + rows * self.k * size];
            unpack_panel(self.dtype, self.k, self.panel(panel), to);
        }
        out
    }
}

/// The row-major bytes of the rows of one panel.
pub(crate) fn panel_rows(dtype: Dtype, k: usize, bytes: &[u8], panel: usize) -> &[u8] {
    let size = PANEL * k * dtype.size();
    &bytes[panel * size..bytes.len().min((panel + 1) * size)]
}

/// Lays up to 16 rows side by side.
pub(crate) fn pack_panel(dtype: Dtype, k: usize, rows: &[u8], out: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            let (out, rows) = (out.as_chunks_mut::<4>().0, rows.as_chunks::<4>().0);
            for (lane, row) in rows.chunks_exact(k.max(1)).enumerate() {
                for (k, value) in row.iter().enumerate() {
                    out[k * PANEL + lane] = *value;
                }
            }
        }
        Dtype::Bf16 => {
            let (out, rows) = (out.as_chunks_mut::<2>().0, rows.as_chunks::<2>().0);
            for (lane, row) in rows.chunks_exact(k.max(1)).enumerate() {
                for (k, value) in row.iter().enumerate() {
                    out[(k / 2) * 2 * PANEL + 2 * lane + k % 2] = *value;
                }
            }
        }
    }
}

fn unpack_panel(dtype: Dtype, k: usize, panel: &[u8], out: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            let (panel, out) = (panel.as_chunks::<4>().0, out.as_chunks_mut::<4>().0);
            for (lane, row) in out.chunks_exact_mut(k.max(1)).enumerate() {
                for (k, value) in row.iter_mut().enumerate() {
                    *value = panel[k * PANEL + lane];
                }
            }
        }
        Dtype::Bf16 => {
            let (panel, out) = (panel.as_chunks::<2>().0, out.as_chunks_mut::<2>().0);
            for (lane, row) in out.chunks_exact_mut(k.max(1)).enumerate() {
                for (k, value) in row.iter_mut().enumerate() {
                    *value = panel[(k / 2) * 2 * PANEL + 2 * lane + k % 2];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpack_inverts_pack_from_any_alignment() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for (n, k) in [(1, 1), (16, 2), (17, 3), (33, 64), (5, 0), (0, 5)] {
                let bytes: Vec<u8> =
                    (0..=n * k * dtype.size()).map(|i| (i * 7) as u8).collect();
                let matrix = Matrix::pack(dtype, n, k, &bytes[1..]).unwrap();
                assert_eq!(matrix.unpack(), &bytes[1..], "{dtype} {n}x{k}");
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
        assert!(Matrix::pack(Dtype::Bf16, usize::MAX, 2, &[]).is_err());
    }
}
