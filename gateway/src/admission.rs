//! Who may work now: permits, a bounded queue in order of arrival, a deadline for waiting.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;

/// Longest wait that a client is told to make.
const LONGEST_RETRY: u64 = 60;

/// The gate before the upstream. A request holds one permit per sequence it runs at a time.
#[derive(Debug)]
pub struct Admission {
    permits: Arc<Semaphore>,
    max_in_flight: u32,
    max_queued: u32,
    queue_timeout: Duration,
    draining: CancellationToken,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    running: AtomicU32,
    queued: AtomicU32,
    /// Moving average of the time a permit is held, in microseconds; 0: not known yet.
    held_us: AtomicU64,
}

/// The right to work; gives everything back when dropped.
#[derive(Debug)]
pub struct Permit {
    _permit: OwnedSemaphorePermit,
    counts: Arc<Counts>,
    since: Instant,
    /// How long the request waited for it.
    pub waited: Duration,
    /// Sequences it may run at a time.
    pub sequences: u32,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.counts.running.fetch_sub(1, Ordering::Relaxed);
        let held = u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX);
        let old = self.counts.held_us.load(Ordering::Relaxed);
        // Weight 1/8 for the newest; a lost update under a race is a lost sample, nothing more.
        let new = if old == 0 {
            held
        } else {
            old - old / 8 + held / 8
        };
        self.counts.held_us.store(new.max(1), Ordering::Relaxed);
    }
}

/// Counts a waiting request out again, however the wait ends.
struct Waiting<'a>(&'a AtomicU32);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admission {
    /// A gate with these limits; `draining` closes it.
    #[must_use]
    pub fn new(
        max_in_flight: u32,
        max_queued: u32,
        queue_timeout: Duration,
        draining: CancellationToken,
    ) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(max_in_flight as usize)),
            max_in_flight,
            max_queued,
            queue_timeout,
            draining,
            counts: Arc::default(),
        }
    }

    /// Waits for a permit to run `sequences` sequences (as many of them at a time as the limit allows).
    ///
    /// # Errors
    /// 429 with `Retry-After` when the queue is full or the wait is over; 503 while draining.
    pub async fn admit(&self, sequences: usize) -> Result<Permit, ApiError> {
        if self.draining.is_cancelled() {
            return Err(draining());
        }
        let wanted = u32::try_from(sequences)
            .unwrap_or(u32::MAX)
            .clamp(1, self.max_in_flight);
        let from = Instant::now();
        if let Ok(permit) = Arc::clone(&self.permits).try_acquire_many_owned(wanted) {
            return Ok(self.granted(permit, from, wanted));
        }
        let waiting = self.queue()?;
        let acquired = tokio::select! {
            acquired = Arc::clone(&self.permits).acquire_many_owned(wanted) => acquired,
            () = self.draining.cancelled() => return Err(draining()),
            () = tokio::time::sleep(self.queue_timeout) => {
                // The figure below is for those that wait still.
                drop(waiting);
                return Err(ApiError::overloaded(
                    "queue_timeout",
                    format!("no free place within {} ms: try again later", self.queue_timeout.as_millis()),
                    self.retry_after(),
                ));
            }
        };
        match acquired {
            Ok(permit) => Ok(self.granted(permit, from, wanted)),
            Err(_) => Err(draining()),
        }
    }

    /// A place in the queue, if it has one.
    fn queue(&self) -> Result<Waiting<'_>, ApiError> {
        let queued = &self.counts.queued;
        let one_more = |waiting: u32| (waiting < self.max_queued).then_some(waiting + 1);
        match queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more) {
            Ok(_) => Ok(Waiting(queued)),
            Err(waiting) => Err(ApiError::overloaded(
                "queue_full",
                format!(
                    "every place is taken and {waiting} requests wait for one: try again later"
                ),
                self.retry_after(),
            )),
        }
    }

    fn granted(&self, permit: OwnedSemaphorePermit, from: Instant, sequences: u32) -> Permit {
        self.counts.running.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        Permit {
            _permit: permit,
            counts: Arc::clone(&self.counts),
            since: now,
            waited: now - from,
            sequences,
        }
    }

    /// Whether new requests are refused because the gateway ends.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Requests that hold a permit.
    #[must_use]
    pub fn running(&self) -> u32 {
        self.counts.running.load(Ordering::Relaxed)
    }

    /// Requests that wait for one.
    #[must_use]
    pub fn queued(&self) -> u32 {
        self.counts.queued.load(Ordering::Relaxed)
    }

    /// Seconds until a place is likely: the time requests take, times how many of them go first per place.
    #[must_use]
    pub fn retry_after(&self) -> u64 {
        let held_us = self.counts.held_us.load(Ordering::Relaxed);
        let ahead = u64::from(self.queued()) + 1;
        let seconds =
            held_us.saturating_mul(ahead) / u64::from(self.max_in_flight.max(1)) / 1_000_000;
        seconds.saturating_add(1).clamp(1, LONGEST_RETRY)
    }
}

fn draining() -> ApiError {
    ApiError::unavailable("draining", "the server is shutting down: try another one")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(in_flight: u32, queued: u32) -> (Arc<Admission>, CancellationToken) {
        let draining = CancellationToken::new();
        let gate = Admission::new(in_flight, queued, Duration::from_secs(5), draining.clone());
        (Arc::new(gate), draining)
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_queue_and_a_long_wait_are_429() {
        let (gate, _) = gate(1, 1);
        let first = gate.admit(1).await.unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn({
            let gate = Arc::clone(&gate);
            async move { gate.admit(1).await.map(|_| ()) }
        });
        tokio::task::yield_now().await;
        assert_eq!(gate.queued(), 1);
        let refused = gate.admit(1).await.unwrap_err();
        assert_eq!(
            (refused.status.as_u16(), refused.reason),
            (429, "queue_full")
        );
        assert!(
            refused.message.contains(" 1 requests wait"),
            "{}",
            refused.message
        );
        let late = tasks.join_next().await.unwrap().unwrap().unwrap_err();
        assert_eq!(late.reason, "queue_timeout");
        assert_eq!(gate.queued(), 0);
        drop(first);
        assert_eq!(gate.running(), 0);
        gate.admit(9).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn retry_after_follows_the_service_time() {
        let (gate, _) = gate(1, 8);
        let permit = gate.admit(1).await.unwrap();
        tokio::time::advance(Duration::from_secs(20)).await;
        drop(permit);
        assert_eq!(gate.retry_after(), 21);
        // The one that is refused does not stand before itself.
        let _held = gate.admit(1).await.unwrap();
        let refused = gate.admit(1).await.unwrap_err();
        assert_eq!(refused.retry_after, Some(21));
    }

    #[tokio::test]
    async fn draining_refuses_new_and_waiting_ones() {
        let (gate, draining) = gate(1, 8);
        let _held = gate.admit(1).await.unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn({
            let gate = Arc::clone(&gate);
            async move { gate.admit(1).await.map(|_| ()) }
        });
        tokio::task::yield_now().await;
        draining.cancel();
        assert_eq!(
            tasks
                .join_next()
                .await
                .unwrap()
                .unwrap()
                .unwrap_err()
                .status
                .as_u16(),
            503
        );
        assert_eq!(gate.admit(1).await.unwrap_err().reason, "draining");
    }
}
