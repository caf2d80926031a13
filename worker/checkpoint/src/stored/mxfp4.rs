//! MXFP4 as gpt-oss has it: all routed experts of a block in four tensors, gate and up interleaved row by
//! row. A row is blocks of 32 inputs in 16 bytes, the even input low: canonical bytes as they are.

use foregate_api::model::ModelSpec;

use super::{Source, Wrong, tensor};
use crate::header::Dtype;
use crate::index::Index;
use crate::names;

/// Inputs that share a scale.
const BLOCK: usize = 32;

/// Where the routed experts of a block are.
pub(crate) struct Fused {
    prefix: String,
    experts: usize,
    hidden: usize,
    inner: usize,
}

/// The three matrices of an expert, canonical.
pub(crate) struct Matrices {
    pub(crate) gate: Vec<u8>,
    pub(crate) up: Vec<u8>,
    pub(crate) down: Vec<u8>,
}

impl Fused {
    /// The experts of block `block`.
    pub(crate) fn of(spec: &ModelSpec, block: usize) -> Self {
        Self {
            prefix: names::experts_prefix(spec.family, block),
            experts: spec.experts,
            hidden: spec.hidden,
            inner: spec.expert_inner,
        }
    }

    /// Whether the files have them so.
    pub(crate) fn is_in(&self, index: &Index) -> bool {
        index.get(&self.name("gate_up_proj_blocks")).is_some()
    }

    /// Their tensors. Widths that are no multiple of a block have shapes that no file can have.
    pub(crate) fn sources(&self) -> Vec<Source> {
        let mut sources = Vec::new();
        for (part, outputs, inputs) in [
            ("gate_up_proj", 2 * self.inner, self.hidden),
            ("down_proj", self.hidden, self.inner),
        ] {
            let blocks = if inputs.is_multiple_of(BLOCK) {
                inputs / BLOCK
            } else {
                0
            };
            let shape = [self.experts, outputs, blocks];
            let name = |what: &str| self.name(&format!("{part}_{what}"));
            let bytes = [shape.as_slice(), &[BLOCK / 2]].concat();
            sources.push(Source::new(name("blocks"), &[Dtype::U8], bytes));
            sources.push(Source::new(name("scales"), &[Dtype::U8], shape));
        }
        sources
    }

    /// One expert.
    pub(crate) fn read(&self, index: &Index, expert: usize) -> Result<Matrices, Wrong> {
        let [gate, up] = self
            .rows(index, "gate_up_proj", expert, self.hidden, 2)?
            .try_into()
            .unwrap_or_default();
        let [down] = self
            .rows(index, "down_proj", expert, self.inner, 1)?
            .try_into()
            .unwrap_or_default();
        Ok(Matrices { gate, up, down })
    }

    /// Byte ranges of one expert within its tensors.
    pub(crate) fn ranges(&self, expert: usize) -> Vec<(String, std::ops::Range<usize>)> {
        let one = |source: &Source| source.shape.iter().skip(1).product::<usize>();
        self.sources()
            .into_iter()
            .map(|source| {
                let size = one(&source);
                (source.name, expert * size..(expert + 1) * size)
            })
            .collect()
    }

    fn name(&self, rest: &str) -> String {
        format!("{}.{rest}", self.prefix)
    }

    /// An expert's rows of one tensor, dealt to `matrices` matrices in turn: weights, then scales.
    fn rows(
        &self,
        index: &Index,
        part: &str,
        expert: usize,
        inputs: usize,
        matrices: usize,
    ) -> Result<Vec<Vec<u8>>, Wrong> {
        let mut out = vec![Vec::new(); matrices];
        for (what, width) in [("blocks", inputs / 2), ("scales", inputs / BLOCK)] {
            let all = tensor(index, &self.name(&format!("{part}_{what}")))?.bytes;
            let own = all.len() / self.experts.max(1);
            let own = all.get(expert * own..(expert + 1) * own).unwrap_or(&[]);
            for (row, bytes) in own.chunks_exact(width.max(1)).enumerate() {
                out[row % matrices].extend_from_slice(bytes);
            }
        }
        Ok(out)
    }
}
