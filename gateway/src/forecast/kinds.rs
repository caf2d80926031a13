//! Kinds of text: which experts a prompt will use, by the words it has.
//!
//! Prompts that were read are grouped by the experts they used (k-means on the square roots of the shares). Each group
//! has the words of its prompts and the experts of all its rows. A new prompt belongs to each kind by the probability
//! of its words there (naive Bayes, multinomial: McCallum and Nigam 1998). Words are token ids, folded into buckets.

use std::sync::Arc;

use crate::route::window::clusters;
use crate::signature::{Profile, Signature};

/// Most kinds; with more, each has too few examples to be known by.
const KINDS: usize = 8;
/// Examples per kind below which there are fewer kinds.
const LEAST: usize = 12;
/// Buckets of words.
const BUCKETS: usize = 4096;
/// Tokens of a prompt that are looked at.
const TOKENS: usize = 1024;
/// Words whose evidence counts in full. Neighbouring words depend on each other, so that more of them are worth less
/// than their number: without a bound every guess would be a certainty.
const EVIDENCE: f32 = 32.0;
/// Times that every word is taken to have been seen in every kind.
const SMOOTHING: f32 = 0.1;

/// How often each bucket of words stands in the beginning of a prompt, ascending by bucket. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Words(Arc<[(u16, u16)]>);

impl Words {
    /// The words of a prompt.
    #[must_use]
    pub fn of(prompt: &[u32]) -> Self {
        // Below BUCKETS, so it fits.
        let bucket = |token: &u32| (*token as usize % BUCKETS) as u16;
        let mut buckets: Vec<u16> = prompt.iter().take(TOKENS).map(bucket).collect();
        buckets.sort_unstable();
        let same = buckets.chunk_by(|one, next| one == next);
        // No more than TOKENS of one.
        Self(same.map(|same| (same[0], same.len() as u16)).collect())
    }

    fn len(&self) -> f32 {
        self.0.iter().map(|(_, count)| f32::from(*count)).sum()
    }
}

/// A prompt that was read.
#[derive(Debug, Clone)]
pub struct Example {
    /// Its words.
    pub words: Words,
    /// What it used.
    pub signature: Arc<Signature>,
}

#[derive(Debug)]
struct Kind {
    /// Logarithm of its share of the examples.
    prior: f32,
    /// Logarithm of the probability of each bucket.
    words: Vec<f32>,
    /// Share of each expert in its layer's rows, layer-major.
    experts: Vec<f64>,
}

/// What kinds of text there are.
#[derive(Debug)]
pub struct Kinds {
    experts: usize,
    kinds: Vec<Kind>,
}

impl Kinds {
    /// Kinds of `examples`; `None` without any, or if they are of several models.
    #[must_use]
    pub fn fit(examples: &[Example]) -> Option<Self> {
        let first = examples.first()?.signature.as_ref();
        let like = |example: &Example| {
            let other = &example.signature;
            other.experts == first.experts && other.counts.len() == first.counts.len()
        };
        if !examples.iter().all(like) {
            return None;
        }
        // A row chooses one expert here: only shares matter.
        let points: Option<Vec<Vec<f32>>> = examples
            .iter()
            .map(|example| Some(Profile::of(&example.signature, 1)?.roots().collect()))
            .collect();
        let m = (examples.len() / LEAST).clamp(1, KINDS);
        let of = clusters::nearest(&points?, m, examples.len() as u64).of;
        let kinds = (0..m).filter_map(|kind| {
            let own = examples.iter().zip(&of).filter(|(_, of)| **of == kind);
            Kind::of(own.map(|(example, _)| example), examples.len())
        });
        Some(Self {
            experts: first.experts,
            kinds: kinds.collect(),
        })
    }

    /// Number of kinds, at least one.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Whether there are none; never so after a fit.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// Whether a histogram has the shape of these kinds.
    #[must_use]
    pub fn fits(&self, experts: usize, entries: usize) -> bool {
        self.experts == experts && self.kinds.iter().all(|kind| kind.experts.len() == entries)
    }

    /// To what part a prompt is of each kind; sums up to 1.
    #[must_use]
    pub fn guess(&self, words: &Words) -> Vec<f32> {
        let weight = (EVIDENCE / words.len().max(1.0)).min(1.0);
        let log = |kind: &Kind| {
            let words = words
                .0
                .iter()
                .map(|(bucket, count)| f32::from(*count) * kind.words[usize::from(*bucket)]);
            kind.prior + weight * words.sum::<f32>()
        };
        let logs: Vec<f32> = self.kinds.iter().map(log).collect();
        let most = logs.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let parts: Vec<f32> = logs.iter().map(|log| (log - most).exp()).collect();
        let sum: f32 = parts.iter().sum();
        parts.iter().map(|part| part / sum).collect()
    }

    /// Share of each expert in its layer's rows of the kinds, by their weights; layer-major.
    #[must_use]
    pub fn shares(&self, weights: &[f64]) -> Vec<f64> {
        let entries = self.kinds.first().map_or(0, |kind| kind.experts.len());
        let mut sum = vec![0.0; entries];
        for (kind, weight) in self.kinds.iter().zip(weights) {
            for (sum, share) in sum.iter_mut().zip(&kind.experts) {
                *sum += weight * share;
            }
        }
        sum
    }
}

impl Kind {
    #[expect(
        single_use_lifetimes,
        reason = "anonymous lifetimes in impl Trait are unstable"
    )]
    fn of<'a>(own: impl Iterator<Item = &'a Example>, all: usize) -> Option<Self> {
        let mut words = vec![SMOOTHING; BUCKETS];
        let (mut sums, mut width, mut number) = (Vec::new(), 1, 0_u32);
        for example in own {
            number += 1;
            for (bucket, count) in &*example.words.0 {
                words[usize::from(*bucket)] += f32::from(*count);
            }
            let counts = &example.signature.counts;
            width = example.signature.experts;
            sums.resize(counts.len(), 0.0);
            for (sum, count) in sums.iter_mut().zip(counts) {
                *sum += f64::from(*count);
            }
        }
        if number == 0 {
            return None;
        }
        for layer in sums.chunks_mut(width.max(1)) {
            let rows: f64 = layer.iter().sum();
            layer.iter_mut().for_each(|share| *share /= rows.max(1.0));
        }
        let total: f32 = words.iter().sum();
        words
            .iter_mut()
            .for_each(|word| *word = (*word / total).ln());
        Some(Self {
            prior: (number as f32 / all as f32).ln(),
            words,
            experts: sums,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::route::window::clusters::split_mix;

    /// A prompt of one of four kinds: its words are mostly its own, and so are its experts, of 16 in two layers.
    pub(in super::super) fn example(kind: u64, seed: u64) -> (Vec<u32>, Example) {
        let draw = |at: u64| split_mix(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ at);
        let word = |at: u64| match draw(at) % 10 {
            0..=3 => (100 * (kind + 1) + draw(at + 1000) % 100) as u32,
            _ => (draw(at + 1000) % 50) as u32,
        };
        let prompt: Vec<u32> = (0..64).map(word).collect();
        let mut counts = vec![0; 32];
        for row in 0..128 {
            let own = draw(row + 5000) % 4 > 0;
            let expert = draw(row + 9000) % if own { 4 } else { 16 };
            let expert = if own { 4 * kind + expert } else { expert };
            counts[(16 * (row % 2) + expert) as usize] += 1;
        }
        let signature = Arc::new(Signature::new(16, counts).unwrap());
        let words = Words::of(&prompt);
        (prompt, Example { words, signature })
    }

    pub(in super::super) fn examples(n: u64) -> Vec<Example> {
        (0..n).map(|at| example(at % 4, at).1).collect()
    }

    #[test]
    fn a_prompt_nobody_has_read_is_known_by_its_words() {
        let kinds = Kinds::fit(&examples(96)).unwrap();
        let mut right = 0.0;
        for at in 0..40 {
            let (prompt, _) = example(at % 4, 10_000 + at);
            let guess: Vec<f64> = kinds
                .guess(&Words::of(&prompt))
                .into_iter()
                .map(f64::from)
                .collect();
            assert!((guess.iter().sum::<f64>() - 1.0).abs() < 1e-5);
            let shares = kinds.shares(&guess);
            let own = 4 * (at % 4) as usize;
            right += shares[own..own + 4].iter().sum::<f64>() / 40.0;
        }
        // Three quarters of the rows and a quarter of the rest are of the kind's own experts.
        assert!(right > 0.7, "{right}");
    }

    #[test]
    fn without_words_all_kinds_are_as_likely_as_they_are_frequent() {
        let kinds = Kinds::fit(&examples(96)).unwrap();
        let guess = kinds.guess(&Words::of(&[]));
        let shares = kinds.shares(&guess.iter().copied().map(f64::from).collect::<Vec<_>>());
        assert!(
            shares.iter().all(|share| (0.03..0.1).contains(share)),
            "{shares:?}"
        );
        assert!((shares[..16].iter().sum::<f64>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn few_examples_make_one_kind_and_odd_ones_none() {
        assert!(Kinds::fit(&[]).is_none());
        let mut few = examples(5);
        assert_eq!(Kinds::fit(&few).unwrap().len(), 1);
        let odd = Arc::new(Signature::new(8, vec![1; 32]).unwrap());
        few[3].signature = odd;
        assert!(Kinds::fit(&few).is_none());
    }
}
