//! Prompts and arrival times, drawn from a seed so that runs repeat.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::error::CliError;

/// A small generator of its own: the sequence of a seed never changes.
#[derive(Debug, Clone)]
pub(super) struct Draw(u64);

impl Draw {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`, which must not be 0.
    pub(super) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap_or(0)
    }

    /// A number in (0, 1].
    fn unit(&mut self) -> f64 {
        // 53 bits are exact in a double.
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// Time to the next arrival of a Poisson process.
    pub(super) fn gap(&mut self, per_second: f64) -> Duration {
        Duration::from_secs_f64(-self.unit().ln() / per_second)
    }
}

/// A number of tokens: always the same, or drawn evenly from a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Length {
    low: u32,
    high: u32,
}

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |part: &str| part.parse().ok().filter(|number| *number > 0);
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        match (number(low), number(high)) {
            (Some(low), Some(high)) if low <= high => Ok(Self { low, high }),
            _ => Err("give a number above 0 such as 128, or a range such as 64-256".to_owned()),
        }
    }
}

impl std::fmt::Display for Length {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.low == self.high {
            true => write!(f, "{}", self.low),
            false => write!(f, "{}-{}", self.low, self.high),
        }
    }
}

impl Length {
    /// The highest of its numbers.
    pub(super) const fn longest(self) -> u32 {
        self.high
    }

    /// One of its numbers.
    pub(super) fn draw(self, draw: &mut Draw) -> u32 {
        let range = (self.high - self.low) as usize + 1;
        self.low + u32::try_from(draw.below(range)).unwrap_or(0)
    }
}

/// Texts to cut prompts from.
#[derive(Debug, Clone)]
pub(super) struct Text {
    /// Name of its kind: the file's stem.
    pub(super) kind: String,
    characters: Vec<char>,
}

impl Text {
    /// Reads one file.
    pub(super) fn read(path: &Path) -> Result<Self, CliError> {
        let wrong = |what: &str| CliError::Usage(format!("prompts {}: {what}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| wrong(&error.to_string()))?;
        if text.trim().is_empty() {
            return Err(wrong("is empty"));
        }
        let kind = path.file_stem().unwrap_or_default().to_string_lossy();
        Ok(Self {
            kind: kind.into_owned(),
            characters: text.chars().collect(),
        })
    }

    /// A piece of `length` characters from a drawn place.
    pub(super) fn cut(&self, length: usize, draw: &mut Draw) -> String {
        let last = self.characters.len().saturating_sub(length);
        let start = draw.below(last + 1);
        let end = (start + length).min(self.characters.len());
        self.characters[start..end].iter().collect()
    }
}

/// The demonstration model above the working directory.
pub(super) fn demonstration() -> Result<PathBuf, CliError> {
    const WHERE: &str = "e2e/models/demo";
    above(WHERE)?.ok_or_else(|| {
        CliError::Usage(format!(
            "no {WHERE} above the working directory; pass --model DIR"
        ))
    })
}

fn above(path: &str) -> Result<Option<PathBuf>, CliError> {
    let here =
        std::env::current_dir().map_err(|e| CliError::runtime("working directory", &e))?;
    let mut found = here.ancestors().map(|directory| directory.join(path));
    Ok(found.find(|directory| directory.is_dir()))
}

/// The demonstration model's held-out texts above the working directory.
pub(super) fn heldout() -> Result<Vec<PathBuf>, CliError> {
    let directory = above("e2e/models/demo/heldout")?
        .ok_or_else(|| {
            CliError::Usage(
                "no e2e/models/demo/heldout above the working directory; pass --prompts FILE… or, for random token ids, --prompt-tokens N"
                    .to_owned(),
            )
        })?;
    let names = ["prose", "python", "rust", "markdown"];
    Ok(names
        .iter()
        .map(|name| directory.join(format!("{name}.txt")))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_mean_that_was_asked_for() {
        let mut draw = Draw::new(7);
        let sum: f64 = (0..20_000).map(|_| draw.gap(4.0).as_secs_f64()).sum();
        let mean = sum / 20_000.0;
        assert!((mean - 0.25).abs() < 0.01, "{mean}");
    }

    #[test]
    fn gaps_are_those_of_a_poisson_process_and_repeat() {
        let gaps = |seed| {
            let mut draw = Draw::new(seed);
            let gap = move || draw.gap(2.0).as_secs_f64();
            std::iter::repeat_with(gap)
                .take(20_000)
                .collect::<Vec<f64>>()
        };
        let all = gaps(3);
        assert_eq!(all, gaps(3));
        assert_ne!(all, gaps(4));
        // An exponential law: as spread as its mean, and 1 of e gaps is longer than that.
        let mean = all.iter().sum::<f64>() / 20_000.0;
        let square = all.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / 20_000.0;
        assert!((square.sqrt() - 0.5).abs() < 0.02, "{square}");
        let long = all.iter().filter(|gap| **gap > 0.5).count() as f64 / 20_000.0;
        assert!((long - (-1.0_f64).exp()).abs() < 0.02, "{long}");
    }

    #[test]
    fn lengths_are_numbers_or_ranges() {
        let mut draw = Draw::new(1);
        let length: Length = "3-5".parse().unwrap();
        let drawn: Vec<u32> = (0..1000).map(|_| length.draw(&mut draw)).collect();
        for want in 3..=5 {
            assert!(drawn.contains(&want), "{want}");
        }
        assert!(drawn.iter().all(|one| (3..=5).contains(one)));
        let same: Length = "7".parse().unwrap();
        assert_eq!(
            (same.draw(&mut draw), same.to_string()),
            (7, "7".to_owned())
        );
        for wrong in ["", "0", "0-4", "5-4", "a", "3-", "-3", "1.5", "1-2-3"] {
            assert!(wrong.parse::<Length>().is_err(), "{wrong}");
        }
    }
}
