//! The gRPC service `Generation`: from the wire to the engine and back.
//!
//! In: a `GenerateRequest` with the caller's trace in its metadata. Out: the engine's events. A request
//! is checked field by field before the engine sees it.
//!
//! | status | when |
//! |---|---|
//! | `INVALID_ARGUMENT` | a field is out of its range; the message names it |
//! | `RESOURCE_EXHAUSTED` | batch and queue are full; worth another try, elsewhere at once |
//! | `UNAVAILABLE` | the worker drains, was stopped or lost its engine or its experts; resume elsewhere |
//! | `INTERNAL` | the model gave something that is not a number |

mod prefixes;
mod trace;
mod validate;

use std::pin::Pin;
use std::time::Duration;

use foregate_wire::generation::generation_server::{Generation, GenerationServer};
use foregate_wire::generation::{GenerateEvent, GenerateRequest, PrefixEvent, PrefixesRequest};
use foregate_wire::tonic::{Request, Response, Status};
use futures::{Stream, StreamExt};

pub use validate::{FieldError, validate};

use crate::engine::{EngineHandle, StreamError, SubmitError};

/// Most bytes of a request; a prompt of a million tokens has less than five.
const MAX_REQUEST_BYTES: usize = 16 << 20;

/// `Generation` over one engine.
#[derive(Debug, Clone)]
pub struct GenerationService {
    engine: EngineHandle,
}

impl GenerationService {
    /// A service that gives its requests to `engine`.
    #[must_use]
    pub fn new(engine: EngineHandle) -> Self {
        Self { engine }
    }

    /// As a tonic service with its size limits.
    #[must_use]
    pub fn into_server(self) -> GenerationServer<Self> {
        GenerationServer::new(self).max_decoding_message_size(MAX_REQUEST_BYTES)
    }
}

#[foregate_wire::tonic::async_trait]
impl Generation for GenerationService {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateEvent, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (metadata, _, message) = request.into_parts();
        let time_left = Duration::from_millis(message.deadline_ms);
        let request = validate(message, self.engine.limits())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let span = trace::request_span(&metadata, &request);
        let events = self
            .engine
            .submit(request, Some(time_left), span)
            .map_err(|error| refusal(&error))?;
        let stream = events.map(|event| match event {
            Ok(event) => Ok(GenerateEvent { event: Some(event) }),
            Err(error) => Err(breakdown(&error)),
        });
        Ok(Response::new(Box::pin(stream)))
    }

    type PrefixesStream = Pin<Box<dyn Stream<Item = Result<PrefixEvent, Status>> + Send>>;

    async fn prefixes(
        &self,
        _request: Request<PrefixesRequest>,
    ) -> Result<Response<Self::PrefixesStream>, Status> {
        let follower = self.engine.follower().map_err(|error| refusal(&error))?;
        let events = prefixes::events(self.engine.clone(), follower);
        Ok(Response::new(Box::pin(events)))
    }
}

fn refusal(error: &SubmitError) -> Status {
    let what = error.to_string();
    match error {
        SubmitError::Full(_) => Status::resource_exhausted(what),
        SubmitError::Draining | SubmitError::Dead(_) => Status::unavailable(what),
        SubmitError::NeverFits(_) => Status::invalid_argument(format!("max_tokens: {what}")),
        SubmitError::Unsound(_) => Status::invalid_argument(what),
    }
}

fn breakdown(error: &StreamError) -> Status {
    let what = error.to_string();
    match error {
        StreamError::Stopped | StreamError::Died(_) | StreamError::Step(_) => {
            Status::unavailable(what)
        }
        StreamError::Logits(_) => Status::internal(what),
        StreamError::NeverFits(_) => Status::invalid_argument(format!("max_tokens: {what}")),
    }
}
