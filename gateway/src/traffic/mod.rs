//! Traffic management: who may come, who goes next, who is sent away. Rules only, without a clock or a socket.
//!
//! In: requests with their tenant, priority, size and deadlines; ends of requests; the time, from the caller.
//! Out: grants, and refusals before a token is computed.
//!
//! Order of the queue, first difference decides:
//! 1. every eighth grant goes to the request that waits longest, if it has waited for a quarter of the longest wait;
//! 2. the lower `priority` (as in vLLM);
//! 3. the tenant with the smaller *tag*: tokens it was granted over its weight, an output token counted twice (VTC,
//!    Sheng et al., OSDI 2024, arXiv 2401.00588). A tenant that comes back begins at the tag of the last grant, as
//!    in start-time fair queueing (Goyal et al., SIGCOMM 1996), so nobody saves up;
//! 4. within a tenant, who must start first; without a deadline that is who came first.
//!
//! Invariants: a request that is older than the age bound, with `a` older ones before it, is granted within `8·(a+1)`
//! grants, whatever else comes. The queue has a bound; when it is full, the highest `priority` number goes, of those
//! the tenant that has most waiting for its weight, of that the last one. The number of tenants that are told apart is
//! bounded as well.

mod accounts;
mod bucket;
mod ledger;
mod pace;
mod queue;

use std::sync::Arc;
use std::time::Duration;

use foregate_api::traffic::Traffic as Rules;

pub use accounts::{MOST_TENANTS, OTHER};
pub use bucket::{Level, Standing};
pub use ledger::{NAMED, Tally};
pub use pace::Sample;
pub use queue::AGED_TURN;

use accounts::Accounts;
use ledger::Ledger;
use pace::Pace;
use queue::{Queue, Waiting};

/// Who a request belongs to.
pub type Tenant = Arc<str>;

/// Share of the longest wait after which a request counts as old.
const AGE: u32 = 4;
/// Weight of the newest in the mean time that a place is held.
const HELD: f64 = 1.0 / 8.0;
/// Longest wait that a client is told to make.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// What the rules are applied to.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Sequences at a time.
    pub slots: u32,
    /// Requests waiting at a time.
    pub capacity: u32,
    /// Longest wait.
    pub patience: Duration,
    /// What the manifest says about tenants.
    pub rules: Rules,
}

/// What a request wants of time, counted from its arrival.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wishes {
    /// The whole answer within this time.
    pub whole: Option<Duration>,
    /// The first token within this time.
    pub first: Option<Duration>,
    /// Each further token within this time, on average.
    pub per_token: Option<Duration>,
}

/// A request that comes.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Whose it is, as [`Traffic::tenant`] says.
    pub tenant: Tenant,
    /// Lower goes first.
    pub priority: i64,
    /// Sequences it runs at a time.
    pub sequences: u32,
    /// Sequences in all.
    pub choices: u32,
    /// Tokens of its prompts.
    pub prompt: u64,
    /// Fewest and most tokens of each answer.
    pub answer: (u64, u64),
    /// When it came.
    pub arrived: Duration,
    /// What it wants of time.
    pub wishes: Wishes,
}

/// What a request that waits needs to be in time.
#[derive(Debug, Clone, Copy)]
struct Needs {
    wishes: Wishes,
    arrived: Duration,
    /// Tokens of one prompt and of one answer.
    prompt: u64,
    answer: u32,
    /// How many sequences run one after the other.
    rounds: u32,
}

/// Tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Read.
    pub input: u64,
    /// Made.
    pub output: u64,
}

impl Tokens {
    /// What counts against `tokensPerMinute`.
    #[must_use]
    pub const fn sum(self) -> u64 {
        self.input.saturating_add(self.output)
    }

    /// What counts for fairness: an output token takes a step of its own, so it counts twice, as in VTC.
    #[must_use]
    pub const fn cost(self) -> u64 {
        self.input.saturating_add(self.output.saturating_mul(2))
    }
}

/// Why a request is sent away before anything was computed for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its priority is more urgent than its tenant may ask.
    TooUrgent {
        /// The most urgent one.
        allowed: i64,
    },
    /// Too many requests in this minute.
    Requests(Standing),
    /// Too many tokens in this minute.
    Tokens(Standing),
    /// More tokens than there are in any minute.
    TooManyTokens {
        /// Tokens of a minute.
        limit: u64,
    },
    /// It could not be done in time any more.
    Deadline(Missed),
    /// The queue is full of what goes before it.
    Full,
    /// It waited for as long as anybody may.
    Patience,
}

/// Which wish cannot be met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missed {
    /// The whole answer in time.
    Whole,
    /// The first token in time.
    First,
    /// Further tokens in time.
    PerToken,
}

impl Refusal {
    /// The word in metrics and errors.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::TooUrgent { .. } => "invalid",
            Self::Requests(_) => "requests_per_minute",
            Self::Tokens(_) | Self::TooManyTokens { .. } => "tokens_per_minute",
            Self::Deadline(_) => "deadline_unreachable",
            Self::Full => "queue_full",
            Self::Patience => "queue_timeout",
        }
    }
}

/// A request that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    /// Its number.
    pub id: u64,
    /// When it is over for it, and why.
    pub latest: Duration,
    /// What is left of its tenant's minute.
    pub standing: Standing,
    /// Who was sent away to make room.
    pub shed: Option<u64>,
}

/// A request that may run; to be given back by [`Traffic::done`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Its number.
    pub id: u64,
    /// Whose it is.
    pub tenant: Tenant,
    /// Places it holds.
    pub sequences: u32,
    /// What was charged.
    pub expected: Tokens,
    /// When.
    pub at: Duration,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// This one runs.
    Go(Grant),
    /// It is too late for this one.
    Late(u64, Refusal),
}

/// The queue with everything that decides about it.
#[derive(Debug)]
pub struct Traffic {
    queue: Queue,
    accounts: Accounts,
    ledger: Ledger,
    pace: Pace,
    patience: Duration,
    /// Mean time that a place is held; 0: not known yet.
    held: Duration,
}

impl Traffic {
    /// An empty queue.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let Settings {
            slots,
            capacity,
            patience,
            rules,
        } = settings;
        Self {
            queue: Queue::new(slots, capacity, patience / AGE),
            accounts: Accounts::new(rules),
            ledger: Ledger::default(),
            pace: Pace::default(),
            patience,
            held: Duration::ZERO,
        }
    }

    /// The tenant of this name; [`OTHER`] if there are too many to tell apart.
    pub fn tenant(&mut self, name: &str, now: Duration) -> Tenant {
        self.accounts.enter(name, now)
    }

    /// Takes a request into the queue. [`Traffic::next`] is to be called after it.
    ///
    /// # Errors
    /// Why it is sent away. Nothing is charged then.
    pub fn arrive(&mut self, ask: &Ask, now: Duration) -> Result<Ticket, Refusal> {
        let taken = self.take(ask, now);
        if let Err(refusal) = &taken {
            self.ledger.refused(&ask.tenant, refusal.word());
        }
        taken
    }

    fn take(&mut self, ask: &Ask, now: Duration) -> Result<Ticket, Refusal> {
        let allowed = self.accounts.most_urgent(&ask.tenant);
        if ask.priority < allowed {
            return Err(Refusal::TooUrgent { allowed });
        }
        let (low, high) = ask.answer;
        let answer = self.pace.answer().clamp(low, high.max(low));
        let needs = Needs {
            wishes: ask.wishes,
            arrived: ask.arrived,
            prompt: ask.prompt / u64::from(ask.choices.max(1)),
            answer: u32::try_from(answer).unwrap_or(u32::MAX),
            rounds: ask.choices.div_ceil(ask.sequences.max(1)).max(1),
        };
        let end = (now.saturating_add(self.patience), Refusal::Patience);
        let (latest, over) = self.latest(&needs, end, now);
        if latest < now.saturating_add(self.sure_wait(ask, latest)) {
            return Err(over);
        }
        let expected = Tokens {
            input: ask.prompt,
            output: answer.saturating_mul(ask.choices.into()),
        };
        self.accounts.spend(&ask.tenant, expected, now)?;
        let waiting = Waiting {
            tenant: Arc::clone(&ask.tenant),
            priority: ask.priority,
            sequences: self.queue.fitting(ask.sequences),
            expected,
            arrived: now,
            latest,
            over,
            needs,
        };
        self.accounts.waits(&ask.tenant);
        let weights = |tenant: &Tenant| self.accounts.weight(tenant);
        let (id, shed) = self.queue.push(waiting, weights);
        if shed == Some(id) {
            self.drop_out(id, now);
            return Err(Refusal::Full);
        }
        if let Some(shed) = shed {
            self.leave(shed, Some(Refusal::Full), now);
        }
        Ok(Ticket {
            id,
            latest,
            standing: self.accounts.standing(&ask.tenant, now),
            shed,
        })
    }

    /// Who goes next, if there is room. Call it until there is none.
    pub fn next(&mut self, now: Duration) -> Option<Next> {
        let accounts = &self.accounts;
        let id = self.queue.pick(now, |tenant| accounts.tag(tenant))?;
        let waiting = self.queue.get(id)?;
        // By what is known now: the pace may have been another when it came.
        let end = (waiting.latest, waiting.over);
        let (latest, over) = self.latest(&waiting.needs, end, now);
        if now > latest {
            self.leave(id, Some(over), now);
            return Some(Next::Late(id, over));
        }
        let waiting = self.queue.grant(id, now)?;
        self.accounts.goes(&waiting.tenant, waiting.expected);
        let waited = now.saturating_sub(waiting.arrived);
        self.ledger.granted(&waiting.tenant, waited);
        Some(Next::Go(Grant {
            id,
            tenant: waiting.tenant,
            sequences: waiting.sequences,
            expected: waiting.expected,
            at: now,
        }))
    }

    /// A waiting request goes, because its client left or because of `why`. What it was to cost is given back.
    pub fn leave(&mut self, id: u64, why: Option<Refusal>, now: Duration) {
        if let Some(tenant) = self.drop_out(id, now) {
            let word = why.map_or("left", |why| why.word());
            self.ledger.refused(&tenant, word);
        }
    }

    fn drop_out(&mut self, id: u64, now: Duration) -> Option<Tenant> {
        let waiting = self.queue.remove(id)?;
        self.accounts.left(&waiting.tenant, waiting.expected, now);
        Some(waiting.tenant)
    }

    /// Why it is over for a waiting request at its `latest`.
    #[must_use]
    pub fn over(&self, id: u64) -> Option<Refusal> {
        self.queue.get(id).map(|waiting| waiting.over)
    }

    /// A request that ran has ended, having used this.
    pub fn done(&mut self, grant: &Grant, used: Tokens, sample: Option<Sample>, now: Duration) {
        self.queue.free(grant.sequences);
        let held = now.saturating_sub(grant.at);
        self.held = if self.held.is_zero() {
            held
        } else {
            self.held.mul_f64(1.0 - HELD) + held.mul_f64(HELD)
        };
        self.accounts
            .settle(&grant.tenant, grant.expected, used, now);
        self.ledger.used(&grant.tenant, used);
        if let Some(sample) = sample {
            self.pace.observe(sample, now);
        }
    }

    /// When a request must run at the latest, which is no later than `end`, and what it hears after that.
    fn latest(
        &self,
        needs: &Needs,
        end: (Duration, Refusal),
        now: Duration,
    ) -> (Duration, Refusal) {
        let wishes = needs.wishes;
        let mut latest = end;
        // With nothing at work whatever was learnt may be out of date, and letting one in teaches anew.
        let pace = self
            .pace
            .of(needs.prompt, now)
            .filter(|_| wishes != Wishes::default() && self.queue.busy());
        let (first, per_token) = pace.map_or((Duration::ZERO, Duration::ZERO), |pace| {
            (pace.first, pace.per_token)
        });
        let rest = per_token.saturating_mul(needs.answer);
        let all = first.saturating_add(rest).saturating_mul(needs.rounds);
        for (wish, needed, missed) in [
            (wishes.whole, all, Missed::Whole),
            (wishes.first, first, Missed::First),
        ] {
            let Some(wish) = wish else { continue };
            let end = needs.arrived.saturating_add(wish);
            // Not startable at all is "before now".
            let start = end.checked_sub(needed).unwrap_or(Duration::ZERO);
            if start < latest.0 {
                latest = (start, Refusal::Deadline(missed));
            }
        }
        if wishes.per_token.is_some_and(|wish| per_token > wish) {
            latest = (Duration::ZERO, Refusal::Deadline(Missed::PerToken));
        }
        latest
    }

    /// The part of a wait that is sure: the time until those have gone that go first whatever else happens.
    fn sure_wait(&self, ask: &Ask, latest: Duration) -> Duration {
        if !self.queue.busy() {
            return Duration::ZERO;
        }
        let ahead = self.queue.ahead(&ask.tenant, ask.priority, latest);
        self.held
            .mul_f64(ahead as f64 / f64::from(self.queue.slots()))
    }

    /// Time until a place is likely: the time that requests take, times how many of them go first per place.
    #[must_use]
    pub fn retry_after(&self) -> Duration {
        let ahead = self.queue.len() as f64 + 1.0;
        let wait = self.held.mul_f64(ahead / f64::from(self.queue.slots()));
        (wait + Duration::from_secs(1)).min(LONGEST_RETRY)
    }

    /// What is left of a tenant's minute.
    pub fn standing(&mut self, tenant: &Tenant, now: Duration) -> Standing {
        self.accounts.standing(tenant, now)
    }

    /// Requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Whether this API key may speak for other tenants.
    #[must_use]
    pub fn speaks_for_others(&self, key: &str) -> bool {
        self.accounts.speaks_for_others(key)
    }

    /// The priority of an objective, and the names of all.
    ///
    /// # Errors
    /// The names that there are.
    pub fn objective(&self, name: &str) -> Result<i64, Vec<String>> {
        self.accounts.objective(name)
    }

    /// The most active tenants with what they did since they count among these, and all others as [`OTHER`].
    pub fn tallies(&mut self, now: Duration) -> Vec<(Tenant, Tally, u32)> {
        self.ledger.choose(self.accounts.activity(now));
        let accounts = &self.accounts;
        self.ledger.rows(|tenant| accounts.waiting(tenant))
    }
}

#[cfg(test)]
mod tests;
