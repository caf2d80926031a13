//! A model with all its experts in one process, driven step by step over a paged cache.

use std::path::Path;
use std::sync::Arc;

use foregate_api::weights::WeightSettings;
use foregate_checkpoint::Checkpoint;
use foregate_kernels::{Cpu, KvCache};
use foregate_models::experts::Experts;
use foregate_models::{LocalExperts, Model, StepBatch, StepOutput};

pub(crate) const PAGE_TOKENS: usize = 4;
const PAGES: usize = 64;

pub(crate) struct Rig {
    pub(crate) model: Model,
    pub(crate) experts: LocalExperts,
    pub(crate) kv: KvCache,
}

/// What a walk over a prompt gave, row by row.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Walk {
    pub(crate) logits: Vec<f32>,
    pub(crate) routes: Vec<u32>,
}

impl Rig {
    pub(crate) fn open(dir: &Path) -> Self {
        Self::on(dir, Cpu::new(2))
    }

    pub(crate) fn on(dir: &Path, cpu: Cpu) -> Self {
        Self::with(dir, &WeightSettings::default(), cpu)
    }

    pub(crate) fn with(dir: &Path, settings: &WeightSettings, cpu: Cpu) -> Self {
        let checkpoint = Checkpoint::open_with(dir, settings).unwrap();
        let cpu = Arc::new(cpu);
        let experts = LocalExperts::load(&checkpoint, cpu.clone()).unwrap();
        let model = Model::load(&checkpoint, cpu, |_, _| {}).unwrap();
        let kv = KvCache::new(model.kv_shape(PAGES, PAGE_TOKENS)).unwrap();
        Self { model, experts, kv }
    }

    /// Runs `tokens` in chunks of the given sizes (repeated), each chunk as one step.
    pub(crate) fn walk(&mut self, tokens: &[u32], chunks: &[usize], table: &[u32]) -> Walk {
        let mut walk = Walk::default();
        let mut sizes = chunks.iter().cycle();
        let mut start = 0;
        while start < tokens.len() {
            let end = (start + sizes.next().unwrap()).min(tokens.len());
            let out = self.step(&[(&tokens[start..end], start, table)]);
            walk.logits.extend(out.logits);
            walk.routes.extend(out.routes);
            start = end;
        }
        walk
    }

    /// One step over several sequences: tokens, first position, page table. All logits wanted.
    pub(crate) fn step(&mut self, parts: &[(&[u32], usize, &[u32])]) -> StepOutput {
        let (model, kv) = (&mut self.model, &mut self.kv);
        step_with(model, kv, &mut self.experts, parts)
    }
}

pub(crate) fn step_with(
    model: &mut Model,
    kv: &mut KvCache,
    experts: &mut dyn Experts,
    parts: &[(&[u32], usize, &[u32])],
) -> StepOutput {
    let (mut tokens, mut positions, mut sequences) = (vec![], vec![], vec![]);
    for (sequence, (part, start, _)) in parts.iter().enumerate() {
        tokens.extend_from_slice(part);
        positions.extend((*start as u32..).take(part.len()));
        sequences.extend(std::iter::repeat_n(sequence as u32, part.len()));
    }
    let tables: Vec<&[u32]> = parts.iter().map(|(_, _, table)| *table).collect();
    let wanted: Vec<u32> = (0..tokens.len() as u32).collect();
    let mut out = StepOutput::default();
    let batch = StepBatch {
        tokens: &tokens,
        positions: &positions,
        sequence_of_row: &sequences,
        page_tables: &tables,
        logit_rows: &wanted,
    };
    model.forward(&batch, kv, experts, &mut out).unwrap();
    out
}

/// Pages for a sequence, deliberately not in order.
pub(crate) fn table(first: u32, tokens: usize) -> Vec<u32> {
    let pages = tokens.div_ceil(PAGE_TOKENS) as u32;
    (first..first + pages).rev().collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
