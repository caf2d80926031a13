//! Decides what the next step computes. Pure: no clock, no model, no channel.
//!
//! Policy, in this order:
//!
//! 1. **Decode first.** Every decoding sequence gets its one row, the oldest first. If it needs a
//!    page and none is left, the youngest running sequence loses its pages and waits again
//!    (recompute); that may be the one that asked.
//! 2. **Prefill with what is left** of `max_batched_tokens`, the oldest first, in chunks. So a stream that decodes
//!    has a token in every step, however many prompts wait, and the setting bounds how long a step takes: lower
//!    means steadier streams and slower prompts (`foregate bench engine --mixed` shows both).
//! 3. **Admit** from the queue in order of age, while there is room in the batch and pages for *all*
//!    tokens of the sequence plus one for each running one (so that an admission does not cause a
//!    preemption at once). The head of the queue is overtaken only if [`Limits::overtake`] says so, and only by one
//!    whose experts the batch reads anyway ([`kin`]).
//!
//! Nobody starves: age is the order of arrival and a preempted sequence keeps it. The oldest running sequence
//! is never preempted by another, is first in each phase, and fits alone (`submit` refuses one that
//! does not); so it ends, and then the next is the oldest. A waiting one is passed by nobody once it has waited for
//! as long as it may be overtaken, or has run before, so it is the next to join. Running sequences are never more than
//! `max_batched_tokens`, so each decoding one has its row in every step.

mod kin;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

pub use kin::Hint;

use crate::kv_cache::PagePool;
use crate::sequence::{Sequence, SequenceId, State};

/// Bounds of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most sequences that hold pages at a time, at least 1.
    pub max_num_seqs: usize,
    /// Most rows of a step, at least 1.
    pub max_batched_tokens: usize,
    /// Most rows of a step whose logits are computed; raised to `max_num_seqs + 1` if lower.
    pub max_logit_rows: usize,
    /// How waiting sequences may be overtaken.
    pub overtake: Overtake,
}

/// Whether those who came later may join the batch first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Overtake {
    /// Microseconds after its arrival from which a sequence is passed by nobody; 0: the order is that of arrival.
    pub patience: u64,
    /// Experts that a token uses.
    pub top_k: usize,
}

/// Waiting sequences that are compared.
const LOOK: usize = 32;

/// Consecutive positions of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub id: SequenceId,
    /// First position.
    pub start: usize,
    /// How many.
    pub len: usize,
    /// Positions whose logits give log-probabilities of the prompt.
    pub prompt_logits: Range<usize>,
    /// The last position's logits choose a token.
    pub sample: bool,
}

/// What the next step computes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Rows by sequence.
    pub chunks: Vec<Chunk>,
    /// Sequences that joined the batch, some for the second time.
    pub admitted: Vec<SequenceId>,
    /// Sequences that lost their pages.
    pub preempted: Vec<SequenceId>,
    /// When the first of the sequences that pause may be scheduled again.
    pub wake_at: Option<u64>,
}

impl Plan {
    fn clear(&mut self) {
        self.chunks.clear();
        self.admitted.clear();
        self.preempted.clear();
        self.wake_at = None;
    }
}

/// A request that could never run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "prompt and max_tokens need {need} pages of the KV cache, it has {have}: shorten them or raise the worker's KV memory"
)]
pub struct NeverFits {
    /// Pages it would need alone.
    pub need: usize,
    /// Pages there are.
    pub have: usize,
}

/// Pauses after a lost step double from this (microseconds) …
const FIRST_PAUSE: u64 = 2_000;
/// … to this.
const LONGEST_PAUSE: u64 = 256_000;

/// All sequences of an engine, with their pages.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: PagePool,
    sequences: BTreeMap<SequenceId, Sequence>,
    waiting: BTreeSet<SequenceId>,
    running: BTreeSet<SequenceId>,
    preemptions: u64,
    /// Running sequences as a step found them.
    found: Vec<SequenceId>,
}

struct Budget {
    tokens: usize,
    logits: usize,
}

impl Scheduler {
    /// An empty one.
    #[must_use]
    pub fn new(limits: Limits, pool: PagePool) -> Self {
        let max_batched_tokens = limits.max_batched_tokens.max(1);
        let max_num_seqs = limits.max_num_seqs.clamp(1, max_batched_tokens);
        Self {
            limits: Limits {
                max_num_seqs,
                max_batched_tokens,
                max_logit_rows: limits.max_logit_rows.max(max_num_seqs + 1),
                overtake: limits.overtake,
            },
            pool,
            sequences: BTreeMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            preemptions: 0,
            found: Vec::new(),
        }
    }

    /// The page pool, to read.
    #[must_use]
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// The page pool, to ask what changed in it.
    pub(crate) fn pool_mut(&mut self) -> &mut PagePool {
        &mut self.pool
    }

    /// Sequences that hold pages.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for their turn.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Preemptions since start.
    #[must_use]
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Whether there is nothing to do and nothing to wait for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// All sequences, the oldest first.
    pub fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.values()
    }

    /// A sequence.
    #[must_use]
    pub fn get(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// A sequence, to change. Its pages and state are changed by the scheduler's own methods.
    pub fn get_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.sequences.get_mut(&id)
    }

    /// Takes a sequence into the queue. Its id must be higher than all before.
    ///
    /// # Errors
    /// When it would not fit if it were alone.
    pub fn submit(&mut self, sequence: Sequence) -> Result<(), NeverFits> {
        let need = self.pool.pages_for(sequence.request.most_positions());
        let have = self.pool.pages();
        if need > have {
            return Err(NeverFits { need, have });
        }
        self.waiting.insert(sequence.id);
        self.sequences.insert(sequence.id, sequence);
        Ok(())
    }

    /// Takes a sequence out, whatever its state, and frees its pages.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let sequence = self.sequences.remove(&id)?;
        self.waiting.remove(&id);
        self.running.remove(&id);
        self.pool.give_back(&sequence.pages);
        Some(sequence)
    }

    /// What the step at `now` (microseconds of the engine's clock) computes, in the memory of an older plan.
    pub fn schedule(&mut self, now: u64, plan: &mut Plan) {
        plan.clear();
        let mut budget = Budget {
            tokens: self.limits.max_batched_tokens,
            logits: self.limits.max_logit_rows,
        };
        let mut found = std::mem::take(&mut self.found);
        found.clear();
        found.extend(&self.running);
        self.decode(now, &found, &mut budget, plan);
        self.prefill(now, &found, &mut budget, plan);
        self.found = found;
        self.admit(now, &mut budget, plan);
    }

    fn decode(
        &mut self,
        now: u64,
        running: &[SequenceId],
        budget: &mut Budget,
        plan: &mut Plan,
    ) {
        for id in running.iter().copied() {
            // An older sequence may have taken this one's pages.
            if !self.is_ready(id, State::Decoding, now, plan) || !self.grow(id, plan) {
                continue;
            }
            self.add_chunk(id, budget, plan);
        }
    }

    /// A sequence that gave way meanwhile is not ready.
    fn prefill(&self, now: u64, running: &[SequenceId], budget: &mut Budget, plan: &mut Plan) {
        for id in running.iter().copied() {
            if self.is_ready(id, State::Prefilling, now, plan) {
                self.add_chunk(id, budget, plan);
            }
        }
    }

    fn is_ready(&self, id: SequenceId, state: State, now: u64, plan: &mut Plan) -> bool {
        let Some(sequence) = self.sequences.get(&id) else {
            return false;
        };
        if !self.running.contains(&id) || sequence.state() != state {
            return false;
        }
        if sequence.not_before > now {
            let wake = plan.wake_at.unwrap_or(u64::MAX);
            plan.wake_at = Some(wake.min(sequence.not_before));
            return false;
        }
        true
    }

    /// Makes room for the newest token. False if the sequence itself had to give way.
    fn grow(&mut self, id: SequenceId, plan: &mut Plan) -> bool {
        let Some(sequence) = self.sequences.get(&id) else {
            return false;
        };
        if self.pool.pages_for(sequence.tokens.len()) <= sequence.pages.len() {
            return true;
        }
        loop {
            if let Some(page) = self.pool.take_one() {
                if let Some(sequence) = self.sequences.get_mut(&id) {
                    sequence.pages.push(page);
                }
                return true;
            }
            let Some(youngest) = self.running.last().copied() else {
                return false;
            };
            self.preempt(youngest, plan);
            if youngest == id {
                return false;
            }
        }
    }

    fn preempt(&mut self, id: SequenceId, plan: &mut Plan) {
        self.running.remove(&id);
        if let Some(sequence) = self.sequences.get_mut(&id) {
            let pages = sequence.preempt();
            self.pool.give_back(&pages);
            self.waiting.insert(id);
            self.preemptions += 1;
            plan.preempted.push(id);
        }
    }

    fn add_chunk(&self, id: SequenceId, budget: &mut Budget, plan: &mut Plan) {
        let Some(sequence) = self.sequences.get(&id) else {
            return;
        };
        let Some(chunk) = chunk(sequence, budget) else {
            return;
        };
        budget.tokens -= chunk.len;
        budget.logits -= chunk.prompt_logits.len() + usize::from(chunk.sample);
        plan.chunks.push(chunk);
    }

    fn admit(&mut self, now: u64, budget: &mut Budget, plan: &mut Plan) {
        while budget.tokens > 0 && self.running.len() < self.limits.max_num_seqs {
            let Some(oldest) = self.waiting.first().copied() else {
                return;
            };
            if plan.preempted.contains(&oldest) {
                return;
            }
            let fittest = self.fittest(oldest, now, plan);
            let id = match fittest.filter(|id| self.take_pages(*id)) {
                Some(id) => id,
                None if self.take_pages(oldest) => oldest,
                None => return,
            };
            self.waiting.remove(&id);
            self.running.insert(id);
            plan.admitted.push(id);
            self.add_chunk(id, budget, plan);
        }
    }

    /// Who may pass the oldest one that waits, because it adds fewer experts to the batch.
    fn fittest(&self, oldest: SequenceId, now: u64, plan: &Plan) -> Option<SequenceId> {
        let Overtake { patience, top_k } = self.limits.overtake;
        let first = self.sequences.get(&oldest)?;
        let waited = now.saturating_sub(first.arrived);
        if patience == 0
            || waited >= patience
            || first.preemptions > 0
            || self.waiting.len() < 2
        {
            return None;
        }
        let of = |id: &SequenceId| self.sequences.get(id);
        let near = self.waiting.iter().take(LOOK);
        let waiting: Vec<&Sequence> = near
            .filter(|id| !plan.preempted.contains(id))
            .filter_map(of)
            .collect();
        let running = self.running.iter().filter_map(of);
        let at = kin::fittest(waiting.iter().copied(), running, top_k)?;
        let found = waiting.get(at)?.id;
        (found != oldest).then_some(found)
    }

    fn take_pages(&mut self, id: SequenceId) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        let reuse = sequence.request.may_reuse();
        let (mut pages, names) = if reuse {
            self.pool.take_prefix(&sequence.tokens)
        } else {
            (Vec::new(), Vec::new())
        };
        let need = self.pool.pages_for(sequence.tokens.len()) - pages.len();
        let fits = self.pool.available() >= need + self.running.len();
        let Some(fresh) = fits.then(|| self.pool.take(need)).flatten() else {
            self.pool.give_back(&pages);
            return false;
        };
        pages.extend(fresh);
        let first_time = sequence.cached.is_none();
        sequence.admit(pages, names, self.pool.page_tokens());
        if first_time && reuse {
            let hits = sequence.cached.unwrap_or(0);
            self.pool.count_lookup(sequence.request.prompt_len, hits);
        }
        true
    }

    /// A chunk was computed: its positions are in the cache, full pages become known to others.
    pub fn commit(&mut self, chunk: &Chunk) {
        let Some(sequence) = self.sequences.get_mut(&chunk.id) else {
            return;
        };
        sequence.advance(chunk.len);
        let page_tokens = self.pool.page_tokens();
        while (sequence.names.len() + 1) * page_tokens <= sequence.computed() {
            let at = sequence.names.len();
            let tokens = &sequence.tokens[at * page_tokens..(at + 1) * page_tokens];
            let name = self
                .pool
                .publish(sequence.pages[at], &sequence.last_name(), tokens);
            sequence.names.push(name);
        }
    }

    /// A chunk was lost: the same positions are scheduled again after a pause that doubles with every
    /// loss in a row. Returns how many there were in a row.
    pub fn set_back(&mut self, id: SequenceId, now: u64) -> u32 {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return 0;
        };
        let pause = FIRST_PAUSE << sequence.setbacks.min(16);
        sequence.setbacks += 1;
        sequence.not_before = now + pause.min(LONGEST_PAUSE);
        sequence.setbacks
    }
}

/// The longest next chunk within the budget.
fn chunk(sequence: &Sequence, budget: &Budget) -> Option<Chunk> {
    // One logit row is kept for the sample, so that a chunk that ends the prompt always fits.
    let spare = budget.logits.checked_sub(1)?;
    let mut len = sequence.missing().min(budget.tokens);
    let mut prompt_logits = sequence.prompt_logits(len);
    if prompt_logits.len() > spare {
        len = prompt_logits.start - sequence.computed() + spare;
        prompt_logits = sequence.prompt_logits(len);
    }
    (len > 0).then(|| Chunk {
        id: sequence.id,
        start: sequence.computed(),
        len,
        prompt_logits,
        sample: len == sequence.missing() && sequence.wants_token(),
    })
}

#[cfg(test)]
mod tests;
