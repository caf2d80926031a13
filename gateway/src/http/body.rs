//! Bodies of requests: how large one may be, how slow, and how many bytes of them the gateway holds.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, header};
use futures::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::error::{ApiError, clip};

/// Largest body.
pub const MAX_BODY: usize = 32 << 20;
/// Longest time a body may take to arrive.
const BODY_SECONDS: u64 = 60;
/// Bytes of bodies whose requests are in the gateway. Prompts are held as long as their requests, so this
/// bounds what a queue of large ones takes.
const ROOM: usize = 256 << 20;

/// Bytes of bodies that are read at a time: JSON takes many times its size in memory meanwhile.
const READ_AT_ONCE: usize = 2 * MAX_BODY;
/// Bodies that are read at a time, however small.
const READERS: usize = 32;

/// Room for bodies.
#[derive(Debug)]
pub struct Bodies {
    room: Arc<Semaphore>,
    reading: Arc<Semaphore>,
}

/// A body, and the room it takes until it is dropped.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) bytes: Vec<u8>,
    pub(super) room: Option<OwnedSemaphorePermit>,
}

impl Default for Bodies {
    fn default() -> Self {
        Self::with_room(ROOM)
    }
}

impl Bodies {
    fn with_room(bytes: usize) -> Self {
        Self {
            room: Arc::new(Semaphore::new(bytes)),
            reading: Arc::new(Semaphore::new(READ_AT_ONCE)),
        }
    }

    /// The whole body of a request.
    pub(super) async fn receive(&self, request: Request<Body>) -> Result<Received, ApiError> {
        if let Some(encoding) = request.headers().get(header::CONTENT_ENCODING)
            && encoding != "identity"
        {
            return Err(ApiError::encoded(&String::from_utf8_lossy(
                encoding.as_bytes(),
            )));
        }
        let announced = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.parse::<usize>().ok());
        if announced.is_some_and(|length| length > MAX_BODY) {
            return Err(ApiError::too_large(MAX_BODY));
        }
        timeout(Duration::from_secs(BODY_SECONDS), self.parts(request))
            .await
            .unwrap_or_else(|_| Err(ApiError::slow_body(BODY_SECONDS)))
    }

    /// Waits for the turn of a body of so many bytes to be read; `limit`: for so long.
    pub(super) async fn turn(
        &self,
        bytes: usize,
        limit: Duration,
    ) -> Option<OwnedSemaphorePermit> {
        let share = bytes.clamp(READ_AT_ONCE / READERS, READ_AT_ONCE);
        let share = u32::try_from(share).unwrap_or(u32::MAX);
        let turn = Arc::clone(&self.reading).acquire_many_owned(share);
        timeout(limit, turn).await.ok()?.ok()
    }

    /// Room is taken as bytes come, not as they are announced.
    async fn parts(&self, request: Request<Body>) -> Result<Received, ApiError> {
        let mut received = Received {
            bytes: Vec::new(),
            room: None,
        };
        let mut parts = request.into_body().into_data_stream();
        while let Some(part) = parts.next().await {
            let part = part.map_err(|error| {
                let why = error.to_string();
                ApiError::malformed(format!("the body could not be read: {}", clip(&why, 200)))
            })?;
            if received.bytes.len() + part.len() > MAX_BODY {
                return Err(ApiError::too_large(MAX_BODY));
            }
            let more = self.take(part.len())?;
            match &mut received.room {
                Some(room) => room.merge(more),
                None => received.room = Some(more),
            }
            received.bytes.extend_from_slice(&part);
        }
        Ok(received)
    }

    fn take(&self, bytes: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        u32::try_from(bytes)
            .ok()
            .and_then(|bytes| Arc::clone(&self.room).try_acquire_many_owned(bytes).ok())
            .ok_or_else(|| {
                ApiError::overloaded(
                    "bodies_full",
                    "the requests in work are too large together: try again later",
                    1,
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(bytes: usize) -> Request<Body> {
        Request::new(Body::from(vec![b' '; bytes]))
    }

    #[tokio::test]
    async fn room_is_taken_and_given_back() {
        let bodies = Bodies::with_room(100);
        let first = bodies.receive(request(60)).await.unwrap();
        assert_eq!(first.bytes.len(), 60);
        let refused = bodies.receive(request(60)).await.unwrap_err();
        assert_eq!(
            (refused.status.as_u16(), refused.reason),
            (429, "bodies_full")
        );
        bodies.receive(request(40)).await.unwrap();
        drop(first.bytes);
        assert!(bodies.receive(request(60)).await.is_err());
        drop(first.room);
        bodies.receive(request(100)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn few_large_bodies_and_some_small_ones_are_read_at_once() {
        let bodies = Bodies::default();
        let limit = Duration::from_secs(1);
        let large = [
            bodies.turn(MAX_BODY, limit).await,
            bodies.turn(MAX_BODY, limit).await,
        ];
        assert!(large.iter().all(Option::is_some));
        assert!(bodies.turn(1, limit).await.is_none());
        drop(large);
        let mut small = Vec::new();
        for _ in 0..READERS {
            small.push(bodies.turn(1, limit).await.unwrap());
        }
        assert!(bodies.turn(1, limit).await.is_none());
    }

    #[tokio::test]
    async fn a_compressed_body_is_refused_by_its_encoding() {
        for (encoding, status) in [("gzip", Some(415)), ("identity", None)] {
            let mut request = request(10);
            let value = encoding.parse().unwrap();
            request
                .headers_mut()
                .insert(header::CONTENT_ENCODING, value);
            let refused = Bodies::default().receive(request).await.err();
            assert_eq!(refused.map(|error| error.status.as_u16()), status);
        }
    }

    #[tokio::test]
    async fn a_body_that_was_not_announced_is_bounded_too() {
        let parts =
            futures::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b' '; 1 << 20]));
        let request = Request::new(Body::from_stream(parts));
        let refused = Bodies::default().receive(request).await.unwrap_err();
        assert_eq!(refused.status.as_u16(), 413);
    }
}
