//! Attention over keys and values that were written before.

use foregate_kernels::{Attention, KvCache, KvDtype, KvShape, KvWrite, Ops, PageMap};

use super::Bench;
use super::figures::Pass;
use super::products::noise;
use crate::error::CliError;

/// Tokens of a page.
const PAGE: usize = 16;
/// Most bytes of keys and values; longer contexts with many sequences are left out.
const MOST: usize = 2 << 30;

/// Sequences of one length in a cache, all written.
struct Written {
    kv: KvCache,
    /// Pages of each sequence.
    tables: Vec<Vec<u32>>,
    length: usize,
}

fn failed(error: &impl std::error::Error) -> CliError {
    CliError::runtime("keys and values", error)
}

impl Bench {
    /// One token of each of some sequences, and one prompt alone.
    pub(super) fn attention(&mut self, rows: &[u32], contexts: &[u32]) -> Result<(), CliError> {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            for length in contexts.iter().map(|context| *context as usize) {
                for sequences in rows.iter().map(|rows| *rows as usize) {
                    let token = self.kv_bytes(dtype) * self.shape.layers;
                    if token * sequences * length > MOST {
                        continue;
                    }
                    let written = self.written(dtype, sequences, length)?;
                    self.decode(&written)?;
                }
                let written = self.written(dtype, 1, length)?;
                self.prefill(&written)?;
            }
        }
        Ok(())
    }

    /// Bytes of a token in one layer.
    const fn kv_bytes(&self, dtype: KvDtype) -> usize {
        2 * dtype.bytes() * self.shape.kv_heads * self.shape.head_dim
    }

    fn written(
        &self,
        dtype: KvDtype,
        sequences: usize,
        length: usize,
    ) -> Result<Written, CliError> {
        let each = length.div_ceil(PAGE);
        let mut kv = KvCache::new(KvShape {
            layers: self.shape.layers,
            pages: each * sequences,
            page_tokens: PAGE,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.head_dim,
            dtype,
        })
        .map_err(|error| failed(&error))?;
        let page = |sequence: usize, at: usize| (sequence * each + at) as u32;
        let table = |sequence: usize| (0..each).map(|at| page(sequence, at)).collect();
        let tables: Vec<Vec<u32>> = (0..sequences).map(table).collect();
        let width = self.shape.kv_heads * self.shape.head_dim;
        let (k, v) = (noise(length * width, 3), noise(length * width, 4));
        let positions: Vec<u32> = (0..length as u32).collect();
        let rows = vec![0; length];
        for table in &tables {
            for layer in 0..self.shape.layers {
                self.cpu
                    .kv_write(KvWrite {
                        k: &k,
                        v: &v,
                        positions: &positions,
                        pages: PageMap {
                            sequence_of_row: &rows,
                            tables: &[table],
                        },
                        kv: &mut kv,
                        layer,
                    })
                    .map_err(|error| failed(&error))?;
            }
        }
        Ok(Written { kv, tables, length })
    }

    fn decode(&mut self, it: &Written) -> Result<(), CliError> {
        let sequences = it.tables.len();
        let rows: Vec<u32> = (0..sequences as u32).collect();
        let positions = vec![it.length as u32 - 1; sequences];
        let seconds = self.attend(it, &rows, &positions)?;
        self.add("attention, decode", it, seconds, |width| {
            (sequences * it.length, 4 * width * sequences * it.length)
        });
        Ok(())
    }

    fn prefill(&mut self, it: &Written) -> Result<(), CliError> {
        let rows = vec![0; it.length];
        let positions: Vec<u32> = (0..it.length as u32).collect();
        let seconds = self.attend(it, &rows, &positions)?;
        // A position attends to itself and all before it.
        let pairs = it.length * (it.length + 1) / 2;
        self.add("attention, prefill", it, seconds, |width| {
            (it.length, 4 * width * pairs)
        });
        Ok(())
    }

    /// `work` gives the tokens whose keys and values are read, and the additions and multiplications, from the
    /// width of all query heads.
    fn add(
        &mut self,
        op: &'static str,
        it: &Written,
        seconds: f64,
        work: impl Fn(usize) -> (usize, usize),
    ) {
        let (tokens, flops) = work(self.shape.heads * self.shape.head_dim);
        self.table.add(Pass {
            op,
            format: it.kv.shape().dtype.name(),
            size: format!("{} × {} tokens", it.tables.len(), it.length),
            bytes: (tokens * self.kv_bytes(it.kv.shape().dtype)) as f64,
            flops: flops as f64,
            seconds,
        });
    }

    fn attend(
        &self,
        it: &Written,
        sequence_of_row: &[u32],
        positions: &[u32],
    ) -> Result<f64, CliError> {
        let width = self.shape.heads * self.shape.head_dim;
        let q = noise(positions.len() * width, 5);
        let mut out = vec![0.0; positions.len() * width];
        let tables: Vec<&[u32]> = it.tables.iter().map(Vec::as_slice).collect();
        self.clock.best(|pass| {
            self.cpu.attention(Attention {
                q: &q,
                heads: self.shape.heads,
                scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
                positions,
                pages: PageMap {
                    sequence_of_row,
                    tables: &tables,
                },
                kv: &it.kv,
                layer: pass % self.shape.layers,
                out: &mut out,
            })
        })
    }
}
