//! Who may work now: permits by the rules of [`traffic`](crate::traffic), each wait with an end.
//!
//! The rules decide; here are the clock, the lock and those who wait. A request holds a permit from its grant to its
//! end in any form, and its permit tells the rules what it used.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;
use crate::traffic::{
    Ask, Grant, Missed, Next, Refusal, Sample, Settings, Standing, Tally, Tenant, Tokens,
    Traffic,
};

/// The gate before the upstream. A request holds one place per sequence it runs at a time.
#[derive(Debug)]
pub struct Admission {
    shared: Arc<Shared>,
    patience: Duration,
    draining: CancellationToken,
}

#[derive(Debug)]
struct Shared {
    began: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    traffic: Traffic,
    running: u32,
    waiters: BTreeMap<u64, oneshot::Sender<Verdict>>,
}

type Verdict = Result<Permit, Refusal>;

/// The right to work; gives everything back when dropped.
#[derive(Debug)]
pub struct Permit {
    shared: Arc<Shared>,
    grant: Grant,
    meter: Arc<Meter>,
    /// How long the request waited for it.
    pub waited: Duration,
    /// Sequences it may run at a time.
    pub sequences: u32,
    /// What was left of its tenant's minute when it came.
    pub standing: Standing,
}

/// What a request has used so far.
#[derive(Debug)]
pub struct Meter {
    since: Instant,
    input: AtomicU64,
    output: AtomicU64,
    /// Microseconds from the grant to the first and the last token, plus one; 0: none came.
    first: AtomicU64,
    last: AtomicU64,
}

impl Meter {
    /// Counts from `since`.
    #[must_use]
    pub fn new(since: Instant) -> Self {
        Self {
            since,
            input: AtomicU64::new(0),
            output: AtomicU64::new(0),
            first: AtomicU64::new(0),
            last: AtomicU64::new(0),
        }
    }

    /// A prompt of so many tokens was read.
    pub fn read(&self, tokens: usize) {
        self.input.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// A token was made.
    pub fn made(&self, now: Instant) {
        self.output.fetch_add(1, Ordering::Relaxed);
        let after = now.saturating_duration_since(self.since).as_micros();
        let after = u64::try_from(after).unwrap_or(u64::MAX - 1) + 1;
        // Only the first one finds 0 here.
        let _first =
            self.first
                .compare_exchange(0, after, Ordering::Relaxed, Ordering::Relaxed);
        self.last.store(after, Ordering::Relaxed);
    }

    fn used(&self) -> Tokens {
        Tokens {
            input: self.input.load(Ordering::Relaxed),
            output: self.output.load(Ordering::Relaxed),
        }
    }

    /// What is to be learnt from a request of one sequence.
    fn sample(&self) -> Option<Sample> {
        let Tokens { input, output } = self.used();
        let first = self.first.load(Ordering::Relaxed);
        let last = self.last.load(Ordering::Relaxed);
        (first > 0).then(|| Sample {
            prompt: input,
            first: Duration::from_micros(first - 1),
            rest: Duration::from_micros(last.saturating_sub(first)),
            answer: output,
        })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let used = self.meter.used();
        // Sequences beside each other say nothing about the pace of one.
        let sample = match self.sequences {
            1 => self.meter.sample(),
            _ => None,
        };
        self.shared.with(|state, now| {
            state.running = state.running.saturating_sub(1);
            state.traffic.done(&self.grant, used, sample, now);
        });
        dispatch(&self.shared);
    }
}

impl Permit {
    /// Where what it uses is counted.
    #[must_use]
    pub fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }
}

/// A request that waits; leaves the queue when dropped.
struct Leave<'a>(&'a Shared, u64);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        let waiter = self.0.with(|state, now| {
            state.traffic.leave(self.1, None, now);
            state.waiters.remove(&self.1)
        });
        drop(waiter);
    }
}

impl Shared {
    fn with<T>(&self, change: impl FnOnce(&mut State, Duration) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, so that time never goes back for the rules.
        let now = self.began.elapsed();
        change(&mut state, now)
    }
}

/// Gives free places to those whose turn it is.
fn dispatch(shared: &Arc<Shared>) {
    loop {
        let next = shared.with(|state, now| {
            let next = state.traffic.next(now)?;
            let (id, verdict) = match next {
                Next::Late(id, refusal) => (id, Err(refusal)),
                Next::Go(grant) => {
                    state.running += 1;
                    let permit = Permit {
                        shared: Arc::clone(shared),
                        meter: Arc::new(Meter::new(Instant::now())),
                        // Both are filled in by who waits for it.
                        waited: Duration::ZERO,
                        standing: Standing::default(),
                        sequences: grant.sequences,
                        grant,
                    };
                    (permit.grant.id, Ok(permit))
                }
            };
            Some((state.waiters.remove(&id), verdict))
        });
        match next {
            None => return,
            // Who has left meanwhile does not take it: dropping it frees the place for the next turn of the loop.
            Some((Some(waiter), verdict)) => drop(waiter.send(verdict)),
            Some((None, verdict)) => drop(verdict),
        }
    }
}

impl Admission {
    /// A gate with these settings; `draining` closes it.
    #[must_use]
    pub fn new(settings: Settings, draining: CancellationToken) -> Self {
        let patience = settings.patience;
        Self {
            shared: Arc::new(Shared {
                began: Instant::now(),
                state: Mutex::new(State {
                    traffic: Traffic::new(settings),
                    running: 0,
                    waiters: BTreeMap::new(),
                }),
            }),
            patience,
            draining,
        }
    }

    /// The tenant of this name.
    #[must_use]
    pub fn tenant(&self, name: &str) -> Tenant {
        self.shared
            .with(|state, now| state.traffic.tenant(name, now))
    }

    /// Whether this API key may speak for other tenants.
    #[must_use]
    pub fn speaks_for_others(&self, key: &str) -> bool {
        self.shared
            .with(|state, _| state.traffic.speaks_for_others(key))
    }

    /// The priority of an objective.
    ///
    /// # Errors
    /// The names that there are.
    pub fn objective(&self, name: &str) -> Result<i64, Vec<String>> {
        self.shared.with(|state, _| state.traffic.objective(name))
    }

    /// Time on the clock of the rules.
    #[must_use]
    pub fn time(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.shared.began)
    }

    /// Waits for the turn of a request.
    ///
    /// # Errors
    /// 429 with `Retry-After` when the queue is full, the wait is over or the minute's limit is reached; 503 when it
    /// could not be done in time any more, and while draining; 400 when its priority is not its tenant's to ask.
    pub async fn admit(&self, ask: &Ask) -> Result<Permit, ApiError> {
        if self.draining.is_cancelled() {
            return Err(draining());
        }
        let (send, mut verdict) = oneshot::channel();
        let taken = self.shared.with(|state, now| {
            let ticket = state.traffic.arrive(ask, now)?;
            let shed = ticket.shed.and_then(|shed| state.waiters.remove(&shed));
            state.waiters.insert(ticket.id, send);
            Ok::<_, Refusal>((ticket, shed))
        });
        let (ticket, shed) = taken.map_err(|refusal| self.error(ask, &refusal))?;
        let from = Instant::now();
        let _leave = Leave(&self.shared, ticket.id);
        if let Some(shed) = shed {
            // Who has left meanwhile need not be told.
            drop(shed.send(Err(Refusal::Full)));
        }
        dispatch(&self.shared);
        let over = self.shared.began + ticket.latest;
        let said = tokio::select! {
            biased;
            said = &mut verdict => said,
            () = self.draining.cancelled() => return Err(draining()),
            () = sleep_until(over) => self.give_up(ticket.id, &mut verdict),
        };
        match said {
            Ok(Ok(mut permit)) => {
                permit.waited = from.elapsed();
                permit.standing = ticket.standing;
                Ok(permit)
            }
            Ok(Err(refusal)) => Err(self.error(ask, &refusal)),
            Err(_) => Err(ApiError::internal("the queue lost a request")),
        }
    }

    /// The end of a wait, unless a word came at the same moment.
    fn give_up(
        &self,
        id: u64,
        verdict: &mut oneshot::Receiver<Verdict>,
    ) -> Result<Verdict, oneshot::error::RecvError> {
        let waited = self.shared.with(|state, now| {
            let over = state.traffic.over(id)?;
            state.traffic.leave(id, Some(over), now);
            Some((over, state.waiters.remove(&id)))
        });
        match waited {
            Some((over, _waiter)) => Ok(Err(over)),
            None => Ok(verdict.try_recv().unwrap_or(Err(Refusal::Patience))),
        }
    }

    /// Requests that hold a permit.
    #[must_use]
    pub fn running(&self) -> u32 {
        self.shared.with(|state, _| state.running)
    }

    /// Requests that wait for one.
    #[must_use]
    pub fn queued(&self) -> u32 {
        let waiting = self.shared.with(|state, _| state.traffic.waiting());
        u32::try_from(waiting).unwrap_or(u32::MAX)
    }

    /// What the most active tenants did, with how many of their requests wait.
    #[must_use]
    pub fn tallies(&self) -> Vec<(Tenant, Tally, u32)> {
        self.shared.with(|state, now| state.traffic.tallies(now))
    }

    /// A refusal as its client reads it.
    fn error(&self, ask: &Ask, refusal: &Refusal) -> ApiError {
        let (waiting, retry, standing) = self.shared.with(|state, now| {
            let traffic = &mut state.traffic;
            let standing = traffic.standing(&ask.tenant, now);
            (traffic.waiting(), traffic.retry_after(), standing)
        });
        let mut error = refused(ask, refusal, waiting, retry, self.patience);
        error.standing = Some(Box::new(standing));
        error
    }
}

fn refused(
    ask: &Ask,
    refusal: &Refusal,
    waiting: usize,
    retry: Duration,
    patience: Duration,
) -> ApiError {
    let seconds = |time: Duration| time.as_millis().div_ceil(1000) as u64;
    let tenant = &ask.tenant;
    let minute = |what: &str, standing: &Standing| {
        let level = match what {
            "requests" => standing.requests,
            _ => standing.tokens,
        };
        let (limit, wait) = level.map_or((0, retry), |level| (level.limit, level.wait));
        let text = format!(
            "`{tenant}` has used its {limit} {what} per minute: try again in {} s",
            seconds(wait).max(1)
        );
        ApiError::rate_limited(refusal.word(), text, Some(seconds(wait)))
    };
    match refusal {
        Refusal::TooUrgent { allowed } => ApiError::invalid(
            "priority",
            format!(
                "`priority` {} is more urgent than `{tenant}` may ask: {allowed} is the lowest",
                ask.priority
            ),
        ),
        Refusal::Requests(standing) => minute("requests", standing),
        Refusal::Tokens(standing) => minute("tokens", standing),
        Refusal::TooManyTokens { limit } => ApiError::rate_limited(
            refusal.word(),
            format!(
                "the prompt has {} tokens, and `{tenant}` may use {limit} per minute: shorten it",
                ask.prompt
            ),
            None,
        ),
        Refusal::Deadline(missed) => {
            let what = match missed {
                Missed::Whole => "the whole answer cannot come within the time that is given",
                Missed::First => "the first token cannot come within the time that is given",
                Missed::PerToken => "tokens come more slowly at present than is asked",
            };
            let text =
                format!("{what}; nothing was computed: try again later, or give more time");
            ApiError::unreachable(refusal.word(), text, seconds(retry))
        }
        Refusal::Full => ApiError::overloaded(
            refusal.word(),
            format!(
                "every place is taken and {waiting} requests wait for one: try again later"
            ),
            seconds(retry),
        ),
        Refusal::Patience => ApiError::overloaded(
            refusal.word(),
            format!(
                "no free place within {} ms: try again later",
                patience.as_millis()
            ),
            seconds(retry),
        ),
    }
}

fn draining() -> ApiError {
    ApiError::unavailable("draining", "the server is shutting down: try another one")
}

#[cfg(test)]
mod tests {
    use foregate_api::traffic::{RateLimits, Traffic as Rules};

    use super::*;
    use crate::traffic::Wishes;

    fn gate(in_flight: u32, queued: u32) -> (Arc<Admission>, CancellationToken) {
        limited(in_flight, queued, RateLimits::default())
    }

    fn limited(
        in_flight: u32,
        queued: u32,
        limits: RateLimits,
    ) -> (Arc<Admission>, CancellationToken) {
        let draining = CancellationToken::new();
        let settings = Settings {
            slots: in_flight,
            capacity: queued,
            patience: Duration::from_secs(5),
            rules: Rules {
                limits,
                ..Rules::default()
            },
        };
        let gate = Admission::new(settings, draining.clone());
        (Arc::new(gate), draining)
    }

    fn ask(gate: &Admission, sequences: u32) -> Ask {
        Ask {
            tenant: gate.tenant("a"),
            priority: 0,
            sequences,
            choices: sequences,
            prompt: 10,
            answer: (1, 10),
            arrived: gate.time(Instant::now()),
            wishes: Wishes::default(),
        }
    }

    async fn admit(gate: &Admission) -> Result<Permit, ApiError> {
        gate.admit(&ask(gate, 1)).await
    }

    fn waits(tasks: &mut tokio::task::JoinSet<Result<(), ApiError>>, gate: &Arc<Admission>) {
        let gate = Arc::clone(gate);
        tasks.spawn(async move { admit(&gate).await.map(drop) });
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_queue_and_a_long_wait_are_429() {
        let (gate, _) = gate(1, 1);
        let first = admit(&gate).await.unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        waits(&mut tasks, &gate);
        tokio::task::yield_now().await;
        assert_eq!(gate.queued(), 1);
        let refused = admit(&gate).await.unwrap_err();
        assert_eq!(
            (refused.status.as_u16(), refused.reason),
            (429, "queue_full")
        );
        assert!(
            refused.message.contains(" 1 requests wait"),
            "{}",
            refused.message
        );
        let late = tasks.join_next().await.unwrap().unwrap().unwrap_err();
        assert_eq!(late.reason, "queue_timeout");
        assert_eq!(gate.queued(), 0);
        drop(first);
        assert_eq!(gate.running(), 0);
        let wide = gate.admit(&ask(&gate, 9)).await.unwrap();
        assert_eq!(wide.sequences, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_goes_to_who_waits_and_past_who_left() {
        let (gate, _) = gate(1, 8);
        let first = admit(&gate).await.unwrap();
        let mut gone = Box::pin(admit(&gate));
        assert!(futures::poll!(&mut gone).is_pending());
        let mut tasks = tokio::task::JoinSet::new();
        waits(&mut tasks, &gate);
        tokio::task::yield_now().await;
        assert_eq!(gate.queued(), 2);
        // Its turn comes, but nobody looks: the place goes on when it is dropped.
        drop(first);
        assert_eq!((gate.running(), gate.queued()), (1, 1));
        drop(gone);
        tasks.join_next().await.unwrap().unwrap().unwrap();
        assert_eq!((gate.running(), gate.queued()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn retry_after_follows_the_service_time() {
        let (gate, _) = gate(1, 0);
        let permit = admit(&gate).await.unwrap();
        tokio::time::advance(Duration::from_secs(20)).await;
        drop(permit);
        let _held = admit(&gate).await.unwrap();
        // The one that is refused does not stand before itself.
        let refused = admit(&gate).await.unwrap_err();
        assert_eq!(refused.retry_after, Some(21));
    }

    #[tokio::test(start_paused = true)]
    async fn a_minute_has_its_limit_and_says_what_is_left() {
        let limits = RateLimits {
            requests_per_minute: Some(2),
            tokens_per_minute: Some(60),
        };
        let (gate, _) = limited(8, 8, limits);
        let first = admit(&gate).await.unwrap();
        let left = first.standing;
        assert_eq!(left.requests.unwrap().remaining, 1);
        // A prompt of 10 and an answer of 10 are expected.
        assert_eq!(left.tokens.unwrap().remaining, 40);
        // It computed 5: the rest is given back.
        first.meter().read(5);
        drop(first);
        let second = admit(&gate).await.unwrap();
        assert_eq!(second.standing.tokens.unwrap().remaining, 35);
        let third = admit(&gate).await.unwrap_err();
        let (status, reason) = (third.status.as_u16(), third.reason);
        assert_eq!((status, reason), (429, "requests_per_minute"));
        assert_eq!(third.retry_after, Some(30));
        assert_eq!(third.standing.unwrap().requests.unwrap().remaining, 0);
        tokio::time::advance(Duration::from_secs(30)).await;
        admit(&gate).await.unwrap();
    }

    #[tokio::test]
    async fn draining_refuses_new_and_waiting_ones() {
        let (gate, draining) = gate(1, 8);
        let _held = admit(&gate).await.unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        waits(&mut tasks, &gate);
        tokio::task::yield_now().await;
        draining.cancel();
        let waited = tasks.join_next().await.unwrap().unwrap().unwrap_err();
        assert_eq!(waited.status.as_u16(), 503);
        assert_eq!(admit(&gate).await.unwrap_err().reason, "draining");
    }
}
