//! How fast the cluster is at the moment, for deadlines: learnt from requests of one sequence that ended.

use std::time::Duration;

/// What one sequence took, from its grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Tokens of its prompt.
    pub prompt: u64,
    /// Until the first token.
    pub first: Duration,
    /// From there to the last one.
    pub rest: Duration,
    /// Tokens of the answer, the first included.
    pub answer: u64,
}

/// Tokens of an answer before any has ended.
const ANSWER: f64 = 120.0;
/// Weight of a new sample in means.
const NEW: f64 = 1.0 / 32.0;
/// After this time without a sample nothing is known.
const STALE: Duration = Duration::from_secs(30);

/// The time to a first token grows with the prompt: a line through what was seen, old samples fading.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Weighted sums of 1, x, y, x², xy; x: prompt tokens, y: seconds.
    sums: [f64; 5],
    per_token: Option<f64>,
    answer: Option<f64>,
    seen: Duration,
}

/// What a request may expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) first: Duration,
    pub(super) per_token: Duration,
}

impl Pace {
    pub(super) fn observe(&mut self, sample: Sample, now: Duration) {
        if now.saturating_sub(self.seen) > STALE {
            (self.sums, self.per_token) = ([0.0; 5], None);
        }
        self.seen = now;
        let (x, y) = (sample.prompt as f64, sample.first.as_secs_f64());
        for (sum, new) in self.sums.iter_mut().zip([1.0, x, y, x * x, x * y]) {
            *sum = *sum * (1.0 - NEW) + new;
        }
        let mean =
            |old: Option<f64>, new: f64| Some(old.map_or(new, |old| old + (new - old) * NEW));
        self.answer = mean(self.answer, sample.answer as f64);
        if sample.answer > 1 {
            let per_token = sample.rest.as_secs_f64() / (sample.answer - 1) as f64;
            self.per_token = mean(self.per_token, per_token);
        }
    }

    /// Tokens of a usual answer.
    pub(super) fn answer(&self) -> u64 {
        self.answer.unwrap_or(ANSWER).round().max(1.0) as u64
    }

    /// `None` as long as nothing recent is known.
    pub(super) fn of(&self, prompt: u64, now: Duration) -> Option<Expected> {
        let [n, x, y, xx, xy] = self.sums;
        if n == 0.0 || now.saturating_sub(self.seen) > STALE {
            return None;
        }
        let spread = n * xx - x * x;
        // Prompts of one length give no slope.
        let slope = if spread > n * n * 1e-9 {
            ((n * xy - x * y) / spread).max(0.0)
        } else {
            0.0
        };
        let base = ((y - slope * x) / n).max(0.0);
        let seconds = |value: f64| Duration::from_secs_f64(value.clamp(0.0, 1e6));
        Some(Expected {
            first: seconds(base + slope * prompt as f64),
            per_token: seconds(self.per_token.unwrap_or(0.0)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_prompt_is_no_reason_to_refuse_a_short_one() {
        let mut pace = Pace::default();
        let now = Duration::from_secs(1);
        assert_eq!((pace.of(10, now), pace.answer()), (None, 120));
        for prompt in [10_u64, 10_000, 1000, 5000].repeat(20) {
            pace.observe(
                Sample {
                    prompt,
                    first: Duration::from_micros(10_000 + 100 * prompt),
                    rest: Duration::from_millis(180),
                    answer: 10,
                },
                now,
            );
        }
        let of = |prompt| pace.of(prompt, now).unwrap();
        assert!(of(10).first.abs_diff(Duration::from_millis(11)) < Duration::from_millis(1));
        assert!(of(8000).first.abs_diff(Duration::from_millis(810)) < Duration::from_millis(1));
        assert_eq!(
            (of(10).per_token, pace.answer()),
            (Duration::from_millis(20), 10)
        );
        assert_eq!(pace.of(10, now + STALE * 2), None);
    }
}
