//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response};
use serde::Serialize;
use serde_json::Value;

use super::chat_request::parse_chat;
use super::logprobs::{Labels, routed};
use super::route::{self, Begun};
use super::shape::{Frame, Shape, Usage, finish_fields};
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

/// A choice: in a chunk with `delta`, in a whole answer with `message`.
#[derive(Debug, Default, Serialize)]
struct ChatChoice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Message<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message<'a>>,
    finish_reason: Option<&'static str>,
    stop_reason: Value,
    logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_experts: Option<Value>,
}

/// What the model says, or what of it is new.
#[derive(Debug, Default, Serialize)]
struct Message<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<Value>,
}

impl ChatShape {
    const fn frame<'a>(
        &'a self,
        object: &'static str,
        choices: Vec<ChatChoice<'a>>,
    ) -> Frame<'a, ChatChoice<'a>> {
        Frame {
            id: self.id.as_str(),
            object,
            created: self.created,
            model: self.model.as_str(),
            choices,
            prompt_logprobs: None,
            prompt_token_ids: None,
            usage: None,
        }
    }

    /// What a choice has beside its text, in both forms.
    fn report<'a>(&self, delta: &Delta) -> ChatChoice<'a> {
        let asked = &self.asked;
        let (finish_reason, stop_reason) = finish_fields(delta.finish.as_ref());
        let logprobs = asked.logprobs.filter(|_| !delta.tokens.is_empty());
        let ids = || delta.tokens.iter().map(|token| token.id).collect();
        let experts = || {
            let prompt = delta.prompt.as_ref();
            let of_prompt = prompt.and_then(|prompt| prompt.routed.as_ref());
            routed(of_prompt, &delta.routed)
        };
        ChatChoice {
            index: delta.choice,
            finish_reason,
            stop_reason,
            logprobs: logprobs.map(|top| self.labels.chat(&delta.tokens, top)),
            token_ids: asked.return_token_ids.then(ids),
            routed_experts: asked.return_routed_experts.then(experts),
            ..ChatChoice::default()
        }
    }

    /// Whether a choice speaks for the first time.
    fn opens(&mut self, choice: usize) -> bool {
        let opened = self.opened.get_mut(choice);
        opened.is_some_and(|opened| !std::mem::replace(opened, true))
    }
}

impl Shape for ChatShape {
    fn model(&self) -> &str {
        &self.model
    }

    fn chunk<'a>(&'a mut self, delta: &'a Delta) -> Option<impl Serialize + 'a> {
        let first = delta.prompt.is_some();
        let quiet = delta.text.is_empty() && delta.finish.is_none() && !first;
        let reported = self.asked.logprobs.is_some()
            || self.asked.return_token_ids
            || self.asked.return_routed_experts;
        if quiet && (!reported || delta.tokens.is_empty()) {
            return None;
        }
        let opens = self.opens(delta.choice);
        let mut choice = self.report(delta);
        choice.delta = Some(Message {
            role: opens.then_some("assistant"),
            content: (opens || !delta.text.is_empty()).then_some(delta.text.as_str()),
            refusal: None,
        });
        let mut frame = self.frame("chat.completion.chunk", vec![choice]);
        let asks = self.asked.return_token_ids && first;
        frame.prompt_token_ids = asks.then_some(self.prompt.as_ref());
        frame.usage = self.asked.include_usage.then_some(Value::Null);
        Some(frame)
    }

    fn usage_chunk(&self, usage: Usage) -> impl Serialize {
        let mut frame = self.frame("chat.completion.chunk", Vec::new());
        frame.usage = Some(usage.to_json());
        frame
    }

    fn whole<'a>(&'a self, choices: &'a [Delta], usage: Usage) -> impl Serialize + 'a {
        let prompt = choices.first().and_then(|choice| choice.prompt.as_ref());
        let prompt_logprobs = self
            .asked
            .prompt_logprobs
            .and(prompt)
            .map(|prompt| self.labels.prompt(&prompt.logprobs));
        let choices = choices.iter().map(|delta| ChatChoice {
            message: Some(Message {
                role: Some("assistant"),
                content: Some(&delta.text),
                refusal: Some(Value::Null),
            }),
            ..self.report(delta)
        });
        let asks = self.asked.return_token_ids;
        Frame {
            prompt_logprobs,
            prompt_token_ids: asks.then_some(self.prompt.as_ref()),
            usage: Some(usage.to_json()),
            ..self.frame("chat.completion", choices.collect())
        }
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
