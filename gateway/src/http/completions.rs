//! `POST /v1/completions`.

use std::borrow::Cow;
use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response};
use serde::Serialize;
use serde_json::Value;

use super::completions_request::{PromptInput, parse_completions};
use super::logprobs::{Labels, Lists, routed};
use super::route::{self, Begun};
use super::shape::{Frame, Shape, Usage, finish_fields};
use super::state::{Encoded, Gateway};
use crate::error::ApiError;
use crate::generate::{Delta, Generation, Job};
use crate::metrics::Operation;
use crate::output::{TextOptions, TextStream};
use crate::prompt::Prompter;
use crate::trace::Identity;

pub(super) async fn completions(
    State(gateway): State<Arc<Gateway>>,
    Extension(identity): Extension<Identity>,
    request: Request<Body>,
) -> Result<Response<Body>, ApiError> {
    let operation = Operation::TextCompletion;
    route::serve(&gateway, &identity, request, operation, digest).await
}

fn digest(
    gateway: &Gateway,
    body: &[u8],
    begun: Begun,
) -> Result<(Job, CompletionsShape), ApiError> {
    let asked = parse_completions(body, &gateway.defaults)?;
    let model = gateway.model_name(asked.model.as_deref())?;
    let mut prompts: Vec<Arc<[u32]>> = Vec::with_capacity(asked.prompts.len());
    let mut texts = Vec::new();
    for prompt in asked.prompts {
        let (ids, text) = match prompt {
            PromptInput::Tokens(ids) => (ids, None),
            PromptInput::Text(text) => {
                let ids = gateway.encode("prompt", &text, asked.add_special_tokens)?;
                (ids, Some(text))
            }
        };
        prompts.push(ids.into());
        if asked.echo {
            texts.push(text);
        }
    }
    let mut shape = CompletionsShape {
        id: format!("cmpl-{}", begun.request_id),
        created: gateway.clock.unix_seconds(),
        model,
        labels: Labels::new(gateway.prompter.clone(), asked.generation.tokens_as_ids),
        prompts: prompts.clone(),
        echoes: Vec::new(),
        asked: asked.generation.clone(),
    };
    let job = gateway.job(Encoded {
        prompts,
        generation: asked.generation,
        param: "prompt",
        echo: asked.echo,
        began: begun.began,
        room: begun.room,
    })?;
    // After the lengths were checked: it takes a while per token.
    shape.echoes = texts
        .into_iter()
        .zip(&shape.prompts)
        .map(|(text, prompt)| Echo::of(text, prompt, &gateway.prompter, &shape.asked))
        .collect();
    Ok((job, shape))
}

/// A prompt as part of the answer.
struct Echo {
    text: String,
    characters: usize,
    /// Where each prompt token begins, in characters.
    offsets: Vec<usize>,
}

impl Echo {
    /// `text`: the prompt as the client wrote it, if it did.
    fn of(
        text: Option<String>,
        prompt: &[u32],
        prompter: &Prompter,
        asked: &Generation,
    ) -> Self {
        let options = TextOptions {
            skip_special_tokens: asked.skip_special_tokens,
            ..TextOptions::default()
        };
        let mut stream = TextStream::new(prompter, &[], &options);
        let mut decoded = String::new();
        let mut offsets = Vec::with_capacity(prompt.len());
        for id in prompt {
            let piece = stream.push(*id);
            offsets.push(piece.offset);
            decoded.push_str(&piece.text);
        }
        decoded.push_str(&stream.finish().text);
        let text = text.unwrap_or(decoded);
        Self {
            characters: text.chars().count(),
            text,
            offsets,
        }
    }
}

struct CompletionsShape {
    id: String,
    created: u64,
    model: String,
    labels: Labels,
    prompts: Vec<Arc<[u32]>>,
    /// One per prompt if the prompt is part of the answer, else none.
    echoes: Vec<Echo>,
    asked: Generation,
}

#[derive(Debug, Serialize)]
struct CompletionChoice<'a> {
    index: usize,
    text: Cow<'a, str>,
    finish_reason: Option<&'static str>,
    stop_reason: Value,
    logprobs: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_experts: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Value>,
}

impl CompletionsShape {
    const fn frame<'a>(
        &'a self,
        choices: Vec<CompletionChoice<'a>>,
    ) -> Frame<'a, CompletionChoice<'a>> {
        Frame {
            id: self.id.as_str(),
            object: "text_completion",
            created: self.created,
            model: self.model.as_str(),
            choices,
            prompt_logprobs: None,
            prompt_token_ids: None,
            usage: None,
        }
    }

    fn choice<'a>(&'a self, delta: &'a Delta) -> CompletionChoice<'a> {
        let asked = &self.asked;
        let at = delta.choice / self.n();
        let prompt = delta.prompt.as_ref();
        let text = match (self.echoes.get(at), prompt) {
            (Some(echo), Some(_)) => Cow::Owned([&*echo.text, &*delta.text].concat()),
            _ => Cow::Borrowed(delta.text.as_str()),
        };
        let (finish_reason, stop_reason) = finish_fields(delta.finish.as_ref());
        let ids = || delta.tokens.iter().map(|token| token.id).collect();
        let experts = || {
            let of_prompt = prompt.and_then(|prompt| prompt.routed.as_ref());
            routed(of_prompt, &delta.routed)
        };
        CompletionChoice {
            index: delta.choice,
            text,
            finish_reason,
            stop_reason,
            logprobs: self.logprobs(delta, at),
            token_ids: asked.return_token_ids.then(ids),
            prompt_token_ids: (asked.return_token_ids && prompt.is_some())
                .then(|| self.prompts[at].as_ref()),
            routed_experts: asked.return_routed_experts.then(experts),
            prompt_logprobs: asked
                .prompt_logprobs
                .and(prompt)
                .map(|prompt| self.labels.prompt(&prompt.logprobs)),
        }
    }

    fn logprobs(&self, delta: &Delta, at: usize) -> Value {
        let Some(top) = self.asked.logprobs else {
            return Value::Null;
        };
        let echo = self.echoes.get(at);
        let mut lists = Lists::default();
        if let (Some(echo), Some(prompt)) = (echo, &delta.prompt) {
            for (position, id) in self.prompts[at].iter().enumerate() {
                let info = position
                    .checked_sub(1)
                    .and_then(|entry| prompt.logprobs.get(entry));
                let offset = echo.offsets.get(position).copied().unwrap_or(0);
                lists.push(&self.labels, *id, info, top, offset);
            }
        }
        let before = echo.map_or(0, |echo| echo.characters);
        for token in &delta.tokens {
            let offset = before + token.offset;
            lists.push(&self.labels, token.id, token.info.as_ref(), top, offset);
        }
        if lists.is_empty() && self.asked.stream {
            return Value::Null;
        }
        lists.into_json()
    }
}

impl Shape for CompletionsShape {
    fn model(&self) -> &str {
        &self.model
    }

    fn chunk<'a>(&'a mut self, delta: &'a Delta) -> Option<impl Serialize + 'a> {
        let speaks_of_prompt = delta.prompt.is_some()
            && (!self.echoes.is_empty()
                || self.asked.return_token_ids
                || self.asked.return_routed_experts);
        let speaks_of_tokens = !delta.tokens.is_empty()
            && (self.asked.logprobs.is_some()
                || self.asked.return_token_ids
                || self.asked.return_routed_experts);
        let quiet = delta.text.is_empty() && delta.finish.is_none();
        if quiet && !speaks_of_prompt && !speaks_of_tokens {
            return None;
        }
        Some(Frame {
            usage: self.asked.include_usage.then_some(Value::Null),
            ..self.frame(vec![self.choice(delta)])
        })
    }

    fn usage_chunk(&self, usage: Usage) -> impl Serialize {
        Frame {
            usage: Some(usage.to_json()),
            ..self.frame(Vec::new())
        }
    }

    fn whole<'a>(&'a self, choices: &'a [Delta], usage: Usage) -> impl Serialize + 'a {
        let choices = choices.iter().map(|delta| self.choice(delta));
        Frame {
            usage: Some(usage.to_json()),
            ..self.frame(choices.collect())
        }
    }

    fn n(&self) -> usize {
        self.asked.n as usize
    }

    fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.len()).sum()
    }

    fn stream(&self) -> bool {
        self.asked.stream
    }

    fn include_usage(&self) -> bool {
        self.asked.include_usage
    }
}
