//! Time of the best pass.

use std::time::Duration;

use foregate_kernels::OpError;
use tokio::time::Instant;

use crate::error::CliError;

/// Passes at least, so that one has everything warm.
const LEAST: usize = 3;

/// How long each figure may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    budget: Duration,
}

impl Clock {
    pub(super) const fn new(milliseconds: u64) -> Self {
        Self {
            budget: Duration::from_millis(milliseconds),
        }
    }

    /// Seconds of the best of many passes; each is told its number.
    pub(super) fn best(
        self,
        mut pass: impl FnMut(usize) -> Result<(), OpError>,
    ) -> Result<f64, CliError> {
        let begin = Instant::now();
        let mut best = Duration::MAX;
        for number in 0.. {
            if number >= LEAST && begin.elapsed() >= self.budget {
                break;
            }
            let since = Instant::now();
            pass(number).map_err(|error| CliError::runtime("operation", &error))?;
            best = best.min(since.elapsed());
        }
        Ok(best.as_secs_f64())
    }
}
