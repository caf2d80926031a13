//! What is admitted and not yet computed: an entry per sequence, kept by guards.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwapOption;

use super::kinds::{Example, Kinds, Words};
use crate::signature::{Known, Signature};

/// Prompts that kinds are made from: the newest.
const EXAMPLES: usize = 512;
/// Bytes of their histograms; with large models it is this bound that holds.
const EXAMPLE_BYTES: usize = 16 << 20;
/// New examples after which kinds are made anew; sooner while that doubles their number.
const REFIT: usize = 64;
/// Tokens of an answer before any has ended, and the weight of a new one.
const ANSWER: (f64, f64) = (120.0, 1.0 / 32.0);
/// Rows of a kind that are blended into a request's own histogram: a short prompt says little of its answer.
const PSEUDO_ROWS: f64 = 64.0;
/// Rows that a guess by kinds stands for: kinds are made of many prompts.
const GUESS_ROWS: f64 = 512.0;
/// Weight of the last interval in what workers are taken to compute.
const PACE: f64 = 0.5;

/// All of a gateway's.
#[derive(Debug)]
pub struct Outlook {
    state: Mutex<State>,
    kinds: ArcSwapOption<Kinds>,
    /// Rows of a layer computed for this gateway since its start, and those of answers among them.
    computed: AtomicU64,
    answered: AtomicU64,
}

#[derive(Debug)]
struct State {
    next: u64,
    entries: BTreeMap<u64, Arc<Entry>>,
    answer: f64,
    examples: VecDeque<Example>,
    unfitted: usize,
    pace: Pace,
}

/// What workers compute for this gateway.
#[derive(Debug, Default, Clone, Copy)]
struct Pace {
    computed: u64,
    answered: u64,
    /// Rows of a layer per millisecond; 0: not known.
    rows: f64,
    /// Tokens of an answer per millisecond and sequence that runs; 0: not known.
    steps: f64,
}

#[derive(Debug)]
struct Entry {
    prompt: u32,
    max_tokens: u32,
    sequences: u32,
    words: Words,
    /// What it used, or what is known of its beginning.
    known: Mutex<Option<Arc<Signature>>>,
    is_read: AtomicBool,
    received: AtomicU32,
}

/// One sequence, or several of a request that waits. Counted out when dropped.
#[derive(Debug)]
pub struct Work {
    outlook: Arc<Outlook>,
    id: u64,
    entry: Arc<Entry>,
}

/// What is expected within a horizon.
#[derive(Debug, Clone, PartialEq)]
pub struct Expected {
    /// Rows of a layer.
    pub rows: f64,
    /// Those whose experts are known.
    pub known: f64,
    /// The known rows by layer and expert, layer-major; empty if nothing is known.
    pub counts: Vec<f64>,
}

impl Default for Outlook {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                next: 1,
                entries: BTreeMap::new(),
                answer: ANSWER.0,
                examples: VecDeque::new(),
                unfitted: 0,
                pace: Pace::default(),
            }),
            kinds: ArcSwapOption::empty(),
            computed: AtomicU64::new(0),
            answered: AtomicU64::new(0),
        }
    }
}

impl Outlook {
    /// Counts `sequences` sequences of a prompt in.
    #[must_use]
    pub fn enter(
        self: &Arc<Self>,
        prompt: &[u32],
        known: &Known,
        max_tokens: u32,
        sequences: u32,
    ) -> Work {
        self.enter_known(
            prompt.len(),
            Words::of(prompt),
            known,
            max_tokens,
            sequences,
        )
    }

    /// The same for a prompt of so many tokens whose words are known.
    #[must_use]
    pub fn enter_known(
        self: &Arc<Self>,
        prompt: usize,
        words: Words,
        known: &Known,
        max_tokens: u32,
        sequences: u32,
    ) -> Work {
        let entry = Arc::new(Entry {
            prompt: u32::try_from(prompt).unwrap_or(u32::MAX),
            max_tokens,
            sequences,
            words,
            known: Mutex::new(known.signature.clone()),
            is_read: AtomicBool::new(false),
            received: AtomicU32::new(0),
        });
        let id = self.with(|state| {
            let id = state.next;
            state.next += 1;
            state.entries.insert(id, Arc::clone(&entry));
            id
        });
        Work {
            outlook: Arc::clone(self),
            id,
            entry,
        }
    }

    /// Sequences that are counted in.
    #[must_use]
    pub fn len(&self) -> usize {
        self.with(|state| state.entries.len())
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Kinds of text that are known.
    #[must_use]
    pub fn kinds(&self) -> usize {
        self.kinds.load().as_ref().map_or(0, |kinds| kinds.len())
    }

    /// The experts that a prompt with these words will use, by the kinds of text that they resemble, as a histogram of as many rows as
    /// such a guess is worth. `None` while fewer than two kinds are known, or if they are of another model than one of
    /// `layers` MoE layers with `experts` experts, `top_k` of them for a token.
    #[must_use]
    pub fn guess(
        &self,
        words: &Words,
        (layers, experts): (usize, usize),
        top_k: usize,
    ) -> Option<Signature> {
        let kinds = self.kinds.load_full()?;
        if kinds.len() < 2 || !kinds.fits(experts, layers * experts) {
            return None;
        }
        let guess = kinds.guess(words);
        let weights: Vec<f64> = guess.into_iter().map(f64::from).collect();
        let rows = GUESS_ROWS * top_k as f64;
        let counts = kinds
            .shares(&weights)
            .into_iter()
            .map(|share| (share * rows).round() as u32);
        Signature::new(experts, counts.collect())
    }

    /// Makes kinds anew if there are enough new examples. Takes long; to be called where nobody waits.
    pub fn refit(&self) {
        let due = self.with(|state| {
            let known = state.examples.len().saturating_sub(state.unfitted);
            if state.unfitted < REFIT.min(known.max(1)) {
                return None;
            }
            state.unfitted = 0;
            Some(state.examples.iter().cloned().collect::<Vec<_>>())
        });
        if let Some(kinds) = due.and_then(|examples| Kinds::fit(&examples)) {
            self.kinds.store(Some(Arc::new(kinds)));
        }
    }

    /// What `layers × experts` will be asked for within the horizon. `since_ms`: time since the last call, in which
    /// workers have computed what they will compute again.
    #[must_use]
    pub fn expected(
        &self,
        layers: usize,
        experts: usize,
        horizon_ms: f64,
        since_ms: f64,
    ) -> Expected {
        let (entries, answer, pace) = self.with(|state| {
            let running = state.entries.values().filter(|entry| entry.is_read());
            let running = running.count();
            self.follow(&mut state.pace, running as f64, since_ms);
            let entries: Vec<Arc<Entry>> = state.entries.values().map(Arc::clone).collect();
            (entries, state.answer, state.pace)
        });
        let kinds = self.kinds.load_full();
        let kinds = kinds.filter(|kinds| kinds.fits(experts, layers * experts));
        let mut sum = Sum::new(layers, experts, kinds.as_deref());
        let room = pace.rows * horizon_ms;
        for entry in &entries {
            // Who has not begun begins in its turn, if workers come that far.
            let waits = !entry.is_read();
            if waits && room > 0.0 && sum.rows >= room {
                continue;
            }
            sum.add(entry, entry.rows(answer, pace.steps * horizon_ms));
        }
        sum.ended()
    }

    fn follow(&self, pace: &mut Pace, running: f64, since_ms: f64) {
        let (computed, answered) = (
            self.computed.load(Ordering::Relaxed),
            self.answered.load(Ordering::Relaxed),
        );
        let rows = computed.saturating_sub(pace.computed) as f64;
        let tokens = answered.saturating_sub(pace.answered) as f64;
        (pace.computed, pace.answered) = (computed, answered);
        if since_ms <= 0.0 || rows <= 0.0 {
            return;
        }
        let blend = |old: f64, new: f64| match old > 0.0 {
            true => old + PACE * (new - old),
            false => new,
        };
        pace.rows = blend(pace.rows, rows / since_ms);
        if running > 0.0 && tokens > 0.0 {
            pace.steps = blend(pace.steps, tokens / running / since_ms);
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Entry {
    fn is_read(&self) -> bool {
        self.is_read.load(Ordering::Relaxed)
    }

    fn known(&self) -> Option<Arc<Signature>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.clone()
    }

    /// Rows of a layer that it will ask for in `steps` steps (0: as many as it takes). `answer`: tokens that answers
    /// have; one that is longer already is taken to have an eighth of that to go.
    fn rows(&self, answer: f64, steps: f64) -> f64 {
        let received = f64::from(self.received.load(Ordering::Relaxed));
        let most = f64::from(self.max_tokens);
        let left = (answer.min(most) - received).max(answer / 8.0);
        let left = left.min(most - received).max(0.0);
        let left = if steps > 0.0 { left.min(steps) } else { left };
        let prompt = if self.is_read() {
            0.0
        } else {
            f64::from(self.prompt)
        };
        (prompt + left) * f64::from(self.sequences)
    }
}

/// The sum over sequences.
struct Sum<'a> {
    layers: usize,
    experts: usize,
    kinds: Option<&'a Kinds>,
    rows: f64,
    known: f64,
    /// Rows by kind.
    weights: Vec<f64>,
    /// Rows of requests with a histogram of their own.
    own: Vec<f64>,
}

impl<'a> Sum<'a> {
    fn new(layers: usize, experts: usize, kinds: Option<&'a Kinds>) -> Self {
        Self {
            layers,
            experts,
            kinds,
            rows: 0.0,
            known: 0.0,
            weights: vec![0.0; kinds.map_or(0, Kinds::len)],
            own: vec![0.0; layers * experts],
        }
    }

    fn add(&mut self, entry: &Entry, rows: f64) {
        self.rows += rows;
        let entries = self.layers * self.experts;
        let fits = |known: &Arc<Signature>| {
            known.experts == self.experts && known.counts.len() == entries
        };
        let own = entry.known().filter(fits);
        // Its own histogram counts by the rows that it was made of.
        let part = own.as_ref().map_or(0.0, |own| {
            let read = own.counts[..self.experts]
                .iter()
                .copied()
                .map(f64::from)
                .sum::<f64>();
            read / (read
                + if self.kinds.is_some() {
                    PSEUDO_ROWS
                } else {
                    0.0
                })
            .max(1.0)
        });
        if own.is_none() && self.kinds.is_none() {
            return;
        }
        self.known += rows;
        if let Some(kinds) = self.kinds {
            let guess = kinds.guess(&entry.words);
            for (weight, guess) in self.weights.iter_mut().zip(guess) {
                *weight += rows * (1.0 - part) * f64::from(guess);
            }
        }
        if let Some(own) = own {
            let layers = own.counts.chunks(self.experts);
            for (sum, counts) in self.own.chunks_mut(self.experts).zip(layers) {
                let all: f64 = counts.iter().copied().map(f64::from).sum();
                let scale = rows * part / all.max(1.0);
                for (sum, count) in sum.iter_mut().zip(counts) {
                    *sum += scale * f64::from(*count);
                }
            }
        }
    }

    fn ended(self) -> Expected {
        let mut counts = self.own;
        if let Some(kinds) = self.kinds {
            for (sum, share) in counts.iter_mut().zip(kinds.shares(&self.weights)) {
                *sum += share;
            }
        }
        if self.known <= 0.0 {
            counts.clear();
        }
        Expected {
            rows: self.rows,
            known: self.known,
            counts,
        }
    }
}

impl Work {
    /// A worker has read the prompt, but for the part that it had `cached`, and it used experts like this.
    pub fn read(&self, cached: u32, signature: Option<Arc<Signature>>) {
        let entry = &self.entry;
        let computed = entry.prompt.saturating_sub(cached);
        self.outlook
            .computed
            .fetch_add(u64::from(computed), Ordering::Relaxed);
        entry.is_read.store(true, Ordering::Relaxed);
        let Some(signature) = signature else { return };
        *entry.known.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::clone(&signature));
        // Of a part of a prompt its words say nothing.
        if cached > 0 {
            return;
        }
        let bytes = signature.counts.len() * size_of::<u32>();
        let most = EXAMPLES.min(EXAMPLE_BYTES / bytes.max(1)).max(1);
        let example = Example {
            words: entry.words.clone(),
            signature,
        };
        self.outlook.with(|state| {
            while state.examples.len() >= most {
                state.examples.pop_front();
            }
            state.examples.push_back(example);
            state.unfitted = state.unfitted.saturating_add(1);
        });
    }

    /// What it used is not believed to say what it will use: its kinds of text are asked instead.
    pub fn disregard(&self) {
        *self
            .entry
            .known
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// A token came.
    pub fn token(&self) {
        self.entry.received.fetch_add(1, Ordering::Relaxed);
        self.outlook.computed.fetch_add(1, Ordering::Relaxed);
        self.outlook.answered.fetch_add(1, Ordering::Relaxed);
    }

    /// The answer has ended with so many tokens.
    pub fn answered(&self, tokens: u32) {
        self.outlook.with(|state| {
            state.answer += (f64::from(tokens) - state.answer) * ANSWER.1;
        });
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.outlook.with(|state| state.entries.remove(&self.id));
    }
}

#[cfg(test)]
mod tests {
    use super::super::kinds::tests::example;
    use super::*;

    fn outlook() -> Arc<Outlook> {
        Arc::new(Outlook::default())
    }

    fn signature(counts: &[u32]) -> Option<Arc<Signature>> {
        Signature::new(2, counts.to_vec()).map(Arc::new)
    }

    fn known(counts: &[u32]) -> Known {
        Known {
            signature: signature(counts),
            tokens: 32,
        }
    }

    #[test]
    fn what_is_left_is_counted_until_it_is_computed() {
        let outlook = outlook();
        let work = outlook.enter(&[7; 100], &known(&[30, 10]), 20, 1);
        let unknown = outlook.enter(&[7; 40], &Known::default(), 10, 2);
        let all = outlook.expected(1, 2, 1000.0, 0.0);
        assert!(
            (all.rows - 220.0).abs() < 1e-9,
            "100 + 20 and two times 40 + 10"
        );
        assert!((all.known - 120.0).abs() < 1e-9);
        assert_eq!(all.counts, [90.0, 30.0]);
        drop(unknown);
        work.read(0, signature(&[0, 200]));
        (0..15).for_each(|_| work.token());
        let rest = outlook.expected(1, 2, 1000.0, 0.0);
        assert!((rest.rows - 5.0).abs() < 1e-9, "{}", rest.rows);
        assert_eq!(rest.counts, [0.0, 5.0]);
        work.answered(15);
        drop(work);
        assert!(outlook.is_empty());
        assert_eq!(outlook.expected(1, 2, 1000.0, 0.0).counts, [0.0; 0]);
    }

    #[test]
    fn the_horizon_bounds_answers_and_who_waits_behind_it_does_not_count() {
        let outlook = outlook();
        let first = outlook.enter(&[1; 100], &known(&[1, 1]), 1000, 1);
        first.read(0, None);
        (0..100).for_each(|_| first.token());
        // 200 rows in 100 ms, a token per ms: in 50 ms 100 rows and 50 steps.
        let waiting: Vec<Work> = (0..9)
            .map(|_| outlook.enter(&[1; 20], &known(&[1, 1]), 1000, 1))
            .collect();
        let soon = outlook.expected(1, 2, 50.0, 100.0);
        // The first has 20 tokens to go; each of the others 20 and 50 steps, and two of them reach 100 rows.
        assert!((soon.rows - 160.0).abs() < 1e-9, "{}", soon.rows);
        drop(waiting);
    }

    #[test]
    fn another_model_is_unknown() {
        let outlook = outlook();
        let _work = outlook.enter(&[7; 10], &known(&[30, 10]), 20, 1);
        let other = outlook.expected(2, 2, 1000.0, 0.0);
        assert!(other.known.abs() < 1e-9 && other.rows > 0.0 && other.counts.is_empty());
    }

    #[test]
    fn who_waits_is_known_by_those_who_were_read() {
        let outlook = outlook();
        for at in 0..96 {
            let (prompt, example) = example(at % 4, at);
            outlook
                .enter(&prompt, &Known::default(), 1, 1)
                .read(0, Some(example.signature));
        }
        outlook.refit();
        assert!(outlook.kinds() > 3);
        let (prompt, _) = example(2, 777);
        let _work = outlook.enter(&prompt, &Known::default(), 64, 1);
        let expected = outlook.expected(2, 16, 1000.0, 0.0);
        assert!((expected.known - expected.rows).abs() < 1e-9);
        let own: f64 = expected.counts[8..12].iter().sum();
        assert!(own > 0.6 * expected.rows, "{own} of {}", expected.rows);
    }

    #[test]
    fn a_prompt_is_guessed_by_its_words_once_there_are_kinds() {
        let outlook = outlook();
        let (prompt, _) = example(1, 999);
        assert!(outlook.guess(&Words::of(&prompt), (2, 16), 1).is_none());
        for at in 0..96 {
            let (prompt, example) = example(at % 4, at);
            let work = outlook.enter(&prompt, &Known::default(), 1, 1);
            work.read(0, Some(example.signature));
        }
        outlook.refit();
        let guess = outlook.guess(&Words::of(&prompt), (2, 16), 1).unwrap();
        let layer: u32 = guess.counts[..16].iter().sum();
        assert!((500..=524).contains(&layer), "{layer}");
        let own: u32 = guess.counts[4..8].iter().sum();
        assert!(own > layer / 2, "{own} of {layer}");
        assert!(
            outlook.guess(&Words::of(&prompt), (2, 8), 1).is_none(),
            "another model"
        );
    }

    #[test]
    fn kinds_follow_the_first_examples_soon() {
        let outlook = outlook();
        let mut kinds = Vec::new();
        for at in 0..24 {
            let (prompt, example) = example(at % 2, at);
            outlook
                .enter(&prompt, &Known::default(), 1, 1)
                .read(0, Some(example.signature));
            outlook.refit();
            kinds.push(outlook.kinds());
        }
        assert_eq!((kinds[0], kinds[22], kinds[23]), (1, 1, 1));
        let (_, more) = example(0, 99);
        for _ in 0..8 {
            let work = outlook.enter(&[1; 8], &Known::default(), 1, 1);
            work.read(0, Some(Arc::clone(&more.signature)));
        }
        outlook.refit();
        assert_eq!(outlook.kinds(), 2, "32 are twice the 16 of the last fit");
    }

    #[test]
    fn examples_are_bounded() {
        let outlook = outlook();
        for at in 0..(EXAMPLES as u64 + 20) {
            let (prompt, example) = example(at % 4, at);
            outlook
                .enter(&prompt, &Known::default(), 1, 1)
                .read(0, Some(example.signature));
        }
        assert_eq!(outlook.with(|state| state.examples.len()), EXAMPLES);
    }
}
