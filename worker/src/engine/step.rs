//! A plan as one forward pass.

use std::ops::Range;
use std::time::Duration;

use foregate_models::{ModelError, StepBatch, StepOutput, emptied};

use super::Engine;
use super::handle::{self, StreamError};
use crate::scheduler::{Plan, Scheduler};

/// Whole steps that may fail in a row; with the pauses between them this is about two seconds.
const MOST_FAILURES: u32 = 14;

/// Memory of a step.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequence_of_row: Vec<u32>,
    logit_rows: Vec<u32>,
    /// Empty between steps.
    tables: Vec<&'static [u32]>,
    pub(super) output: StepOutput,
    /// Where each chunk's rows and logits are, in the order of the plan.
    pub(super) places: Vec<Place>,
}

/// Where a chunk's results are.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Rows of the batch.
    pub(super) rows: Range<usize>,
    /// First of its wanted logit rows: those of the prompt, then that of the sample.
    pub(super) logits: usize,
}

impl Buffers {
    fn fill(&mut self, plan: &Plan, scheduler: &Scheduler) {
        self.tokens.clear();
        self.positions.clear();
        self.sequence_of_row.clear();
        self.logit_rows.clear();
        self.places.clear();
        for (index, chunk) in plan.chunks.iter().enumerate() {
            let first = self.tokens.len();
            let end = chunk.start + chunk.len;
            self.places.push(Place {
                rows: first..first + chunk.len,
                logits: self.logit_rows.len(),
            });
            if let Some(sequence) = scheduler.get(chunk.id) {
                self.tokens
                    .extend_from_slice(&sequence.tokens[chunk.start..end]);
            }
            self.positions.extend(chunk.start as u32..end as u32);
            self.sequence_of_row
                .extend(std::iter::repeat_n(index as u32, chunk.len));
            let row = |position: usize| (first + position - chunk.start) as u32;
            self.logit_rows.extend(chunk.prompt_logits.clone().map(row));
            if chunk.sample {
                self.logit_rows.push(row(end - 1));
            }
        }
    }
}

impl Engine {
    /// Computes a plan and hands out its results.
    pub(super) fn step(&mut self, plan: &Plan) {
        let contexts = |id| self.outlets.get(id)?.context();
        let trace = plan.chunks.iter().find_map(|chunk| contexts(&chunk.id));
        let epoch = self.experts.begin_step(trace);
        let begun = handle::now();
        let result = self.forward(plan);
        let took = begun.elapsed();
        self.experts.end_step();
        self.shared.set_epoch(epoch);
        self.counts.steps += 1;
        match result {
            Ok(()) => {
                self.failures = 0;
                self.time(plan, took);
                self.settle(plan);
            }
            Err(error) => self.lose(plan, &error),
        }
    }

    /// Notes how long a decode step took. One with late rows waited for somebody, and says nothing.
    fn time(&mut self, plan: &Plan, took: Duration) {
        let output = &self.buffers.output;
        let decodes = plan.chunks.iter().all(|chunk| chunk.len == 1);
        if !decodes || output.dead.iter().any(|dead| *dead) {
            return;
        }
        let spec = self.model.spec();
        let shape = (spec.moe_layers(), spec.experts, spec.top_k);
        let ms = took.as_secs_f64() * 1000.0;
        self.pace.note(&output.routes, plan.chunks.len(), shape, ms);
    }

    fn forward(&mut self, plan: &Plan) -> Result<(), ModelError> {
        self.buffers.fill(plan, &self.scheduler);
        let buffers = &mut self.buffers;
        let pages = |id| self.scheduler.get(id).map_or(&[][..], |s| &s.pages);
        let mut tables: Vec<&[u32]> = emptied(std::mem::take(&mut buffers.tables));
        tables.extend(plan.chunks.iter().map(|chunk| pages(chunk.id)));
        let batch = StepBatch {
            tokens: &buffers.tokens,
            positions: &buffers.positions,
            sequence_of_row: &buffers.sequence_of_row,
            page_tables: &tables,
            logit_rows: &buffers.logit_rows,
        };
        let output = &mut buffers.output;
        let done = self
            .model
            .forward(&batch, &mut self.kv, &mut *self.experts, output);
        buffers.tables = emptied(tables);
        done
    }

    /// A step that failed as a whole: its chunks are scheduled again after a pause, up to a number of
    /// failures in a row.
    fn lose(&mut self, plan: &Plan, error: &ModelError) {
        self.failures += 1;
        let give_up = self.failures >= MOST_FAILURES;
        tracing::warn!(%error, failures = self.failures, "step failed");
        let now = self.clock();
        for chunk in &plan.chunks {
            if give_up {
                self.fail(chunk.id, StreamError::Step(error.to_string()));
            } else {
                self.scheduler.set_back(chunk.id, now);
            }
        }
    }
}
