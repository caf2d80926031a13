//! Wall time for the few places that show it to people: `created`, and templates that print a date.

use std::time::{Duration, UNIX_EPOCH};

use tokio::time::Instant;

/// Wall time read once at start, carried on by the monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    started: Instant,
    unix: Duration,
}

impl Clock {
    /// Reads the wall clock.
    #[must_use]
    pub fn start() -> Self {
        #[expect(
            clippy::disallowed_methods,
            reason = "the answer's `created` field is wall time; read once, here"
        )]
        let unix = std::time::SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            started: Instant::now(),
            unix,
        }
    }

    /// Seconds since 1970.
    #[must_use]
    pub fn unix_seconds(&self) -> u64 {
        (self.unix + self.started.elapsed()).as_secs()
    }

    /// Milliseconds since 1970.
    #[must_use]
    pub fn unix_millis(&self) -> u64 {
        u64::try_from((self.unix + self.started.elapsed()).as_millis()).unwrap_or(u64::MAX)
    }
}
