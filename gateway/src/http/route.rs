//! From a request to its answer: the same way for every route that generates.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, Response};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::answer;
use super::body::Received;
use super::shape::Shape;
use super::state::Gateway;
use super::traffic::Wanted;
use crate::error::ApiError;
use crate::generate::{Answer, Job};
use crate::metrics::{Call, Operation};
use crate::trace::Identity;

/// What a request has beside its body.
pub(super) struct Begun {
    /// The last part of the answer's id.
    pub(super) request_id: String,
    /// When it came.
    pub(super) began: Instant,
    /// The room its body takes.
    pub(super) room: Option<OwnedSemaphorePermit>,
}

/// How a route reads a body: the work, and the shape of its answer.
pub(super) type Digest<S> = fn(&Gateway, &[u8], Begun) -> Result<(Job, S), ApiError>;

/// Serves a request to generate.
pub(super) async fn serve<S: Shape>(
    gateway: &Arc<Gateway>,
    identity: &Identity,
    request: Request<Body>,
    operation: Operation,
    digest: Digest<S>,
) -> Result<Response<Body>, ApiError> {
    identity
        .span
        .record("gen_ai.operation.name", operation.word());
    let mut call = Call::begin(&gateway.metrics, operation);
    let started = start(gateway, identity, request, digest, &mut call).await;
    answer::respond(started, call, identity).await
}

async fn start<S: Shape>(
    gateway: &Arc<Gateway>,
    identity: &Identity,
    request: Request<Body>,
    digest: Digest<S>,
    call: &mut Call,
) -> Result<(Answer, S), ApiError> {
    let wanted = Wanted::of(request.headers(), request.extensions())?;
    let Received { bytes, room } = gateway.bodies.receive(request).await?;
    let begun = Begun {
        request_id: identity.request_id.clone(),
        began: call.began,
        room,
    };
    let digested = gateway.digest(bytes, move |gateway, bytes| digest(gateway, bytes, begun));
    let (job, shape) = digested.await?;
    call.is_for(shape.model());
    Ok((gateway.start(job, &wanted, identity).await?, shape))
}
