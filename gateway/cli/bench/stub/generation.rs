//! Foregate's own gRPC, as a worker speaks it.

use std::pin::Pin;
use std::sync::Arc;

use foregate_wire::generation::generate_event::Event;
use foregate_wire::generation::generation_server::Generation;
use foregate_wire::generation::{
    FinishReason, Finished, GenerateEvent, GenerateRequest, Prefilled, PrefixEvent,
    PrefixesRequest, Token,
};
use foregate_wire::tonic::{Request, Response, Status, async_trait};
use futures::{Stream, StreamExt, stream};

use super::Script;
use super::schedule::Pace;

/// One back end.
pub(super) struct Face(pub(super) Arc<Script>);

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[async_trait]
impl Generation for Face {
    type GenerateStream = Events<GenerateEvent>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let have = (request.token_ids.len() as u32).checked_sub(request.prompt_len);
        let Some(0) = have else {
            return Err(Status::invalid_argument(
                "token_ids: the bench's stub resumes no answer; send the prompt only",
            ));
        };
        let pace = self.0.schedule.begin(request.max_tokens);
        let answer = Answer {
            script: Arc::clone(&self.0),
            pace,
            prompt: request.prompt_len,
            at: At::Prefilled,
        };
        let events = stream::unfold(answer, |mut answer| async {
            let event = answer.next().await?;
            Some((Ok(GenerateEvent { event: Some(event) }), answer))
        });
        Ok(Response::new(Box::pin(events)))
    }

    type PrefixesStream = Events<PrefixEvent>;

    async fn prefixes(
        &self,
        _request: Request<PrefixesRequest>,
    ) -> Result<Response<Self::PrefixesStream>, Status> {
        let none = PrefixEvent {
            reset: true,
            added: Vec::new(),
            removed: Vec::new(),
        };
        let events = stream::iter([Ok(none)]).chain(stream::pending());
        Ok(Response::new(Box::pin(events)))
    }
}

enum At {
    Prefilled,
    Tokens,
    End,
}

/// An answer on its way.
struct Answer {
    script: Arc<Script>,
    pace: Pace,
    prompt: u32,
    at: At,
}

impl Answer {
    async fn next(&mut self) -> Option<Event> {
        match self.at {
            At::Prefilled => {
                self.at = At::Tokens;
                Some(Event::Prefilled(Prefilled {
                    signature: self.signature(),
                    ..Prefilled::default()
                }))
            }
            At::Tokens => match self.pace.next().await {
                Some(index) => Some(Event::Token(Token {
                    index,
                    id: self.script.token(index).0,
                    ..Token::default()
                })),
                None => {
                    self.at = At::End;
                    Some(Event::Finished(Finished {
                        reason: FinishReason::Length.into(),
                        prompt_tokens: self.prompt,
                        generated_tokens: self.pace.told(),
                        signature: self.signature(),
                        ..Finished::default()
                    }))
                }
            },
            At::End => None,
        }
    }

    /// Every row at the first experts of each layer: as long as a worker's, so that a gateway has the same to read.
    fn signature(&self) -> Vec<u32> {
        let spec = &self.script.spec;
        let layer = (0..spec.experts).map(|expert| match expert < spec.top_k {
            true => self.prompt,
            false => 0,
        });
        let layers = spec.moe_blocks.iter().filter(|moe| **moe).count();
        std::iter::repeat_n(layer, layers).flatten().collect()
    }
}
