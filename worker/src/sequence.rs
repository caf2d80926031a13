//! The life of one request inside the engine.
//!
//! ```text
//!   Waiting ──admitted──▶ Prefilling ──all but the newest token in the cache──▶ Decoding ─▶ Finished
//!      ▲                      │                                                    │           ▲
//!      └────── preempted ─────┴────────────────────────────────────────────────────┘   (from any state)
//! ```
//!
//! Position `p` is *computed* when its keys and values are in the cache. A sequence with `n` tokens
//! and `n - 1` computed positions needs one row per step: that is decoding. After a preemption the
//! answer so far is computed again like a prompt; since every row has the same bits however it is
//! batched and the sampler counts tokens of the answer, nothing a client sees changes.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::kv_cache::{Name, Page, ROOT};
use crate::sampler::logprobs::Report;
use crate::sampler::{History, Sampling};
use crate::scheduler::Hint;

/// Number of a sequence on its engine, ascending with arrival: the lower the older.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// A validated request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The caller's name for it, for logs.
    pub id: String,
    /// Prompt, followed by answer tokens that another worker gave before. Not empty.
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt, at least 1.
    pub prompt_len: usize,
    /// Limit of the answer, tokens that are already there included.
    pub max_tokens: usize,
    /// Stop tokens are impossible before the answer has this many.
    pub min_tokens: usize,
    /// Tokens that end the answer: the model's (unless ignored) and the request's.
    pub stop_tokens: BTreeSet<u32>,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// Report log-probabilities of answer tokens with this many best.
    pub logprobs: Option<usize>,
    /// Report those of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// Report the experts of every position.
    pub routed_experts: bool,
    /// What the caller expects of its experts.
    pub hint: Option<Hint>,
}

impl Request {
    /// Most positions that this request ever has in the cache: the last token's are not needed.
    #[must_use]
    pub fn most_positions(&self) -> usize {
        (self.prompt_len + self.max_tokens)
            .saturating_sub(1)
            .max(self.tokens.len())
    }

    /// Whether it may take pages of others: not if every position must be seen here.
    #[must_use]
    pub fn may_reuse(&self) -> bool {
        self.prompt_logprobs.is_none() && !self.routed_experts
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// This stop token was chosen. It is not part of the answer.
    Stop(u32),
    /// The answer has `max_tokens`.
    Length,
    /// The client is gone or asked for it.
    Cancelled,
    /// Its time is over.
    Deadline,
}

/// Where a sequence is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Holds no pages.
    Waiting,
    /// Part of its tokens is in the cache.
    Prefilling,
    /// All but the newest token are in the cache.
    Decoding,
    /// Over.
    Finished(Finish),
}

/// Counts that are kept once per position, whatever is computed twice.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// Rows per (layer, expert) of positions seen here, layer-major; 32 bits hold any sequence.
    pub signature: Vec<u32>,
    /// Positions below this are in `signature`, or came from the prefix cache.
    pub counted: usize,
    /// Experts of prompt positions, position-major; only if asked for.
    pub prompt_routes: Vec<u32>,
    /// Entry `i` is about prompt token `i + 1`.
    pub prompt_logprobs: Vec<Report>,
}

/// One request and all that belongs to it, except its way out.
#[derive(Debug)]
pub struct Sequence {
    /// Its number.
    pub id: SequenceId,
    /// What was asked.
    pub request: Request,
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// What penalties look at.
    pub history: History,
    /// Where it is.
    state: State,
    /// Pages by position.
    pub pages: Vec<Page>,
    /// Names of the pages that are full and published.
    pub names: Vec<Name>,
    /// Positions in the cache.
    computed: usize,
    /// Prompt tokens that the prefix cache had at the first admission.
    pub cached: Option<usize>,
    /// Counts by position.
    pub trace: Trace,
    /// Whether the end of the prompt was reported.
    pub prefilled: bool,
    /// Times it lost its pages.
    pub preemptions: u32,
    /// Steps in a row that were lost to late rows.
    pub setbacks: u32,
    /// It is not scheduled before this time (microseconds of the engine's clock).
    pub not_before: u64,
    /// When it came, on the same clock.
    pub arrived: u64,
}

impl Sequence {
    /// A new sequence, waiting. `signature_len` is layers × experts.
    #[must_use]
    pub fn new(id: SequenceId, request: Request, signature_len: usize) -> Self {
        // Room for the whole answer, so that no step of it has to ask for memory.
        let mut tokens = Vec::with_capacity(request.most_positions() + 1);
        tokens.extend_from_slice(&request.tokens);
        Self {
            id,
            tokens,
            history: if request.sampling.has_penalties() {
                History::new(&request.tokens, request.prompt_len)
            } else {
                History::default()
            },
            request,
            state: State::Waiting,
            pages: Vec::new(),
            names: Vec::new(),
            computed: 0,
            cached: None,
            trace: Trace {
                signature: vec![0; signature_len],
                ..Trace::default()
            },
            prefilled: false,
            preemptions: 0,
            setbacks: 0,
            not_before: 0,
            arrived: 0,
        }
    }

    /// Where it is in its life.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Positions in the cache.
    #[must_use]
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Positions that the next steps must compute before a token can be chosen.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Tokens of the answer so far.
    #[must_use]
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt_len
    }

    /// Whether another token may be chosen once all positions are computed.
    #[must_use]
    pub fn wants_token(&self) -> bool {
        self.generated() < self.request.max_tokens
    }

    /// Positions of the next `len` whose logits are needed for prompt log-probabilities.
    #[must_use]
    pub fn prompt_logits(&self, len: usize) -> Range<usize> {
        if self.request.prompt_logprobs.is_none() {
            return 0..0;
        }
        let start = self.computed.max(self.trace.prompt_logprobs.len());
        let end = (self.computed + len).min(self.request.prompt_len - 1);
        if start < end { start..end } else { 0..0 }
    }

    /// Stop tokens that may not come yet.
    #[must_use]
    pub fn masked(&self) -> Vec<u32> {
        if self.generated() < self.request.min_tokens {
            self.request.stop_tokens.iter().copied().collect()
        } else {
            Vec::new()
        }
    }

    /// Takes its place in the batch with pages for all its tokens, the first of which are already
    /// filled (`names` of them).
    pub fn admit(&mut self, pages: Vec<Page>, names: Vec<Name>, page_tokens: usize) {
        debug_assert_eq!(self.state, State::Waiting);
        self.computed = names.len() * page_tokens;
        self.trace.counted = self.trace.counted.max(self.computed);
        if self.cached.is_none() {
            self.cached = Some(self.computed.min(self.request.prompt_len));
        }
        self.pages = pages;
        self.names = names;
        let most = self.request.most_positions().div_ceil(page_tokens.max(1));
        self.pages.reserve(most.saturating_sub(self.pages.len()));
        self.names.reserve(most.saturating_sub(self.names.len()));
        self.settle();
    }

    /// Loses its pages (returned) and waits again.
    pub fn preempt(&mut self) -> Vec<Page> {
        self.state = State::Waiting;
        self.computed = 0;
        self.names.clear();
        self.not_before = 0;
        self.preemptions += 1;
        std::mem::take(&mut self.pages)
    }

    /// The next `len` positions are in the cache.
    pub fn advance(&mut self, len: usize) {
        debug_assert!(len <= self.missing());
        self.computed += len;
        self.setbacks = 0;
        self.settle();
    }

    fn settle(&mut self) {
        self.state = if self.missing() <= 1 {
            State::Decoding
        } else {
            State::Prefilling
        };
    }

    /// Adds the chosen token to the answer, or ends.
    pub fn push(&mut self, token: u32) {
        if self.request.stop_tokens.contains(&token) {
            self.finish(Finish::Stop(token));
            return;
        }
        self.tokens.push(token);
        if self.request.sampling.has_penalties() {
            self.history.push(token);
        }
        if !self.wants_token() {
            self.finish(Finish::Length);
        }
    }

    /// Ends it. The first reason stays.
    pub fn finish(&mut self, why: Finish) {
        if !matches!(self.state, State::Finished(_)) {
            self.state = State::Finished(why);
        }
    }

    /// Name of the last published page.
    #[must_use]
    pub fn last_name(&self) -> Name {
        self.names.last().copied().unwrap_or(ROOT)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn request(tokens: Vec<u32>, max_tokens: usize) -> Request {
        Request {
            id: String::new(),
            prompt_len: tokens.len(),
            tokens,
            max_tokens,
            min_tokens: 0,
            stop_tokens: BTreeSet::from([99]),
            sampling: Sampling::greedy(),
            logprobs: None,
            prompt_logprobs: None,
            routed_experts: false,
            hint: None,
        }
    }

    fn sequence(request: Request) -> Sequence {
        Sequence::new(SequenceId(1), request, 0)
    }

    #[test]
    fn lives_from_prompt_to_length() {
        let mut s = sequence(request(vec![1, 2, 3], 2));
        s.admit(vec![0, 1], Vec::new(), 4);
        assert_eq!(s.state(), State::Prefilling);
        s.advance(2);
        assert_eq!(s.state(), State::Decoding);
        s.advance(1);
        s.push(7);
        assert_eq!((s.missing(), s.generated()), (1, 1));
        s.advance(1);
        s.push(8);
        assert_eq!(s.state(), State::Finished(Finish::Length));
        assert_eq!(s.tokens, [1, 2, 3, 7, 8]);
    }

    #[test]
    fn a_stop_token_ends_and_is_not_part_of_the_answer() {
        let mut s = sequence(request(vec![1], 5));
        s.push(99);
        assert_eq!(s.state(), State::Finished(Finish::Stop(99)));
        assert_eq!(s.generated(), 0);
    }

    #[test]
    fn preemption_keeps_the_answer_and_what_was_counted() {
        let mut s = sequence(request(vec![1, 2], 5));
        s.admit(vec![4], Vec::new(), 4);
        s.advance(2);
        s.push(7);
        s.trace.counted = 2;
        assert_eq!(s.preempt(), vec![4]);
        assert_eq!(
            (s.state(), s.missing(), s.trace.counted),
            (State::Waiting, 3, 2)
        );
        s.admit(vec![5], Vec::new(), 4);
        assert_eq!(s.cached, Some(0));
        assert_eq!(s.state(), State::Prefilling);
    }

    #[test]
    fn prompt_logits_are_asked_once() {
        let mut asked = request(vec![1, 2, 3, 4], 1);
        asked.prompt_logprobs = Some(0);
        let mut s = sequence(asked);
        s.admit(vec![0], Vec::new(), 4);
        assert_eq!(s.prompt_logits(2), 0..2);
        assert_eq!(s.prompt_logits(4), 0..3);
        let report = crate::sampler::logprobs::report(&[0.0], 0, 0);
        s.trace.prompt_logprobs = vec![report; 2];
        assert_eq!(s.prompt_logits(4), 2..3);
        assert_eq!(s.prompt_logits(2), 0..0);
    }

    #[test]
    fn resumed_sequences_count_their_answer() {
        let mut resumed = request(vec![1, 2, 3, 4], 3);
        resumed.prompt_len = 2;
        resumed.min_tokens = 3;
        let s = sequence(resumed);
        assert_eq!(s.generated(), 2);
        assert!(s.wants_token());
        assert_eq!(s.masked(), vec![99]);
        assert_eq!(s.request.most_positions(), 4);
    }
}
