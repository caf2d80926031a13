//! What every op asks of its arguments, whoever computes it.

use crate::error::ShapeError;
use crate::kv::{KvCache, KvShape, PageMap};
use crate::matrix::Matrix;
use crate::ops::{
    Add, Attention, Combine, Embed, ExpertFfn, Gate, KvWrite, LogSoftmax, MatMul, RmsNorm,
    Rope, SigmoidScale, SiluMul,
};
use crate::place::{Extent, Memory};

type Checked = Result<(), ShapeError>;

/// Every index is below `bound`.
fn below(op: &'static str, what: &'static str, bound: usize, ids: &[u32]) -> Checked {
    match ids.iter().find(|id| **id as usize >= bound) {
        Some(id) => Err(ShapeError::new(op, what, bound, *id as usize)),
        None => Ok(()),
    }
}

fn at_least_one(op: &'static str, what: &'static str, got: usize) -> Checked {
    if got == 0 {
        Err(ShapeError::new(op, what, 1, 0))
    } else {
        Ok(())
    }
}

/// A weight that ops on the processor read is in its memory.
fn here<M: Memory>(op: &'static str, w: &Matrix) -> Checked {
    if M::HERE && w.region().is_some() {
        return Err(ShapeError::new(
            op,
            "weight, bytes in this process",
            w.bytes(),
            0,
        ));
    }
    Ok(())
}

/// As [`here`], for the cache.
fn cache_here<M: Memory>(op: &'static str, kv: &KvCache) -> Checked {
    if M::HERE && kv.region().is_some() {
        let want = kv.shape().page_bytes().unwrap_or(0);
        return Err(ShapeError::new(
            op,
            "kv cache, bytes of a page in this process",
            want,
            0,
        ));
    }
    Ok(())
}

impl<M: Memory> MatMul<'_, M> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Checked {
        const OP: &str = "matmul";
        here::<M>(OP, self.w)?;
        ShapeError::check_area(OP, "x", (self.rows, self.w.k()), self.x.extent())?;
        ShapeError::check_area(OP, "out", (self.rows, self.w.n()), self.out.extent())?;
        self.bias.map_or(Ok(()), |b| {
            ShapeError::check(OP, "bias", self.w.n(), b.extent())
        })
    }
}

impl<M: Memory> Embed<'_, M> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Checked {
        const OP: &str = "embed";
        here::<M>(OP, self.table)?;
        below(OP, "id below the table's rows", self.table.n(), self.ids)?;
        ShapeError::check_area(
            OP,
            "out",
            (self.ids.len(), self.table.k()),
            self.out.extent(),
        )
    }
}

impl<M: Memory> RmsNorm<'_, M> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Checked {
        const OP: &str = "rms_norm";
        ShapeError::check_area(OP, "x", (self.rows, self.width), self.x.extent())?;
        ShapeError::check(OP, "out", self.x.extent(), self.out.extent())?;
        if let Some(add) = self.add {
            ShapeError::check(OP, "add", self.x.extent(), add.extent())?;
        }
        ShapeError::check(OP, "weight", self.width, self.weight.extent())
    }
}

impl<M: Memory> Rope<'_, M> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Checked {
        const OP: &str = "rope";
        let row = self.heads.saturating_mul(self.head_dim);
        ShapeError::check_area(OP, "x", (self.rows, row), self.x.extent())?;
        ShapeError::check(OP, "head_dim", self.table.half * 2, self.head_dim)?;
        if let Some(norm) = &self.norm {
            let width = norm.weight.extent();
            if width == 0 || !row.is_multiple_of(width) {
                return Err(ShapeError::new(
                    OP,
                    "width of a norm, dividing a row of",
                    row,
                    width,
                ));
            }
        }
        if self.clip.is_some_and(|clip| clip.is_nan() || clip < 0.0) {
            return Err(ShapeError::new(OP, "clip, not negative and a number", 0, 0));
        }
        let angles = self.table.cos.len();
        ShapeError::check_area(OP, "angles", (self.rows, self.table.half), angles)
    }
}

impl PageMap<'_> {
    /// Each row's position (and, when `all_before`, each position before it) lies in a page that exists.
    fn check(
        &self,
        op: &'static str,
        positions: &[u32],
        kv: KvShape,
        all_before: bool,
    ) -> Checked {
        at_least_one(op, "page_tokens", kv.page_tokens)?;
        ShapeError::check(
            op,
            "sequence_of_row",
            positions.len(),
            self.sequence_of_row.len(),
        )?;
        below(
            op,
            "sequence of a row",
            self.tables.len(),
            self.sequence_of_row,
        )?;
        let mut checked = (u32::MAX, 0);
        for (sequence, position) in self.sequence_of_row.iter().zip(positions) {
            let table = self.tables[*sequence as usize];
            let last = *position as usize / kv.page_tokens;
            if last >= table.len() {
                return Err(ShapeError::new(
                    op,
                    "pages of the sequence, too few",
                    last + 1,
                    table.len(),
                ));
            }
            // Rows of one sequence usually follow each other: its earlier pages are checked once.
            let first = match (all_before, checked) {
                (true, (s, upto)) if s == *sequence => upto.min(last),
                (true, _) => 0,
                (false, _) => last,
            };
            below(op, "page", kv.pages, &table[first..=last])?;
            checked = (*sequence, last);
        }
        Ok(())
    }
}

impl<M: Memory> KvWrite<'_, M> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Checked {
        const OP: &str = "kv_write";
        let shape = self.kv.shape();
        cache_here::<M>(OP, self.kv)?;
        let area = (self.positions.len(), shape.kv_heads * shape.head_dim);
        ShapeError::check_area(OP, "k", area, self.k.extent())?;
        ShapeError::check_area(OP, "v", area, self.v.extent())?;
        below_layer(OP, shape, self.layer)?;
        self.pages.check(OP, self.positions, shape, false)
    }
}

fn below_layer(op: &'static str, shape: KvShape, layer: usize) -> Checked {
    if layer >= shape.layers {
        return Err(ShapeError::new(op, "layer below", shape.layers, layer));
    }
    Ok(())
}

impl<M: Memory> Attention<'_, M> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Checked {
        const OP: &str = "attention";
        let shape = self.kv.shape();
        cache_here::<M>(OP, self.kv)?;
        at_least_one(OP, "heads", self.heads)?;
        if shape.kv_heads == 0 || !self.heads.is_multiple_of(shape.kv_heads) {
            return Err(ShapeError::new(
                OP,
                "heads, a multiple of kv_heads",
                shape.kv_heads,
                self.heads,
            ));
        }
        let row = self.heads.saturating_mul(shape.head_dim);
        ShapeError::check_area(OP, "q", (self.positions.len(), row), self.q.extent())?;
        ShapeError::check(OP, "out", self.q.extent(), self.out.extent())?;
        below_layer(OP, shape, self.layer)?;
        self.pages.check(OP, self.positions, shape, true)
    }
}

impl<M: Memory> Gate<'_, M> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Checked {
        const OP: &str = "gate";
        at_least_one(OP, "top_k", self.top_k)?;
        if self.top_k > self.experts {
            return Err(ShapeError::new(
                OP,
                "top_k at most",
                self.experts,
                self.top_k,
            ));
        }
        ShapeError::check_area(
            OP,
            "logits",
            (self.rows, self.experts),
            self.logits.extent(),
        )?;
        let area = (self.rows, self.top_k);
        ShapeError::check_area(OP, "out_experts", area, self.out_experts.extent())?;
        ShapeError::check_area(OP, "out_weights", area, self.out_weights.extent())
    }
}

impl<M: Memory> ExpertFfn<'_, M> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Checked {
        const OP: &str = "expert_ffn";
        at_least_one(OP, "hidden", self.hidden)?;
        let rows = self.x.extent() / self.hidden;
        ShapeError::check(OP, "x, whole rows", rows * self.hidden, self.x.extent())?;
        let out_rows = self.out.extent() / self.hidden;
        ShapeError::check(
            OP,
            "out, whole rows",
            out_rows * self.hidden,
            self.out.extent(),
        )?;
        let mut free = 0;
        for group in self.groups {
            let inner = group.gate.n();
            for weight in [group.gate, group.up, group.down] {
                here::<M>(OP, weight)?;
            }
            ShapeError::check(OP, "gate: inputs", self.hidden, group.gate.k())?;
            ShapeError::check(OP, "up: inputs", self.hidden, group.up.k())?;
            ShapeError::check(OP, "up: outputs", inner, group.up.n())?;
            ShapeError::check(OP, "down: inputs", inner, group.down.k())?;
            ShapeError::check(OP, "down: outputs", self.hidden, group.down.n())?;
            below(OP, "row index", rows, group.rows)?;
            if group.out_offset < free {
                return Err(ShapeError::new(
                    OP,
                    "out_offset at least",
                    free,
                    group.out_offset,
                ));
            }
            free = group.out_offset.saturating_add(group.rows.len());
            if free > out_rows {
                return Err(ShapeError::new(OP, "out, too few rows", free, out_rows));
            }
        }
        Ok(())
    }
}

impl Combine<'_> {
    pub(crate) fn check(&self) -> Checked {
        const OP: &str = "combine";
        at_least_one(OP, "top_k", self.top_k)?;
        at_least_one(OP, "width", self.width)?;
        let rows = self.out.len() / self.width;
        ShapeError::check(OP, "out, whole rows", rows * self.width, self.out.len())?;
        ShapeError::check_area(OP, "parts", (rows, self.top_k), self.parts.len())?;
        ShapeError::check_area(OP, "weights", (rows, self.top_k), self.weights.len())?;
        for part in self.parts.iter().filter(|p| !p.is_empty()) {
            ShapeError::check(OP, "width of a part", self.width, part.len())?;
        }
        Ok(())
    }
}

impl<M: Memory> Add<'_, M> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Checked {
        ShapeError::check("add", "y", self.x.extent(), self.y.extent())
    }
}

impl<M: Memory> SiluMul<'_, M> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Checked {
        ShapeError::check("silu_mul", "up", self.gate.extent(), self.up.extent())
    }
}

impl<M: Memory> SigmoidScale<'_, M> {
    /// Whether sizes and indices fit each other.
    ///
    /// # Errors
    /// When they do not; the error names the argument.
    pub fn check(&self) -> Checked {
        let area = (self.logits.extent(), self.width);
        ShapeError::check_area("sigmoid_scale", "x", area, self.x.extent())
    }
}

impl LogSoftmax<'_> {
    pub(crate) fn check(&self) -> Checked {
        const OP: &str = "log_softmax";
        at_least_one(OP, "width", self.width)?;
        let rows = self.logits.len() / self.width;
        ShapeError::check(
            OP,
            "logits, whole rows",
            rows * self.width,
            self.logits.len(),
        )?;
        ShapeError::check(OP, "out", self.logits.len(), self.out.len())
    }
}
