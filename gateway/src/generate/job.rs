//! What is to be generated: a client's wishes, checked and resolved.

use std::collections::BTreeMap;
use std::sync::Arc;

use foregate_wire::generation::{GenerateRequest, Sampling};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

/// What a client asked about generation; absent values are already resolved to their defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Limit on generated tokens; `None`: whatever still fits.
    pub max_tokens: Option<u32>,
    /// Tokens before which nothing stops the answer.
    pub min_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// Token id → what is added to its logit, in [-100, 100].
    pub logit_bias: BTreeMap<u32, f32>,
    /// The client's seed; `None`: one is drawn.
    pub seed: Option<u64>,
    /// Choices per prompt.
    pub n: u32,
    /// Lower goes first, as in vLLM.
    pub priority: Option<i64>,
    /// Stop strings, none empty.
    pub stop: Vec<String>,
    /// Stop tokens.
    pub stop_token_ids: Vec<u32>,
    /// The model's own end tokens are ordinary ones.
    pub ignore_eos: bool,
    /// The stop string that ended the answer stays in it.
    pub include_stop: bool,
    /// Special tokens leave no text.
    pub skip_special_tokens: bool,
    /// Alternatives to report per generated token; `Some(0)`: the token itself.
    pub logprobs: Option<u32>,
    /// The same for prompt tokens.
    pub prompt_logprobs: Option<u32>,
    /// Report token ids.
    pub return_token_ids: bool,
    /// Report experts per token, layer and choice.
    pub return_routed_experts: bool,
    /// Write tokens in logprobs as `token_id:N`.
    pub tokens_as_ids: bool,
    /// Answer as server-sent events.
    pub stream: bool,
    /// A last chunk with usage.
    pub include_usage: bool,
}

/// A request ready to run.
#[derive(Debug)]
pub struct Job {
    /// Token ids of each prompt, not empty; choice `p * n + i` is the i-th answer to prompt `p`.
    pub prompts: Vec<Arc<[u32]>>,
    /// Tokens per answer, resolved; 0: only the prompt is read.
    pub max_tokens: u32,
    /// Alternatives to report per prompt token.
    pub prompt_logprobs: Option<u32>,
    /// What the client asked.
    pub generation: Generation,
    /// Seed of the first choice of every prompt; the i-th has `seed + i`.
    pub seed: u64,
    /// Arrival of the request.
    pub began: Instant,
    /// End of its time.
    pub deadline: Instant,
    /// What the prompts take of the room for bodies; given back with the job.
    pub room: Option<OwnedSemaphorePermit>,
}

impl Job {
    /// Sequences to run.
    #[must_use]
    pub fn choices(&self) -> usize {
        self.prompts.len() * self.generation.n as usize
    }

    /// Token ids of the prompt that choice `index` answers.
    pub(super) fn prompt_of(&self, index: usize) -> &[u32] {
        let at = index / self.generation.n.max(1) as usize;
        self.prompts.get(at).map_or(&[], AsRef::as_ref)
    }

    /// What a worker is asked for choice `index`.
    pub(super) fn request(&self, index: usize, request_id: &str) -> GenerateRequest {
        let asked = &self.generation;
        let prompt = self.prompt_of(index);
        let repeat = index % asked.n.max(1) as usize;
        GenerateRequest {
            request_id: format!("{request_id}-{index}"),
            token_ids: prompt.to_vec(),
            prompt_len: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
            // A worker always makes a token; one that was not asked for is dropped here.
            max_tokens: self.max_tokens.max(1),
            min_tokens: asked.min_tokens,
            ignore_eos: asked.ignore_eos,
            stop_token_ids: asked.stop_token_ids.clone(),
            sampling: Some(Sampling {
                temperature: asked.temperature,
                top_k: asked.top_k,
                top_p: asked.top_p,
                min_p: asked.min_p,
                repetition_penalty: asked.repetition_penalty,
                presence_penalty: asked.presence_penalty,
                frequency_penalty: asked.frequency_penalty,
                logit_bias: asked
                    .logit_bias
                    .iter()
                    .map(|(id, bias)| (*id, *bias))
                    .collect(),
                seed: self.seed.wrapping_add(repeat as u64),
            }),
            logprobs: asked.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            return_routed_experts: asked.return_routed_experts,
            deadline_ms: 0,
            expert_hint: None,
        }
    }
}
