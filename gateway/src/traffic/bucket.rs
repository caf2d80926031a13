//! A token bucket: what may be spent in a minute.

use std::time::Duration;

/// Seconds in which an empty bucket is full again.
const MINUTE: f64 = 60.0;

/// What is left of a minute. `None`: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// Requests.
    pub requests: Option<Level>,
    /// Tokens.
    pub tokens: Option<Level>,
}

/// One limit at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level {
    /// Per minute.
    pub limit: u64,
    /// Left.
    pub remaining: u64,
    /// Time until all is there again.
    pub reset: Duration,
    /// Time until what was asked for is there; 0 if it is.
    pub wait: Duration,
}

/// Full at first; fills evenly. May be in debt, when more was used than expected.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bucket {
    limit: f64,
    level: f64,
    at: Duration,
}

impl Bucket {
    pub(super) fn new(limit: u64, now: Duration) -> Self {
        let limit = limit as f64;
        Self {
            limit,
            level: limit,
            at: now,
        }
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.level = (self.level + self.limit * passed / MINUTE).min(self.limit);
        self.at = self.at.max(now);
    }

    /// The level, and how long to wait for `wanted`.
    pub(super) fn look(&mut self, wanted: u64, now: Duration) -> Level {
        self.fill(now);
        let time = |missing: f64| {
            Duration::from_secs_f64((missing.max(0.0) * MINUTE / self.limit).min(1e9))
        };
        Level {
            limit: self.limit as u64,
            remaining: self.level.max(0.0) as u64,
            reset: time(self.limit - self.level),
            wait: time(wanted as f64 - self.level),
        }
    }

    /// Takes `amount`; a negative one is given back.
    pub(super) fn take(&mut self, amount: f64, now: Duration) {
        self.fill(now);
        self.level = (self.level - amount).min(self.limit);
    }

    pub(super) fn is_full(&mut self, now: Duration) -> bool {
        self.fill(now);
        self.level >= self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn it_fills_evenly_and_never_over() {
        let mut bucket = Bucket::new(60, S(0));
        bucket.take(60.0, S(0));
        let level = bucket.look(1, S(0));
        assert_eq!((level.remaining, level.wait, level.reset), (0, S(1), S(60)));
        assert_eq!(bucket.look(1, S(10)).remaining, 10);
        assert_eq!(bucket.look(60, S(1000)).remaining, 60);
        assert!(bucket.is_full(S(1000)));
        bucket.take(-5.0, S(1000));
        assert_eq!(bucket.look(0, S(1000)).remaining, 60);
    }

    #[test]
    fn a_debt_is_paid_before_anything_else() {
        let mut bucket = Bucket::new(60, S(0));
        bucket.take(120.0, S(0));
        let level = bucket.look(1, S(0));
        assert_eq!((level.remaining, level.wait), (0, S(61)));
        // A clock that stands still gives nothing, and one that goes back takes nothing.
        assert_eq!(bucket.look(1, S(0)).wait, S(61));
        assert_eq!(bucket.look(1, S(61)).wait, S(0));
        assert_eq!(bucket.look(1, S(5)).wait, S(0));
    }
}
