//! Operations on rows of activations alone.

use foregate_kernels::{Combine, Gate, Ops, RmsNorm, Rope, RopeTable};

use super::Bench;
use super::figures::Pass;
use super::products::noise;
use crate::error::CliError;

impl Bench {
    /// Norm, rotary embedding, choice of experts, weighted sum.
    pub(super) fn by_row(&mut self, rows: &[u32]) -> Result<(), CliError> {
        for rows in rows.iter().map(|rows| *rows as usize) {
            self.norm(rows)?;
            self.rope(rows)?;
            self.gate(rows)?;
            self.combine(rows)?;
        }
        Ok(())
    }

    /// `values` are float32 numbers read and written.
    fn add_rows(
        &mut self,
        op: &'static str,
        size: String,
        values: usize,
        flops: usize,
        seconds: f64,
    ) {
        self.table.add(Pass {
            op,
            format: "",
            size,
            bytes: 4.0 * values as f64,
            flops: flops as f64,
            seconds,
        });
    }

    fn norm(&mut self, rows: usize) -> Result<(), CliError> {
        let width = self.shape.hidden;
        let (mut x, weight) = (noise(rows * width, 1), noise(width, 2));
        let mut out = vec![0.0; rows * width];
        let seconds = self.clock.best(|_| {
            self.cpu.rms_norm(RmsNorm {
                x: &mut x,
                add: None,
                rows,
                width,
                weight: &weight,
                eps: 1e-6,
                out: &mut out,
            })
        })?;
        let values = rows * width;
        self.add_rows(
            "norm",
            format!("{rows} × {width}"),
            2 * values,
            4 * values,
            seconds,
        );
        Ok(())
    }

    fn rope(&mut self, rows: usize) -> Result<(), CliError> {
        let (heads, head_dim) = (self.shape.heads, self.shape.head_dim);
        let frequencies = vec![0.01; head_dim / 2];
        let positions: Vec<u32> = (0..rows as u32).collect();
        let table = RopeTable::new(&frequencies, &positions);
        let mut x = noise(rows * heads * head_dim, 1);
        let seconds = self.clock.best(|_| {
            self.cpu.rope(Rope {
                x: &mut x,
                rows,
                heads,
                head_dim,
                norm: None,
                clip: None,
                table: &table,
            })
        })?;
        let values = rows * heads * head_dim;
        let size = format!("{rows} × {heads} × {head_dim}");
        self.add_rows("rope", size, 2 * values, 3 * values, seconds);
        Ok(())
    }

    fn gate(&mut self, rows: usize) -> Result<(), CliError> {
        let (experts, top_k) = (self.shape.experts, self.shape.top_k);
        let logits = noise(rows * experts, 1);
        let (mut chosen, mut weights) = (vec![0; rows * top_k], vec![0.0; rows * top_k]);
        let seconds = self.clock.best(|_| {
            self.cpu.gate(Gate {
                logits: &logits,
                rows,
                experts,
                top_k,
                normalise: true,
                out_experts: &mut chosen,
                out_weights: &mut weights,
            })
        })?;
        let values = rows * (experts + 2 * top_k);
        let size = format!("{rows} × {experts}, {top_k} chosen");
        self.add_rows("gate", size, values, 4 * rows * experts, seconds);
        Ok(())
    }

    fn combine(&mut self, rows: usize) -> Result<(), CliError> {
        let (width, top_k) = (self.shape.hidden, self.shape.top_k);
        let results = noise(rows * top_k * width, 1);
        let parts: Vec<&[f32]> = results.chunks(width).collect();
        let weights = noise(rows * top_k, 2);
        let mut out = vec![0.0; rows * width];
        let seconds = self.clock.best(|_| {
            self.cpu.combine(Combine {
                parts: &parts,
                weights: &weights,
                top_k,
                width,
                out: &mut out,
            })
        })?;
        let values = rows * width * (top_k + 1);
        let size = format!("{rows} × {top_k} × {width}");
        self.add_rows("combine", size, values, 2 * rows * top_k * width, seconds);
        Ok(())
    }
}
