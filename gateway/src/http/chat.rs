//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response};
use serde_json::{Map, Value, json};

use super::chat_request::parse_chat;
use super::logprobs::{Labels, routed};
use super::route::{self, Begun};
use super::shape::{Shape, Usage, finish_fields};
use super::state::{Encoded, Gateway};
use crate::error::ApiError;
use crate::generate::{Delta, Generation, Job};
use crate::metrics::Operation;
use crate::trace::Identity;

pub(super) async fn chat(
    State(gateway): State<Arc<Gateway>>,
    Extension(identity): Extension<Identity>,
    request: Request<Body>,
) -> Result<Response<Body>, ApiError> {
    let operation = Operation::Chat;
    route::serve(&gateway, &identity, request, operation, digest).await
}

fn digest(gateway: &Gateway, body: &[u8], begun: Begun) -> Result<(Job, ChatShape), ApiError> {
    let asked = parse_chat(body, &gateway.defaults)?;
    let model = gateway.model_name(asked.model.as_deref())?;
    let text = gateway.prompter.render(
        &asked.messages,
        asked.add_generation_prompt,
        &asked.template_variables,
        gateway.clock.unix_seconds(),
    )?;
    let prompt: Arc<[u32]> = gateway
        .encode("messages", &text, asked.add_special_tokens)?
        .into();
    let shape = ChatShape {
        id: format!("chatcmpl-{}", begun.request_id),
        created: gateway.clock.unix_seconds(),
        model,
        prompt: Arc::clone(&prompt),
        labels: Labels::new(gateway.prompter.clone(), asked.generation.tokens_as_ids),
        opened: vec![false; asked.generation.n as usize],
        asked: asked.generation.clone(),
    };
    let job = gateway.job(Encoded {
        prompts: vec![prompt],
        generation: asked.generation,
        param: "messages",
        echo: false,
        began: begun.began,
        room: begun.room,
    })?;
    Ok((job, shape))
}

struct ChatShape {
    id: String,
    created: u64,
    model: String,
    prompt: Arc<[u32]>,
    labels: Labels,
    asked: Generation,
    /// Choices whose first chunk, the one with the role, was sent.
    opened: Vec<bool>,
}

impl ChatShape {
    fn frame(&self, object: &str, choices: &[Value]) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    /// What a choice has beside its text, in both forms.
    fn report(&self, delta: &Delta) -> Map<String, Value> {
        let mut fields = Map::new();
        fields.insert("index".into(), delta.choice.into());
        let (reason, stop) = finish_fields(delta.finish.as_ref());
        fields.insert("finish_reason".into(), reason);
        fields.insert("stop_reason".into(), stop);
        let logprobs = match self.asked.logprobs {
            Some(top) if !delta.tokens.is_empty() => self.labels.chat(&delta.tokens, top),
            _ => Value::Null,
        };
        fields.insert("logprobs".into(), logprobs);
        if self.asked.return_token_ids {
            let ids: Vec<u32> = delta.tokens.iter().map(|token| token.id).collect();
            fields.insert("token_ids".into(), ids.into());
        }
        if self.asked.return_routed_experts {
            let of_prompt = delta
                .prompt
                .as_ref()
                .and_then(|prompt| prompt.routed.as_ref());
            fields.insert("routed_experts".into(), routed(of_prompt, &delta.routed));
        }
        fields
    }
}

impl Shape for ChatShape {
    fn model(&self) -> &str {
        &self.model
    }

    fn chunk(&mut self, delta: Delta) -> Option<Value> {
        let first = delta.prompt.is_some();
        let quiet = delta.text.is_empty() && delta.finish.is_none() && !first;
        let reported = self.asked.logprobs.is_some()
            || self.asked.return_token_ids
            || self.asked.return_routed_experts;
        if quiet && (!reported || delta.tokens.is_empty()) {
            return None;
        }
        let mut message = Map::new();
        if let Some(opened) = self.opened.get_mut(delta.choice)
            && !*opened
        {
            *opened = true;
            message.insert("role".into(), "assistant".into());
            message.insert("content".into(), "".into());
        }
        if !delta.text.is_empty() {
            message.insert("content".into(), delta.text.as_str().into());
        }
        let mut choice = self.report(&delta);
        choice.insert("delta".into(), message.into());
        let mut frame = self.frame("chat.completion.chunk", &[choice.into()]);
        if self.asked.return_token_ids && first {
            frame["prompt_token_ids"] = Value::from(self.prompt.as_ref());
        }
        if self.asked.include_usage {
            frame["usage"] = Value::Null;
        }
        Some(frame)
    }

    fn usage_chunk(&self, usage: Usage) -> Value {
        let mut frame = self.frame("chat.completion.chunk", &[]);
        frame["usage"] = usage.to_json();
        frame
    }

    fn whole(&self, choices: Vec<Delta>, usage: Usage) -> Value {
        let prompt = choices.first().and_then(|choice| choice.prompt.as_ref());
        let prompt_logprobs = self
            .asked
            .prompt_logprobs
            .and(prompt)
            .map(|prompt| self.labels.prompt(&prompt.logprobs));
        let choices: Vec<Value> = choices
            .iter()
            .map(|delta| {
                let mut choice = self.report(delta);
                let message = json!({
                    "role": "assistant",
                    "content": delta.text,
                    "refusal": null,
                });
                choice.insert("message".into(), message);
                choice.into()
            })
            .collect();
        let mut frame = self.frame("chat.completion", &choices);
        frame["usage"] = usage.to_json();
        if let Some(prompt_logprobs) = prompt_logprobs {
            frame["prompt_logprobs"] = prompt_logprobs;
        }
        if self.asked.return_token_ids {
            frame["prompt_token_ids"] = Value::from(self.prompt.as_ref());
        }
        frame
    }

    fn n(&self) -> usize {
        self.asked.n as usize
    }

    fn prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    fn stream(&self) -> bool {
        self.asked.stream
    }

    fn include_usage(&self) -> bool {
        self.asked.include_usage
    }
}
