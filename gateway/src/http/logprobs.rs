//! Probabilities as the three shapes that clients know.

use foregate_wire::generation::{RoutedExperts, TokenInfo, TokenLogprob};
use serde_json::{Map, Value, json};

use crate::generate::TokenReport;
use crate::prompt::Prompter;

/// What stands for a probability of zero, which JSON cannot write as a logarithm.
const LOWEST: f32 = -9999.0;

/// Writes tokens.
#[derive(Debug, Clone)]
pub(super) struct Labels {
    prompter: Prompter,
    as_ids: bool,
}

impl Labels {
    pub(super) const fn new(prompter: Prompter, as_ids: bool) -> Self {
        Self { prompter, as_ids }
    }

    /// The token as text, `bytes:\x…` if it is no whole text, `token_id:N` if asked or without tokenizer.
    pub(super) fn label(&self, id: u32) -> String {
        match self.prompter.token_bytes() {
            Some(bytes) if !self.as_ids => bytes.label(id),
            _ => format!("token_id:{id}"),
        }
    }

    fn bytes(&self, id: u32) -> Value {
        self.prompter
            .token_bytes()
            .map_or(Value::Null, |bytes| Value::from(bytes.of(id)))
    }

    /// `choices[].logprobs` of chat: one entry per token.
    pub(super) fn chat(&self, tokens: &[TokenReport], top: u32) -> Value {
        let content: Vec<Value> = tokens
            .iter()
            .map(|token| {
                let info = token.info.as_ref();
                let best: Vec<Value> = info
                    .map(|info| info.top.as_slice())
                    .unwrap_or_default()
                    .iter()
                    .take(top as usize)
                    .map(|entry| self.entry(entry.id, entry.logprob))
                    .collect();
                let chosen = chosen(info);
                let mut entry =
                    self.entry(token.id, chosen.map_or(LOWEST, |entry| entry.logprob));
                entry["top_logprobs"] = Value::from(best);
                entry
            })
            .collect();
        json!({ "content": content, "refusal": null })
    }

    fn entry(&self, id: u32, logprob: f32) -> Value {
        json!({
            "token": self.label(id),
            "logprob": finite(logprob),
            "bytes": self.bytes(id),
        })
    }

    /// The best tokens of a position and the one that came, as completions have them.
    fn best(&self, info: Option<&TokenInfo>, top: u32) -> Value {
        let Some(info) = info else {
            return Value::Null;
        };
        let best = info.top.iter().take(top as usize);
        let map: Map<String, Value> = best
            .chain(info.chosen.as_ref())
            .map(|entry| (self.label(entry.id), Value::from(finite(entry.logprob))))
            .collect();
        Value::Object(map)
    }

    /// `prompt_logprobs` as vLLM has it: null for the first token, then objects by token id.
    pub(super) fn prompt(&self, infos: &[TokenInfo]) -> Value {
        let entries = infos.iter().map(|info| {
            let map: Map<String, Value> = info
                .top
                .iter()
                .chain(info.chosen.as_ref())
                .map(|entry| {
                    let value = json!({
                        "logprob": finite(entry.logprob),
                        "rank": entry.rank,
                        "decoded_token": self.label(entry.id),
                    });
                    (entry.id.to_string(), value)
                })
                .collect();
            Value::Object(map)
        });
        std::iter::once(Value::Null).chain(entries).collect()
    }
}

/// `choices[].logprobs` of completions: four lists of equal length.
#[derive(Debug, Default)]
pub(super) struct Lists {
    tokens: Vec<String>,
    logprobs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
}

impl Lists {
    /// Adds a token at `offset` characters.
    pub(super) fn push(
        &mut self,
        labels: &Labels,
        id: u32,
        info: Option<&TokenInfo>,
        top: u32,
        offset: usize,
    ) {
        self.tokens.push(labels.label(id));
        self.logprobs
            .push(chosen(info).map_or(Value::Null, |entry| Value::from(finite(entry.logprob))));
        self.top.push(labels.best(info, top));
        self.offsets.push(offset);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    pub(super) fn into_json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.logprobs,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }
}

fn chosen(info: Option<&TokenInfo>) -> Option<&TokenLogprob> {
    info.and_then(|info| info.chosen.as_ref())
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() {
        LOWEST
    } else {
        logprob.max(LOWEST)
    }
}

/// Experts as nested lists: position → MoE layer → chosen experts.
pub(super) fn routed(of_prompt: Option<&RoutedExperts>, later: &[RoutedExperts]) -> Value {
    let mut positions = Vec::new();
    for report in of_prompt.into_iter().chain(later) {
        let top_k = (report.top_k as usize).max(1);
        let per_token = (report.layers as usize * top_k).max(1);
        for token in report.experts.chunks_exact(per_token) {
            let layers: Vec<Value> = token.chunks(top_k).map(Value::from).collect();
            positions.push(Value::from(layers));
        }
    }
    Value::from(positions)
}
