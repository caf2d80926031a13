//! SGLang's scheduler over gRPC, as far as a gateway in front of it asks.

use std::pin::Pin;
use std::sync::Arc;

use foregate_wire::sglang::generate_response::Response as Part;
use foregate_wire::sglang::sglang_scheduler_server::SglangScheduler;
use foregate_wire::sglang::{
    GenerateComplete, GenerateRequest, GenerateResponse, GenerateStreamChunk,
    GetModelInfoRequest, GetModelInfoResponse, GetServerInfoRequest, GetServerInfoResponse,
    HealthCheckRequest, HealthCheckResponse,
};
use foregate_wire::tonic::{Request, Response, Status, async_trait};
use futures::{Stream, stream};

use super::schedule::Pace;
use super::{NAME, Script};

/// One back end.
pub(super) struct Face(pub(super) Arc<Script>);

#[async_trait]
impl SglangScheduler for Face {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let params = request.sampling_params.unwrap_or_default();
        let Some(tokens) = params.max_new_tokens else {
            return Err(Status::invalid_argument(
                "sampling_params.max_new_tokens: the bench's stub ends by it; say how many",
            ));
        };
        let input = request.tokenized.unwrap_or_default().input_ids;
        let answer = Answer {
            script: Arc::clone(&self.0),
            pace: self.0.schedule.begin(tokens),
            id: request.request_id,
            prompt: input.len() as u32,
            streamed: request.stream,
            ended: false,
        };
        let parts = stream::unfold(answer, |mut answer| async {
            let part = answer.next().await?;
            let response = GenerateResponse {
                request_id: answer.id.clone(),
                response: Some(part),
            };
            Some((Ok(response), answer))
        });
        Ok(Response::new(Box::pin(parts)))
    }

    async fn health_check(
        &self,
        _request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(HealthCheckResponse {
            healthy: true,
            message: String::new(),
        }))
    }

    async fn get_model_info(
        &self,
        _request: Request<GetModelInfoRequest>,
    ) -> Result<Response<GetModelInfoResponse>, Status> {
        let number = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
        Ok(Response::new(GetModelInfoResponse {
            model_path: self.0.model.clone(),
            tokenizer_path: self.0.model.clone(),
            is_generation: true,
            served_model_name: NAME.to_owned(),
            max_context_length: number(self.0.spec.max_positions),
            vocab_size: number(self.0.spec.vocab),
        }))
    }

    async fn get_server_info(
        &self,
        _request: Request<GetServerInfoRequest>,
    ) -> Result<Response<GetServerInfoResponse>, Status> {
        Ok(Response::new(GetServerInfoResponse {
            server_type: "grpc".to_owned(),
        }))
    }
}

/// An answer on its way.
struct Answer {
    script: Arc<Script>,
    pace: Pace,
    id: String,
    prompt: u32,
    streamed: bool,
    ended: bool,
}

impl Answer {
    async fn next(&mut self) -> Option<Part> {
        if self.ended {
            return None;
        }
        if !self.streamed {
            self.pace.all().await;
        }
        let Some(index) = self.pace.next().await else {
            self.ended = true;
            return Some(Part::Complete(self.whole()));
        };
        Some(Part::Chunk(GenerateStreamChunk {
            token_ids: vec![self.script.token(index).0],
            prompt_tokens: self.prompt,
            completion_tokens: index + 1,
        }))
    }

    fn whole(&self) -> GenerateComplete {
        let tokens = self.pace.told();
        GenerateComplete {
            output_ids: (0..tokens)
                .map(|index| self.script.token(index).0)
                .collect(),
            finish_reason: "length".to_owned(),
            prompt_tokens: self.prompt,
            completion_tokens: tokens,
        }
    }
}
