//! The Experts service: hands resident experts to peers that a new placement gives them to.
//!
//! At most [`AT_ONCE`] experts are unpacked and streamed at a time, so that a migration does not take the
//! processor from serving; further fetches wait for at most [`WAIT`] and are then told to come back.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foregate_api::ids::{ExpertId, LayerId};
use foregate_models::ExpertWeights;
use foregate_wire::experts::experts_server::{Experts, ExpertsServer};
use foregate_wire::experts::{Chunk, FetchRequest};
use foregate_wire::tonic::{Request, Response, Status};
use futures::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::{Residency, background};

/// Experts in transfer at a time.
const AT_ONCE: usize = 2;
/// Longest wait for a place.
const WAIT: Duration = Duration::from_secs(5);
/// Bytes of one chunk.
const CHUNK: usize = 256 << 10;

/// Serves experts of one worker.
#[derive(Debug)]
pub struct ExpertsService {
    residency: Arc<Residency>,
    places: Arc<Semaphore>,
}

impl ExpertsService {
    /// The service over a worker's resident experts.
    #[must_use]
    pub fn server(residency: Arc<Residency>) -> ExpertsServer<Self> {
        ExpertsServer::new(Self {
            residency,
            places: Arc::new(Semaphore::new(AT_ONCE)),
        })
    }

    fn find(&self, request: &FetchRequest) -> Result<Arc<ExpertWeights>, Status> {
        let item = (LayerId(request.layer), ExpertId(request.expert));
        self.residency.get(item.0, item.1).ok_or_else(|| {
            Status::not_found(format!(
                "expert {} of layer {} is not resident here",
                item.1, item.0
            ))
        })
    }
}

#[foregate_wire::tonic::async_trait]
impl Experts for ExpertsService {
    type FetchStream = Pin<Box<dyn Stream<Item = Result<Chunk, Status>> + Send>>;

    async fn fetch(
        &self,
        request: Request<FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let weights = self.find(request.get_ref())?;
        let place = timeout(WAIT, Arc::clone(&self.places).acquire_owned())
            .await
            .map_err(|_| Status::resource_exhausted("too many fetches at a time"))?
            .map_err(|_| Status::unavailable("the worker shuts down"))?;
        let hash = weights.hash();
        // Unpacking touches every weight: not on a runtime thread. The place goes with it, because the work
        // goes on when the caller leaves.
        let (bytes, place) = background::run(move || (weights.to_canonical(), place))
            .await
            .map_err(|_| Status::internal("unpacking the expert failed"))?;
        let bytes = bytes
            .map_err(|error| Status::internal(format!("the expert was not read: {error}")))?;
        let chunks = chunks(Bytes::from(bytes), hash.0.to_vec(), place);
        Ok(Response::new(Box::pin(chunks)))
    }
}

/// The expert in chunks; the first has total and hash. Holds its place until the stream is dropped.
fn chunks(
    bytes: Bytes,
    hash: Vec<u8>,
    place: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<Chunk, Status>> + Send {
    let total = bytes.len() as u64;
    let first = Some((total, hash));
    futures::stream::unfold(
        (bytes, first, place),
        |(mut rest, mut first, place)| async move {
            if rest.is_empty() && first.is_none() {
                return None;
            }
            let data = rest.split_to(CHUNK.min(rest.len()));
            let (total, blake3) = first.take().unwrap_or_default();
            let chunk = Chunk {
                total,
                blake3,
                data,
            };
            Some((Ok(chunk), (rest, first, place)))
        },
    )
}
