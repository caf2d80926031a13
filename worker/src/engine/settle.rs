//! What a computed step means for its sequences.

use super::Engine;
use super::handle::StreamError;
use super::outlet::{RouteShape, routed};
use super::step::Place;
use crate::sampler::logprobs::report;
use crate::sampler::{SamplerError, Turn};
use crate::scheduler::{Chunk, Plan};
use crate::sequence::{Finish, Sequence, SequenceId, State};

impl Engine {
    /// Commits every chunk whose rows all arrived, and sets the others back.
    pub(super) fn settle(&mut self, plan: &Plan) {
        let places = std::mem::take(&mut self.buffers.places);
        let now = self.clock();
        for (chunk, place) in plan.chunks.iter().zip(&places) {
            let lost = self.lost_rows(place);
            if lost > 0 {
                self.counts.late_rows += lost as u64;
                let in_a_row = self.scheduler.set_back(chunk.id, now);
                tracing::debug!(lost, in_a_row, "rows came late, the chunk is repeated");
            } else {
                self.take(chunk, place);
            }
        }
        self.buffers.places = places;
    }

    fn lost_rows(&self, place: &Place) -> usize {
        let dead = self.buffers.output.dead.get(place.rows.clone());
        dead.map_or(0, |rows| rows.iter().filter(|dead| **dead).count())
    }

    /// One chunk is computed: count, commit, report, and choose a token if it ends the known tokens.
    fn take(&mut self, chunk: &Chunk, place: &Place) {
        self.count(chunk, place);
        self.report_prompt(chunk, place);
        self.scheduler.commit(chunk);
        let Some(sequence) = self.scheduler.get_mut(chunk.id) else {
            return;
        };
        if sequence.missing() > 0 {
            return;
        }
        if !sequence.prefilled {
            sequence.prefilled = true;
            let shape = self.route_shape();
            if let (Some(outlet), Some(sequence)) = (
                self.outlets.get_mut(&chunk.id),
                self.scheduler.get_mut(chunk.id),
            ) {
                outlet.prefilled(sequence, shape);
            }
        }
        if chunk.sample {
            self.choose(chunk, place);
        } else {
            self.end(chunk.id, Finish::Length);
        }
    }

    /// Load counters, signature, and the experts of prompt positions.
    fn count(&mut self, chunk: &Chunk, place: &Place) {
        let spec = self.model.spec();
        let (experts, top_k) = (spec.experts, spec.top_k.max(1));
        let output = &self.buffers.output;
        let Some(sequence) = self.scheduler.get_mut(chunk.id) else {
            return;
        };
        let routed = sequence.request.routed_experts;
        let prompt_len = sequence.request.prompt_len;
        let trace = &mut sequence.trace;
        for (row, position) in place.rows.clone().zip(chunk.start..) {
            let Some(routes) = output.routes_of(row) else {
                continue;
            };
            self.load.count_row(routes);
            if position < prompt_len {
                self.counts.prompt_tokens += 1;
            }
            if position < trace.counted {
                continue;
            }
            trace.counted = position + 1;
            for (layer, chosen) in routes.chunks_exact(top_k).enumerate() {
                for expert in chosen {
                    trace.signature[layer * experts + *expert as usize] += 1;
                }
            }
            if routed && position < prompt_len {
                trace.prompt_routes.extend_from_slice(routes);
            }
        }
    }

    fn report_prompt(&mut self, chunk: &Chunk, place: &Place) {
        let vocab = self.model.spec().vocab;
        let output = &self.buffers.output;
        let Some(sequence) = self.scheduler.get_mut(chunk.id) else {
            return;
        };
        let top = sequence.request.prompt_logprobs.unwrap_or(0);
        for (index, position) in (place.logits..).zip(chunk.prompt_logits.clone()) {
            if let Some(logits) = output.logits_of(index, vocab) {
                let next = sequence.tokens[position + 1];
                sequence
                    .trace
                    .prompt_logprobs
                    .push(report(logits, next, top));
            }
        }
    }

    fn choose(&mut self, chunk: &Chunk, place: &Place) {
        let vocab = self.model.spec().vocab;
        let shape = self.route_shape();
        let output = &self.buffers.output;
        let index = place.logits + chunk.prompt_logits.len();
        let logits = output.logits_of(index, vocab).unwrap_or(&[]);
        let Some(sequence) = self.scheduler.get_mut(chunk.id) else {
            return;
        };
        let token = match draw(&mut self.sampler, sequence, logits) {
            Ok(token) => token,
            Err(error) => return self.fail(chunk.id, StreamError::Logits(error)),
        };
        let report = sequence
            .request
            .logprobs
            .map(|top| report(logits, token, top));
        sequence.push(token);
        let state = sequence.state();
        if !matches!(state, State::Finished(Finish::Stop(_))) {
            self.counts.generation_tokens += 1;
            let wanted = sequence.request.routed_experts && sequence.generated() > 1;
            let routes = wanted
                .then(|| output.routes_of(place.rows.end - 1))
                .flatten()
                .map(|routes| routed(shape, routes.to_vec()));
            if let Some(outlet) = self.outlets.get_mut(&chunk.id) {
                outlet.token(sequence, report.as_ref(), routes);
            }
        }
        self.end_if_finished(chunk.id, state);
    }

    fn end_if_finished(&mut self, id: SequenceId, state: State) {
        if let State::Finished(why) = state {
            self.end(id, why);
        }
    }

    fn route_shape(&self) -> RouteShape {
        let spec = self.model.spec();
        RouteShape {
            layers: spec.moe_layers(),
            top_k: spec.top_k,
        }
    }
}

fn draw(
    sampler: &mut crate::sampler::Sampler,
    sequence: &Sequence,
    logits: &[f32],
) -> Result<u32, SamplerError> {
    let sampling = &sequence.request.sampling;
    let turn = Turn {
        sampling,
        history: sampling.has_penalties().then_some(&sequence.history),
        masked: &sequence.masked(),
        index: sequence.generated() as u32,
    };
    sampler.choose(logits, &turn)
}
