//! Prompts and arrival times, drawn from a seed so that runs repeat.

use std::path::{Path, PathBuf};
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

/// The demonstration model's held-out texts above the working directory.
pub(super) fn heldout() -> Result<Vec<PathBuf>, CliError> {
    let here =
        std::env::current_dir().map_err(|e| CliError::runtime("working directory", &e))?;
    let directory = here
        .ancestors()
        .map(|directory| directory.join("e2e/models/demo/heldout"))
        .find(|directory| directory.is_dir())
        .ok_or_else(|| {
            CliError::Usage(
                "no e2e/models/demo/heldout above the working directory; pass --prompts FILE…"
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
}
