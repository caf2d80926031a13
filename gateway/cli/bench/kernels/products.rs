//! Products with weights: linear layers and experts.

use foregate_kernels::{Cpu, Dtype, ExpertFfn, ExpertGroup, MatMul, Matrix, Ops};

use super::clock::Clock;
use super::figures::Pass;
use super::{Bench, Format};
use crate::bench::workload::Draw;
use crate::error::CliError;

/// Width of the weights that stay in the nearest caches: half a MiB of bfloat16.
const CACHED: usize = 512;
/// Their rows of activations.
const CACHED_ROWS: usize = 512;

/// Numbers between -1 and 1.
pub(super) fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut draw = Draw::new(seed);
    let mut one = || draw.below(2001) as f32 / 1000.0 - 1.0;
    (0..count).map(|_| one()).collect()
}

fn failed(error: &impl std::error::Error) -> CliError {
    CliError::runtime("weights", error)
}

/// Operations per second on weights that stay in the nearest caches.
pub(super) fn cached_rate(cpu: &Cpu, dtype: Dtype, clock: Clock) -> Result<f64, CliError> {
    let weights = noise(CACHED * CACHED, 1);
    let bytes = cpu.quantize(dtype, CACHED, CACHED, &weights);
    let bytes = bytes.map_err(|error| failed(&error))?;
    let matrix = cpu.pack(dtype, CACHED, CACHED, &bytes);
    let matrix = matrix.map_err(|error| failed(&error))?;
    let x = noise(CACHED_ROWS * CACHED, 2);
    let mut out = vec![0.0; CACHED_ROWS * CACHED];
    let seconds = clock.best(|_| {
        cpu.matmul(MatMul {
            x: &x,
            rows: CACHED_ROWS,
            w: &matrix,
            bias: None,
            out: &mut out,
        })
    })?;
    Ok(2.0 * (CACHED_ROWS * CACHED * CACHED) as f64 / seconds)
}

impl Bench {
    /// As many equal matrices as it takes, at least one.
    fn copies(&self, dtype: Dtype, n: usize, k: usize) -> Result<Vec<Matrix>, CliError> {
        let weights = noise(n * k, 1);
        let bytes = self
            .cpu
            .quantize(dtype, n, k, &weights)
            .map_err(|error| failed(&error))?;
        let count = self.weight_bytes.div_ceil(bytes.len().max(1));
        let matrices = (0..count).map(|_| self.cpu.pack(dtype, n, k, &bytes));
        matrices
            .collect::<Result<_, _>>()
            .map_err(|error| failed(&error))
    }

    /// The query projection, and the output projection.
    pub(super) fn matmul(&mut self, format: Format, rows: &[u32]) -> Result<(), CliError> {
        let shape = self.shape;
        for n in [shape.heads * shape.head_dim, shape.vocab] {
            self.products(format, n, shape.hidden, rows)?;
        }
        Ok(())
    }

    fn products(
        &mut self,
        format: Format,
        n: usize,
        k: usize,
        rows: &[u32],
    ) -> Result<(), CliError> {
        let weights = self.copies(format.dtype(), n, k)?;
        for rows in rows.iter().map(|rows| *rows as usize) {
            let x = noise(rows * k, 2);
            let mut out = vec![0.0; rows * n];
            let seconds = self.clock.best(|pass| {
                self.cpu.matmul(MatMul {
                    x: &x,
                    rows,
                    w: &weights[pass % weights.len()],
                    bias: None,
                    out: &mut out,
                })
            })?;
            self.table.add(Pass {
                op: "matmul",
                format: format.name(),
                size: format!("{rows} × {k} by {n}"),
                bytes: weights[0].bytes() as f64 + 4.0 * (rows * (n + k)) as f64,
                flops: 2.0 * (rows * n * k) as f64,
                seconds,
            });
        }
        Ok(())
    }

    /// All experts of a layer, each with its even share of the rows; with fewer routed rows than experts, as many
    /// experts with one row each.
    pub(super) fn experts(&mut self, format: Format, rows: &[u32]) -> Result<(), CliError> {
        let (hidden, inner) = (self.shape.hidden, self.shape.inner);
        let dtype = format.dtype();
        let gates = self.copies(dtype, inner, hidden)?;
        let ups = self.copies(dtype, inner, hidden)?;
        let downs = self.copies(dtype, hidden, inner)?;
        for rows in rows.iter().map(|rows| *rows as usize) {
            let routed = rows * self.shape.top_k;
            let experts = self.shape.experts.min(routed);
            let each = routed.div_ceil(experts);
            let x = noise(rows * hidden, 2);
            let mut out = vec![0.0; experts * each * hidden];
            // Which rows an expert has does not change the work.
            let chosen: Vec<u32> = (0..each).map(|at| (at % rows) as u32).collect();
            let groups = |pass: usize| {
                let group = |expert: usize| {
                    let at = pass * experts + expert;
                    ExpertGroup {
                        gate: &gates[at % gates.len()],
                        up: &ups[at % ups.len()],
                        down: &downs[at % downs.len()],
                        rows: &chosen,
                        out_offset: expert * each,
                    }
                };
                (0..experts).map(group).collect::<Vec<_>>()
            };
            let seconds = self.clock.best(|pass| {
                self.cpu.expert_ffn(ExpertFfn {
                    x: &x,
                    hidden,
                    groups: &groups(pass),
                    out: &mut out,
                })
            })?;
            let weights = gates[0].bytes() + ups[0].bytes() + downs[0].bytes();
            let activations = 4 * hidden * (rows + experts * each);
            self.table.add(Pass {
                op: "experts",
                format: format.name(),
                size: format!("{experts} × {inner} wide, {each} rows each"),
                bytes: (experts * weights + activations) as f64,
                flops: 6.0 * (experts * each * hidden * inner) as f64,
                seconds,
            });
        }
        Ok(())
    }
}
