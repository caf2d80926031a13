//! When the tokens of an answer come.

use std::sync::Mutex;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until};

/// The moments of an answer's tokens, in microseconds. The timer behind them has a grain of a millisecond and is never early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub(in crate::bench) struct Delays {
    /// Microseconds from a request to its first token.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=60_000_000))]
    pub(in crate::bench) first_us: u64,
    /// Microseconds between two tokens.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=60_000_000))]
    pub(in crate::bench) between_us: u64,
}

impl Delays {
    /// From a request to its token of this index.
    pub(in crate::bench) const fn until(self, index: u32) -> Duration {
        let between = self.between_us.saturating_mul(index as u64);
        Duration::from_micros(self.first_us.saturating_add(between))
    }
}

/// The delays of the answers that begin now.
#[derive(Debug)]
pub(super) struct Schedule(Mutex<Delays>);

impl Schedule {
    pub(super) const fn new(delays: Delays) -> Self {
        Self(Mutex::new(delays))
    }

    pub(super) fn set(&self, delays: Delays) {
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) = delays;
    }

    /// An answer of so many tokens that begins now.
    pub(super) fn begin(&self, tokens: u32) -> Pace {
        Pace {
            since: Instant::now(),
            delays: *self.0.lock().unwrap_or_else(|e| e.into_inner()),
            tokens,
            next: 0,
        }
    }
}

/// Where an answer is.
#[derive(Debug)]
pub(super) struct Pace {
    since: Instant,
    delays: Delays,
    tokens: u32,
    next: u32,
}

impl Pace {
    /// Waits for the next token and gives its index; `None` after the last. A moment counts from the answer's beginning, so
    /// a late token makes no other late.
    pub(super) async fn next(&mut self) -> Option<u32> {
        if self.next >= self.tokens {
            return None;
        }
        let index = self.next;
        self.next += 1;
        let until = self.delays.until(index);
        if !until.is_zero() {
            sleep_until(self.since + until).await;
        }
        Some(index)
    }

    /// Tokens that have come.
    pub(super) const fn told(&self) -> u32 {
        self.next
    }

    /// Waits until all tokens have come.
    pub(super) async fn all(&mut self) {
        self.next = self.next.max(self.tokens.saturating_sub(1));
        while self.next().await.is_some() {}
    }
}
