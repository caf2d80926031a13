//! Canonical bytes of one format → those of another: widened, rounded or quantised at load.
//!
//! Rows are converted in pieces, so that no second copy of a matrix in float32 is made, and by several
//! threads. A piece is cut between rows that share nothing, so its bytes do not depend on where it is cut.

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

use foregate_api::weights::WeightFormat;
use foregate_kernels::{Dtype, quantize};

/// Weights that one thread widens at a time: 1 MiB of float32.
const PIECE: usize = 1 << 18;

/// A matrix and the formats it has and shall have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Conversion {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) from: WeightFormat,
    pub(crate) to: WeightFormat,
}

/// The kernels' name of a format, for rows of `k` inputs.
#[must_use]
pub fn dtype(format: WeightFormat, k: usize) -> Dtype {
    match format {
        WeightFormat::Float32 => Dtype::F32,
        WeightFormat::Bfloat16 => Dtype::Bf16,
        WeightFormat::Float16 => Dtype::F16,
        WeightFormat::Int8 => Dtype::Int8,
        WeightFormat::Int4 { group } => Dtype::Int4 {
            // Kernels take groups of an even size; one past the row's end is the row.
            group: (group as usize).min(k.next_multiple_of(2)).max(2),
        },
        WeightFormat::Fp8 { rows, columns } => Dtype::Fp8 {
            block_n: rows as usize,
            block_k: columns as usize,
        },
        WeightFormat::Mxfp4 => Dtype::Mxfp4,
    }
}

impl Conversion {
    /// Converts, with at most `threads` threads.
    ///
    /// # Errors
    /// When a weight is beyond what the format can hold.
    pub(crate) fn run<'a>(
        &self,
        bytes: Cow<'a, [u8]>,
        threads: usize,
    ) -> Result<Cow<'a, [u8]>, String> {
        if self.from == self.to {
            return Ok(bytes);
        }
        if !self.from.is_plain() {
            // Settings that ask for this are refused before.
            return Err(format!("{} is not converted to {}", self.from, self.to));
        }
        let mut out = vec![0; self.to.matrix_bytes(self.n, self.k)];
        let work = Mutex::new(self.pieces(&bytes, &mut out).into_iter());
        let next = || work.lock().unwrap_or_else(PoisonError::into_inner).next();
        let convert = || {
            while let Some(piece) = next() {
                self.convert(piece)?;
            }
            Ok(())
        };
        let helpers = threads.saturating_sub(1).min(self.n / self.piece_rows());
        std::thread::scope(|scope| {
            let others: Vec<_> = (0..helpers).map(|_| scope.spawn(convert)).collect();
            let mine = convert();
            others.into_iter().fold(mine, |all, one| {
                let one = one
                    .join()
                    .unwrap_or_else(|_| Err("a thread ended early".to_owned()));
                all.and(one)
            })
        })?;
        Ok(Cow::Owned(out))
    }

    /// Rows of a piece: a multiple of the rows that share a scale.
    fn piece_rows(&self) -> usize {
        let together = match self.to {
            WeightFormat::Fp8 { rows, .. } => rows.max(1) as usize,
            _ => 1,
        };
        (PIECE / self.k.max(1)).max(1).next_multiple_of(together)
    }

    fn pieces<'a>(&self, bytes: &'a [u8], out: &'a mut [u8]) -> Vec<Piece<'a>> {
        let row_bytes = self.from.matrix_bytes(1, self.k);
        let [weights, scales, _] = self.to.sections(self.n, self.k);
        let (mut weights, rest) = out.split_at_mut(weights);
        let (mut scales, mut zeros) = rest.split_at_mut(scales);
        let mut pieces = Vec::new();
        for rows in bytes.chunks((self.piece_rows() * row_bytes).max(1)) {
            let n = rows.len() / row_bytes.max(1);
            let sizes = self.to.sections(n, self.k);
            let cut = |section: &mut &'a mut [u8], size: usize| {
                let (head, tail) = std::mem::take(section).split_at_mut(size);
                *section = tail;
                head
            };
            pieces.push(Piece {
                n,
                rows,
                out: [
                    cut(&mut weights, sizes[0]),
                    cut(&mut scales, sizes[1]),
                    cut(&mut zeros, sizes[2]),
                ],
            });
        }
        pieces
    }

    fn convert(&self, piece: Piece<'_>) -> Result<(), String> {
        let wide = widen(self.from, piece.rows);
        let narrowed = match self.to {
            WeightFormat::Float32 => wide.iter().flat_map(|v| v.to_le_bytes()).collect(),
            WeightFormat::Bfloat16 => narrow(&wide, |v| {
                let rounded = half::bf16::from_f32(v);
                (rounded.to_le_bytes(), rounded.is_finite())
            })?,
            WeightFormat::Float16 => narrow(&wide, |v| {
                let rounded = half::f16::from_f32(v);
                (rounded.to_le_bytes(), rounded.is_finite())
            })?,
            format => quantize(dtype(format, self.k), piece.n, self.k, &wide)
                .map_err(|error| error.to_string())?,
        };
        let mut rest = narrowed.as_slice();
        for section in piece.out {
            let (head, tail) = rest.split_at(section.len());
            section.copy_from_slice(head);
            rest = tail;
        }
        Ok(())
    }
}

/// Rows to be converted, and where their weights, scales and zero points go.
struct Piece<'a> {
    n: usize,
    rows: &'a [u8],
    out: [&'a mut [u8]; 3],
}

/// Little-endian numbers as float32; empty for a format that is not plain.
pub(crate) fn widen(format: WeightFormat, bytes: &[u8]) -> Vec<f32> {
    let halves = || bytes.as_chunks::<2>().0.iter();
    match format {
        WeightFormat::Float32 => {
            let words = bytes.as_chunks::<4>().0.iter();
            words.map(|b| f32::from_le_bytes(*b)).collect()
        }
        WeightFormat::Bfloat16 => halves()
            .map(|b| half::bf16::from_le_bytes(*b).to_f32())
            .collect(),
        WeightFormat::Float16 => halves()
            .map(|b| half::f16::from_le_bytes(*b).to_f32())
            .collect(),
        _ => Vec::new(),
    }
}

/// Rounds each value; one that was finite and no longer is has no place in the format.
fn narrow(values: &[f32], round: impl Fn(f32) -> ([u8; 2], bool)) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(2 * values.len());
    for value in values {
        let (bytes, finite) = round(*value);
        if value.is_finite() && !finite {
            return Err(format!("{value} is beyond what the format can hold"));
        }
        out.extend_from_slice(&bytes);
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
