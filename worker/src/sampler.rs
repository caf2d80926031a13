//! From one row of logits to one token, the same one every time.
//!
//! Order of operations on a row (float32 logits of the model):
//!
//! 1. log-probabilities that are reported are taken here, from the *raw* logits ([`logprobs`]);
//! 2. `logit_bias` is added;
//! 3. penalties: repetition over prompt and answer (a positive logit is divided, a negative one
//!    multiplied), then frequency (times the count in the answer) and presence, over the answer;
//! 4. tokens that may not come yet (`min_tokens`) become impossible;
//! 5. temperature below [`GREEDY_BELOW`]: the largest logit wins, ties go to the lower id;
//! 6. otherwise temperature, top-k, top-p (over what top-k left, renormalised), min-p;
//! 7. one draw: a number from a counter-based generator keyed by the seed and the *index of the
//!    token in the answer* ([`draw`]) is looked up in the cumulative sum by ascending id.
//!
//! No state survives from one token to the next, so a sequence that was preempted, resumed on
//! another worker or batched with others draws the same tokens. Sums run in float64 by ascending
//! id, exponential and logarithm are our own ([`transcendental`]): the bits do not depend on the
//! processor's C library.

pub mod draw;
pub mod logprobs;
pub mod transcendental;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use foregate_kernels::argmax;
use transcendental::exp;

/// Temperatures below this mean greedy; dividing by less would leave the range of float32.
pub const GREEDY_BELOW: f32 = 1e-5;

/// How a request wants its tokens chosen. Ranges are checked where the request comes in.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Below [`GREEDY_BELOW`] means greedy.
    pub temperature: f32,
    /// Most likely tokens to keep; 0 means all.
    pub top_k: u32,
    /// Probability mass to keep, in (0, 1]; 1 means all.
    pub top_p: f32,
    /// Least probability relative to the most likely token, in [0, 1]; 0 means none.
    pub min_p: f32,
    /// Divides the positive and multiplies the negative logits of tokens already seen; 1 means none.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens that the answer has.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the answer.
    pub frequency_penalty: f32,
    /// Added to logits, by token id (each below the vocabulary).
    pub logit_bias: BTreeMap<u32, f32>,
    /// Key of the generator.
    pub seed: u64,
}

impl Sampling {
    /// The most likely token, nothing else.
    #[must_use]
    pub const fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
        }
    }

    /// Whether any penalty looks at earlier tokens.
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }

    fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }

    fn keeps_all(&self) -> bool {
        self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0
    }
}

/// What penalties look at: which tokens the prompt has, how often the answer has each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    prompt: BTreeSet<u32>,
    answer: BTreeMap<u32, u32>,
}

impl History {
    /// The history of a sequence whose first `prompt_len` tokens are the prompt.
    #[must_use]
    pub fn new(tokens: &[u32], prompt_len: usize) -> Self {
        let (prompt, answer) = tokens.split_at(prompt_len.min(tokens.len()));
        let mut history = Self {
            prompt: prompt.iter().copied().collect(),
            answer: BTreeMap::new(),
        };
        answer.iter().for_each(|token| history.push(*token));
        history
    }

    /// Adds a token of the answer.
    pub fn push(&mut self, token: u32) {
        *self.answer.entry(token).or_default() += 1;
    }
}

/// Why no token could be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SamplerError {
    /// The model gave something that is not a number, or an infinity.
    #[error("logit of token {0} is not finite")]
    NotFinite(u32),
    /// The row is empty.
    #[error("the row of logits is empty")]
    Empty,
    /// Every token is masked.
    #[error("no token is allowed: min_tokens masks the whole vocabulary")]
    AllMasked,
}

/// One token's circumstances.
#[derive(Debug, Clone, Copy)]
pub struct Turn<'a> {
    /// How to choose.
    pub sampling: &'a Sampling,
    /// What came before; `None` if no penalty is set.
    pub history: Option<&'a History>,
    /// Token ids that may not come yet.
    pub masked: &'a [u32],
    /// Index of the token in the answer.
    pub index: u32,
}

/// Chooses tokens. Holds scratch memory only.
#[derive(Debug, Default)]
pub struct Sampler {
    row: Vec<f32>,
    candidates: Vec<u32>,
}

impl Sampler {
    /// The token for a row of raw logits.
    ///
    /// # Errors
    /// When the row is empty or not finite, or when every token is masked.
    pub fn choose(&mut self, logits: &[f32], turn: &Turn<'_>) -> Result<u32, SamplerError> {
        check(logits)?;
        if is_plain(turn) && turn.sampling.is_greedy() {
            return Ok(argmax(logits));
        }
        self.row.clear();
        self.row.extend_from_slice(logits);
        adjust(&mut self.row, turn);
        let best = argmax(&self.row);
        if self.row[best as usize] == f32::NEG_INFINITY {
            return Err(SamplerError::AllMasked);
        }
        if turn.sampling.is_greedy() {
            return Ok(best);
        }
        Ok(self.draw(best, turn))
    }

    fn draw(&mut self, best: u32, turn: &Turn<'_>) -> u32 {
        let weigh = Weigh::new(self.row[best as usize], turn.sampling.temperature);
        let at = draw::uniform(turn.sampling.seed, turn.index);
        if turn.sampling.keeps_all() {
            let all = self.row.iter().enumerate();
            return lookup(
                all.map(|(id, logit)| (id as u32, weigh.of(*logit))),
                at,
                best,
            );
        }
        self.filter(turn.sampling, weigh);
        let kept = self.candidates.iter();
        let row = &self.row;
        lookup(kept.map(|id| (*id, weigh.of(row[*id as usize]))), at, best)
    }

    /// Leaves the ids that top-k, top-p and min-p keep, ascending.
    fn filter(&mut self, sampling: &Sampling, weigh: Weigh) {
        let row = &self.row;
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates
            .extend((0..row.len() as u32).filter(|id| row[*id as usize] > f32::NEG_INFINITY));
        keep_top_k(candidates, row, sampling.top_k as usize);
        keep_top_p(candidates, row, sampling.top_p, weigh);
        if sampling.min_p > 0.0 {
            let least = f64::from(sampling.min_p);
            candidates.retain(|id| weigh.of(row[*id as usize]) >= least);
        }
        candidates.sort_unstable();
    }
}

/// A logit's weight: `exp((logit - best) / temperature)`, 1 for the best.
#[derive(Clone, Copy)]
struct Weigh {
    best: f64,
    scale: f64,
}

impl Weigh {
    fn new(best: f32, temperature: f32) -> Self {
        Self {
            best: f64::from(best),
            scale: 1.0 / f64::from(temperature),
        }
    }

    fn of(self, logit: f32) -> f64 {
        exp((f64::from(logit) - self.best) * self.scale)
    }
}

fn check(logits: &[f32]) -> Result<(), SamplerError> {
    if logits.is_empty() {
        return Err(SamplerError::Empty);
    }
    // All of them in one pass without a branch; which one it is matters to an error only.
    if logits
        .iter()
        .fold(true, |all, logit| all & logit.is_finite())
    {
        return Ok(());
    }
    let at = logits.iter().position(|logit| !logit.is_finite());
    Err(SamplerError::NotFinite(at.unwrap_or(0) as u32))
}

fn is_plain(turn: &Turn<'_>) -> bool {
    turn.history.is_none() && turn.masked.is_empty() && turn.sampling.logit_bias.is_empty()
}

fn adjust(row: &mut [f32], turn: &Turn<'_>) {
    for (id, bias) in &turn.sampling.logit_bias {
        if let Some(logit) = row.get_mut(*id as usize) {
            *logit += bias;
        }
    }
    if let Some(history) = turn.history {
        penalise(row, turn.sampling, history);
    }
    for id in turn.masked {
        if let Some(logit) = row.get_mut(*id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

fn penalise(row: &mut [f32], sampling: &Sampling, history: &History) {
    if sampling.repetition_penalty != 1.0 {
        let only_answer = history
            .answer
            .keys()
            .filter(|id| !history.prompt.contains(id));
        for id in history.prompt.iter().chain(only_answer) {
            if let Some(logit) = row.get_mut(*id as usize) {
                if *logit > 0.0 {
                    *logit /= sampling.repetition_penalty;
                } else {
                    *logit *= sampling.repetition_penalty;
                }
            }
        }
    }
    for (id, count) in &history.answer {
        if let Some(logit) = row.get_mut(*id as usize) {
            *logit -= sampling.frequency_penalty * *count as f32;
            *logit -= sampling.presence_penalty;
        }
    }
}

/// Most likely first, ties to the lower id.
fn by_rank(row: &[f32], a: u32, b: u32) -> Ordering {
    row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b))
}

fn keep_top_k(candidates: &mut Vec<u32>, row: &[f32], k: usize) {
    if k == 0 || k >= candidates.len() {
        return;
    }
    candidates.select_nth_unstable_by(k - 1, |a, b| by_rank(row, *a, *b));
    candidates.truncate(k);
}

/// Keeps the shortest list of most likely tokens whose weight reaches `top_p` of the whole.
/// Orders only as many as it needs: the head is grown by a factor until the mass is reached.
fn keep_top_p(candidates: &mut Vec<u32>, row: &[f32], top_p: f32, weigh: Weigh) {
    if top_p >= 1.0 {
        return;
    }
    candidates.sort_unstable();
    let total: f64 = candidates
        .iter()
        .map(|id| weigh.of(row[*id as usize]))
        .sum();
    let goal = f64::from(top_p) * total;
    let mut mass = 0.0;
    let mut ordered = 0;
    let mut head = 64;
    while ordered < candidates.len() {
        let rest = &mut candidates[ordered..];
        let take = head.min(rest.len());
        if take < rest.len() {
            rest.select_nth_unstable_by(take - 1, |a, b| by_rank(row, *a, *b));
        }
        rest[..take].sort_unstable_by(|a, b| by_rank(row, *a, *b));
        for at in ordered..ordered + take {
            mass += weigh.of(row[candidates[at] as usize]);
            if mass >= goal {
                candidates.truncate(at + 1);
                return;
            }
        }
        ordered += take;
        head *= 4;
    }
}

/// The id at which the cumulative weight passes `at` of the total. `best` if rounding passes the end.
fn lookup(weights: impl Iterator<Item = (u32, f64)> + Clone, at: f64, best: u32) -> u32 {
    let total: f64 = weights.clone().map(|(_, weight)| weight).sum();
    let goal = at * total;
    let mut mass = 0.0;
    for (id, weight) in weights {
        mass += weight;
        if mass > goal {
            return id;
        }
    }
    best
}

#[cfg(test)]
mod tests;
